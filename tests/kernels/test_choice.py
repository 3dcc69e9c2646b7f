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
from flexgen.kernels.dequantize.choice import dequantize_kernels, kernels_of
from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.experts import grouped_kernels
from flexgen.kernels.gathered import GatheredKernels
from flexgen.kernels.priced import PricedDequantizeKernels, PricedKernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.triton_support import compiling, in_triton


def test_kernels_by_device() -> None:
    with attention_kernels(torch.device("cpu"), 2) as on_cpu, attention_kernels(torch.device("xpu"), 2) as elsewhere:
        assert isinstance(on_cpu, CpuKernels)
        assert type(elsewhere) is AttentionKernels
    assert type(dequantize_kernels(torch.device("xpu"))) is DequantizeKernels
    assert type(attention_kernels(torch.device("meta"), 2)) is PricedKernels
    assert type(dequantize_kernels(torch.device("meta"))) is PricedDequantizeKernels


def test_numba_is_imported_only_where_it_computes() -> None:
    code = "import sys, flexgen.kernels.attention, flexgen.kernels.dequantize.choice; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((7, 5), True, "its compute capability is 7.5"),
        ((8, 0), False, "flexgen-engine[triton]"),
        ((12, 0), False, "flexgen-engine[triton]"),
    ],
)
def test_cuda_devices_without_kernels_gather_pages_and_say_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], installed: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with caplog.at_level(logging.INFO, "flexgen"), attention_kernels(torch.device("cuda", 0), 2) as kernels:
        assert type(kernels) is GatheredKernels
        assert type(kernels_of.__wrapped__(torch.device("cuda", 0))) is DequantizeKernels  # without what is kept for each device
        assert grouped_kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert [record.message.partition(" on the device ")[0] for record in caplog.records if reason in record.message] == [
        "attention", "decoding of stored numbers", "experts",
    ]  # fmt: skip


def test_the_host_has_no_grouped_kernels() -> None:
    assert grouped_kernels(torch.device("cpu")) is None


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_cuda_devices_have_tritons_kernels(capability: tuple[int, int]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (the extra triton)")
    code = (
        "import torch; from flexgen.kernels.attention import attention_kernels; from flexgen.kernels.experts import grouped_kernels\n"
        "from flexgen.kernels.dequantize.choice import dequantize_kernels\n"
        f"torch.cuda.get_device_capability = lambda device: {capability}\n"
        "device = torch.device('cuda', 0)\n"
        "chosen = attention_kernels(device, 2), dequantize_kernels(device), grouped_kernels(device)\n"
        "print(*(type(each).__name__ for each in chosen))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["TritonKernels", "TritonDequantizeKernels", "TritonGroupedKernels"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra triton)")
def test_tensors_without_memory_are_those_of_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.device("meta")
    for present, capability, wanted in ((False, (9, 0), False), (True, (7, 5), False), (True, (9, 0), True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        with compiling():
            assert in_triton(meta, "anything", otherwise="") == wanted
            assert (type(kernels_of.__wrapped__(meta)) is not DequantizeKernels) == wanted
        assert not in_triton(meta, "anything", otherwise=""), "only while kernels are compiled"


def test_triton_is_imported_only_where_it_computes() -> None:
    modules = "flexgen.kernels.attention, flexgen.kernels.dequantize.lookup, flexgen.models.experts"
    code = f"import sys, {modules}; sys.exit('flexgen.kernels.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
