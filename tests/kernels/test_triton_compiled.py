"""Triton's kernels compiled for devices that are not there: they compile, and their programs fit a multiprocessor's shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ATTENTION, DECODING, AHEAD = HERE / "cross_compile.py", HERE / "cross_compile_decoding.py", HERE / "compile_ahead.py"
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # of a program, by compute capability

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra triton)")


def cases_of(script: Path) -> list[str]:
    """The names of a script's cases; it imports Triton, which may not be there."""
    return re.findall(r'^    "([\w-]+)": ', script.read_text(encoding="utf-8"), re.MULTILINE)


def printed(cache: Path, script: Path, *arguments: str) -> Any:
    """What a script prints that compiles, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compiled(script: Path, case: str, cache: Path) -> list[dict[str, Any]]:
    """What a case launches, compiled for every capability."""
    found = printed(cache, script, case)
    assert {each["capability"] for each in found} == set(SHARED_BYTES)
    for each in found:
        assert each["shared_bytes"] <= SHARED_BYTES[each["capability"]], each
    return found


@pytest.mark.matrix(2, always=["decode-opt", "encoded-gpt-oss", "random-numbers"])
@pytest.mark.parametrize("case", cases_of(ATTENTION))
def test_programs_fit_every_device(case: str, tmp_path: Path) -> None:
    """Those that decode while they multiply do not flush subnormal numbers either."""
    found = compiled(ATTENTION, case, tmp_path)
    assert not any(each["flushes"] for each in found if each["kernel"] == "encoded_product")


@pytest.mark.matrix(2, always=["mxfp4", "nf4-nested", "nvfp4-divided"])
@pytest.mark.parametrize("case", cases_of(DECODING))
def test_decoding_is_one_program_whose_operations_round_as_torchs_do(case: str, tmp_path: Path) -> None:
    """No product and sum are fused, no subnormal number is flushed, divisions are rounded correctly."""
    found = compiled(DECODING, case, tmp_path)
    assert len(found) == len(SHARED_BYTES)
    assert not any(each["fuses"] or each["flushes"] or each["divides_roughly"] for each in found), found


def test_what_is_compiled_ahead_is_not_compiled_again(tmp_path: Path) -> None:
    """On two threads, by calls on tensors without memory; and an error leaves nothing behind."""
    found = printed(tmp_path, AHEAD)
    assert found["loaded"] == ["decode_attention", "decode_attention", "exponential_rows", "merge_parts", *["prefill_attention"] * 2]
    assert found["launched"] == len(found["loaded"])
    assert found["errors"] == ["CompilationError"]
