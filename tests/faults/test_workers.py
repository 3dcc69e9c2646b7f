"""Jobs with several workers that are killed, stopped and woken: each ends with the bytes of an undisturbed one.

Here are a few; `python -m faults.workers` makes as many as one likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults.workers import ALL_KINDS, POISON
from flexgen.base.failpoints import FAILPOINTS

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "src"
ALWAYS = ("kill -9 of workers", "SIGSTOP and SIGCONT of workers", "kill -9 of a run", POISON)


def rounds(folder: Path, kinds: tuple[str, ...], count: int) -> dict[str, Any]:
    """The summary of some rounds, in a process of its own: a fork would not copy this one's threads."""
    path = os.pathsep.join([str(SOURCE), str(HERE.parent)])
    command = [sys.executable, "-m", "faults.workers", str(folder), "--rounds", str(count)]
    command += [part for kind in kinds for part in ("--only", kind)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_disturbed_workers_end_like_undisturbed_ones(tmp_path: Path) -> None:
    found = rounds(tmp_path, ALWAYS, len(ALWAYS))
    assert found["rounds"] == len(ALWAYS)
    assert found[f"struck: {POISON}"] == 1
    assert found["struck"] >= 2  # times are drawn from those of a run on a machine that may have been busier


@pytest.mark.slow
def test_disturbed_workers_of_every_kind(tmp_path: Path) -> None:
    found = rounds(tmp_path, (), 3 * len(ALL_KINDS))
    assert found["rounds"] == 3 * len(ALL_KINDS)
    assert found["struck"] >= len(ALL_KINDS)


def test_the_steps_of_workers_are_failpoints() -> None:
    from faults.workers import _POINTS, _POINTS_OF_RUN

    assert {*_POINTS, *_POINTS_OF_RUN} <= set(FAILPOINTS)
