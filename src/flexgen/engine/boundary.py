"""The boundary of a stage during one pass: the hidden states that come from the stage before it, and those that go to the one after it."""

from __future__ import annotations

from typing import Protocol

import torch


class Boundary(Protocol):
    """Where hidden states enter and leave a stage, micro-batch by micro-batch, in one pass.

    Attributes:
        receives: Whether hidden states come from a stage before this one; otherwise it begins with token ids.
        sends: Whether hidden states go to a stage after this one; otherwise it ends with logits.
    """

    receives: bool
    sends: bool

    def arrived(self, batch: int) -> bool:
        """Return whether the hidden states of a micro-batch are there; raise what went wrong with them.

        Whoever brings them calls `ModelRunner.wake` then.
        """
        ...

    def take(self, batch: int) -> torch.Tensor:
        """Return the hidden states of a micro-batch that have arrived, in host memory; called once."""
        ...

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Hand over the hidden states of a micro-batch, in host memory that nobody changes any more."""
        ...


class CheckedBoundary(Boundary):
    """A boundary that keeps the hidden states which leave last, until the pass has been checked.

    The stages after this one then come to no result from what was read wrongly here.

    Args:
        boundary: The boundary.
        num_batches: The number of micro-batches of the pass.
    """

    def __init__(self, boundary: Boundary, num_batches: int) -> None:
        self.receives, self.sends = boundary.receives, boundary.sends
        self._boundary, self._num_left = boundary, num_batches
        self._last: tuple[int, torch.Tensor] | None = None

    def arrived(self, batch: int) -> bool:
        return self._boundary.arrived(batch)

    def take(self, batch: int) -> torch.Tensor:
        return self._boundary.take(batch)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        self._num_left -= 1
        if self._num_left:
            self._boundary.put(batch, hidden)
        else:
            self._last = (batch, hidden)

    def release(self) -> None:
        """Hand over what was kept."""
        if self._last is not None:
            self._boundary.put(*self._last)
