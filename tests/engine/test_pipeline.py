"""Blocks in flight cannot change answers: one, two and three of them give the answers of the engine on one machine.

A stand-in runs the whole model in this process (whole_model.py); the stages themselves are tested where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen.base.recorder import COMPUTE, PASSES, Recorder
from flexgen.engine.admission import LengthForecast
from flexgen.engine.engine import Engine
from flexgen.engine.pipeline import PipelineEngine
from flexgen.errors import EngineError, RequestError, StorageError
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.report.progress import Progress
from flexgen.request import Generated, TokenRequest, TokenResult
from flexgen.text.common_prefixes import CommonPrefixes, PrefixCensus
from tests.engine.test_guided import Sum
from tests.engine.whole_model import WholeModel, pipeline_engine
from tests.traces import read_trace

POLICY = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=1.0), kv=Fractions(host=1.0), kv_host_bytes=4 << 20, host_ring_bytes=0,
    embedding_resident=False, schedule="diagonal", max_num_seqs=3, prefill_tokens=40, micro_batch_tokens=24, page_tokens=16,
    compute_threads=1, io_threads=1, longest_sequence=128,
)  # fmt: skip
ON_DISK: dict[str, Any] = {
    "kv": Fractions(host=0.5, disk=0.5), "kv_disk_bytes": 4 << 20, "kv_staging_bytes": 1 << 20, "kv_tail_bytes": 1 << 20
}  # fmt: skip
POLICIES = {
    "host": POLICY,
    "disk": replace(POLICY, **ON_DISK),
    "zigzag": replace(POLICY, schedule="zigzag"),
    "row": replace(POLICY, schedule="row"),
}


def tokens(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 120, (length,), generator=generator).tolist())


def requests(**how: Any) -> list[TokenRequest]:
    return [
        TokenRequest(index=index, prompt_token_ids=tokens(3 + 7 * index % 31, index), max_tokens=2 + 5 * index % 9, **how)
        for index in range(14)
    ]


class EndsWith:
    """A stop string, after so many tokens."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, token_ids: Sequence[int]) -> str | None:
        return "end" if len(token_ids) >= self._count else None


def alike() -> list[TokenRequest]:
    """An instruction, of which groups of requests have further pages in common, and choices that are scored after a context."""
    instruction = tokens(35, 100)
    groups = [(*instruction, *tokens(32, 101 + group)) for group in range(3)]
    asked = [
        TokenRequest(index=index, prompt_token_ids=(*groups[index % 3], *tokens(1 + index, 200 + index)), max_tokens=4)
        for index in range(9)
    ]
    context = tokens(33, 300)
    return asked + [
        TokenRequest(
            index=20 + index, prompt_token_ids=(*context, *tokens(3, 310 + index)), max_tokens=0, num_prompt_logprobs=1,
            first_scored=len(context),
        )
        for index in range(5)
    ]  # fmt: skip


def common(asked: Sequence[TokenRequest]) -> CommonPrefixes:
    census = PrefixCensus(POLICY.page_tokens)
    for each in asked:
        census.add(each.sharable, each.offered)
    return census.common()


# Each of these makes its requests anew, because guides remember what they were asked.
KINDS: dict[str, Callable[[], list[TokenRequest]]] = {
    "greedy": requests,
    "drawn": lambda: requests(temperature=0.9, top_p=0.9, top_k=30, seed=7),
    "penalties": lambda: requests(temperature=0.7, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    "log probabilities": lambda: requests(num_logprobs=3, temperature=0.5, seed=1),
    "scored": lambda: requests(num_prompt_logprobs=2, num_logprobs=1),
    "only scored": lambda: [replace(each, max_tokens=0) for each in requests(num_prompt_logprobs=2)],
    "guided": lambda: [replace(each, guide=Sum(length=1 + each.index % 4)) if each.index % 2 else each for each in requests()],
    "failing guide": lambda: [
        replace(each, guide=Sum(error=RequestError("no", code="c"))) if each.index == 4 else each for each in requests()
    ],
    "stop strings": lambda: [replace(each, stops=EndsWith(1 + each.index % 5)) for each in requests()],
    "stop tokens": lambda: requests(stop_token_ids=frozenset(range(5, 60))),
    "resumed": lambda: [
        replace(each, generated=Generated(token_ids=tokens(min(each.index % 4, each.max_tokens), each.index))) for each in requests()
    ],
    "never fit": lambda: [*requests(), *(replace(each, index=50 + each.index, prompt_token_ids=(5,) * 9000) for each in requests()[:3])],
    "alike": alike,
}  # fmt: skip


@pytest.fixture(scope="module")
def single(novels_opt: Path) -> Iterator[Engine]:
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    with Engine(model, POLICY, poison=True) as engine:
        yield engine


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} blocks".format)
def opened(request: pytest.FixtureRequest, novels_opt: Path) -> Iterator[tuple[PipelineEngine, WholeModel]]:
    with pipeline_engine(novels_opt, replace(POLICY, num_blocks=request.param)) as found:
        yield found


