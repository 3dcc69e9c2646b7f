"""KV on the host beside a device: next tokens are attended to on the host, prompts on the device.

q and the new k, v cross the link as one copy; meanwhile the device continues with other micro-batches.  A worker thread runs jobs in
order, so that what a pass writes is complete before a later job reads it.  It sleeps until the copy of its job has arrived, and submits
the copy of the result without waiting for it: computing does, when the micro-batch goes on.

Keys and values of prompts arrive late, when the device has computed them.  Next tokens that see nothing of what the prompts of the pass
store, which are nearly all, therefore have a worker of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexgen.base.recorder import Recorder, recorded
from flexgen.devices.staging import DeviceCopies, Staging
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.flow import KVFlow
from flexgen.kv.format import KVPages
from flexgen.kv.pages import KVGroup, PagePool, layer_index
from flexgen.kv.pass_pages import apart
from flexgen.kv.place import Answer, DeferredAttention, PendingAttention, Place, View
from flexgen.kv.plan import GroupPlans, KVPlan
from flexgen.kv.sinks import HostSinks
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.views import Heads, Past, step_outputs, step_queries
from flexgen.kv.worker import AtOnce, Worker
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice

# Lends the pages of a layer, by the model's layer index, for the duration of one job on the worker.
LendPages = Callable[[int], contextlib.AbstractContextManager[KVPages]]


class Lane:
    """A worker, with what its jobs compute with.

    Args:
        name: The name of its thread.
        kernels: The kernels of the host, for this worker alone.
        notify: A function that wakes the ready loop.
        recorder: The recorder of the trace; None without one.
        overlap: Whether there is a thread; otherwise jobs run at once on the thread that computes.

    Attributes:
        track: The track of the thread in the trace.
    """

    def __init__(
        self, name: str, kernels: AttentionKernels, notify: Callable[[], None], recorder: Recorder | None, *, overlap: bool
    ) -> None:
        self._notify, self._recorder, self.track = notify, recorder, name.removeprefix("flexgen-").replace("-", " ")
        self.kernels, self.sinks = kernels, HostSinks()
        self.worker = Worker(name) if overlap else AtOnce()

    def later(self, job: Callable[[], Any], complete: Callable[[Any], torch.Tensor], name: str, layer: int) -> PendingAttention:
        """Run a job on the worker; its error is also raised to the micro-batch that waits for it.

        Args:
            job: The job.
            complete: See `PendingAttention`.
            name: What the job does, for the trace.
            layer: The layer that it is done for.
        """
        pending = PendingAttention(complete)

        def run() -> None:
            try:
                pending.finish(job())
            except BaseException as error:
                pending.finish(None, error)
                raise

        self.submit(run, name, layer)
        return pending

    def submit(self, job: Callable[[], None], name: str, layer: int) -> None:
        """Run a job on the worker, whose end wakes the ready loop; for `name` and `layer` see `later`."""

        def run() -> None:
            try:
                with recorded(self._recorder, self.track, f"{name} of layer {layer}"):
                    job()
            finally:
                self._notify()

        self.worker.submit(run)

    def close(self) -> None:
        self.worker.close()
        self.kernels.close()


class HostAttention:
    """Attention to pages in host memory, computed by worker threads.

    Args:
        groups: The layer groups.
        kernels: The kernels of the host.
        device_kernels: The kernels of the computing device, for prompts.
        staging: What copies tensors between the computing device and the host.
        flow: What counts the prompts whose keys and values are on the way.
        notify: A function that wakes the ready loop.
        worker: The name of the thread.
        sparse: What generated tokens keep of what they see; None for all of it.
        recorder: The recorder of the trace; None without one.
        overlap: Whether there is a thread; otherwise the thread that computes attends on the host, too.
        apart: Kernels of the host for a second thread, see Attributes; None for one thread.

    Attributes:
        lane: The thread whose jobs are done in order.
        apart: The thread for next tokens that depend on nothing that prompts of the same pass store; the same one if there is but one.
    """

    def __init__(
        self, groups: Sequence[KVGroup], kernels: AttentionKernels, device_kernels: AttentionKernels, staging: Staging, flow: KVFlow,
        notify: Callable[[], None], worker: str, sparse: SparseAttention | None = None, recorder: Recorder | None = None,
        *, overlap: bool = True, apart: AttentionKernels | None = None,
    ) -> None:  # fmt: skip
        self.recorder, self.device_kernels = recorder, device_kernels
        self.staging, self.flow, self.notify = staging, flow, notify
        self.where = layer_index(groups)
        self.lane = Lane(worker if apart is None else f"{worker}-in-order", kernels, notify, recorder, overlap=overlap)
        self.apart = self.lane if apart is None else Lane(worker, apart, notify, recorder, overlap=overlap)
        self._groups, self._sparse = groups, sparse

    def plan(self, slices: Sequence[Slice]) -> KVPlan:
        """Return the index tensors of a micro-batch."""
        return KVPlan(self._groups, slices, self._sparse)

    def view(self, slices: Sequence[Slice], lend: LendPages) -> HostView:
        """Return a view of pages that are lent layer by layer."""
        return HostView(self, self.plan(slices), lend)

    def drain(self) -> None:
        """Return once all jobs have run, and raise the first error among them."""
        with contextlib.ExitStack() as draining:  # all of them, whichever fails
            for lane in (self.lane, self.apart):
                draining.callback(lane.worker.drain)

    def close(self) -> None:
        for lane in {self.lane, self.apart}:
            lane.close()
        self.device_kernels.close()


class HostPlace(Place):
    """The place for micro-batches whose pages are in host memory.

    Args:
        pool: The pages.
        attention: The host attention, which attends to the pages.
    """

    def __init__(self, pool: PagePool, attention: HostAttention) -> None:
        self.pool, self._attention = pool, attention

    def view(self, slices: Sequence[Slice]) -> HostView:
        return self._attention.view(slices, self._pages_of)

    def _pages_of(self, layer: int) -> contextlib.AbstractContextManager[KVPages]:
        return contextlib.nullcontext(self.pool.pages[layer])

    def begin_pass(self, views: Sequence[View]) -> None:
        """Find out which next tokens need not wait for what others store."""
        found = apart(self.pool.groups, [view.plan.slices for view in views])
        for view, is_apart in zip(views, found, strict=True):
            if isinstance(view, HostView):
                view.is_apart = is_apart and not view.plan.prompts

    def finish_pass(self) -> None:
        self._attention.drain()

    def close(self) -> None:
        self._attention.close()


class HostView:
    """The KV of a micro-batch that consists either of next tokens or of prompts.

    Attributes:
        plan: The index tensors on the host, where the pages are.
        device_groups: The same index tensors on the computing device, which needs them for prompts only.
        is_apart: Whether it is of next tokens that depend on nothing that others of the pass store, nor these on what it stores.
    """

    def __init__(self, attention: HostAttention, plan: KVPlan, lend: LendPages) -> None:
        self._attention, self.plan, self._lend = attention, plan, lend
        self.is_apart = False
        self.device_groups: GroupPlans = plan.groups if plan.prompts else ()
        self._heads: dict[int, Heads] = {}  # by layer, for later calls of layers that share its keys

    @property
    def lane(self) -> Lane:
        """The thread that runs its jobs."""
        return self._attention.apart if self.is_apart else self._attention.lane

    def attend(self, call: AttentionCall) -> Answer:
        group, _ = self._attention.where[call.layer]
        if not self.plan.prompts:
            return self._attend_steps(call, group)
        flow = self._attention.flow
        if flow.has_room():
            return self._attend_prompts(call, group)
        return DeferredAttention(flow.has_room, lambda: self._attend_prompts(call, group))

    def _attend_steps(self, call: AttentionCall, group: int) -> PendingAttention:
        attention, plan, lane = self._attention, self.plan.groups[group], self.lane
        new, sinks = call.new or (), lane.sinks.missing(call)
        copies = attention.staging.to_host(step_queries(call, plan.num_steps), *new, *sinks)

        def job() -> DeviceCopies:
            with copies.arrived() as (query, *others), self._lend(call.layer) as pages:
                if call.new is not None:
                    plan.write(lane.kernels, (others[0], others[1]), pages)
                here = dataclasses.replace(call, sinks=lane.sinks.of(call, others[len(new) :]))
                attended = plan.attend_steps(lane.kernels, here, query, pages)
            return attention.staging.to_device(attended)

        return lane.later(job, lambda attended: step_outputs(call, attended.take()[0])[None], "attention", call.layer)

    def _attend_prompts(self, call: AttentionCall, group: int) -> Answer:
        """Attend to prompts on the device; their keys and values are copied to the pages, and stored tokens before them from the pages."""
        attention, plan, lane = self._attention, self.plan.groups[group], self.lane
        continued = any(each.start > 0 for each in self.plan.prompts)
        if not continued and call.new is None:
            return self._attended(call, group, [None] * len(self.plan.prompts))
        copies = attention.staging.to_host(*(call.new or ()))
        attention.flow.enter()

        def store() -> list[Past]:
            with copies.arrived() as new, self._lend(call.layer) as pages:
                if call.new is not None:  # first, since a prompt may continue what another of this micro-batch stores
                    self._heads[call.layer] = plan.write(lane.kernels, (new[0], new[1]), pages)
                return plan.gather_past(lane.kernels, pages, call.query.dtype, self._heads[call.layer]) if continued else []

        def store_only() -> None:
            try:
                store()
            finally:
                attention.flow.leave()

        def fetch() -> list[DeviceCopies | None]:
            return [None if each is None else attention.staging.to_device(*each) for each in store()]

        def fetched(past: Sequence[DeviceCopies | None]) -> torch.Tensor:
            taken: list[Past] = [None if each is None else tuple(each.take()) for each in past]
            attention.flow.leave()
            return self._attended(call, group, taken)

        if continued:
            return lane.later(fetch, fetched, "KV of prompts", call.layer)
        lane.submit(store_only, "KV of prompts", call.layer)
        return self._attended(call, group, [None] * len(self.plan.prompts))

    def _attended(self, call: AttentionCall, group: int, past: Sequence[Past]) -> torch.Tensor:
        """Return the attention of prompts, whose new tokens follow `past`, on the device."""
        out = call.new_output()
        self.device_groups[group].attend_prompts(self._attention.device_kernels, call, past, out)
        return out
