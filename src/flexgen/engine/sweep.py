"""One pass: a coroutine per micro-batch, and one ready loop that runs whichever has what it waits for.

Dataflow, no barrier per layer: lowest unit first; a unit is released when the last coroutine has left it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import greenlet
import torch

from flexgen.engine.schedule import Slice
from flexgen.errors import EngineError
from flexgen.kv.place import PendingAttention, View
from flexgen.models.attention import PassCache
from flexgen.models.coroutine import ForwardCoroutine
from flexgen.models.skeleton import BoundModel
from flexgen.passes.calls import AttentionCall, Span
from flexgen.weights.store import WeightStore

FEW_ROWS = 256  # up to here odd row counts cost nothing
IDLE_SECONDS = 0.5  # longest wait between looks; arrivals wake the loop earlier


class RowSource(Protocol):
    """Where embedding rows come from (weights/rows.py)."""

    def rows(self, module: str, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class MicroBatch(ForwardCoroutine):
    """Slices computed together; a greenlet that runs the model's forward.

    Attributes:
        wanted: the unit it waits for (-1 before it starts). pending: attention it waits for.
        logits: (sampled, vocab) once it has finished.
        after: micro-batches whose attention must come first in every layer (the previous chunk of a prompt, a shared beginning).
        filler: rows (0 or 1) that repeat the last token and are thrown away: CPU matrix kernels lose up to a quarter of
            their rate at odd row counts (docs/log.md).
    """

    def __init__(
        self, slices: Sequence[Slice], model: BoundModel, cache: PassCache, view: View, rows: RowSource, device: torch.device,
        *, even_rows: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(self._forward)
        self.slices = tuple(slices)
        num_tokens = sum(each.length for each in slices)
        self.filler = num_tokens % 2 if even_rows and num_tokens > FEW_ROWS else 0
        self.wanted = -1
        self.pending: PendingAttention | None = None
        self.logits: torch.Tensor | None = None
        self.after: set[MicroBatch] = set()
        self.view = view
        self._model, self._cache, self._rows, self._device = model, cache, rows, device

    @property
    def home(self) -> str:
        """The tier of its sequences' KV."""
        kv = self.slices[0].sequence.kv
        assert kv is not None
        return kv.home

    def _forward(self) -> None:
        ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        for each in self.slices:
            ids += each.sequence.tokens[each.start : each.start + each.length]
            positions += range(each.start, each.start + each.length)
            if each.last:
                sampled.append(len(ids) - 1)
        ids += ids[-1:] * self.filler
        positions += positions[-1:] * self.filler
        self.logits = self._model.forward(
            torch.tensor([ids], device=self._device),
            torch.tensor([positions], device=self._device),
            torch.tensor(sampled, dtype=torch.int64, device=self._device),
            self._cache,
        )

    def _suspend(self) -> None:
        assert self.parent is not None
        self.parent.switch()

    def enter_unit(self, unit: int) -> None:
        if unit < self.wanted:
            raise EngineError(f"unit {unit} was entered after unit {self.wanted}")
        if unit > self.wanted:
            self.wanted = unit
            self._suspend()

    def spans(self) -> list[Span]:
        last = self.slices[-1]
        return [
            Span(
                start=each.start,
                length=each.length + (self.filler if each is last else 0),
                prompt_len=len(each.sequence.request.prompt_token_ids),
                total=len(each.sequence.tokens),
            )
            for each in self.slices
        ]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if self.filler:
            attended = self._attend(_without_last_row(call))
            return torch.cat([attended, torch.zeros_like(attended[:, :1])], dim=1)
        return self._attend(call)

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        answer = self.view.attend(call)
        if isinstance(answer, torch.Tensor):
            return answer
        self.pending = answer
        self._suspend()
        return answer.result()

    def input_rows(self, module_name: str, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rows.rows(module_name, token_ids)

    def runnable(self, weights: WeightStore) -> bool:
        if self.pending is not None and not self.pending.done():
            return False
        if any(not other.dead and other.wanted <= self.wanted for other in self.after):
            return False
        return weights.is_ready(self.wanted)


def _without_last_row(call: AttentionCall) -> AttentionCall:
    new = call.new and (call.new[0][:, :, :-1], call.new[1][:, :, :-1])
    query, key, value = call.query[:, :, :-1], call.key[:, :, :-1], call.value[:, :, :-1]
    return dataclasses.replace(call, query=query, key=key, value=value, new=new)


def run_pass(
    batches: Sequence[MicroBatch], weights: WeightStore, num_units: int, *, on_unit: Callable[[int], None], waits: dict[str, float]
) -> None:
    """Run all micro-batches through the model.

    Args:
        on_unit: told whenever the frontmost micro-batch enters a unit.
        waits: seconds without anything to run are added to "attention" or "weights".
    """
    active = list(batches)
    front = released = 0
    try:
        while active:
            batch = _next_runnable(active, weights)
            if batch is None:
                _wait(active, weights, waits)
                continue
            batch.pending = None
            if batch.wanted >= 0:
                weights.open(batch.wanted)
            if batch.wanted > front:
                front = batch.wanted
                on_unit(front)
            batch.switch()
            if batch.dead:
                active.remove(batch)
            done = min((each.wanted for each in active), default=num_units)
            while released < done:
                weights.release(released)
                released += 1
    finally:
        for batch in active:
            batch.throw(greenlet.GreenletExit)


def _next_runnable(active: Sequence[MicroBatch], weights: WeightStore) -> MicroBatch | None:
    """The runnable micro-batch at the lowest unit; among equals the first."""
    for batch in sorted(active, key=_position):
        if batch.runnable(weights):
            return batch
    return None


def _position(batch: MicroBatch) -> int:
    return batch.wanted


def _wait(active: Sequence[MicroBatch], weights: WeightStore, waits: dict[str, float]) -> None:
    cause = "attention" if any(each.pending is not None and not each.pending.done() for each in active) else "weights"
    start = time.perf_counter()
    weights.wait_arrival(IDLE_SECONDS if cause == "weights" else 0.0005, lambda: _next_runnable(active, weights) is not None)
    waits[cause] = waits.get(cause, 0.0) + time.perf_counter() - start
