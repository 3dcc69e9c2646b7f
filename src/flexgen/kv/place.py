"""The interface of a tier that holds KV: for every micro-batch it makes a view, which stores keys and values and attends to them.

Each tier is one file (local.py, host.py, disk.py), and linked.py is for KV on the host that a device attends to.  Attention that takes
time, or has to begin later, returns a pending result, which the ready loop polls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch

from flexgen.kv.plan import GroupPlans, KVPlan
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice


class Place(Protocol):
    """The interface to the KV of one tier, which serves the micro-batches of its sequences.

    What a pass may compute together there is known without it (tiers.py).
    """

    def view(self, slices: Sequence[Slice]) -> View:
        """Return the KV of one micro-batch during one pass."""
        ...

    def begin_pass(self, views: Sequence[View]) -> None:
        """Prepare for the coming pass, given all its views in the order in which they will run."""

    def finish_pass(self) -> None:
        """Return once everything that the pass wrote has reached its home."""

    def forget(self, sequences: Collection[int]) -> None:
        """Free what is kept for sequences, given by their ids, whose pages are free; no pass may be running."""

    def close(self) -> None:
        """Stop the threads, free the memory and close the file."""
        ...


class View(Protocol):
    """The KV of one micro-batch during one pass.

    Attributes:
        plan: The index tensors of the micro-batch, in host memory.
        device_groups: Those that the computing device needs, by layer group.  Whoever runs the micro-batch brings them there, together with
            all else that it needs on the device, and puts the copies in their place before the first call.
    """

    plan: KVPlan
    device_groups: GroupPlans

    def attend(self, call: AttentionCall) -> Answer:
        """Store the call's new keys and values, and return its attention, (1, tokens, heads, value_dim), now or as a pending result."""
        ...


class Pending(Protocol):
    """Attention that a micro-batch waits for while others run."""

    def done(self) -> bool:
        """Return whether `result` can be asked for; it may need computing to wait for a copy, but no thread."""
        ...

    def result(self) -> Answer:
        """Return the attention, or what the micro-batch has to wait for next; raise what went wrong on another thread."""
        ...


Answer = torch.Tensor | Pending


class DeferredAttention:
    """Attention that begins when something else has made progress.

    Args:
        may_begin: A function that returns whether it may begin.
        begin: A function that begins it, on the thread that asks for the result.
    """

    def __init__(self, may_begin: Callable[[], bool], begin: Callable[[], Answer]) -> None:
        self._may_begin, self._begin = may_begin, begin

    def done(self) -> bool:
        return self._may_begin()

    def result(self) -> Answer:
        return self._begin()


class PendingAttention:
    """Attention that another thread computes.

    Args:
        complete: A function from the other thread's result to the attention; it runs on the thread that asks for the result.
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
        """Return the attention, or raise the error of the other thread."""
        if self._error is not None:
            raise self._error
        return self._complete(self._found)
