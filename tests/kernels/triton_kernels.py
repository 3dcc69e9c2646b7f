"""What the tests of Triton's kernels share: the kernels, in Triton's interpreter on the host, or compiled where torch sees a CUDA device.

The interpreter finds wrong places, masks and ends of tiles; it does not find races.  Its products in bfloat16 are wrong (Triton issue
11584), so that this format is left to devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexgen.kernels.codes import SealedPages
from flexgen.kernels.prompts import PagedPrompts
from flexgen.kernels.reference import AttentionKernels

triton = pytest.importorskip("triton", reason="Triton is not installed (the extra triton)")

ON_DEVICE = torch.cuda.is_available()
if not ON_DEVICE and not triton.knobs.runtime.interpret:  # tests/conftest.py sets it where there is no driver
    pytest.skip("torch sees no CUDA device, and TRITON_INTERPRET is not set", allow_module_level=True)
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_DEVICE else [])]
ON_GPU = [pytest.mark.gpu] if ON_DEVICE else []  # marks of a module


METHODS = (
    "decode_attention", "prefill_attention", "prefill_paged_attention", "decode_latent_attention", "decode_sealed_attention",
    "decode_sealed_latent_attention", "prefill_sealed_attention",
)  # fmt: skip


class OnDevice(AttentionKernels):
    """Kernels whose arguments are copied to the device, and what they write back to the host."""

    def __init__(self, kernels: AttentionKernels) -> None:
        for name in METHODS:
            setattr(self, name, self._moved(getattr(kernels, name)))

    @staticmethod
    def _moved(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, out: torch.Tensor, **how: Any) -> None:
            there = out.to(DEVICE)
            how = {name: _to_device(value) for name, value in how.items()}
            method(*(_to_device(each) for each in tensors), out=there, **how)
            out.copy_(there)

        return call


def _to_device(value: Any) -> Any:
    if isinstance(value, SealedPages):
        return replace(value, keys=value.keys.to(DEVICE), values=value.values.to(DEVICE))
    if isinstance(value, PagedPrompts):
        return replace(value, **{name: getattr(value, name).to(DEVICE) for name in ("tiles", "page_tables", "starts")})
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def kernels() -> AttentionKernels:
    from flexgen.kernels.triton.sealed_kernels import TritonKernels

    return OnDevice(TritonKernels()) if ON_DEVICE else TritonKernels()