@pytest.fixture
def fresh(novels_opt: Path) -> Iterator[tuple[PipelineEngine, WholeModel]]:
    """Two blocks that a test may break."""
    with pipeline_engine(novels_opt, replace(POLICY, num_blocks=2)) as found:
        yield found


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


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_one_machine(kind: str, single: Engine, opened: tuple[PipelineEngine, WholeModel]) -> None:
    engine, stages = opened
    stages.most_in_flight = 0
    wanted, found = list(single.generate(KINDS[kind]())), list(engine.generate(KINDS[kind]()))
    assert len(wanted) == len(KINDS[kind]())
    assert_alike(found, wanted)
    assert_all_free(engine, stages)
    assert stages.most_in_flight == len(engine.blocks)
    assert engine.log.counts.output_tokens == single.log.counts.output_tokens
    assert engine.log.counts.scored_tokens == single.log.counts.scored_tokens


@pytest.mark.parametrize("name", POLICIES)
def test_wherever_kv_lives_and_whatever_the_schedule(name: str, single: Engine, novels_opt: Path, tmp_path: Path) -> None:
    with pipeline_engine(novels_opt, replace(POLICIES[name], num_blocks=2), tmp_path) as (engine, stages):
        assert_alike(list(engine.generate(requests())), list(single.generate(requests())))
        assert_all_free(engine, stages)
        assert engine.placement()["kv"].keys() == engine.runner.cache.pools.keys()
        assert all(0 < used <= 2 * 4 << 20 for used in engine.placement()["kv"].values())
        tails = [pool.tails for pool in engine.runner.cache.pools.values() if hasattr(pool, "tails")]  # type: ignore[attr-defined]
        assert all(not slots for each in tails for slots in each._slots), "tails are free again, although no page came back here"


