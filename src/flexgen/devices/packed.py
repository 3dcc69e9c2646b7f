"""Small tensors that cross the link to a device together, in one copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch

from flexgen.devices.base import HOST
from flexgen.devices.staging import HostCopies, Staging

Value = TypeVar("Value")


class PackedCopies:
    """Copies of values that consist of small tensors between the host and the computing device; without a device nothing is copied.

    Args:
        staging: What copies tensors between the two.

    Attributes:
        device: Where computing happens.
    """

    def __init__(self, staging: Staging) -> None:
        self.device, self._staging = staging.device, staging

    def to_device(self, value: Value) -> Value:
        """Return a value with copies on the device in place of all tensors in it; only later computing waits for them.

        Args:
            value: A tensor in host memory, or tuples, lists and dataclasses with such tensors among their members.
        """
        if self.device == HOST:
            return value
        tensors = list(_tensors(value))
        if any(each.nbytes for each in tensors):
            copies = self._staging.to_device(*tensors).take()
        else:
            copies = [each.to(self.device) for each in tensors]
        return cast("Value", _with(value, iter(copies)))

    def to_host(self, *tensors: torch.Tensor) -> HostCopies:
        """Start to copy tensors to the host, all in one copy."""
        return self._staging.to_host(*tensors)


def mapped(value: Value, change: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """Return a value with what becomes of them in place of all tensors in it; what may hold tensors is said in `PackedCopies.to_device`."""
    return cast("Value", _with(value, map(change, _tensors(value))))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, in the order in which `_with` replaces them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in cast("Sequence[object]", value):
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _with(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Return a value with other tensors in place of its own; what has none in it stays the same object."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        members = cast("Sequence[Any]", value)
        others = [_with(each, tensors) for each in members]
        return value if all(one is other for one, other in zip(members, others, strict=True)) else type(value)(others)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: other for name, each in own.items() if (other := _with(each, tensors)) is not each}
        return dataclasses.replace(value, **changed) if changed else value
    return value
