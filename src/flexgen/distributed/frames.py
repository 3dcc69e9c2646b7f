"""Frames as they cross a link: messages of at most CHUNK_BYTES, a JSON header first, then the bytes of each tensor.

The first message begins with the number of the header's bytes.  It is a mark instead where nothing follows: the sender is alive, or at
its end.  Nothing is pickled, and whoever receives a header checks every number in it before memory is taken for what it announces.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.base.quantities import GIB, MIB, format_size
from flexgen.errors import EngineError

CHUNK_BYTES = MIB
LENGTH = struct.Struct("<Q")
KEEPALIVE, END = 0, (1 << 64) - 1
FIRST_BYTES = CHUNK_BYTES - LENGTH.size  # of a header, in the first message
_MOST_DIMENSIONS = 16
_KEYS = {"kind", "header", "tensors"}

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FrameError(Exception):
    """What arrived is no frame, or one beyond the limits; the message is the end of a sentence that begins with the sender's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest frame that is sent and taken.

    Attributes:
        header_bytes: Bytes of its JSON header.
        tensor_bytes: Bytes of all its tensors.
    """

    header_bytes: int = 64 * MIB
    tensor_bytes: int = 16 * GIB


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame.

    Attributes:
        kind: Its kind, such as "plan".
        header: Plain JSON values.
        tensors: Tensors in host memory.
    """

    kind: str
    header: dict[str, Any]
    tensors: list[torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A frame as its header describes it, with dtype and shape of every tensor."""

    kind: str
    header: dict[str, Any]
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors)


def mark(what: int) -> torch.Tensor:
    """Return the message that is a mark: KEEPALIVE or END."""
    return _bytes_of(LENGTH.pack(what))


def messages_of(kind: str, header: dict[str, Any], tensors: Sequence[torch.Tensor], limits: Limits) -> list[torch.Tensor]:
    """Return a frame as messages (bytes, at most CHUNK_BYTES each), which share the memory of contiguous tensors.

    Raises:
        EngineError: The frame is beyond the limits, or holds what cannot be sent.
    """
    listed: list[tuple[str, tuple[int, ...]]] = []
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in _NAMES:
            raise EngineError(f"a tensor of {tensor.dtype} on {tensor.device} cannot be sent to another rank")
        listed.append((_NAMES[tensor.dtype], tuple(tensor.shape)))
    try:
        data = json.dumps({"kind": kind, "header": header, "tensors": listed}, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise EngineError(f"the header of a frame ({kind}) cannot be written as JSON: {error}") from error
    tensor_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if problem := _beyond(len(data), tensor_bytes, limits):
        raise EngineError(f"a frame ({kind}) has {problem}")
    messages = [_bytes_of(LENGTH.pack(len(data)) + data[:FIRST_BYTES])]
    messages += [_bytes_of(data[begin : begin + CHUNK_BYTES]) for begin in range(FIRST_BYTES, len(data), CHUNK_BYTES)]
    for tensor in tensors:
        if tensor.numel():
            messages += tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(CHUNK_BYTES)
    return messages


def check_header_bytes(num_bytes: int, limits: Limits) -> None:
    """Check the length that a first message begins with.

    Raises:
        FrameError: It is beyond the limits.
    """
    if problem := _beyond(num_bytes, 0, limits):
        raise FrameError(f"announced {problem}")


def announced(data: bytes, limits: Limits) -> Announced:
    """Parse and check a header.

    Raises:
        FrameError: It is not one, or describes tensors that are unknown or beyond the limits.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"sent a header that is not JSON ({error})") from error
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise FrameError(f"sent a header without just {', '.join(sorted(_KEYS))}")
    kind, header, listed = value["kind"], value["header"], value["tensors"]
    if not isinstance(kind, str) or not isinstance(header, dict) or not isinstance(listed, list):
        raise FrameError("sent a header whose values have wrong types")
    frame = Announced(kind=kind, header=header, tensors=tuple(_tensor(each) for each in listed))
    if problem := _beyond(0, frame.tensor_bytes, limits):
        raise FrameError(f"announced a frame ({kind[:80]}) with {problem}")
    return frame


def _tensor(listed: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of one tensor of a header."""
    if not isinstance(listed, list) or len(listed) != 2 or not isinstance(listed[0], str) or not isinstance(listed[1], list):
        raise FrameError("announced a tensor without dtype and shape")
    name, shape = listed
    if name not in _DTYPES:
        raise FrameError(f"announced a tensor of an unknown dtype, {name[:80]!r}")
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise FrameError("announced a tensor of an impossible shape")
    return _DTYPES[name], tuple(shape)


def _beyond(header_bytes: int, tensor_bytes: int, limits: Limits) -> str:
    """Return which limit sizes are beyond, in words; nothing where they are within all."""
    if header_bytes > limits.header_bytes:
        return f"a header of {format_size(header_bytes)}, and at most {format_size(limits.header_bytes)} are allowed"
    if tensor_bytes > limits.tensor_bytes:
        return f"tensors of {format_size(tensor_bytes)}, and at most {format_size(limits.tensor_bytes)} are allowed"
    return ""


def _bytes_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
