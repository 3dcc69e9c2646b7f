"""Runs on a simulated device with a clock: how long passes take if one resource decides, what they wait for, and what they need here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from machines import machine_of, steady
from typer.testing import CliRunner

from flexgen.base.quantities import GIB
from flexgen.bench.simulated import SimulatedReport, simulate_steady
from flexgen.bench.throughput import uniform_job
from flexgen.cli import app
from flexgen.devices.timed import CopyRules, TimedDevice
from flexgen.engine.sampling import Sampler
from flexgen.errors import OptionError
from flexgen.kv.host import HostView
from flexgen.options import EngineOptions
from flexgen.plan.machine import Machine
from flexgen.session.lookup import files_of
from flexgen.session.simulated import prepare_simulated

FAST = 0.01  # of what happens in what order, not of when
EXPERTS = {
    "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "vocab_size": 512, "max_position_embeddings": 512, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


def box(link: float = 1e12, flops: float = 1e16, host_attention: float = 1e13) -> Machine:
    """A machine on which nothing takes time but what is given."""
    curves = {place: {"float32": ((1.0, steady(rate)),)} for place, rate in (("host", host_attention), ("device", 1e13))}
    return machine_of(
        name="box", device="cuda", device_bytes=4 * GIB, dense={"float32": [(1, flops)]}, attention={"float32": 1e16},
        elementwise={"float32": 1e14}, decode_attention=curves, host_memory=1e14, host_to_device=link, device_to_host=1e12,
    )  # fmt: skip


def simulated(
    model: str | Path, machine: Machine, *, slow_motion: float = FAST, passes: int = 3, rules: CopyRules | None = None,
    trace: Path | None = None, **options: Any,
) -> SimulatedReport:  # fmt: skip
    asked = EngineOptions(**{"dtype": "float32", "max_num_seqs": 8, "prefill_tokens": 48, "load_format": "dummy", **options})
    files, workload = files_of(str(model), asked), uniform_job(64, 60, 24, 6)
    prepared = prepare_simulated(files, asked, machine, workload, slow_motion=slow_motion, rules=rules)
    return simulate_steady(prepared, warmup=1, passes=passes, trace=None if trace is None else str(trace))


# A busy machine makes passes longer than what decides them, and no machine makes them shorter.
LEAST_OVERLAP, MOST_OVERLAP = 0.2, 1.1


def test_where_the_link_decides(novels_opt: Path) -> None:
    """Weights take half a second in each pass, beside which Python's time is small."""
    report = simulated(novels_opt, box(link=4e7), slow_motion=1.0, weights="host=1", kv="device=1")
    run = report.steady.run
    assert max(run.busiest_seconds, key=run.busiest_seconds.__getitem__) == "host_to_device"
    assert run.busiest_seconds["host_to_device"] > 1
    assert LEAST_OVERLAP < run.overlap < MOST_OVERLAP
    assert run.bytes_moved["host_to_device"] == pytest.approx(4e7 * run.busiest_seconds["host_to_device"], rel=0.4), "rings run ahead"


def test_where_computing_decides(novels_opt: Path) -> None:
    report = simulated(novels_opt, box(flops=5e8), slow_motion=1.0, weights="device=1", kv="device=1")
    run, passes = report.steady.run, (*report.steady.steady.warmup, *report.steady.steady.passes)
    assert max(run.busiest_seconds, key=run.busiest_seconds.__getitem__) == "compute"
    assert LEAST_OVERLAP < run.overlap < MOST_OVERLAP
    expected = sum(each.ideal_seconds["compute"] for each in passes)
    assert report.busy_seconds["compute"] == pytest.approx(expected, rel=0.05), "operations take what the plan counts"
    assert report.seconds >= report.busy_seconds["compute"]


def test_where_attention_on_the_host_decides(novels_opt: Path) -> None:
    report = simulated(novels_opt, box(host_attention=1e6), slow_motion=1.0, weights="device=1", kv="host=1", host_attention="on", passes=2)
    expected = report.steady.run.forecast["resource_seconds"]["host_compute"]
    assert report.busy_seconds["host_compute"] / 3 == pytest.approx(expected, rel=0.3), "in three passes"
    assert report.busy_seconds["host_compute"] / report.seconds > LEAST_OVERLAP
    assert report.steady.run.wait_seconds["attention"] > LEAST_OVERLAP * report.steady.run.elapsed_seconds


def test_slow_motion_changes_what_python_counts_only(novels_opt: Path) -> None:
    fast, slow = (simulated(novels_opt, box(link=1e9), slow_motion=each, weights="host=1", kv="device=1") for each in (1.0, 20.0))
    assert slow.seconds < fast.seconds
    assert slow.busy_seconds["host_to_device"] == pytest.approx(fast.busy_seconds["host_to_device"], rel=0.4)
    assert slow.steady.run.overlap > LEAST_OVERLAP, "in passes of 20 ms"


