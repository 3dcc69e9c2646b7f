"""Runs of a pipeline with blocks in flight: requests that come and go, errors, what is told and recorded.

A stand-in runs the whole model in this process (whole_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from flexgen.base.recorder import COMPUTE, PASSES, Recorder
from flexgen.engine.engine import Engine
from flexgen.engine.pipeline import PipelineEngine
from flexgen.errors import EngineError, StorageError
from flexgen.models.assemble import assemble_model
from flexgen.report.progress import Progress
from flexgen.request import Generated, TokenResult
from tests.engine.whole_model import POLICY, WholeModel, assert_alike, assert_all_free, pipeline_engine, requests
from tests.traces import read_trace


@pytest.fixture(scope="module")
def single(novels_opt: Path) -> Iterator[Engine]:
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    with Engine(model, POLICY, poison=True) as engine:
        yield engine


@pytest.fixture(params=[1, 2, 3], ids="{} blocks".format)
def opened(request: pytest.FixtureRequest, novels_opt: Path) -> Iterator[tuple[PipelineEngine, WholeModel]]:
    with pipeline_engine(novels_opt, replace(POLICY, num_blocks=request.param)) as found:
        yield found


@pytest.fixture
def fresh(novels_opt: Path) -> Iterator[tuple[PipelineEngine, WholeModel]]:
    """Two blocks that a test may break."""
    with pipeline_engine(novels_opt, replace(POLICY, num_blocks=2)) as found:
        yield found


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
