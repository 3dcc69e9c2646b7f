"""Puts frames together from the messages of a connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from flexgen.distributed.frames import (
    CHUNK_BYTES,
    END,
    FIRST_BYTES,
    KEEPALIVE,
    LENGTH,
    Frame,
    Limits,
    announced,
    check_header_bytes,
)


class Messages(Protocol):
    """What brings messages."""

    def message(self) -> torch.Tensor:
        """Wait for the next message, and return the memory that begins with it; it is valid until the next call."""
        ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """A frame with its bytes, and the seconds from its first message to its last in which there was room for it."""

    frame: Frame
    num_bytes: int
    seconds: float


def read_frame(flow: Messages, limits: Limits, admit: Callable[[int], None]) -> Arrived | None:
    """Return the next frame, or None when the sender has said that there are no more.

    Args:
        flow: What brings messages.
        limits: The largest frame that is taken.
        admit: Called with the frame's bytes before its tensors get memory; waits until there is room.

    Raises:
        FrameError: What arrives is no frame, or one beyond the limits.
    """
    first = flow.message()
    while (header_bytes := LENGTH.unpack(_taken(first, LENGTH.size))[0]) == KEEPALIVE:
        first = flow.message()
    if header_bytes == END:
        return None
    start = time.monotonic()
    check_header_bytes(header_bytes, limits)
    what = announced(_header(first, header_bytes, flow), limits)
    num_bytes = LENGTH.size + header_bytes + what.tensor_bytes
    waits = time.monotonic()
    admit(num_bytes)
    waited = time.monotonic() - waits
    tensors = [_tensor(dtype, shape, flow) for dtype, shape in what.tensors]
    return Arrived(Frame(what.kind, what.header, tensors), num_bytes, time.monotonic() - start - waited)


def _header(first: torch.Tensor, num_bytes: int, flow: Messages) -> bytes:
    """Return the header that the first message begins."""
    data = _taken(first[LENGTH.size :], min(num_bytes, FIRST_BYTES))
    parts, left = [data], num_bytes - len(data)
    while left:
        parts.append(_taken(flow.message(), min(left, CHUNK_BYTES)))
        left -= len(parts[-1])
    return b"".join(parts)


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], flow: Messages) -> torch.Tensor:
    """Return the next tensor."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        for part in tensor.reshape(-1).view(torch.uint8).split(CHUNK_BYTES):
            part.copy_(flow.message()[: part.numel()])
    return tensor


def _taken(memory: torch.Tensor, num_bytes: int) -> bytes:
    return memory[:num_bytes].numpy().tobytes()
