"""One pass: a coroutine per micro-batch, and one ready loop that runs those that have what they wait for.

The order is by dataflow, without a barrier per layer: the lowest unit goes first, and a unit is released when the last coroutine
has left it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import greenlet
import torch

from flexgen.base.recorder import COMPUTE, WAITING, Begun, Recorder
from flexgen.devices.packed import PackedCopies
from flexgen.devices.staging import HostCopies
from flexgen.engine.boundary import Boundary
from flexgen.engine.inputs import BatchInputs, batch_inputs
from flexgen.errors import EngineError
from flexgen.kv.place import Pending, PendingAttention, View
from flexgen.models.attention import PassCache
from flexgen.models.coroutine import ForwardCoroutine
from flexgen.models.scoring import Scorer, Scores
from flexgen.models.skeleton import BoundModel
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import MicroBatch, Slice
from flexgen.weights.store import WeightStore

# The longest waits between checks, for weights and for attention; arrivals wake the loop earlier.
IDLE_SECONDS = 0.5
POLL_SECONDS = 0.0005


class RowSource(Protocol):
    """A source of embedding rows (weights/rows.py)."""

    def rows(self, module: str, token_ids: torch.Tensor, host_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]: ...


class MicroBatchForward(ForwardCoroutine):
    """The coroutine that takes one micro-batch through the model, or through a stage of it.

    Attributes:
        batch: The micro-batch.
        unit: The unit of weights that it has reached, and runs once that is ready; -1 before it starts.
        pending: The attention that it waits for, or its hidden states on their way to the host; None if it waits for neither.
        after: The coroutines whose attention must come first in every layer.
        view: The KV that it reads and writes.
        logits: The logits, (wanted positions, vocab), once it has finished.
        scores: The scores of the scored positions, once it has finished; None if there are none.
    """

    def __init__(
        self, batch: MicroBatch, model: BoundModel, cache: PassCache, view: View, rows: RowSource, copies: PackedCopies,
        after: Sequence[MicroBatchForward], recorder: Recorder | None = None, boundary: Boundary | None = None, index: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(self._forward)
        self._recorder = recorder
        self.batch, self.view, self.after = batch, view, after
        self.unit = -1
        self.pending: Pending | HostCopies | None = None
        self.logits: torch.Tensor | None = None
        self.scores: Scores | None = None
        self._model, self._cache, self._rows, self._copies = model, cache, rows, copies
        self._boundary, self._index = boundary, index

    def _forward(self) -> None:
        host, places = batch_inputs(self.batch)
        inputs, self.view.device_groups = self._copies.to_device((host, self.view.device_groups))
        self._host_ids, self._input_ids = host.token_ids, inputs.token_ids
        if inputs is not host:  # a tensor of its own, not a view of what was copied, so that `input_rows` knows what is a view of it
            self._input_ids = inputs.token_ids.clone()
        self.logits = self._model.forward(
            self._input_ids, inputs.positions, inputs.rows, self._cache, scorer := self._scorer(inputs, places)
        )
        self.scores = None if scorer is None else scorer.result()

    def _scorer(self, inputs: BatchInputs, places: Sequence[int]) -> Scorer | None:
        if not places or (self._boundary is not None and self._boundary.sends):
            return None
        counts = {each.num_likeliest for each in self.batch.slices if each.scored}
        return Scorer(inputs.targets, -1 if -1 in counts else max(counts), places, inputs.places)

    def _suspend(self) -> None:
        assert self.parent is not None
        self.parent.switch()

    def enter_unit(self, unit: int) -> None:
        if unit < self.unit:
            raise EngineError(f"unit {unit} was entered after unit {self.unit}")
        if unit > self.unit:
            self.unit = unit
            self._suspend()

    def slices(self) -> Sequence[Slice]:
        if not self.batch.filler:
            return self.batch.slices
        *others, last = self.batch.slices
        return [*others, dataclasses.replace(last, token_ids=last.token_ids + last.token_ids[-1:])]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if self.batch.filler:
            attended = self._attend(_without_last_row(call))
            return torch.cat([attended, torch.zeros_like(attended[:, :1])], dim=1)
        return self._attend(call)

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        begun = None if self._recorder is None else self._recorder.begin(COMPUTE)
        answer = self.view.attend(call)
        if isinstance(answer, torch.Tensor):
            if self._recorder is not None and begun is not None:
                self._recorder.end(begun, f"attention of layer {call.layer}")
            return answer
        while not isinstance(answer, torch.Tensor):
            self.pending = answer
            self._suspend()
            answer = answer.result()
        return answer

    def input_rows(self, module_name: str, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        is_input = token_ids is self._input_ids or token_ids._base is self._input_ids  # models may reshape their input
        return self._rows.rows(module_name, token_ids, self._host_ids if is_input else None)

    def stage_input(self) -> torch.Tensor:
        """Return the hidden states that the stage before this one has computed, where computing happens."""
        assert self._boundary is not None
        return self._copies.to_device(self._boundary.take(self._index))

    def stage_output(self, hidden: torch.Tensor) -> None:
        """Hand the hidden states over to the stage after this one, once they are in host memory; others go on meanwhile."""
        assert self._boundary is not None
        copies = self._copies.to_host(hidden)
        while not copies.done():
            self.pending = copies
            self._suspend()
        with copies.arrived() as (here,):
            self._boundary.put(self._index, here if copies.event is None else here.clone())  # the memory of a copy is lent

    @property
    def is_away(self) -> bool:
        """Whether another thread attends for it."""
        return isinstance(self.pending, PendingAttention) and not self.pending.done()

    @property
    def waits_for_input(self) -> bool:
        """Whether it cannot begin because its hidden states have not arrived."""
        return self.unit < 0 and self._boundary is not None and self._boundary.receives and not self._boundary.arrived(self._index)

    @property
    def waits_for_others(self) -> bool:
        """Whether the attention of others must come first."""
        return any(not other.dead and other.unit <= self.unit for other in self.after)

    def runnable(self, weights: WeightStore) -> bool:
        if self.pending is not None and not self.pending.done():
            return False
        return not self.waits_for_others and weights.is_ready(self.unit) and not self.waits_for_input


def _without_last_row(call: AttentionCall) -> AttentionCall:
    new = call.new and (call.new[0][:, :, :-1], call.new[1][:, :, :-1])
    query, key, value = call.query[:, :, :-1], call.key[:, :, :-1], call.value[:, :, :-1]
    return dataclasses.replace(call, query=query, key=key, value=value, new=new)


class SweepRecorder:
    """Records what the micro-batches of one pass compute, and what they wait for when none of them can go on.

    Args:
        recorder: The recorder of the trace.
        forwards: The coroutines of the micro-batches.
        units: What people call the units.
    """

    def __init__(self, recorder: Recorder, forwards: Sequence[MicroBatchForward], units: Sequence[str]) -> None:
        self._recorder, self._units = recorder, units
        self._indices = {forward: index for index, forward in enumerate(forwards)}
        self._cause, self._since, self._lowest = "", 0, 0  # of the wait that has not ended

    def begin(self) -> Begun:
        return self._recorder.begin(COMPUTE)

    def waits(self, cause: str, active: Sequence[MicroBatchForward]) -> None:
        """Record that all micro-batches wait, which may have begun before."""
        if cause != self._cause:
            self.goes_on()
            self._cause, self._since, self._lowest = cause, self._recorder.now(), min(each.unit for each in active)

    def goes_on(self) -> None:
        """Record that the wait is over, if there is one."""
        if self._cause:
            self._recorder.slice(COMPUTE, f"wait for {self._cause}", self._since, WAITING, unit=self._lowest)
            self._cause = ""

    def computed(self, forward: MicroBatchForward, unit: int, begun: Begun, *, resumed: bool) -> None:
        """Record what a micro-batch has computed, up to the next unit, the end, or attention that it waits for.

        Args:
            forward: The micro-batch.
            unit: The unit in which it was; -1 before the first.
            begun: When it began.
            resumed: Whether it had begun with the unit before, and waited for attention.
        """
        modules = {"modules": self._units[unit]} if unit >= 0 else {}
        self._recorder.end(
            begun, f"unit {unit}" if unit >= 0 else "begin", unit=unit, micro_batch=self._indices[forward],
            rows=sum(each.length for each in forward.batch.slices), pass_index=self._recorder.pass_index, resumed=resumed, **modules,
        )  # fmt: skip


def run_pass(
    forwards: Sequence[MicroBatchForward], weights: WeightStore, num_units: int, arrived: threading.Event,
    on_unit: Callable[[int], None], record: SweepRecorder | None = None, now: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:  # fmt: skip
    """Take all micro-batches through the model.

    Args:
        forwards: The coroutines of the micro-batches, in the order in which they should go first.
        weights: The store in which the units arrive.
        num_units: The number of units of the model.
        arrived: An event that other threads set whenever a unit or hidden states have arrived, or attention is done.
        on_unit: A function that is called whenever the frontmost micro-batch enters a unit.
        record: What records the pass for the trace; None without one.
        now: Returns the time in seconds.

    Returns:
        For each cause ("attention", "link" or "weights"), the seconds in which there was nothing to run.
    """
    waits: dict[str, float] = {}
    active = list(forwards)
    front = released = 0
    try:
        while active:
            arrived.clear()  # before checking: an arrival in the meantime sets it again
            weights.in_use({each.unit for each in active if not each.is_away})
            forward = _next_runnable(active, weights)
            if forward is None:
                _wait(active, weights, arrived, waits, record, now)
                continue
            resumed, forward.pending = forward.pending is not None, None
            if record is not None:
                record.goes_on()
            if forward.unit >= 0:
                weights.open(forward.unit)
            if forward.unit > front:
                front = forward.unit
                on_unit(front)
            unit, begun = forward.unit, None if record is None else record.begin()
            forward.switch()
            if record is not None and begun is not None:
                record.computed(forward, unit, begun, resumed=resumed)
            if forward.dead:
                active.remove(forward)
            done = min((each.unit for each in active), default=num_units)
            while released < done:
                weights.release(released)
                released += 1
    finally:
        if record is not None:
            record.goes_on()
        for forward in active:
            forward.throw(greenlet.GreenletExit)
    return waits


def _next_runnable(active: Sequence[MicroBatchForward], weights: WeightStore) -> MicroBatchForward | None:
    """Return the runnable micro-batch at the lowest unit; among equals the first."""
    for forward in sorted(active, key=_unit_of):
        if forward.runnable(weights):
            return forward
    return None


def _unit_of(forward: MicroBatchForward) -> int:
    return forward.unit


def _wait(
    active: Sequence[MicroBatchForward], weights: WeightStore, arrived: threading.Event, waits: dict[str, float],
    record: SweepRecorder | None, now: Callable[[], float],
) -> None:  # fmt: skip
    pending = [each.pending for each in active if each.pending is not None and not each.pending.done()]
    cause = _cause_of_pending(pending) if pending else _cause_of_rest(active, weights)
    if record is not None:
        record.waits(cause, active)
    start = now()
    arrived.wait(POLL_SECONDS if pending else IDLE_SECONDS)
    waits[cause] = waits.get(cause, 0.0) + now() - start


def _cause_of_pending(pending: Sequence[Pending | HostCopies]) -> str:
    return "link" if all(isinstance(each, HostCopies) for each in pending) else "attention"


def _cause_of_rest(active: Sequence[MicroBatchForward], weights: WeightStore) -> str:
    """Return what is waited for if nothing is pending: hidden states, if every micro-batch that has its own waits for others alone."""
    coming = [each for each in active if each.waits_for_input]
    rest = (each for each in active if each not in coming)
    return "link" if coming and all(each.waits_for_others or weights.is_ready(each.unit) for each in rest) else "weights"
