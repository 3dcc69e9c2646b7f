"""Which kernels there are, and what it takes to import them."""

from __future__ import annotations

import subprocess
import sys

import torch

from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.reference import AttentionKernels


def test_kernels_by_device() -> None:
    with attention_kernels(torch.device("cpu"), 2) as on_cpu, attention_kernels(torch.device("meta"), 2) as elsewhere:
        assert isinstance(on_cpu, CpuKernels)
        assert type(elsewhere) is AttentionKernels


def test_numba_is_imported_only_where_it_computes() -> None:
    code = "import sys, flexgen.kernels.attention, flexgen.kernels.reference; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
