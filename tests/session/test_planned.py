"""What opening an engine does beside planning: the look at the machine before and after a job that is long enough."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from machines import machine_of

from flexgen import LLM, SamplingParams
from flexgen.devices.sim import SimulatedDevice
from flexgen.profile.check import MachineCheck
from flexgen.profile.limits import find_limits
from flexgen.report.progress import RunReport
from flexgen.session import model, planned, prepare


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


def test_next_tokens_attend_where_the_option_says(looked: list[Path | None], novels_opt: Path) -> None:
    """To KV on the host: the answers are the same, and the memory of both ways is in the plan."""
    texts, moved, device_bytes = [], [], []
    for where in ("on", "off"):
        with LLM(
            novels_opt, dtype="float32", device="sim", device_mem="200MiB", host_mem="2GiB", kv="host=1", host_attention=where
        ) as llm:  # fmt: skip
            outputs = llm.generate(["It was a dark night", "The old house stood"], SamplingParams(temperature=0, max_tokens=30))
            report = llm.report()
        texts.append([each.outputs[0].text for each in outputs])
        moved.append(report.bytes_moved["host_to_device"])
        device_bytes.append(report.peak_device_bytes)
        assert report.peak_device_bytes <= sum(report.forecast["memory_bytes"]["device"].values()) <= 200 << 20
    assert texts[0] == texts[1]
    assert moved[0] != moved[1]
    assert device_bytes[0] < device_bytes[1], "which has a ring"


def test_the_budget_of_a_device_is_that_of_the_process(
    looked: list[Path | None], novels_opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arenas share what is left beside what belongs to no tensor."""
    opened: list[tuple[int, int]] = []
    monkeypatch.setattr(SimulatedDevice, "limit", lambda device, size: opened.append((device.budget_bytes, size)))
    overhead = 40 << 20
    monkeypatch.setattr(
        model, "find_limits", lambda options: dataclasses.replace(find_limits(options), device_overhead_bytes=overhead)
    )  # fmt: skip
    with LLM(novels_opt, dtype="float32", device="sim", device_mem="200MiB", host_mem="2GiB") as llm:
        llm.generate(["It was a dark night"], SamplingParams(temperature=0, max_tokens=3))
        report = llm.report()
    assert opened == [((200 << 20) - overhead, 200 << 20)]
    assert report.forecast["memory_bytes"]["device"]["CUDA context and libraries"] == overhead
    assert 0 < report.peak_device_bytes <= (200 << 20) - overhead
    assert report.device_budget_bytes == 200 << 20
