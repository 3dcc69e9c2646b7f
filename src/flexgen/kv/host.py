"""KV on the host beside a device: next tokens are attended to on the host, prompts on the device.

q and the new k, v cross the link; the device goes on with other micro-batches meanwhile.  One worker thread takes jobs
in order, so that what a pass writes is there before a later job reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch

from flexgen.devices.base import Backend
from flexgen.kernels.attention import AttentionKernels
from flexgen.kv.format import KVPages
from flexgen.kv.pages import KVGroup, PagePool, layer_index
from flexgen.kv.place import PendingAttention, View
from flexgen.kv.views import (
    KVPlan,
    KVSlice,
    Past,
    attend_prompts,
    attend_steps,
    gather_past,
    step_outputs,
    step_queries,
    write_new,
)
from flexgen.kv.worker import Link, Worker
from flexgen.passes.calls import AttentionCall

HOST = torch.device("cpu")

# Lends the pages of a layer, by the model's index, for the time of one job on the worker.
LendPages = Callable[[int], contextlib.AbstractContextManager[KVPages]]


class HostAttention:
    """Attends on a worker thread to pages in host memory, while computing is elsewhere.

    Args:
        groups: The layer groups.
        kernels: Of the host.
        device_kernels: Of the computing device, for prompts.
        backend: The computing device; None where that is the host.
        notify: Wakes the ready loop.
        worker: Name of the thread.
    """

    def __init__(
        self, groups: Sequence[KVGroup], kernels: AttentionKernels, device_kernels: AttentionKernels, backend: Backend | None,
        notify: Callable[[], None], worker: str,
    ) -> None:  # fmt: skip
        self.kernels, self.device_kernels = kernels, device_kernels
        self.link, self.notify = Link(backend), notify
        self.where = layer_index(groups)
        self.worker = Worker(worker)
        self._groups, self._device = groups, backend.device if backend is not None else HOST

    def view(self, slices: Sequence[KVSlice], lend: LendPages) -> HostView:
        """A view of pages that are lent layer by layer."""
        return HostView(self, KVPlan(self._groups, slices, HOST), KVPlan(self._groups, slices, self._device), lend)

    def close(self) -> None:
        self.worker.close()
        self.kernels.close()
        self.device_kernels.close()


class HostPlace:
    """Serves micro-batches whose pages are in host memory.

    Args:
        pool: The pages.
        attention: Attends to them.
    """

    chunks = True
    mixes = False

    def __init__(self, pool: PagePool, attention: HostAttention) -> None:
        self.pool, self._attention = pool, attention

    def view(self, slices: Sequence[KVSlice]) -> HostView:
        return self._attention.view(slices, lambda layer: contextlib.nullcontext(self.pool.pages[layer]))

    def begin_pass(self, views: Sequence[View]) -> None:
        pass

    def finish_pass(self) -> None:
        self._attention.worker.drain()

    def close(self) -> None:
        self._attention.close()


class HostView:
    """A micro-batch of next tokens only, or of prompts only.

    Attributes:
        plan: Index tensors on the host, beside the pages.
        device_plan: The same beside the computing.
    """

    def __init__(self, attention: HostAttention, plan: KVPlan, device_plan: KVPlan, lend: LendPages) -> None:
        self._attention, self.plan, self.device_plan, self._lend = attention, plan, device_plan, lend

    def attend(self, call: AttentionCall) -> torch.Tensor | PendingAttention:
        group, _ = self._attention.where[call.layer]
        return self._attend_prompts(call, group) if self.plan.prefills else self._attend_steps(call, group)

    def _attend_steps(self, call: AttentionCall, group: int) -> PendingAttention:
        attention, plan = self._attention, self.plan.groups[group]
        new, sinks = call.new or (), () if call.sinks is None else (call.sinks,)
        copies = attention.link.to_host(step_queries(call, plan.num_steps), *new, *sinks)
        pending = PendingSteps(call)

        def job() -> None:
            with copies as (query, *others), self._lend(call.layer) as pages:
                if call.new is not None:
                    write_new(attention.kernels, plan, (others[0], others[1]), pages)
                here = dataclasses.replace(call, sinks=others[-1] if call.sinks is not None else None)
                attended = attend_steps(attention.kernels, plan, here, query, pages)
            pending.finish(attention.link.to_device(attended))
            attention.notify()

        attention.worker.submit(_reporting(job, pending, attention.notify))
        return pending

    def _attend_prompts(self, call: AttentionCall, group: int) -> torch.Tensor | PendingAttention:
        """Prompts attend on the device; their keys and values go to the pages, what they go on from comes from there."""
        attention, plan = self._attention, self.plan.groups[group]
        continued = any(each.start > 0 for each in self.plan.prefills)
        copies = attention.link.to_host(*(call.new or ()))
        pending = PendingPrompts(self, call, group)

        def job() -> None:
            with copies as new, self._lend(call.layer) as pages:
                if call.new is not None:  # first: a prompt may go on from what another of this micro-batch stores
                    write_new(attention.kernels, plan, (new[0], new[1]), pages)
                if continued:
                    past = gather_past(attention.kernels, plan, pages, call.query.dtype)
                    pending.past = [each and (attention.link.to_device(each[0]), attention.link.to_device(each[1])) for each in past]
                    pending.finish(None)
                    attention.notify()

        if continued or call.new is not None:
            attention.worker.submit(_reporting(job, pending, attention.notify))
        return pending if continued else self.attend_on_device(call, group, [None] * len(plan.prompts))

    def attend_on_device(self, call: AttentionCall, group: int, past: Sequence[Past]) -> torch.Tensor:
        """Attention of the prompts, given what they see of the tokens stored before them."""
        out = call.new_output()
        attend_prompts(self._attention.device_kernels, self.device_plan.groups[group], call, past, out)
        return out


class PendingSteps(PendingAttention):
    """The host's answer, before the value up-projection of latents (which needs the device's weights)."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self._call = call

    def result(self) -> torch.Tensor:
        return step_outputs(self._call, super().result())[None]


class PendingPrompts(PendingAttention):
    """Past keys and values on their way to the device; the attention itself runs when they are there."""

    def __init__(self, view: HostView, call: AttentionCall, group: int) -> None:
        super().__init__()
        self._view, self._call, self._group = view, call, group
        self.past: list[Past] = []

    def result(self) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return self._view.attend_on_device(self._call, self._group, self.past)


def _reporting(job: Callable[[], None], pending: PendingAttention, notify: Callable[[], None]) -> Callable[[], None]:
    """A job whose error reaches the micro-batch that waits for it."""

    def run() -> None:
        try:
            job()
        except BaseException as error:
            pending.finish(None, error)
            notify()
            raise

    return run
