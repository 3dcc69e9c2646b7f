"""Triton's kernels compiled for devices that are not there: they compile, and their programs fit a multiprocessor's shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "cross_compile.py"
CASES = re.findall(r'^    "([\w-]+)": ', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)  # it imports Triton, which may not be there
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # of a program, by compute capability

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra triton)")


@pytest.mark.matrix(2, always=["decode-opt", "random-numbers"])
@pytest.mark.parametrize("case", CASES)
def test_programs_fit_every_device(case: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {each["capability"] for each in found} == set(SHARED_BYTES)
    for each in found:
        assert each["shared_bytes"] <= SHARED_BYTES[each["capability"]], each
