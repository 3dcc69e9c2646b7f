"""KV on the host beside a device that attends to it: the pages of next tokens come to the device, and what is new goes to the host.

The choice is the policy's.  Prompts are attended to as in host.py, and so are next tokens for which the link cannot run ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from flexgen.kv.compact import CompactPages
from flexgen.kv.flow import KVFlow
from flexgen.kv.host import HostAttention, HostPlace, HostView, LendPages
from flexgen.kv.link import KVLink
from flexgen.kv.pages import PagePool
from flexgen.kv.place import Answer, DeferredAttention, View
from flexgen.kv.sparse import SparseAttention
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice
from flexgen.plan.policy import STEPS_ON_THE_WAY


class LinkedPlace(HostPlace):
    """The place for micro-batches whose pages are in host memory, and come to the device for next tokens.

    Args:
        pool: The pages.
        attention: The host attention, for prompts and for what the link does not bring.
        link: The link that brings pages.
        sparse: What generated tokens keep of what they see; None for all of it.
    """

    def __init__(self, pool: PagePool, attention: HostAttention, link: KVLink, sparse: SparseAttention | None = None) -> None:
        super().__init__(pool, attention)
        self._link, self._sparse, self._flow = link, sparse, KVFlow(STEPS_ON_THE_WAY)

    def view(self, slices: Sequence[Slice]) -> HostView:
        if not all(each.is_decode for each in slices):
            return super().view(slices)
        return LinkedView(self._attention, slices, self._pages_of, CompactPages(self.pool.groups, slices), self._link, self._flow)

    def begin_pass(self, views: Sequence[View]) -> None:
        """Start bringing the pages of next tokens, but of those that see what prompts of this pass store."""
        super().begin_pass(views)
        linked: list[CompactPages] = []
        for view in views:
            if isinstance(view, LinkedView) and self._link.holds(view.pages) and view.is_apart:
                view.is_linked, view.device_groups = True, view.pages.plan(self._sparse)
                linked.append(view.pages)
        self._link.begin(linked)

    def finish_pass(self) -> None:
        super().finish_pass()
        self._link.finish()

    def close(self) -> None:
        self._link.stop()
        super().close()


class LinkedView(HostView):
    """The KV of a micro-batch of next tokens.

    Attributes:
        pages: The pages that they see.
        is_linked: Whether the link brings them; if not, the host attends.
    """

    def __init__(
        self, attention: HostAttention, slices: Sequence[Slice], lend: LendPages, pages: CompactPages, link: KVLink, flow: KVFlow
    ) -> None:
        super().__init__(attention, attention.plan(slices), lend)
        self.pages, self.is_linked = pages, False
        self._link, self._flow = link, flow

    def attend(self, call: AttentionCall) -> Answer:
        if not self.is_linked or call.new is None:  # an earlier layer has stored what this one attends to, and its pages have left
            return super().attend(call)
        return (
            self._store_and_attend(call)
            if self._flow.has_room()
            else DeferredAttention(self._flow.has_room, lambda: self._store_and_attend(call))
        )

    def _store_and_attend(self, call: AttentionCall) -> Answer:
        """Start to copy what is new to the host's pages, and attend to those on the device as soon as they have arrived."""
        self._store(call)
        has_arrived = functools.partial(self._link.has_arrived, self.pages, call.layer)
        return self._attended_on_device(call) if has_arrived() else DeferredAttention(has_arrived, lambda: self._attended_on_device(call))

    def _store(self, call: AttentionCall) -> None:
        plan, lane = self.plan.groups[self._attention.where[call.layer][0]], self.lane
        assert call.new is not None
        copies = self._attention.staging.to_host(*call.new)
        self._flow.enter()

        def store() -> None:
            try:
                with copies.arrived() as new, self._lend(call.layer) as pages:
                    plan.write(lane.kernels, (new[0], new[1]), pages)
            finally:
                self._flow.leave()

        lane.submit(store, "KV of next tokens", call.layer)

    def _attended_on_device(self, call: AttentionCall) -> torch.Tensor:
        kernels, plan = self._attention.device_kernels, self.device_groups[self._attention.where[call.layer][0]]
        assert call.new is not None
        with self._link.lend(self.pages, call.layer) as pages:
            plan.write(kernels, call.new, pages)
            return plan.attend(kernels, call, pages, [])
