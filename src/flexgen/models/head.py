"""The output head: its logits of sampled positions are returned whole, those of scored positions are reduced range by range.

Some models change the logits after the head (soft caps, scales). The trace records these operations, so that they can be applied to any
range of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flexgen.models.coroutine import current_forward
from flexgen.models.parts import Part
from flexgen.models.scoring import Scorer

# Functions of torch that treat each number by itself, if their other arguments are not tensors.
_ELEMENTWISE = frozenset(("div", "div_", "mul", "mul_", "add", "add_", "sub", "sub_", "tanh", "tanh_", "float", "double", "to", "clamp"))

Tail = Callable[[torch.Tensor], torch.Tensor]


class TailRecorder(TorchFunctionMode):
    """Records what a model does to the logits between its head and the end of its forward.

    Args:
        model: The model, whose forward runs within this mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._operations: list[Callable[[torch.Tensor], torch.Tensor]] | None = []
        self._logits: torch.Tensor | None = None
        self._head: nn.Module = model.get_output_embeddings()

    def __enter__(self) -> TailRecorder:
        self._hook = self._head.register_forward_hook(self._begin)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _begin(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._logits = output

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._logits is None or not isinstance(result, torch.Tensor):
            return result
        given = [*args, *(kwargs or {}).values()]
        if any(each is self._logits for each in given):
            self._record(func, args, kwargs or {}, sum(isinstance(each, torch.Tensor) for each in given))
            self._logits = result
        return result

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_tensors: int) -> None:
        if self._operations is None or num_tensors != 1 or args[0] is not self._logits or func.__name__ not in _ELEMENTWISE:
            self._operations = None
        else:
            self._operations.append(lambda logits: func(logits, *args[1:], **kwargs))

    def tail(self, logits: torch.Tensor) -> Tail | None:
        """Return a function that does to any range of the head's logits what the model did to all of them; None if there is none.

        Args:
            logits: The logits that the model returned.
        """
        operations = self._operations
        if operations is None or logits is not self._logits:
            return None

        def run(part: torch.Tensor) -> torch.Tensor:
            for operation in operations:
                part = operation(part)
            return part

        return run


def split_linear(module: Any, parts: Sequence[Part], tail: Tail | None, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear layer whose output rows arrive as several units; if it is the head, score the rows that are only scored.

    Args:
        module: The linear layer.
        parts: Its parts.
        tail: For the head, what the model does to the logits afterwards. None for other layers, and for a head whose tail cannot be applied
            to a part: all outputs are returned then.
        x: The inputs, (..., rows, in_features); those of the rows to score come last.

    Returns:
        The outputs of the other rows, (..., rows, out_features).
    """
    forward = current_forward()
    scorer = forward.scorer if tail is not None else None
    own = x if scorer is None else x[..., : x.shape[-2] - scorer.num_rows, :]
    out = x.new_empty(*own.shape[:-1], module.out_features)
    for part in parts:
        forward.enter_unit(part.unit)
        weight = part.tensors["weight"]
        out[..., part.start : part.stop] = functional.linear(own, weight, module.bias if part.is_whole else None)
        if scorer is not None and tail is not None:
            bias = None if module.bias is None else module.bias[part.start : part.stop]
            scorer.add(_scored_logits(scorer, x[0, own.shape[-2] :], weight, bias, tail), part.start)
    return out if len(parts) == 1 or module.bias is None else out.add_(module.bias)


def _scored_logits(
    scorer: Scorer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tail: Tail
) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows in scorer.slices(len(weight), x.element_size()):
        yield rows, tail(functional.linear(x[rows], weight, bias))
