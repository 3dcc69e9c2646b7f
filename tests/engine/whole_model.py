"""A pipeline in one process: every pass of a block is run by the whole model when it begins, and told when it ends."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
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
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest, TokenResult

POLICY = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=1.0), kv=Fractions(host=1.0), kv_host_bytes=4 << 20, host_ring_bytes=0,
    embedding_resident=False, schedule="diagonal", max_num_seqs=3, prefill_tokens=40, micro_batch_tokens=24, page_tokens=16,
    compute_threads=1, io_threads=1, longest_sequence=128,
)  # fmt: skip


def tokens(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 120, (length,), generator=generator).tolist())


def requests(**how: Any) -> list[TokenRequest]:
    return [
        TokenRequest(index=index, prompt_token_ids=tokens(3 + 7 * index % 31, index), max_tokens=2 + 5 * index % 9, **how)
        for index in range(14)
    ]


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


def by_index(results: Sequence[TokenResult]) -> dict[int, TokenResult]:
    assert len({each.index for each in results}) == len(results)
    return {each.index: each for each in results}


def assert_alike(found: Sequence[TokenResult], wanted: Sequence[TokenResult]) -> None:
    """The same answers; log probabilities are rounded differently in other micro-batches."""
    mine, others = by_index(found), by_index(wanted)
    assert mine.keys() == others.keys()
    for index, one in mine.items():
        other = others[index]
        assert (one.token_ids, one.finish_reason, one.stop_string) == (other.token_ids, other.finish_reason, other.stop_string)
        assert (one.error is None) == (other.error is None)
        assert one.error is None or other.error is None or one.error.code == other.error.code
        for mine_scored, others_scored in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert (mine_scored is None) == (others_scored is None)
            for each, its in zip(mine_scored or (), others_scored or (), strict=True):
                assert each.token_ids == its.token_ids
                assert each.logprobs == pytest.approx(its.logprobs, abs=1e-3)


def assert_all_free(engine: PipelineEngine, stages: WholeModel) -> None:
    for block in engine.blocks:
        assert all(used == 0 for used in block.cache.used_bytes.values())
        assert block.work == 0
    assert not stages.known, "nobody remembers a request that has ended"
    assert not engine.has_work
