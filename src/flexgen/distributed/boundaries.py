"""Hidden states on their way between the stages of a pipeline, as one pass sees them."""

from __future__ import annotations

import time
from typing import Any

import torch

from flexgen.distributed.channel import Frame, Receiver, Sender
from flexgen.engine.boundary import Boundary
from flexgen.errors import EngineError

HIDDEN = "hidden"


class PassAbandoned(Exception):
    """The leader has closed the engine while a pass was on its way.

    Args:
        frame: What came in place of hidden states; None if it has not been taken yet.
    """

    def __init__(self, frame: Frame | None) -> None:
        super().__init__("a pass was given up")
        self.frame = frame


class LinkBoundary(Boundary):
    """The hidden states of one pass, received from the stage before this one and sent to the one after it.

    Args:
        number: The number of the pass.
        num_batches: The number of its micro-batches.
        source: What receives from the stage before; None on the first stage.
        target: What sends to the stage after; None on the last stage.

    Attributes:
        wait_seconds: The time from the beginning to the first arrival, in which a stage without work waits.
    """

    def __init__(self, number: int, num_batches: int, source: Receiver | None, target: Sender | None) -> None:
        self.receives, self.sends = source is not None, target is not None
        self._number, self._num_left = number, num_batches
        self._source, self._target = source, target
        self._there: dict[int, torch.Tensor] = {}
        self._begin, self.wait_seconds = time.perf_counter(), 0.0

    def arrived(self, batch: int) -> bool:
        """Return whether the hidden states of a micro-batch are there.

        Raises:
            PassAbandoned: The leader has ended the pass.
            StageError: A stage does not work any more.
        """
        assert self._source is not None
        while batch not in self._there and self._num_left and (frame := self._source.poll()) is not None:
            self._take_in(frame)
        return batch in self._there

    def _take_in(self, frame: Frame) -> None:
        if frame.kind != HIDDEN:
            raise PassAbandoned(frame)
        number, batch = _integers(frame.header)
        if number != self._number or batch in self._there:
            raise EngineError(f"hidden states of micro-batch {batch} of pass {number} arrived in pass {self._number}")
        (self._there[batch],) = frame.tensors
        self.wait_seconds = self.wait_seconds or time.perf_counter() - self._begin
        self._num_left -= 1

    def take(self, batch: int) -> torch.Tensor:
        return self._there.pop(batch)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        assert self._target is not None
        self._target.send(HIDDEN, {"pass": self._number, "batch": batch}, [hidden])


def _integers(header: dict[str, Any]) -> tuple[int, int]:
    return int(header["pass"]), int(header["batch"])
