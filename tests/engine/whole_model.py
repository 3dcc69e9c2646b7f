"""A pipeline in one process: every pass of a block is run by the whole model when it begins, and told when it ends."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig

from flexgen.base.recorder import Recorder
from flexgen.engine.choosing import BatchAnswer, Chooser
from flexgen.engine.pipeline import Pipeline, PipelineEngine
from flexgen.engine.runner import ModelRunner
from flexgen.engine.sequence import LiveSequence
from flexgen.kv.lanes import Lanes, StageKV, lanes_of
from flexgen.kv.pages import PagePool
from flexgen.models.assemble import assemble_model
from flexgen.passes.plan import PassPlan
from flexgen.plan.policy import Policy


class WholeModel(Pipeline):
    """Answers passes in the order in which they began, as the last stage of a pipeline does.

    Attributes:
        known: The requests that the last stage of a real pipeline would know.
        most_in_flight: The most passes that were in flight at the same time.
        events: What was asked for, in order: ("begin", block), ("finish", block).
        fail: A function that is called with every event.
    """

    def __init__(self, runner: ModelRunner, lanes: Lanes) -> None:
        self._runner, self._lanes, self._chooser = runner, lanes, Chooser(runner.copies)
        self._flying: deque[tuple[int, list[BatchAnswer], dict[str, float]]] = deque()
        self.known: set[int] = set()
        self.most_in_flight = 0
        self.events: list[tuple[str, int]] = []
        self.fail: Callable[[tuple[str, int]], None] = lambda event: None

    def begin(self, block: int, plan: PassPlan, requests: Mapping[int, LiveSequence], on_unit: Callable[[int], None]) -> None:
        self._note("begin", block)
        assert all(block != other for other, _, _ in self._flying), "one pass of a block at a time"
        self._check_pages(block, plan)
        self.known |= {each.sequence for batch in plan.micro_batches for each in batch.slices}
        outputs, waits = self._runner.run(self._lanes.for_stage(plan, 0), on_unit)
        answers: list[BatchAnswer] = []
        for batch, output in zip(plan.micro_batches, outputs, strict=True):
            wanted = [requests[sequence] for sequence, _ in batch.wanted]
            answers.append(self._chooser.start(batch, output, [each.request for each in wanted], [each.generated for each in wanted])())
        self._flying.append((block, answers, waits))
        self.most_in_flight = max(self.most_in_flight, len(self._flying))

    def _check_pages(self, block: int, plan: PassPlan) -> None:
        """Each block has pages of its own."""
        for batch in self._lanes.for_stage(plan, 0).micro_batches:
            for each in batch.slices:
                for table, count in zip(each.tables, self._runner.cache.pools[batch.home].num_pages, strict=True):
                    size = count // self._runner.policy.num_blocks
                    assert all(page == -1 or block * size <= page < (block + 1) * size for page in table)

    def finish(self, block: int) -> tuple[list[BatchAnswer], dict[str, float]]:
        self._note("finish", block)
        first, answers, waits = self._flying.popleft()
        assert first == block, "in the order of beginning"
        return answers, waits | {"stages": 0.25}

    def forget(self, sequence_ids: Collection[int]) -> None:
        self.known -= set(sequence_ids)

    def _note(self, *event: str | int) -> None:
        self.events.append(event)  # type: ignore[arg-type]
        self.fail(event)  # type: ignore[arg-type]


@contextlib.contextmanager
def pipeline_engine(
    folder: Path, policy: Policy, offload_dir: Path | None = None, recorder: Recorder | None = None
) -> Iterator[tuple[PipelineEngine, WholeModel]]:
    """An engine over a model in one process; its KV memory is full of NaN, so that no page is read before it is written."""
    model = assemble_model(folder, AutoConfig.from_pretrained(folder), torch.float32)
    runner = ModelRunner(model, policy, offload_dir=offload_dir, poison=True, recorder=recorder)
    with contextlib.ExitStack() as opened:
        opened.callback(runner.close)
        for pool in runner.cache.pools.values():
            if isinstance(pool, PagePool):
                for memory in pool.memory:
                    memory.keys.fill_(0xFF)
                    memory.values.fill_(0xFF)
        lanes = lanes_of([StageKV(groups=runner.cache.groups, policy=policy)])
        stages = WholeModel(runner, lanes)
        yield PipelineEngine(runner, lanes, stages), stages
