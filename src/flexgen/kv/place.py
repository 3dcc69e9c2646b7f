"""What the engine asks of a tier that holds KV: a view for every micro-batch, which stores and attends.

A tier is one file (local.py, host.py, disk.py).  Attention that takes time is answered with a pending result, which
the ready loop polls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from flexgen.kv.views import KVPlan
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice


class Place(Protocol):
    """Serves the micro-batches whose KV is on one tier.

    Attributes:
        chunks: Whether later chunks of a prompt may follow the first within a pass.
        mixes: Whether next tokens and prompts may share a micro-batch.
    """

    chunks: bool
    mixes: bool

    def view(self, slices: Sequence[Slice]) -> View:
        """The KV of one micro-batch during one pass."""
        ...

    def begin_pass(self, views: Sequence[View]) -> None:
        """Take note of all views of the coming pass, in the order in which they will run."""

    def finish_pass(self) -> None:
        """Return once everything that the pass wrote has reached its home."""

    def close(self) -> None:
        """End the threads, and free the memory and the file."""
        ...


class View(Protocol):
    """The KV of one micro-batch during one pass.

    Attributes:
        plan: Its index tensors.
    """

    plan: KVPlan

    def attend(self, call: AttentionCall) -> torch.Tensor | PendingAttention:
        """Store what the call brings, and attend: (1, tokens, heads, value_dim), now or later."""
        ...


class PendingAttention:
    """Attention that another thread computes.

    Args:
        complete: Makes the result of what the other thread has found, on the thread that asks for it.
    """

    def __init__(self, complete: Callable[[Any], torch.Tensor]) -> None:
        self._complete = complete
        self._event = threading.Event()
        self._found: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._event.is_set()

    def finish(self, found: Any, error: BaseException | None = None) -> None:
        self._found, self._error = found, error
        self._event.set()

    def result(self) -> torch.Tensor:
        """What was computed; raises what failed."""
        if self._error is not None:
            raise self._error
        return self._complete(self._found)
