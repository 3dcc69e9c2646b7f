"""Compiles what a call of Triton's kernels launches, for devices that are not there, and prints the shared memory of each program.

    python tests/kernels/cross_compile.py CASE

The tensors have no memory, so that a launch that waited for a number would fail.  Triton takes the device that is current, its
capability among it, from a driver; the one here has a device for each capability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flexgen.kernels.triton.kernels import TritonKernels

CAPABILITIES = (80, 89, 90, 120)
META = torch.device("meta")


class Driver:
    """A driver of devices that are not there: device 80 has the compute capability 8.0, and so on."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device, 32)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device=META)


def decode(
    dtype: torch.dtype, heads: int, kv_heads: int, key_dim: int, value_dim: int, *, tokens: int = 4096, **how: Any
) -> Callable[[], None]:
    def call() -> None:
        TritonKernels().decode_attention(
            numbers(8, heads, key_dim, dtype=dtype), numbers(99, kv_heads, key_dim, 16, dtype=dtype),
            numbers(99, kv_heads, 16, value_dim, dtype=dtype), integers(8, tokens // 16), integers(8), integers(8),
            scaling=0.1, out=numbers(8, heads, value_dim, dtype=dtype), **how,
        )  # fmt: skip

    return call


CASES: dict[str, Callable[[], None]] = {
    "decode-opt": decode(torch.float16, 32, 32, 128, 128),
    "decode-gpt-oss": decode(torch.bfloat16, 64, 8, 64, 64, sinks=numbers(64, dtype=torch.bfloat16)),
    "decode-gemma": decode(torch.bfloat16, 32, 16, 256, 256, softcap=50.0),
    "decode-short": decode(torch.bfloat16, 32, 8, 128, 128, tokens=256, sinks=numbers(32, dtype=torch.bfloat16)),
    "decode-falcon": decode(torch.bfloat16, 71, 1, 64, 64),
    "decode-float32": decode(torch.float32, 32, 8, 256, 256),
    "decode-uneven": decode(torch.bfloat16, 6, 2, 192, 80),
}


def main(case: str) -> None:
    active, found = Driver(), []

    def compiled(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **how: Any) -> None:
            for active.device in CAPABILITIES:
                program = kernel.run(*args, grid=grid, warmup=True, **how)
                found.append({"kernel": kernel.__name__, "capability": active.device, "shared_bytes": program.metadata.shared})
                assert len(program.asm["cubin"]) > 0

        return launch

    driver.set_active(active)
    JITFunction.__getitem__ = compiled
    CASES[case]()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
