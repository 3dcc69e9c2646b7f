"""What opening an engine does beside planning: the look at the machine before and after a job that is long enough."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import machine_of

from flexgen import LLM, SamplingParams
from flexgen.profile.check import MachineCheck
from flexgen.report.progress import RunReport
from flexgen.session import planned, prepare


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Files that were looked at, on a machine of fixed rates that has half of them just now."""
    calls: list[Path | None] = []

    def now(self: MachineCheck) -> dict[str, float]:
        calls.append(self.weights)
        return {"compute": 0.5, "disk_read": 0.5}

    machine = machine_of(decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
    monkeypatch.setattr(prepare, "cached_machine", lambda *_, **__: machine)
    monkeypatch.setattr(MachineCheck, "now", now)
    return calls


def report_of(model: Path, **options: object) -> RunReport:
    with LLM(model, dtype="float32", device="cpu", **options) as llm:
        llm.generate(["It was a dark night"], SamplingParams(temperature=0, max_tokens=3))
        return llm.report()


def test_a_short_job_is_not_looked_at(looked: list[Path | None], novels_opt: Path) -> None:
    report = report_of(novels_opt)
    assert looked == []
    assert (report.check_rates, report.busy_cores, report.overlap_at_check, report.efficiency_at_check) == ({}, None, None, None)


def test_a_longer_one_is_looked_at_before_and_after(looked: list[Path | None], novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "CHECKED_SECONDS", 0.0)
    report = report_of(novels_opt)
    assert looked == [None, None]
    assert report.check_rates == {"start": {"compute": 0.5, "disk_read": 0.5}, "end": {"compute": 0.5, "disk_read": 0.5}}
    assert report.busy_cores is not None
    assert report.busy_cores >= 0
    assert report.overlap <= (report.overlap_at_check or 0) <= 2 * report.overlap + 1e-9  # memory is not looked at
    assert report.efficiency_at_check == pytest.approx((report.overlap_at_check or 0) * report.plan)
    report_of(novels_opt, weights="disk=1")
    assert [path and path.name for path in looked[2:]] == ["model.safetensors"] * 2


def test_a_plan_looks_at_nothing(looked: list[Path | None], novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "CHECKED_SECONDS", 0.0)
    from flexgen.plan.workload import Workload

    with LLM(novels_opt, dtype="float32", device="cpu") as llm:
        llm.plan(Workload(prompt_lens=(5,), output_lens=(3,)))
    assert looked == []