@pytest.mark.parametrize("kv", ["device=1", "host=1", "device=.5,host=.5"])
@pytest.mark.parametrize("model", ["opt", "experts"])
def test_the_host_waits_once_for_the_tokens_of_a_micro_batch(
    kv: str, model: str, novels_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model == "experts":
        (tmp_path / "config.json").write_text(json.dumps({**EXPERTS, "architectures": ["GptOssForCausalLM"]}))
    counts = dict.fromkeys(("outputs", "sampled", "attended"), 0)
    devices: list[TimedDevice] = []

    def counted(owner: Any, name: str, what: str) -> None:
        really = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            counts[what] += 1
            if isinstance(self, TimedDevice):
                devices.append(self)
            return really(self, *args)

        monkeypatch.setattr(owner, name, call)

    counted(TimedDevice, "copy_out", "outputs")
    counted(Sampler, "start", "sampled")
    counted(HostView, "attend", "attended")
    report = simulated(novels_opt if model == "opt" else tmp_path, box(), weights="device=.3,host=.7", kv=kv)
    assert report.steady.run.num_errors == 0
    assert counts["sampled"] >= 4
    assert counts["outputs"] == counts["sampled"] + counts["attended"], "tokens, and what the host attends to or stores"
    assert (counts["attended"] == 0) == (kv == "device=1")
    assert devices[0].synchronisations == 0


@pytest.mark.parametrize(
    "rules",
    [CopyRules(chunk_bytes=None), CopyRules(urgent=False), CopyRules(waits=True), CopyRules(chunk_bytes=None, urgent=False, waits=True)],
)
def test_copies_by_other_rules_move_the_same(rules: CopyRules, novels_opt: Path) -> None:
    how: dict[str, Any] = {"weights": "host=1", "kv": "host=1"}
    usual, other = (simulated(novels_opt, box(), rules=each, **how).steady for each in (None, rules))
    assert [each.output_tokens for each in other.steady.passes] == [each.output_tokens for each in usual.steady.passes]


def test_weights_on_disk_take_the_disk_s_time(novels_opt: Path) -> None:
    slow = dataclasses.replace(box(), disk_read=steady(5.6e7))
    report = simulated(novels_opt, slow, slow_motion=1.0, weights="disk=1", kv="device=1", passes=2)
    assert report.busy_seconds["disk"] / report.seconds > 0.5


@pytest.mark.slow
def test_homes_of_many_gigabytes_take_no_memory() -> None:
    """Some 26 GB of weights, in float32, and the KV of 40 sequences."""
    before = psutil.Process().memory_info().rss
    machine = dataclasses.replace(box(), host_bytes=200 * GIB)
    report = simulated("opt-6.7b", machine, weights="host=1", kv="host=1", passes=1, max_num_seqs=40, host_mem="64GiB")
    homes = report.steady.run.placement
    assert homes["weights"]["host"] > 24 * GIB
    assert psutil.Process().memory_info().rss - before < 2 * GIB


def test_a_trace_has_simulated_time(novels_opt: Path, tmp_path: Path) -> None:
    report = simulated(novels_opt, box(link=1.4e9), slow_motion=5.0, weights="host=1", trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    passes = [each for each in events if each.get("name", "").startswith("pass ")]
    assert len(passes) == 4
    assert max(each["ts"] + each["dur"] for each in passes) <= 1e6 * report.seconds


def test_the_plan_is_for_the_machine_that_is_simulated(novels_opt: Path) -> None:
    asked = EngineOptions(dtype="float32", load_format="dummy", host_mem="2GiB", device_mem="1GiB")
    prepared = prepare_simulated(files_of(novels_opt, asked), asked, box(link=1e9), uniform_job(64, 60, 24, 6))
    prepared.discard()
    machine, limits = prepared.plan.machine, prepared.limits
    assert (machine.name, machine.host_to_device) == ("box", steady(1e9))
    assert (limits.host_bytes, limits.device_bytes, limits.disk_bytes) == (2 * GIB, GIB, 0)
    assert all(rate.best == rate.typical for curve in machine.dense.values() for _, rate in curve)
    assert prepared.model.dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "int4"}, "kv_format='int4' is not simulated"),
        ({"sparse_attention": 0.1}, "sparse_attention=0.1 is not simulated"),
        ({"verify_reads": True}, "reads nothing that could be compared"),
    ],
)
def test_what_is_not_simulated(options: dict[str, Any], message: str, novels_opt: Path) -> None:
    asked = EngineOptions(dtype="float32", load_format="dummy", **options)
    with pytest.raises(OptionError, match=message):
        prepare_simulated(files_of(novels_opt, asked), asked, box(), uniform_job(64, 60, 24, 6))


def test_a_machine_without_a_device_is_refused(novels_opt: Path) -> None:
    asked = EngineOptions(dtype="float32", load_format="dummy")
    with pytest.raises(OptionError, match="only machines with a device"):
        prepare_simulated(files_of(novels_opt, asked), asked, machine_of(), uniform_job(64, 60, 24, 6))


def test_the_command(novels_opt: Path, tmp_path: Path) -> None:
    job = ("--num-prompts", "60", "--input-len", "24", "--output-len", "6", "--passes", "2", "--warmup", "1")
    how = ("--machine", "rtx4090-64gb", "--slow-motion", "2", "--max-num-seqs", "8", "--prefill-tokens", "48")
    figures = tmp_path / "figures.json"
    done = CliRunner().invoke(app, ["bench", "steady", str(novels_opt), *job, *how, "--output-json", str(figures)])
    assert done.exit_code == 0, done.output
    assert "2 passes in the middle of 60 prompts, simulated on rtx4090-64gb" in done.stdout
    written = json.loads(figures.read_text())
    assert (written["machine"]["name"], written["simulated"]["slow_motion"]) == ("rtx4090-64gb", 2)
    assert set(written["simulated"]["busy_seconds"]) == {"disk", "host_to_device", "device_to_host", "host_compute", "compute"}
