"""Tensors without numbers, on which every operation takes the time of its price: what a simulated device with a clock computes on.

They are of torch's meta device, so operations find out shapes and nothing else.  What is read of them is zeros.  Torch takes long to find
out shapes, so for arguments of the same shapes it is asked once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flexgen.io.aligned import AlignedBuffer

META = torch.device("meta")
# Products: the places of their two matrices among the arguments, and whether the second one is transposed.
PRODUCTS = {"mm": (0, 1, False), "addmm": (1, 2, False), "bmm": (0, 1, False), "baddbmm": (1, 2, False), "linear": (0, 1, True)}
# These read and write as many numbers as their result has, or as what they write has, however large the tensor is.
GATHERS = frozenset({"embedding", "index", "_unsafe_index", "index_select", "gather"})
SCATTERS = frozenset({"index_put", "index_put_", "_index_put_impl_", "index_copy_", "index_add_", "index_fill_", "scatter_"})
FREE = frozenset({"empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"})


class Computing(Protocol):
    """What computes: it gives operations their time.

    Attributes:
        effects: What is known of operations, by their arguments.
    """

    effects: dict[Hashable, Effect]

    def operation(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        """Take the time of an operation of torch; kinds and amounts are those of `OperationPrices.seconds`."""
        ...

    def spend(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        """Take the time of a kernel of ours."""
        ...

    def synchronise(self) -> None:
        """Make the host wait for all that was computed so far."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What an operation yields and needs, for arguments of certain shapes.

    Attributes:
        out: Its result; any result of that shape serves as well, since nobody writes to it.
        kind: The kind of operation.
        amounts: How much of that it is.
    """

    out: Any
    kind: str
    amounts: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """The properties of an operation, as derived from its schema."""

    name: str
    is_view: bool
    is_free: bool
    mutates: bool


@functools.cache
def _operation(function: Any) -> _Operation:
    schema = function._schema
    name = schema.name.removeprefix("aten::")
    is_view = any(each.alias_info is not None for each in schema.returns) and not schema.is_mutable
    return _Operation(name=name, is_view=is_view, is_free=is_view or name in FREE, mutates=schema.is_mutable)


class TimedTensor(torch.Tensor):
    """A tensor without numbers.

    Attributes:
        raw: The shape, as a tensor of the meta device.
        computing: What computes on it.
    """

    raw: torch.Tensor
    computing: Computing

    @staticmethod
    def __new__(cls: type[TimedTensor], raw: torch.Tensor, computing: Computing) -> TimedTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=META
        )
        made.raw, made.computing = raw, computing
        return made

    def __init__(self, raw: torch.Tensor, computing: Computing) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def spend(self) -> Callable[..., None]:
        """Takes the time of a kernel that computes on this tensor, see `Computing.spend`."""
        return self.computing.spend

    def numpy(self, *, force: bool = False) -> Any:
        """Return zeros, in memory that is not touched."""
        return AlignedBuffer(self.nbytes).tensor[: self.nbytes].view(self.dtype).view(self.shape).numpy()

    def tolist(self) -> Any:  # torch's own implementation needs the storage
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TimedTensor({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        operation, found = _operation(func), list[TimedTensor]()
        raw_args = [_raw(each, found) for each in args]
        raw_kwargs = {name: _raw(each, found) for name, each in (kwargs or {}).items()}
        computing = found[0].computing
        if operation.name == "_local_scalar_dense":
            computing.synchronise()
            return torch.zeros((), dtype=found[0].dtype).item()
        if operation.name == "copy_" and args[0].device != META:
            computing.synchronise()
            return args[0].zero_()
        if raw_kwargs.get("device") is not None and torch.device(raw_kwargs["device"]) != META:
            computing.synchronise()
            return torch.zeros(found[0].shape, dtype=raw_kwargs.get("dtype") or found[0].dtype)
        if operation.is_view:
            return _wrapped(func(*raw_args, **raw_kwargs), computing)
        key = func, _signature(raw_args), _signature(tuple(raw_kwargs.items()))
        if (effect := computing.effects.get(key)) is None:
            effect = computing.effects[key] = _effect(operation, func, raw_args, raw_kwargs)
        if not operation.is_free:
            computing.operation(effect.kind, **effect.amounts)
        return args[0] if operation.mutates else _wrapped(effect.out, computing)


def _raw(value: Any, found: list[TimedTensor]) -> Any:
    kind = type(value)
    if kind is TimedTensor:
        found.append(value)
        return value.raw
    if kind is list or kind is tuple:
        return [_raw(each, found) for each in value]
    return value


def _wrapped(out: Any, computing: Computing) -> Any:
    if isinstance(out, torch.Tensor):
        return TimedTensor(out, computing)
    if isinstance(out, (list, tuple)):
        return type(out)(_wrapped(each, computing) for each in out)
    return out


def _signature(value: Any) -> Hashable:
    """Return what a result's shape and price depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(_signature(each) for each in value) if isinstance(value, (list, tuple)) else value


def _effect(operation: _Operation, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Effect:
    """Find out what an operation yields, and its FLOPs and bytes; what changes an argument yields no more than that."""
    out = args[0] if operation.mutates else function(*args, **kwargs)
    given = list(_tensors((*args, *kwargs.values())))
    if operation.name in GATHERS:
        nbytes = 2 * sum(each.nbytes for each in _tensors(out))
    elif operation.name in SCATTERS:
        nbytes = 2 * given[-1].nbytes
    else:
        nbytes = sum(each.nbytes for each in (given if operation.mutates else [*given, *_tensors(out)]))
    if (places := PRODUCTS.get(operation.name)) is None:
        return Effect(out=out, kind="memory", amounts={"nbytes": nbytes})
    first, second, transposed = args[places[0]], args[places[1]], places[2]
    columns = second.shape[0] if transposed else second.shape[-1]
    rows = math.prod(first.shape[:-1]) if transposed else first.shape[-2]
    return Effect(out=out, kind="product", amounts={"flops": 2.0 * first.numel() * columns, "nbytes": nbytes, "rows": rows})


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    """Yield the tensors of a value, those in lists included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
