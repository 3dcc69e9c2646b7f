"""`flexgen plan` for several machines, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flexgen.cli import app
from flexgen.plan.known.machines import find_machine

JOB = ("--num-requests", 200, "--gen-len", 32, "--schedule", "zigzag", "--micro-batch-tokens", 512)


def flexgen(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_plan_of_stages_in_words() -> None:
    done = flexgen("plan", "opt-30b", "--machines", "t4-gcp*2,rtx4090-64gb", "--link", "1Gbit,10ms", *JOB)
    assert done.exit_code == 0, done.output
    for part in (
        "facebook/opt-30b on t4-gcp * 2, rtx4090-64gb\n",
        "plan: 3 stages, float16, zigzag schedule, 3 blocks of sequences in flight, a link of 1 Gbit/s, 10 ms",
        "bound by",
        "6,400 output tokens",
        "a pass is back after",
        "bubbles: the busiest stage waits",
        "one machine more, like ",
        "on all stages together:",
    ):
        assert part in done.stdout, part
    rows = [line.split() for line in done.stdout.splitlines() if " 0-" in line or "-47" in line]
    assert rows[0][0].startswith("0")
    assert rows[-1][1] == "rtx4090-64gb"


def test_a_plan_of_stages_as_json(tmp_path: Path) -> None:
    """The machine's file and its name give the same stages."""
    file = tmp_path / "box.json"
    file.write_text(find_machine("t4-gcp").to_json())
    job = ("plan", "opt-30b", *JOB, "--json", "--link", "100Mbit,100ms")
    named, by_file = (
        json.loads(flexgen(*job, *flags).stdout) for flags in (("--machine", "t4-gcp", "--stages", 2), ("--machines", f"{file}*2"))
    )
    assert set(named) == {"model", "link", "forecast", "bound_by", "bubble_share", "round_trip_seconds", "stages", "one_more"}
    assert named["stages"] == by_file["stages"]
    assert named["link"] == {"bytes_per_s": 1.25e7, "latency_s": 0.1}
    first, last = named["stages"]
    assert (first["layers"][0], last["layers"][1]) == (0, 48)
    assert first["layers"][1] == last["layers"][0]
    assert first["policy"]["num_blocks"] == last["policy"]["num_blocks"] >= 2
    assert named["one_more"]["like"] == "t4-gcp"
    assert named["forecast"]["num_requests"] == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--link", "1Gbit,10ms"), "--link is between stages: give --machines or --stages as well"),
        (("--machines", "t4-gcp*2", "--machine", "t4-gcp"), "--machine is one machine and --machines are all stages"),
        (("--machines", "t4-gcp*2", "--stages", 3), "--stages 3: --machines names 2"),
        (("--machines", "t4-gcp*x"), "is not a machine; write names or files between commas"),
        (("--machines", "t4-gcp,"), "is not a machine"),
        (("--machines", "t4-gcpp,t4-gcp"), "--machines 't4-gcpp' is neither a file nor a known machine; did you mean t4-gcp?"),
        (("--machine", "t4-gcp", "--stages", 2, "--link", "fast"), "--link 'fast' is not a link"),
        (("--machine", "t4-gcp", "--stages", 2, "--pareto"), "--pareto compares plans of one machine"),
        (("--machine", "t4-gcp", "--stages", 2, "--allow-formats", "int4"), "chooses for one machine"),
        (("--machine", "t4-gcp", "--stages", 49), "can be cut into at most 48 stages, not into 49"),
    ],
)
def test_what_is_refused(flags: tuple[object, ...], message: str) -> None:
    done = flexgen("plan", "opt-30b", *flags)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
