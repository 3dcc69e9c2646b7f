"""Attention where the KV lives: beside the computing, on the host beside a device, or on disk.

Each place is a factory of views; a view serves one micro-batch during one pass.  Whatever takes time is answered
with a pending result that the ready loop polls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from flexgen.kv.cache import PagePool, layer_index
from flexgen.kv.views import KVPlan, attend, write_new
from flexgen.passes.plan import Slice

if TYPE_CHECKING:
    from flexgen.kernels.attention import AttentionKernels as Kernels
    from flexgen.models.attention import AttentionCall

NewKV = tuple[torch.Tensor, torch.Tensor] | None


class Place(Protocol):
    """Serves the micro-batches whose KV has one home.

    Attributes:
        chunks: whether later chunks of a prompt may follow the first within a pass.
        mixes: whether next tokens and prompts may share a micro-batch.
    """

    chunks: bool
    mixes: bool

    def view(self, slices: Sequence[Slice]) -> View: ...

    def begin_pass(self, views: Sequence[View]) -> None:
        """All views of the coming pass, in the order in which they will run."""
        ...

    def finish_pass(self) -> None:
        """Return once everything that the pass wrote has reached its home."""
        ...

    def close(self) -> None: ...


class View(Protocol):
    """One micro-batch's KV during one pass.

    Attributes:
        plan: its index tensors.
    """

    plan: KVPlan

    def attend(self, call: AttentionCall, new: NewKV) -> torch.Tensor | PendingAttention: ...


class PendingAttention:
    """Attention computed on another thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._result: torch.Tensor | None = None
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self._event.is_set()

    def finish(self, result: torch.Tensor | None, error: BaseException | None = None) -> None:
        self._result, self.error = result, error
        self._event.set()

    def result(self) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        assert self._result is not None
        return self._result


class LocalPlace:
    """Pages in the memory where computing happens: attention is just computed.

    Args:
        pool: the pages. device: of its tensors.
    """

    chunks = True
    mixes = True

    def __init__(self, pool: PagePool, kernels: Kernels, device: torch.device) -> None:
        self.pool, self.kernels, self.device = pool, kernels, device
        self.where = layer_index(pool.groups)

    def view(self, slices: Sequence[Slice]) -> LocalView:
        return LocalView(self, KVPlan(self.pool.groups, slices, self.device))

    def pages(self, layer: int) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
        """(group, this layer's key and value pages)."""
        group, index = self.where[layer]
        return group, (self.pool.keys[group][index], self.pool.values[group][index])

    def begin_pass(self, views: Sequence[View]) -> None:
        pass

    def finish_pass(self) -> None:
        pass

    def close(self) -> None:
        self.kernels.close()


class LocalView:
    """A micro-batch over pages beside the computing."""

    def __init__(self, place: LocalPlace, plan: KVPlan) -> None:
        self._place, self.plan = place, plan

    def attend(self, call: AttentionCall, new: NewKV) -> torch.Tensor:
        place = self._place
        group, pages = place.pages(call.layer)
        if new is not None:
            write_new(place.kernels, self.plan, group, *new, pages)
        return attend(place.kernels, self.plan, group, call, pages)
