"""KV at home on the host beside a device: next tokens are attended to on the host, prompts on the device.

q and the new k, v cross the link; the device goes on with other micro-batches meanwhile.  One worker thread takes
jobs in order, so what a pass writes is there before a later job reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from flexgen.devices.base import Backend, Event
from flexgen.kv.cache import KVGroup, PagePool, layer_index
from flexgen.kv.place import NewKV, PendingAttention, View
from flexgen.kv.views import (
    KVPlan,
    Past,
    attend_prompts,
    attend_steps,
    gather_past,
    step_outputs,
    step_queries,
    write_new,
)
from flexgen.passes.plan import Slice

if TYPE_CHECKING:
    from flexgen.kernels.attention import AttentionKernels as Kernels
    from flexgen.models.attention import AttentionCall

HOST = torch.device("cpu")
MAX_JOBS = 8  # each holds the q, k and v of a micro-batch
Pages = tuple[torch.Tensor, torch.Tensor]


class Worker:
    """One thread that runs jobs in order; the first error is kept and raised by `drain`."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=MAX_JOBS)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def _work(self) -> None:
        with torch.no_grad():
            while (job := self._jobs.get()) is not None:
                try:
                    job()
                except BaseException as error:  # noqa: BLE001 - raised by drain()
                    self.error = self.error or error
                finally:
                    self._jobs.task_done()
        self._jobs.task_done()

    def drain(self) -> None:
        """Return once all jobs have run.  Raises what one of them raised."""
        self._jobs.join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


class Link:
    """Copies of whole tensors between the computing device and the host; without a device nothing is copied."""

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend

    def to_host(self, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[Event]]:
        """Host copies, and the events after which they may be read."""
        if self._backend is None:
            return list(tensors), []
        sources = [tensor.contiguous() for tensor in tensors]
        copies = [torch.empty(source.shape, dtype=source.dtype) for source in sources]
        return copies, [self._backend.copy_out(copy, source) for copy, source in zip(copies, sources, strict=True)]

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A device copy, there when this returns (called on the worker)."""
        if self._backend is None:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._backend.device)
        self._backend.copy_in(copy, tensor.contiguous(), self._backend.marker()).wait()
        return copy


class HostPlace:
    """Serves micro-batches whose pages are in host memory while computing is elsewhere.

    Args:
        kernels: of the host. device_kernels: of the device, for prompts. notify: wakes the ready loop.
    """

    chunks = True
    mixes = False

    def __init__(
        self, pool: PagePool, kernels: Kernels, device_kernels: Kernels, backend: Backend | None, notify: Callable[[], None]
    ) -> None:
        self._share(pool.groups, kernels, device_kernels, backend, notify, "flexgen-host-attention")
        self.pool = pool

    def _share(
        self, groups: Sequence[KVGroup], kernels: Kernels, device_kernels: Kernels, backend: Backend | None,
        notify: Callable[[], None], worker: str,
    ) -> None:  # fmt: skip
        """What every place has whose attention runs on a worker."""
        self.kernels, self.device_kernels = kernels, device_kernels
        self.device = backend.device if backend is not None else HOST
        self.link, self.notify = Link(backend), notify
        self.where = layer_index(groups)
        self.worker = Worker(worker)

    def view(self, slices: Sequence[Slice]) -> HostView:
        groups = self.pool.groups
        return HostView(self, KVPlan(groups, slices, HOST), KVPlan(groups, slices, self.device))

    @contextlib.contextmanager
    def pages(self, view: HostView, layer: int) -> Iterator[Pages]:
        """A layer's key and value pages, for the time of one job on the worker."""
        group, index = self.where[layer]
        yield self.pool.keys[group][index], self.pool.values[group][index]

    def begin_pass(self, views: Sequence[View]) -> None:
        pass

    def finish_pass(self) -> None:
        self.worker.drain()

    def close(self) -> None:
        self.worker.close()
        self.kernels.close()
        self.device_kernels.close()


class HostView:
    """One micro-batch: all next tokens, or all prompts.

    Attributes:
        plan: index tensors on the host, beside the pages. device_plan: the same beside the computing.
    """

    def __init__(self, place: HostPlace, plan: KVPlan, device_plan: KVPlan) -> None:
        self._place, self.plan, self.device_plan = place, plan, device_plan

    def attend(self, call: AttentionCall, new: NewKV) -> torch.Tensor | PendingAttention:
        if self.plan.prefills:
            return self._attend_prompts(call, new)
        return self._attend_steps(call, new)

    def _attend_steps(self, call: AttentionCall, new: NewKV) -> PendingAttention:
        place, plan = self._place, self.plan
        tensors = [step_queries(call, plan.num_decodes), *(new or ()), *([call.sinks] if call.sinks is not None else [])]
        copies, events = place.link.to_host(*tensors)
        pending = PendingSteps(call)

        def job() -> None:
            for event in events:
                event.wait()
            group, _ = place.where[call.layer]
            with place.pages(self, call.layer) as pages:
                if new is not None:
                    write_new(place.kernels, plan, group, copies[1], copies[2], pages)
                here = dataclasses.replace(call, sinks=copies[-1] if call.sinks is not None else None)
                attended = attend_steps(place.kernels, plan, group, here, copies[0], pages)
            pending.finish(place.link.to_device(attended))
            place.notify()

        place.worker.submit(_reporting(job, pending, place.notify))
        return pending

    def _attend_prompts(self, call: AttentionCall, new: NewKV) -> torch.Tensor | PendingAttention:
        """Prompts attend on the device; their keys and values go to the pages, what they go on from comes from there."""
        place, plan = self._place, self.plan
        group, _ = place.where[call.layer]
        continued = any(each.start > 0 for each in plan.prefills)
        copies, events = place.link.to_host(*(new or ()))
        pending = PendingPrompts(self, call)

        def job() -> None:
            for event in events:
                event.wait()
            with place.pages(self, call.layer) as pages:
                if new is not None:  # first: a prompt may go on from what another of this micro-batch stores
                    write_new(place.kernels, plan, group, copies[0], copies[1], pages)
                if continued:
                    past = [gather_past(place.kernels, plan, group, index, pages) for index in range(len(plan.prefills))]
                    pending.past = [each and (place.link.to_device(each[0]), place.link.to_device(each[1])) for each in past]
                    pending.finish(None)
                    place.notify()

        if continued or new is not None:
            place.worker.submit(_reporting(job, pending, place.notify))
        return pending if continued else self._on_device(call, [None] * len(plan.prefills))

    def _on_device(self, call: AttentionCall, past: Sequence[Past]) -> torch.Tensor:
        out = call.query.new_empty(1, call.query.shape[2], call.query.shape[1], call.value.shape[3])
        group, _ = self._place.where[call.layer]
        attend_prompts(self._place.device_kernels, self.device_plan, group, call, past, out)
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

    def __init__(self, view: HostView, call: AttentionCall) -> None:
        super().__init__()
        self._view, self._call = view, call
        self.past: list[Past] = []

    def result(self) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return self._view._on_device(self._call, self.past)


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
