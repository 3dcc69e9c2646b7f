"""KV on the host beside a device: next tokens are attended to on the host, prompts on the device.

q and the new k, v cross the link; meanwhile the device continues with other micro-batches.  One worker thread runs jobs
in order, so that what a pass writes is complete before a later job reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexgen.base.recorder import Recorder
from flexgen.devices.base import Device
from flexgen.devices.staging import Staging
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import KVPages
from flexgen.kv.pages import KVGroup, PagePool, layer_index
from flexgen.kv.place import PendingAttention, Place
from flexgen.kv.plan import GroupPlans, KVPlan
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.views import Heads, Past, step_outputs, step_queries
from flexgen.kv.worker import Worker
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice

# Lends the pages of a layer, by the model's layer index, for the duration of one job on the worker.
LendPages = Callable[[int], contextlib.AbstractContextManager[KVPages]]


class HostAttention:
    """Attention to pages in host memory, computed by a worker thread.

    Args:
        groups: The layer groups.
        kernels: The kernels of the host.
        device_kernels: The kernels of the computing device, for prompts.
        backend: The computing device; None if that is the host.
        notify: A function that wakes the ready loop.
        worker: The name of the thread.
        sparse: What generated tokens keep of what they see; None for all of it.
        recorder: The recorder of the trace; None without one.

    Attributes:
        track: The track of the thread in the trace.
    """

    def __init__(
        self, groups: Sequence[KVGroup], kernels: AttentionKernels, device_kernels: AttentionKernels, backend: Device | None,
        notify: Callable[[], None], worker: str, sparse: SparseAttention | None = None, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.recorder, self.track = recorder, worker.removeprefix("flexgen-").replace("-", " ")
        self.kernels, self.device_kernels = kernels, device_kernels
        self.staging, self.notify = Staging(backend), notify
        self.where = layer_index(groups)
        self.worker = Worker(worker)
        self._groups, self._sparse = groups, sparse

    def view(self, slices: Sequence[Slice], lend: LendPages) -> HostView:
        """Return a view of pages that are lent layer by layer."""
        return HostView(self, KVPlan(self._groups, slices, self._sparse), lend)

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
            start = 0 if self.recorder is None else self.recorder.now()
            try:
                pending.finish(job())
            except BaseException as error:
                pending.finish(None, error)
                raise
            finally:
                if self.recorder is not None:
                    self.recorder.slice(self.track, f"{name} of layer {layer}", start)
                self.notify()

        self.worker.submit(run)
        return pending

    def close(self) -> None:
        self.worker.close()
        self.kernels.close()
        self.device_kernels.close()


class HostPlace(Place):
    """The place for micro-batches whose pages are in host memory.

    Args:
        pool: The pages.
        attention: The host attention, which attends to the pages.
    """

    chunks = True
    mixes = False

    def __init__(self, pool: PagePool, attention: HostAttention) -> None:
        self.pool, self._attention = pool, attention

    def view(self, slices: Sequence[Slice]) -> HostView:
        return self._attention.view(slices, lambda layer: contextlib.nullcontext(self.pool.pages[layer]))

    def finish_pass(self) -> None:
        self._attention.worker.drain()

    def close(self) -> None:
        self._attention.close()


class HostView:
    """The KV of a micro-batch that consists either of next tokens or of prompts.

    Attributes:
        plan: The index tensors on the host, where the pages are.
        device_groups: The same index tensors on the computing device, which needs them for prompts only.
    """

    def __init__(self, attention: HostAttention, plan: KVPlan, lend: LendPages) -> None:
        self._attention, self.plan, self._lend = attention, plan, lend
        self.device_groups: GroupPlans = plan.groups if plan.prompts else ()
        self._heads: dict[int, Heads] = {}  # by layer, for later calls of layers that share its keys

    def attend(self, call: AttentionCall) -> torch.Tensor | PendingAttention:
        group, _ = self._attention.where[call.layer]
        return self._attend_prompts(call, group) if self.plan.prompts else self._attend_steps(call, group)

    def _attend_steps(self, call: AttentionCall, group: int) -> PendingAttention:
        attention, plan = self._attention, self.plan.groups[group]
        new, sinks = call.new or (), () if call.sinks is None else (call.sinks,)
        copies = attention.staging.to_host(step_queries(call, plan.num_steps), *new, *sinks)

        def job() -> torch.Tensor:
            with copies.arrived() as (query, *others), self._lend(call.layer) as pages:
                if call.new is not None:
                    plan.write(attention.kernels, (others[0], others[1]), pages)
                here = dataclasses.replace(call, sinks=others[-1] if call.sinks is not None else None)
                attended = plan.attend_steps(attention.kernels, here, query, pages)
            return attention.staging.to_device(attended)[0]

        return attention.later(job, lambda attended: step_outputs(call, attended)[None], "attention", call.layer)

    def _attend_prompts(self, call: AttentionCall, group: int) -> torch.Tensor | PendingAttention:
        """Attend to prompts on the device; their keys and values are copied to the pages, and stored tokens before them from the pages."""
        attention, plan = self._attention, self.plan.groups[group]
        continued = any(each.start > 0 for each in self.plan.prompts)
        copies = attention.staging.to_host(*(call.new or ()))

        def job() -> list[Past]:
            with copies.arrived() as new, self._lend(call.layer) as pages:
                if call.new is not None:  # first, since a prompt may continue what another of this micro-batch stores
                    self._heads[call.layer] = plan.write(attention.kernels, (new[0], new[1]), pages)
                past = plan.gather_past(attention.kernels, pages, call.query.dtype, self._heads[call.layer]) if continued else []
            return [each and tuple(attention.staging.to_device(*each)) for each in past]

        def attended(past: Sequence[Past]) -> torch.Tensor:
            out = call.new_output()
            self.device_groups[group].attend_prompts(attention.device_kernels, call, past, out)
            return out

        pending = attention.later(job, attended, "KV of prompts", call.layer) if continued or call.new is not None else None
        return pending if continued and pending is not None else attended([None] * len(plan.prompts))