def test_preemption_concerns_one_block(single: Engine, novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages run out, because all answers are expected to end at once."""
    asked = [TokenRequest(index=index, prompt_token_ids=tokens(8, index), max_tokens=40) for index in range(20)]
    wanted = list(single.generate(asked))
    monkeypatch.setattr(LengthForecast, "expect", lambda *_: 1)
    (group,) = single.cache.groups
    small = replace(POLICY, kv_host_bytes=9 * group.page_bytes, max_num_seqs=8, longest_sequence=64, num_blocks=2)
    with pipeline_engine(novels_opt, small) as (engine, stages):
        found = list(engine.generate(asked))
        assert sum(each.num_preemptions for each in found) == engine.log.counts.preemptions > 0
        assert {block for event, block in stages.events if event == "begin"} == {0, 1}
        assert_all_free(engine, stages)
    assert_alike(found, wanted)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_prefixes_are_shared_within_a_block(num_blocks: int, single: Engine, novels_opt: Path) -> None:
    """Requests with a context of their own go to the same block, so that each context is computed once, as on one machine."""
    asked = alike()
    prefixes = common(asked)
    wanted = list(single.generate(asked, prefixes=prefixes))
    most = replace(POLICY, max_num_seqs=5, num_blocks=num_blocks)
    with pipeline_engine(novels_opt, most) as (engine, stages):
        block_for, went = engine._block_for, dict[int, int]()

        def noted(request: TokenRequest) -> Any:
            block = block_for(request)
            went[request.index] = engine.blocks.index(block)
            return block

        engine._block_for = noted  # type: ignore[method-assign]
        found = list(engine.generate(asked, prefixes=prefixes))
        assert_all_free(engine, stages)
    assert_alike(found, wanted)
    assert engine.log.counts.shared_prompt_tokens > 0
    for group in ([0, 3, 6], [1, 4, 7], [2, 5, 8], [20, 21, 22, 23, 24]):
        assert len({went[index] for index in group}) == 1
    assert set(went.values()) == set(range(num_blocks)), "and the groups are spread"
    lost = single.log.counts.shared_prompt_tokens - engine.log.counts.shared_prompt_tokens
    assert lost <= 32 * (num_blocks - 1), "only the instruction is computed in every block"


def test_work_is_spread_over_the_blocks(fresh: tuple[PipelineEngine, WholeModel]) -> None:
    engine, _ = fresh
    for each in requests():
        engine.add(each)
    least, most = sorted(block.work for block in engine.blocks)
    assert most - least <= max(len(each.prompt_token_ids) + each.max_tokens for each in requests())
    assert engine.num_waiting == len(requests())
    engine.clear()
    assert [block.work for block in engine.blocks] == [0, 0]


def test_requests_added_while_others_run(single: Engine, opened: tuple[PipelineEngine, WholeModel]) -> None:
    engine, stages = opened
    assert engine.step() == []
    wanted, results = list(single.generate(requests())), list[TokenResult]()
    for each in requests():
        engine.add(each)
        results += engine.step()
    while engine.has_work:
        results += engine.step()
    assert engine.step() == []
    assert_alike(results, wanted)
    assert_all_free(engine, stages)


def test_what_had_ended_comes_with_the_next_step(fresh: tuple[PipelineEngine, WholeModel]) -> None:
    engine, stages = fresh
    asked = requests()[0]
    engine.add(replace(asked, generated=Generated(token_ids=(7,) * asked.max_tokens)))
    assert [each.index for each in engine.step()] == [0]
    assert not stages.events


def test_a_run_begins_only_once_the_last_one_is_over(fresh: tuple[PipelineEngine, WholeModel]) -> None:
    engine, _ = fresh
    engine.add(requests()[0])
    with pytest.raises(EngineError, match="over"):
        next(engine.generate(requests()[1:]))


def test_all_blocks_answers_are_told_after_every_step(fresh: tuple[PipelineEngine, WholeModel]) -> None:
    engine, _ = fresh
    told: list[dict[int, int]] = []
    results = []
    for each in engine.generate(
        requests(), on_pass=lambda answers: told.append({each.index: len(each.generated.token_ids) for each in answers})
    ):
        results.append(each)
    assert max(map(len, told)) > POLICY.max_num_seqs, "those of more than one block"
    assert len(told) >= engine.log.passes.num_passes


def test_a_run_that_is_given_up_leaves_nothing(single: Engine, opened: tuple[PipelineEngine, WholeModel]) -> None:
    """Passes in flight are waited for when the next one begins, not before."""
    engine, stages = opened
    for number in (1, 4):
        partial = engine.generate(requests())
        for _ in range(number):
            next(partial)
        num_events = len(stages.events)
        partial.close()
        assert len(stages.events) == num_events
        assert_all_free(engine, stages)
    assert_alike(list(engine.generate(requests())), list(single.generate(requests())))
    assert_all_free(engine, stages)


@pytest.mark.parametrize("where", [("begin", 0), ("begin", 1), ("finish", 0), ("finish", 1)], ids=str)
@pytest.mark.parametrize("error", [StorageError("gone"), KeyboardInterrupt()], ids=lambda each: type(each).__name__)
def test_after_an_error_there_is_no_other_pass(
    where: tuple[str, int], error: BaseException, fresh: tuple[PipelineEngine, WholeModel]
) -> None:
    engine, stages = fresh
    engine.add(requests()[0])
    engine.clear()

    def fail(event: tuple[str, int]) -> None:
        if event == where and stages.events.count(where) == 2:
            raise error

    stages.fail = fail
    with pytest.raises(type(error)):
        list(engine.generate(requests()))
    num_events = len(stages.events)
    assert not engine.has_work
    engine.add(requests()[0])
    with pytest.raises(EngineError, match="failed before"):
        engine.step()
    engine.clear()
    with pytest.raises(EngineError, match="failed before"):
        list(engine.generate(requests()))
    assert len(stages.events) == num_events
    engine.close()
    engine.close()


def test_an_error_of_the_caller_is_no_error_of_the_engine(single: Engine, fresh: tuple[PipelineEngine, WholeModel]) -> None:
    engine, stages = fresh

    def full(answers: object) -> None:
        if len(stages.events) > 5:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        list(engine.generate(requests(), on_pass=full))
    assert_alike(list(engine.generate(requests())), list(single.generate(requests())))


def test_passes_are_as_long_as_the_time_between_their_ends(fresh: tuple[PipelineEngine, WholeModel]) -> None:
    """So their sum is the time of the run; the waits are those of the first stage and, for the others, of `finish`."""
    engine, _ = fresh
    engine.load()
    log = engine.new_log()
    begin = engine.runner.now()
    list(engine.generate(requests(), log=log))
    passes = log.passes
    assert 0 < passes.seconds <= engine.runner.now() - begin
    assert passes.seconds >= 0.5 * log.elapsed_seconds
    assert passes.waits["stages"] == pytest.approx(0.25 * passes.num_passes)


def test_progress_is_told_within_passes(fresh: tuple[PipelineEngine, WholeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.report.run_log.PROGRESS_SECONDS", 0.0)
    engine, _ = fresh
    told: list[Progress] = []
    list(engine.generate(requests(), log=engine.new_log(on_progress=told.append)))
    assert {each.unit for each in told} >= set(range(1, engine.runner.num_units))
    assert max(each.num_live_sequences for each in told) > POLICY.max_num_seqs


def test_a_trace_shows_the_waits_for_other_stages(novels_opt: Path, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace.json")
    with pipeline_engine(novels_opt, replace(POLICY, num_blocks=2), recorder=recorder) as (engine, _):
        list(engine.generate(requests()))
        num_passes = engine.log.passes.num_passes
    recorder.close()
    trace = read_trace(tmp_path / "trace.json")
    assert len(trace.slices[PASSES]) == num_passes
    assert {each["args"]["block"] for each in trace.slices[PASSES]} == {0, 1}
    assert len(trace.named(COMPUTE, "wait for stages")) == num_passes
