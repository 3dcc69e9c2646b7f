"""Tensors of the simulated device: computed on the host, but as strict as an accelerator's about where a tensor lives.

The device is torch's private-use backend with its kernels written in Python (an experimental interface, of torch 2.11 and
2.13).  Registering it is global to the process and cannot be undone.  Therefore `register` is called when a simulated
device is opened for the first time, and a process that opens none is not changed.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.devices.base import HOST

NAME = "sim"
MAX_REMEMBERED = 1 << 20  # operations on arenas since the last synchronisation

aten = torch.ops.aten
COPIES = frozenset({"copy_", "_to_copy"})
# As on CUDA, the indices passed to these may be on the host.
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})
# Their results are numbers for the host, or have shapes that depend on the data.
WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "repeat_interleave"}
    | {"_unique", "_unique2", "unique_dim", "unique_consecutive"}
)
# Torch would decompose these before they are dispatched here; as a whole they run as fast as on the host.
WHOLE = ("linear", "matmul", "einsum", "layer_norm", "scaled_dot_product_attention")
CREATED = ("empty.memory_format", "empty_strided.default", "arange.default", "arange.start", "arange.start_step")


class Timeline:
    """A record of the computing, by which copies that come too early are detected; the threads of links use it as well.

    Attributes:
        now: The number of operations so far.
        synchronisations: The number of times that the host has waited for the device: by reading a number, or by one of torch's own copies
            to the host or from it, which wait on CUDA because the memory is not pinned.
        observers: The functions that are called at every synchronisation.
    """

    def __init__(self) -> None:
        self.now = 0
        self.synchronisations = 0
        self.observers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._finished = 0  # operations that the host has waited for
        self._uses: deque[tuple[int, int, int]] = deque(maxlen=MAX_REMEMBERED)  # (time of use, first byte, end) in arenas

    def use(self, tensors: Iterable[SimTensor]) -> None:
        """Record an operation that reads or writes these tensors."""
        with self._lock:
            self.now += 1
            for tensor in tensors:
                if tensor.in_arena:
                    start = tensor.raw.data_ptr()
                    self._uses.append((self.now, start, start + tensor.raw.nbytes))

    def synchronise(self) -> None:
        """Record that the host has waited for all operations so far."""
        self.synchronisations += 1
        self.finish(self.now)
        for observer in tuple(self.observers):
            observer()

    def finish(self, when: int) -> None:
        """Record that the host has waited for the operations up to `when`."""
        with self._lock:
            self._finished = max(self._finished, when)
            while self._uses and self._uses[0][0] <= self._finished:
                self._uses.popleft()

    def used_since(self, when: int, raw: torch.Tensor) -> bool:
        """Return whether these bytes are used by operations after `when` for which the host has not waited."""
        start = raw.data_ptr()
        end = start + raw.nbytes
        with self._lock:
            when = max(when, self._finished)
            return any(used > when and start < until and first < end for used, first, until in self._uses)


timeline = Timeline()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """The properties of an operation, as derived from its schema.

    Attributes:
        run: The function that computes it, on host tensors.
        is_view: Whether its result shares memory with its first argument.
        mutates: Whether it writes to an argument.
        copies: Whether it may take both host and device tensors.
        indexes: Whether it takes indices, which may be on the host.
        waits: Whether the host has to wait for its result.
        may_wait: Whether the host may have to wait, depending on the arguments.
    """

    run: Callable[..., Any]
    is_view: bool
    mutates: bool
    copies: bool
    indexes: bool
    waits: bool
    may_wait: bool


@functools.cache
def _operation(function: Any) -> _Operation:
    schema, name = function._schema, function._schema.name.removeprefix("aten::")
    aliases = any(each.alias_info is not None for each in schema.returns)
    return _Operation(
        run=function._op,
        is_view=aliases and not schema.is_mutable,
        mutates=schema.is_mutable,
        copies=name in COPIES,
        indexes=name in INDEXING,
        waits=name in WAITING,
        may_wait=name in INDEXING or name == "copy_",
    )


class SimTensor(torch.Tensor):
    """A tensor of the simulated device.

    Attributes:
        raw: The host tensor that holds its numbers; only devices/ may access it.
        in_arena: Whether it is a view of an arena, to which copies are made.
    """

    raw: torch.Tensor
    in_arena: bool

    @staticmethod
    def __new__(cls: type[SimTensor], raw: torch.Tensor, *, in_arena: bool = False) -> SimTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device()
        )
        made.raw, made.in_arena = raw, in_arena
        return made

    def __init__(self, raw: torch.Tensor, *, in_arena: bool = False) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:  # torch's own implementation needs the storage
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimTensor({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        operation = _operation(func)
        found: list[SimTensor] = []
        host: list[torch.Tensor] = []
        raw_args = [_unwrapped(each, found, host) for each in args]
        raw_kwargs = {name: _unwrapped(each, found, host) for name, each in kwargs.items()} if kwargs else {}
        if host and not operation.copies:
            _check_host(func, operation, args, host)
        to_host = False
        if raw_kwargs.get("device") is not None:
            to_host = torch.device(raw_kwargs["device"]).type == "cpu"
            raw_kwargs["device"] = HOST
        if not operation.is_view:
            timeline.use(found)
        if to_host or host or operation.waits or (operation.may_wait and _waits(operation, args)):
            timeline.synchronise()
        out = operation.run(*raw_args, **raw_kwargs)
        if operation.mutates:
            return _written(out, found)
        return out if to_host else _wrapped(out, in_arena=operation.is_view and found[0].in_arena)


def _unwrapped(value: Any, found: list[SimTensor], host: list[torch.Tensor]) -> Any:
    kind = type(value)
    if kind is SimTensor:
        found.append(value)
        return value.raw
    if kind is list or kind is tuple:
        return [_unwrapped(each, found, host) for each in value]
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        host.append(value)
    return value


def _wrapped(out: Any, *, in_arena: bool) -> Any:
    if isinstance(out, torch.Tensor):
        return SimTensor(out, in_arena=in_arena)
    if isinstance(out, (list, tuple)):
        return type(out)(_wrapped(each, in_arena=in_arena) for each in out)
    return out


def _written(out: Any, found: Sequence[SimTensor]) -> Any:
    """Return the caller's tensors that an operation has written, in place of their host tensors."""
    if isinstance(out, (list, tuple)):
        return type(out)(_written(each, found) for each in out)
    for each in found:
        if each.raw is out:
            if each.shape != out.shape:
                raise RuntimeError(f"a tensor of the simulated device cannot be resized in place, from {each.shape} to {out.shape}")
            return each
    return out  # on the host: a copy's destination


