"""What is compiled is kept on disk, but never longer than the source it came from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from flexgen.kernels.attention import ReferenceKernels, attention_kernels
from flexgen.kernels.cpu import CpuKernels, compile


def test_kernels_by_device() -> None:
    with attention_kernels(torch.device("cpu"), 2) as on_cpu, attention_kernels(torch.device("meta"), 2) as elsewhere:
        assert isinstance(on_cpu, CpuKernels)
        assert isinstance(elsewhere, ReferenceKernels)


def test_numba_is_imported_only_where_it_computes() -> None:
    code = "import sys, flexgen.kernels.attention, flexgen.kernels.reference; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_writable_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(**options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(compile, "njit", njit)

    def increment(numbers: Any) -> None:
        numbers += 1

    numbers = np.zeros(2)
    compile.entry(increment)(numbers)
    assert numbers.tolist() == [1, 1]


def test_changed_sources_are_compiled_again(tmp_path: Path) -> None:
    names = ["decode.f-1.py311.nbi", "decode.f-1.py311.1.nbc", "decode.g-9.py311.nbi", "prefill.f-1.py311.nbi"]
    for name in names:
        (tmp_path / name).touch()
    for outdated in names[:2] + names[3:]:
        os.utime(tmp_path / outdated, (0, 0))
    compile._forget_outdated(tmp_path, "decode")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
