"""Marks of tensors: for each tensor of a forward, the earliest decoder layer that it derives from.

What is concluded from a use of a marked tensor is the business of whoever asks for it (flow.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

BEFORE = -1  # the mark of what derives from the token ids by matrices that precede the layers


class Marks(TorchDispatchMode):
    """Marks tensors with the earliest layer that they derive from, and asks for every use of one that is marked.

    Tensors without a mark follow from token ids and positions alone, which every stage has.

    Args:
        on_use: A function that is called with the mark of what an operation uses.

    Attributes:
        layer: The layer that was entered last; BEFORE before the first.
        inside: Whether it still runs; what is computed then derives from it at least.
    """

    def __init__(self, on_use: Callable[[int], None]) -> None:
        super().__init__()
        self.layer, self.inside = BEFORE, False
        self._on_use = on_use
        self._marks: Any = WeakTensorKeyDictionary()
        self._written: dict[int, tuple[int, Any]] = {}  # address of memory that was written to -> its mark, and what keeps it from reuse

    def of(self, tensor: torch.Tensor) -> int | None:
        """Return the mark of a tensor; None if it has none."""
        mark: int | None = self._marks.get(tensor)
        written = self._written.get(tensor.untyped_storage().data_ptr()) if self._written else None
        if written is None or mark is None:
            return mark if written is None else written[0]
        return min(mark, written[0])

    def set(self, found: Any, mark: int) -> None:
        """Mark the tensors among the results of an operation."""
        for tensor in tensors_among([found]):
            self._marks[tensor] = mark

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that a layer is given, as something new that derives from this layer alone."""
        fresh = hidden.clone()  # still a use of them behind the layer before
        self.layer, self.inside = layer, True
        self.set(fresh, layer)
        return fresh

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        marks = [mark for each in tensors_among([*args, *kwargs.values()]) if (mark := self.of(each)) is not None]
        if marks:
            self._on_use(min(marks))
        result = func(*args, **kwargs)
        if self.inside:
            marks.append(self.layer)
        if marks:
            self.set(result, min(marks))
            for tensor in _written(func, args, kwargs):
                storage = tensor.untyped_storage()
                if address := storage.data_ptr():
                    self._written[address] = min(marks), storage
        return result


def tensors_among(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values, those in lists and tuples included."""
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from tensors_among(each)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operation writes to."""
    if func._schema.is_mutable:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        changed = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        yield from tensors_among(given[name] for name in changed if name in given)
