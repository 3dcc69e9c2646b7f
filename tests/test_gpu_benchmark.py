"""The steps of benchmarks/gpu: their order, their results, what is repeated; and that each of them runs, on tiny models without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.execute import driver_peak, run_steps
from benchmarks.gpu.links import Copies, behind, launches, pinning, rates, reads
from benchmarks.gpu.models import CAPS, MODELS, TINY, write_configs
from benchmarks.gpu.peers.commands import Peers
from benchmarks.gpu.step import Step
from benchmarks.gpu.steps import Setting
from benchmarks.gpu.table import format_table


def step(name: str, code: str, **changes: Any) -> Step:
    values = {"name": name, "what": "a test", "command": (sys.executable, "-c", code), "seconds": 30.0} | changes
    return Step(**values)


def run(steps: list[Step], out: Path, seconds: float = 60.0, **how: Any) -> list[tuple[str, str]]:
    results = run_steps(steps, out, seconds, tell=lambda _: None, **how)
    assert [json.loads((out / f"{each.name}.json").read_text()) for each in steps] == results
    return [(each["step"], each["status"]) for each in results]


def test_steps_run_in_order_and_leave_their_results(tmp_path: Path) -> None:
    noting = "open(r'{}', 'a').write('{}'); print('{{\"figure\": {}}}')"
    order = tmp_path / "order"
    steps = [step(name, noting.format(order, name, number)) for number, name in enumerate("bac")]
    assert run(steps, tmp_path) == [("b", "done"), ("a", "done"), ("c", "done")]
    assert order.read_text() == "bac"
    assert json.loads((tmp_path / "a.json").read_text())["result"] == {"figure": 1}
    assert run(steps, tmp_path) == [("b", "done"), ("a", "done"), ("c", "done")]
    assert order.read_text() == "bac", "what went well is not repeated"
    steps[1] = step("a", noting.format(order, "A", 7))
    run(steps, tmp_path)
    assert order.read_text() == "bacA", "another command is another step"
    run(steps, tmp_path, again=True)
    assert order.read_text() == "bacAbAc"


def test_a_failure_stops_no_other_step_and_is_tried_again(tmp_path: Path) -> None:
    steps = [
        step("wrong", "import sys; sys.exit('no such thing')"),
        step("missing", "", command=("no-such-program",)),
        step("text", "print('no JSON')"),
        step("peer", 'print(\'{"peer": "x", "output_tokens_per_s": 12.5, "sequences": 24, "peak_device_bytes": 1073741824}\')'),
        step("not here", "", skipped="no peer"),
    ]
    wanted = [("wrong", "failed"), ("missing", "failed"), ("text", "done"), ("peer", "done"), ("not here", "skipped")]
    assert run(steps, tmp_path) == wanted
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name, _ in wanted}
    assert found["wrong"]["why"] == "it ended with 1: no such thing"
    assert found["not here"]["why"] == "no peer"
    assert found["text"]["result"] == {"text": "no JSON\n"}
    table = format_table(found.values())
    assert "| peer | done | 0 | 12.50 |  |  | 24 |  |  |  | 1.0 GiB, " in table
    assert "not here: no peer" in table
    steps[0] = step("wrong", "print(1)")
    assert run(steps, tmp_path)[0] == ("wrong", "done")


def test_time_is_kept(tmp_path: Path) -> None:
    sleeping = step("sleeps", "import time; time.sleep(60)", seconds=0.4)
    start = time.monotonic()
    assert run([sleeping, step("long", "print(1)", seconds=300.0)], tmp_path, 20.0) == [("sleeps", "failed"), ("long", "no time")]
    assert time.monotonic() - start < 15
    assert "longer than 1 s" in json.loads((tmp_path / "sleeps.json").read_text())["why"]


def test_the_drivers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with driver_peak() as peak:
        pass
    assert peak() is None, "there is no driver"
    program, used = tmp_path / "nvidia-smi", tmp_path / "used"
    program.write_text(f'#!/bin/sh\nread -r line < "{used}"; echo "$line"\n')
    program.chmod(0o700)
    used.write_text("100\n")
    with driver_peak() as peak:
        used.write_text("350\n")
        end = time.monotonic() + 20
        while peak() == 0 and time.monotonic() < end:
            time.sleep(0.05)
        used.write_text("120\n")
    assert peak() == 250 << 20


@pytest.mark.parametrize("device", ["cpu", "sim", "cuda"])
def test_every_model_and_schedule_has_a_step(device: str, tmp_path: Path) -> None:
    steps = Setting(out=tmp_path, device=device, tiny=False).steps()
    names = [each.name for each in steps]
    assert len(set(names)) == len(names)
    assert list(MODELS) == list(TINY)
    assert set(MODELS) <= set(names)
    assert {f"opt-30b-{each}" for each in ("no-overlap", "no-host-attention", "zigzag", "row")} <= set(names)
    (ablation,) = (each.command for each in steps if each.name == "opt-30b-no-host-attention")
    assert ablation[ablation.index("--host-attention") + 1] == ("on" if device == "cpu" else "off")
    assert all(each.skipped for each in steps if not each.name.startswith((*MODELS, "facts", "links", "profile")))


def test_every_model_is_measured_with_both_lengths_and_both_budgets(tmp_path: Path) -> None:
    steps = Setting(out=tmp_path, device="cuda", tiny=False).steps()
    for model in MODELS:
        found = set[tuple[str, str]]()
        for each in steps:
            if each.name.startswith(model) and "zigzag" not in each.name and "row" not in each.name and "no-" not in each.name:
                flags = dict(itertools.pairwise(each.command))
                assert flags["--input-len"] == "512"
                assert "--no-overlap" not in each.command
                found.add((flags["--device-mem"], flags["--output-len"]))
        assert found == set(itertools.product(CAPS, ("32", "128"))), model


def test_the_most_important_steps_take_a_quarter_of_an_hour(tmp_path: Path) -> None:
    """In a first run: the machine, the models of the README, the original at its best, and what overlap is worth."""
    peers = Peers(python="no such python", host_bytes=1 << 40)
    steps = Setting(out=tmp_path, device="cuda", tiny=False, peers=peers).steps()
    begins = dict(zip((each.name for each in steps), itertools.accumulate((each.seconds for each in steps), initial=0.0), strict=False))
    for name in ("facts", "links", "profile", "opt-30b", "flexgen-0.1.8-48x3", "opt-30b-no-overlap", "gpt-oss-120b", "mixtral-8x7b"):
        assert begins[name] < 900, name
    assert steps[0].name == "facts"


def test_the_step_without_overlap_has_no_other_difference(tmp_path: Path) -> None:
    steps = {each.name: each for each in Setting(out=tmp_path, device="cuda", tiny=False).steps()}
    with_overlap, without = (set(steps[name].command) for name in ("opt-30b", "opt-30b-no-overlap"))
    assert without - with_overlap == {"--no-overlap", str(tmp_path / "opt-30b-no-overlap.trace.json")}
    assert with_overlap - without == {str(tmp_path / "opt-30b.trace.json")}


def test_the_list_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), "--list", "--peer-python", "no such python"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("facts: at 0 s, 10 s: versions")
    assert "\nlinks: at 10 s, 30 s: " in listed
    assert "no such python does not run" in listed
    assert "\nqwen3-30b-a3b-24GiB-512+128: in another run, " in listed
    assert " bench steady opt-30b --load-format dummy " in listed
    assert not (tmp_path / "out").exists(), "nothing ran"


def test_configs_of_models_that_the_catalogue_lacks(tmp_path: Path) -> None:
    write_configs(tmp_path, tiny=False)
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")}
    assert set(found) == {"opt-30b", "opt-175b-int4"}
    assert found["opt-30b"]["hidden_size"] == 7168
    assert found["opt-30b"]["architectures"] == ["OPTForCausalLM"]
    assert "quantization_config" not in found["opt-30b"]
    assert (found["opt-175b-int4"]["num_hidden_layers"], found["opt-175b-int4"]["dtype"]) == (96, "float16")
    assert found["opt-175b-int4"]["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_links_without_a_gpu(tmp_path: Path) -> None:
    copies = Copies("cpu")
    host, took = pinning(copies, 3 << 20)
    there = host.clone()
    assert took["seconds_per_gib"] > 0
    assert all(rate > 0 for rate in rates(copies, host, there).values())
    assert all(behind(copies, host, there, 1 << 20, how) > 0 for how in ("same", "other", "chunked"))
    assert reads(tmp_path, host)["bytes_per_s"] > 0
    assert not [*tmp_path.iterdir()]
    assert launches(copies)["ended_us"] >= launches(copies)["submitted_us"] * 0.01 > 0


def check(out: Path, names: list[str]) -> None:
    for name in names:
        found = json.loads((out / f"{name}.json").read_text())
        assert found["status"] == "done", found["why"]
        if name.startswith(tuple(MODELS)):
            assert found["result"]["num_errors"] == 0
            assert found["result"]["output_tokens_per_s"] > 0


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "src"), str(root)]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / "out"


def test_the_command_on_a_tiny_model(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["facts", "links", "opt-30b"]
    flags = ["--out", str(out), "--tiny", "--device", "cpu", "--options", "--host-mem", "2GiB"]
    assert main([*(each for name in names for each in ("--step", name)), *flags]) == 0
    check(out, names)
    assert "| opt-30b | done |" in capsys.readouterr().out
    assert not (out / "offload").exists()
    assert json.loads((out / "opt-30b.json").read_text())["result"]["host_budget_bytes"] == 2 << 30
    assert (out / "opt-30b.trace.json").exists()
    with pytest.raises(SystemExit):
        main(["--out", str(out), "--tiny", "--device", "cpu", "--step", "no such step"])


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_every_step_on_tiny_models(device: str, out: Path) -> None:
    assert main(["--out", str(out), "--tiny", "--device", device]) == 0
    check(out, [each.name for each in Setting(out=out, device=device, tiny=True).steps() if not each.skipped])