def _check_host(func: Any, operation: _Operation, args: Sequence[Any], host: Sequence[torch.Tensor]) -> None:
    """Refuse host tensors beside tensors of the device, as CUDA does."""
    if operation.indexes and type(args[0]) is SimTensor:
        positions = [each for each in args[1] if each is not None]
        if all(any(each is position for position in positions) for each in host):
            return
    raise RuntimeError(
        f"{func}: expected all tensors to be on the same device, but found a host tensor of shape {tuple(host[0].shape)} "
        f"beside tensors of the simulated device"
    )


def _waits(operation: _Operation, args: Sequence[Any]) -> bool:
    """Return whether the host has to wait for an operation with these arguments.

    It waits for an index by a mask, whose positions have to be found first, and for a copy to the host or from it.
    """
    if operation.indexes:
        return any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return any(type(each) is not SimTensor for each in args[:2])


_library: Any = None
_registering = threading.Lock()


@functools.cache
def device() -> torch.device:
    """Return the simulated device, which `register` has made known to torch."""
    return torch.device(NAME, 0)


def register() -> torch.device:
    """Make the device "sim" known to torch, for the rest of the process, and return it. Idempotent."""
    global _library
    with _registering:
        if _library is None:
            from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

            _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
            _library = torch.library.Library("aten", "IMPL")
            for name in CREATED:
                packet, _, overload = name.partition(".")
                create = functools.partial(_create, getattr(getattr(aten, packet), overload))
                _library.impl(name.removesuffix(".default"), create, "PrivateUse1")
            for name in WHOLE:
                _library.impl(name, functools.partial(_whole, getattr(aten, name).default), "PrivateUse1")
            _library.impl("_copy_from", _copy_from, "PrivateUse1")
    return device()


def _create(function: Any, *args: Any, **kwargs: Any) -> SimTensor:
    return SimTensor(function(*args, **{**kwargs, "device": HOST, "pin_memory": False}))


def _whole(function: Any, *args: Any, **kwargs: Any) -> Any:
    return SimTensor.__torch_dispatch__(function, (), args, kwargs)


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy a tensor, as torch requests when it creates a tensor from a list."""
    if type(source) is not type(destination):
        timeline.synchronise()
    raw = [each.raw if type(each) is SimTensor else each for each in (source, destination)]
    raw[1].copy_(raw[0])
    return destination


class _Module:
    """The functions that torch requires of a device's module, `torch.sim`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]
