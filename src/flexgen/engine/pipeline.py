"""The engine of a pipeline: several blocks of sequences are under way through the stages of a model, so that no stage waits for another.

While the later stages compute a pass of one block, the first one begins that of the next.  The engine runs on the first stage, the
*leader*, which owns all requests; how plans, hidden states and answers travel is the business of the `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from flexgen.base.failpoints import failpoint
from flexgen.base.recorder import COMPUTE, WAITING, recorded
from flexgen.engine.admission import LengthForecast
from flexgen.engine.block_engine import BlockEngine
from flexgen.engine.blocks import Block
from flexgen.engine.choosing import BatchAnswer
from flexgen.engine.runner import ModelRunner
from flexgen.engine.sequence import LiveSequence
from flexgen.errors import EngineError
from flexgen.kv.cache import KVCache
from flexgen.kv.lanes import Lanes
from flexgen.passes.plan import PassPlan
from flexgen.plan.price.work import PassWork
from flexgen.request import TokenResult


class Pipeline(Protocol):
    """The stages of a model, seen from the first of them."""

    def begin(self, block: int, plan: PassPlan, requests: Mapping[int, LiveSequence], on_unit: Callable[[int], None]) -> None:
        """Begin a pass of a block, none of whose passes is in flight: send its plan, and run the first stage's part.

        Args:
            block: The block.
            plan: The plan of the pass, whose homes are lanes.
            requests: The live sequences of the block by their ids, as they are before the pass.
            on_unit: A function to call whenever the frontmost micro-batch enters a unit of the first stage.

        Raises:
            StorageError: Something could not be read or written.
            EngineError: A stage cannot continue.
        """
        ...

    def finish(self, block: int) -> tuple[list[BatchAnswer], dict[str, float]]:
        """Wait for the pass of a block, which is the one that began first of those in flight.

        Returns:
            The answer of each micro-batch; and for each cause the seconds in which the first stage had nothing to run in its own part,
            together with those that it has waited here, for "stages".

        Raises:
            EngineError: A stage cannot continue.
        """
        ...

    def forget(self, sequence_ids: Collection[int]) -> None:
        """Have the other stages forget sequences that hold no pages any more.

        One that was preempted comes back, and a later run may have others with the same ids.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A pass in flight.

    Attributes:
        plan: Its plan, whose homes are lanes.
        work: The work of the first stage.
    """

    plan: PassPlan
    work: PassWork


class PipelineEngine(BlockEngine):
    """The engine on the first stage of a pipeline.

    A step is the turn of one block: its pass in flight ends, and its next one begins.

    Args:
        runner: What executes the first stage's part of each pass; the engine closes it.
        lanes: The homes of KV over all stages.
        pipeline: The stages; the caller closes it.
    """

    def __init__(self, runner: ModelRunner, lanes: Lanes, pipeline: Pipeline) -> None:
        policy, lengths = runner.policy, LengthForecast()
        caches = [KVCache(lanes.groups, lanes.pools(index)) for index in range(policy.num_blocks)]
        super().__init__(runner, [Block(runner.model, policy, each, lanes.traits, lanes.shares, lengths) for each in caches])
        self._lanes, self._pipeline = lanes, pipeline
        self._flights: list[Flight | None] = [None] * len(self.blocks)
        self._given_up: list[int] = []  # blocks with a pass in flight for which nobody waits any more, in the order of beginning
        self._turn = 0  # the block whose turn is next
        self._last_end = 0.0  # when the last pass ended, or the first one after a pause began
        self._peak_bytes: dict[str, int] = {}
        self._is_broken = False

    def step(self) -> list[TokenResult]:
        """End the pass of the next block in turn, admit requests to it and begin its next pass; return the results that there are.

        Without work nothing happens.  After an error the engine runs no pass any more.

        Raises:
            StorageError: Something could not be read or written, so the engine cannot continue.
            EngineError: The engine cannot continue.
        """
        if self._is_broken:
            raise EngineError("a pass has failed before, so the engine cannot continue")
        results = self._take_ended()
        if not self.has_work:
            return results
        self.load()
        try:
            self._drain()
            block = self._next_block()
            results += self._end_pass(block)
            results += self._begin_pass(block)
        except BaseException:
            self._is_broken = True
            raise
        return results

    def _next_block(self) -> int:
        """Return the next block in turn that has something to do."""
        block = next(each for each in self._order() if self.blocks[each].has_work)
        self._turn = (block + 1) % len(self.blocks)
        return block

    def _order(self) -> Iterator[int]:
        """Yield the blocks in the order of their turns, which is also that in which their passes in flight have begun."""
        return iter((*range(self._turn, len(self.blocks)), *range(self._turn)))

    def _end_pass(self, index: int) -> list[TokenResult]:
        """Wait for the pass of a block, if one is in flight, and return the results of the requests that finished."""
        flight, block = self._flights[index], self.blocks[index]
        if flight is None:
            return []
        with recorded(self.runner.recorder, COMPUTE, "wait for stages", WAITING):
            answers, waits = self._pipeline.finish(index)
        self._flights[index] = None
        received = zip(flight.plan.micro_batches, answers, strict=True)
        results = [result for batch, answer in received for result in block.take(batch, answer, self.log)]
        end = self.runner.now()
        self.log.passed(end - self._last_end, flight.work, waits)
        self._last_end = end
        return results

    def _begin_pass(self, index: int) -> list[TokenResult]:
        """Begin the next pass of a block, and return the results of requests that can never fit."""
        block = self.blocks[index]
        scheduled, refused = block.schedule(self.log)
        plan = scheduled.plan
        self._note_kv()
        self._forget(scheduled.freed)
        if not plan.micro_batches:
            return refused
        failpoint("engine.pass")
        if not any(self._flights):
            self._last_end = self.runner.now()
        begun = self._begin_record()
        self._flights[index] = Flight(plan=plan, work=self.log.begins(self._load_of(self._lanes.for_stage(plan, 0))))
        block.prepare_guides(plan)
        with torch.no_grad():
            self._pipeline.begin(index, plan, block.scheduler.by_id, self._tell)
        self._end_record(plan, begun, block=index)
        return refused

    def clear(self) -> None:
        """Forget all unanswered requests; passes in flight are waited for before another one begins."""
        self._given_up += [each for each in self._order() if self._flights[each] is not None]
        self._flights = [None] * len(self.blocks)
        self._turn = 0
        freed = self._clear_blocks()
        if not self._is_broken:
            self._forget(freed)

    def _drain(self) -> None:
        """Wait for the passes that were given up, and drop what they have found."""
        while self._given_up:
            self._pipeline.finish(self._given_up.pop(0))

    def _forget(self, sequences: Collection[int]) -> None:
        """Have all stages forget sequences that hold no pages any more."""
        if sequences:
            self.runner.forget(set(sequences))
            self._pipeline.forget(sequences)

    # -- figures --------------------------------------------------------------------------------------------------------------------

    def _note_kv(self) -> None:
        """Remember the most bytes of KV that the first stage has held on each tier."""
        for tier, used in self._lanes.used_bytes(0, [block.cache for block in self.blocks]).items():
            self._peak_bytes[tier] = max(self._peak_bytes.get(tier, 0), used)

    def placement(self) -> dict[str, dict[str, int]]:
        """Return, for each tier of the first stage, the bytes of "weights" as assigned and of "kv" at the peak."""
        return self.runner.placement() | {"kv": dict(self._peak_bytes)}
