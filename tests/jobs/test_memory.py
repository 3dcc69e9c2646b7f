"""The host budget is the whole process's, before there is a plan, too: hostile lines under a control group that kills."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GROUPS = Path("/sys/fs/cgroup/memory")  # version 1; version 2 allows no groups below one that has processes
BUDGET = 1 << 30


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of the budget's size, with what the system may hold for it on top."""
    group = GROUPS / f"flexgen-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    (group / "memory.limit_in_bytes").write_text(str(BUDGET + (64 << 20)))
    yield group
    group.rmdir()


@pytest.mark.slow
def test_hostile_lines_do_not_get_the_job_killed(group: Path, novels_opt: Path, tmp_path: Path) -> None:
    """A kill would come back at every rerun."""
    good = {"prompt": "It was a dark", "max_tokens": 2, "temperature": 0}
    hostile: list[dict[str, Any]] = [
        {"prompt": "a b c d " * 2_090_000},
        {"prompt": "\u2603" * 2_700_000},
        {"prompt": "x", "bad_words": ["x y " * 1_000_000]},
        *[{"prompt": "y" * 4_000_000}] * 4,
        {"messages": [{"role": "user", "content": "z" * 16_000_000}]},
        {"prompt": [1] * 5_000_000},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in (good, *hostile, good)))
    template = "{{ messages[0].content * 40 }}"
    command = [sys.executable, "-m", "flexgen.cli", "run", str(novels_opt), str(source), "-o", str(output), "--dtype", "float32"]
    command += ["--host-mem", str(BUDGET), "--chat-template", template, "--progress", "none"]
    entered = ["sh", "-c", f"echo $$ > {group}/cgroup.procs && exec {shlex.join(command)}"]
    done = subprocess.run(entered, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["error" in record for record in records] == [False] + [True] * len(hostile) + [False]
