"""Which kernels there are, and what it takes to import them."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch

from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.padded import PaddedKernels
from flexgen.kernels.reference import AttentionKernels


def test_kernels_by_device() -> None:
    with attention_kernels(torch.device("cpu"), 2) as on_cpu, attention_kernels(torch.device("meta"), 2) as elsewhere:
        assert isinstance(on_cpu, CpuKernels)
        assert type(elsewhere) is AttentionKernels


def test_numba_is_imported_only_where_it_computes() -> None:
    code = "import sys, flexgen.kernels.attention, flexgen.kernels.reference; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((7, 5), True, "its compute capability is 7.5"),
        ((8, 0), False, "flexgen-engine[triton]"),
        ((12, 0), False, "flexgen-engine[triton]"),
    ],
)
def test_cuda_devices_without_kernels_have_torch_operations_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], installed: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with caplog.at_level(logging.INFO, "flexgen"), attention_kernels(torch.device("cuda", 0), 2) as kernels:
        assert type(kernels) is PaddedKernels
    assert reason in caplog.text


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_cuda_devices_have_tritons_kernels(capability: tuple[int, int]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (the extra triton)")
    code = (
        "import torch; from flexgen.kernels.attention import attention_kernels\n"
        f"torch.cuda.get_device_capability = lambda device: {capability}\n"
        "print(type(attention_kernels(torch.device('cuda', 0), 2)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["TritonKernels"]


def test_triton_is_imported_only_where_it_computes() -> None:
    code = "import sys, flexgen.kernels.attention, flexgen.kernels.reference; sys.exit('flexgen.kernels.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
