"""Passes measured in the middle of a planned job: as in a full run of the same job, within the plan, with figures that agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexgen import LLM
from flexgen.bench.steady import run_steady
from flexgen.bench.throughput import random_requests, uniform_workload
from flexgen.errors import EngineError, OptionError
from flexgen.report.steady import MeasuredPass, SteadyReport, format_steady

DEVICES: list[dict[str, Any]] = [
    {"device": "cpu", "weights": "host=.5,disk=.5"},
    {"device": "sim", "weights": "device=.3,host=.7", "kv": "device=.5,host=.5", "device_mem": "96MiB"},
    {"device": "sim", "weights": "host=1", "load_format": "dummy", "device_mem": "96MiB"},
]
IDS = [" ".join(map(str, each.values())) for each in DEVICES]


def opened(model: Path, **options: Any) -> LLM:
    return LLM(model, dtype="float32", max_num_seqs=8, prefill_tokens=48, **options)


def measure(llm: LLM, num_prompts: int = 60, *, warmup: int = 1, passes: int = 6) -> SteadyReport:
    return run_steady(llm, uniform_workload(llm, num_prompts, 24, 6), warmup=warmup, passes=passes)


def composition(passes: tuple[MeasuredPass, ...]) -> list[tuple[int, int, int]]:
    return [(each.num_sequences, each.prompt_tokens, each.output_tokens) for each in passes]


@pytest.mark.parametrize("options", DEVICES, ids=IDS)
def test_as_in_the_middle_of_a_full_run(options: dict[str, Any], novels_opt: Path) -> None:
    full: list[tuple[int, int, int]] = []

    def note(_: object) -> None:
        work = llm.model._engine.engine._engine.log.passes.last.work  # type: ignore[union-attr]
        full.append((round(work.num_sequences), round(work.num_prompt_tokens), round(work.num_sampled)))

    with opened(novels_opt, **options) as llm:
        report = measure(llm)
        workload = uniform_workload(llm, 60, 24, 6)
        assert len(list(llm.stream(random_requests(llm, workload), workload, on_pass=note))) == 60
        policy = llm.open(workload).policy
        first = report.steady.skipped_passes
        assert composition(report.steady.warmup + report.steady.passes) == full[first : first + 7]
        assert first >= 5, "an answer has ended before"
        assert full[first + 7 :], "and not all are in"
        for tier, size in report.run.placement["kv"].items():
            assert 0 < size <= getattr(policy, f"kv_{tier}_bytes")
        assert report.run.peak_device_bytes <= report.run.device_budget_bytes


def test_the_figures_agree(novels_opt: Path) -> None:
    with opened(novels_opt, device="cpu", weights="disk=1") as llm:
        report = measure(llm)
    run, steady, passes = report.run, report.steady, report.steady.passes
    assert (len(steady.warmup), len(passes), run.num_passes) == (1, 6, 6)
    seconds = [each.seconds for each in passes]
    assert run.elapsed_seconds == pytest.approx(sum(seconds))
    assert run.output_tokens == sum(each.output_tokens for each in passes) > 0
    assert run.prompt_tokens == sum(each.prompt_tokens for each in passes) > 0
    assert run.output_tokens_per_s == pytest.approx(run.output_tokens / run.elapsed_seconds)
    assert steady.passes_per_s == pytest.approx(6 / run.elapsed_seconds)
    assert steady.pass_seconds["least"] <= steady.pass_seconds["median"] <= steady.pass_seconds["most"]
    for link, size in run.bytes_moved.items():
        assert sum(each.bytes_moved[link] for each in passes) == size
    assert run.bytes_moved["disk_read"] > 3 * run.forecast["weights_bytes_per_pass"]["disk_read"]
    busiest = sum(max(each.ideal_seconds.values()) for each in passes)
    assert run.overlap == pytest.approx(busiest / run.elapsed_seconds)
    assert run.efficiency == pytest.approx(run.overlap * run.plan)
    assert 0 < run.plan <= 1
    assert run.forecast["seconds_of_these_passes"] == pytest.approx(sum(each.expected_seconds for each in passes))
    assert steady.expected_tokens_per_s["these_passes"] == pytest.approx(run.output_tokens / run.forecast["seconds_of_these_passes"])
    assert steady.expected_tokens_per_s["these_passes"] == pytest.approx(steady.expected_tokens_per_s["middle"], rel=0.3)
    assert json.loads(json.dumps(report.to_json()))["steady"]["passes"][0]["seconds"] == seconds[0]
    assert f"{run.output_tokens_per_s:.2f} output tokens/s" in format_steady(report)


def test_what_comes_first_is_not_counted(novels_opt: Path) -> None:
    with opened(novels_opt, device="cpu", weights="host=1") as llm:
        without, with_three = measure(llm, warmup=0), measure(llm, warmup=3)
    assert without.steady.warmup == ()
    assert len(with_three.steady.warmup) == 3
    assert composition(without.steady.passes) == composition(with_three.steady.passes)
    assert without.steady.skipped_passes == with_three.steady.skipped_passes + 3


def test_too_few_prompts(novels_opt: Path) -> None:
    with opened(novels_opt, device="cpu") as llm:
        with pytest.raises(OptionError, match=r"8 requests make a job of .* raise num_prompts"):
            measure(llm, num_prompts=8)
        assert measure(llm).run.num_errors == 0, "and the engine is as good as before"


def test_a_job_that_ends_before_the_plan_says_so(novels_opt: Path) -> None:
    with opened(novels_opt, device="cpu") as llm:
        workload = uniform_workload(llm, 60, 24, 6)
        fewer = list(random_requests(llm, workload))[:20]
        with pytest.raises(EngineError, match="earlier than planned: raise num_prompts"):
            llm.model.steady(fewer, workload, num_warmup=1, num_passes=20)
