"""Runs that are killed, starved or refused their disk: the job ends with the bytes of an undisturbed one.

Here are a few of each kind; benchmarks/faults.py makes thousands.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults.hostile import HOSTILE_KINDS
from faults.kinds import ALL_KINDS
from flexgen.base.failpoints import FAILPOINTS

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "src"
# Death, signals, a disk that refuses, and requests that attack: these are in every run.
ALWAYS = ("kill -9 at a failpoint", "kill -9, twenty in a row", "SIGINT, SIGTERM or SIGHUP", "no file may grow", "hostile lines")
JOBS = 2  # of each kind; a run without slow tests has one of most
# The first jobs of these may not be struck.
ALWAYS_BOTH = ("kill -9 at a failpoint", "no file may grow", "hostile lines")
ALWAYS_CASES = [*(f"{kind}-1" for kind in ALWAYS), *(f"{kind}-2" for kind in ALWAYS_BOTH)]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What became of the jobs of each kind that this run tests, in a process of its own: a fork would not copy this one's threads."""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    num_jobs: dict[str, int] = dict.fromkeys(ALWAYS, 1) | dict.fromkeys(ALWAYS_BOTH, JOBS)
    for case in (case for case in cases if case.keys() >= {"kind", "job"}):
        num_jobs[case["kind"]] = max(num_jobs.get(case["kind"], 1), case["job"])
    kinds = [kind for kind in ALL_KINDS if kind in num_jobs]
    folder = tmp_path_factory.mktemp("faults")
    path = os.pathsep.join([str(SOURCE), str(HERE.parent)])
    command = [sys.executable, "-m", "faults.kinds", str(folder), "1", *(f"{kind}#{num_jobs[kind]}" for kind in kinds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    lines = iter([json.loads(line) for line in done.stdout.splitlines()])
    return {kind: [next(lines) for _ in range(num_jobs[kind])] for kind in kinds}


@pytest.mark.matrix(2, always=ALWAYS_CASES)
@pytest.mark.parametrize("job", range(1, JOBS + 1))
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_disturbed_job_ends_like_an_undisturbed_one(outcomes: dict[str, list[dict[str, Any]]], kind: str, job: int) -> None:
    outcome = outcomes[kind][job - 1]
    log = outcome.pop("log")
    figures = {name: outcome[name] for name in ("lost", "duplicated", "wrong", "bugs", "hangs")}
    assert not any(figures.values()), f"{outcome}\n{log}"
    assert outcome["same_bytes"], f"{outcome}\n{log}"


def test_the_trials_do_strike(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Or the tests above would show nothing."""
    struck = {kind: sum(trial["struck"] for each in found for trial in each["trials"]) for kind, found in outcomes.items()}
    assert (
        struck["kill -9, twenty in a row"] >= 1
    )  # of twenty: their times are drawn from those of a run on a machine that may have been busier
    assert struck["kill -9 at a failpoint"] >= 1
    assert struck["no file may grow"] >= 1
    assert all(struck[kind] >= 1 for kind in HOSTILE_KINDS if len(outcomes.get(kind, ())) == JOBS)
    assert any(trial["commits"] for found in outcomes.values() for each in found for trial in each["trials"])


def test_every_failpoint_is_known_and_every_known_one_is_somewhere() -> None:
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "failpoint":
                found |= {each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)}
    assert found == set(FAILPOINTS)


def test_nothing_in_the_package_switches_failpoints_on() -> None:
    users = [path for path in SOURCE.rglob("*.py") if "switch_on" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(SOURCE).as_posix() for path in users] == ["flexgen/base/failpoints.py"]
