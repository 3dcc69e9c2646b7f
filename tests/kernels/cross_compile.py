"""Compiles what a call of Triton's kernels launches, for devices that are not there, and prints the shared memory of each program.

    python tests/kernels/cross_compile.py CASE

The tensors have no memory, so that a launch that waited for a number would fail.  Triton takes the device that is current, its
capability among it, from a driver; the one here has a device for each capability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flexgen.kernels.encoded import EncodedMatrices
from flexgen.kernels.grouped import Window, sorted_pairs
from flexgen.kernels.prompts import paged_prompts
from flexgen.kernels.triton.experts import TritonGroupedKernels
from flexgen.kernels.triton.random_numbers import exponential_rows
from flexgen.kernels.triton.sealed_kernels import TritonKernels
from flexgen.kv.low_bit import LowBitPages, kv_format
from flexgen.passes.geometry import KVGeometry

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


def prefill(dtype: torch.dtype, heads: int, kv_heads: int, key_dim: int, value_dim: int, *, num_queries: int = 512) -> Callable[[], None]:
    """Of one prompt, and of all in pages."""

    def call() -> None:
        query, out = (numbers(num_queries, heads, dim, dtype=dtype) for dim in (key_dim, value_dim))
        key, value = (numbers(2 * num_queries, kv_heads, dim, dtype=dtype) for dim in (key_dim, value_dim))
        TritonKernels().prefill_attention(query, key, value, integers(num_queries), scaling=0.1, softcap=30.0, out=out)
        prompts = paged_prompts([(16, 16 + num_queries)], [range(99)], [0] * num_queries, META)
        pages = numbers(99, kv_heads, key_dim, 16, dtype=dtype), numbers(99, kv_heads, 16, value_dim, dtype=dtype)
        TritonKernels().prefill_paged_attention(query, *pages, prompts, scaling=0.1, sinks=numbers(heads, dtype=dtype), out=out)

    return call


def sealed(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, name: str) -> Callable[[], None]:
    """Next tokens, and a prompt."""
    kv, geometry = kv_format(name, dtype), KVGeometry(key_heads=kv_heads, key_dim=dim, value_heads=kv_heads, value_dim=dim)

    def call() -> None:
        keys, values = (torch.empty(99, 16 * size(geometry), dtype=torch.uint8, device=META) for size in (kv.key_bytes, kv.value_bytes))
        pages = kv.pages(keys, values, geometry, 16)
        assert isinstance(pages, LowBitPages)
        tails = numbers(9, kv_heads, dim, 16, dtype=dtype), numbers(9, kv_heads, 16, dim, dtype=dtype)
        query, out = numbers(8, heads, dim, dtype=dtype), numbers(8, heads, dim, dtype=dtype)
        TritonKernels().decode_sealed_attention(
            query, pages.sealed, *tails, integers(8, 99), integers(8), integers(8), integers(8), scaling=0.1, out=out
        )
        key = numbers(64, kv_heads, dim, dtype=dtype)
        TritonKernels().prefill_sealed_attention(query, key, key, key, key, integers(8), integers(8), 32, scaling=0.1, out=out)

    return call


def latents(dtype: torch.dtype, heads: int, rank: int, rope: int) -> Callable[[], None]:
    """Plain ones, and sealed ones where they have a kernel."""
    geometry = KVGeometry(key_heads=1, key_dim=rank, value_heads=1, value_dim=rope, latent=True)

    def call() -> None:
        kv = kv_format("int8", dtype)
        keys, values = (torch.empty(99, 16 * size(geometry), dtype=torch.uint8, device=META) for size in (kv.key_bytes, kv.value_bytes))
        pages = kv.pages(keys, values, geometry, 16)
        assert isinstance(pages, LowBitPages)
        plain = numbers(9, 1, rank, 16, dtype=dtype), numbers(9, 1, 16, rope, dtype=dtype)
        query, out = (numbers(8, heads, rank, dtype=dtype), numbers(8, heads, rope, dtype=dtype)), numbers(8, heads, rank, dtype=dtype)
        seen = integers(8), integers(8)
        TritonKernels().decode_latent_attention(*query, *plain, integers(8, 99), *seen, scaling=0.1, out=out)
        if dtype.itemsize == 2:
            sealed = pages.sealed, *plain, integers(8, 99), integers(8)
            TritonKernels().decode_sealed_latent_attention(*query, *sealed, *seen, scaling=0.1, out=out)

    return call


def experts(
    dtype: torch.dtype, tokens: int, choices: int, num_experts: int, hidden: int, intermediate: int, *, biased: bool = False,
    inputs_first: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """Both products of some of a layer's experts, and the sums."""

    def call() -> None:
        kernels, count = TritonGroupedKernels(), max(num_experts // 3, 1)
        pairs = sorted_pairs(integers(tokens, choices), num_experts)
        window = Window(first=1, count=count, skipped=0, num_rows=tokens * choices)

        def product(x: torch.Tensor, inputs: int, outputs: int, *, gathers: bool) -> torch.Tensor:
            weight = numbers(count, inputs, outputs, dtype=dtype) if inputs_first else numbers(count, outputs, inputs, dtype=dtype).mT
            bias = numbers(count, outputs, dtype=dtype) if biased else None
            return kernels.product(x, weight, bias, pairs, window, gathers=gathers)

        gate, up = product(numbers(tokens, hidden, dtype=dtype), hidden, 2 * intermediate, gathers=True).chunk(2, dim=-1)
        out = product(gate * up, intermediate, hidden, gathers=False)
        kernels.add(out, numbers(tokens, choices, dtype=dtype), pairs, window, numbers(tokens, hidden, dtype=torch.float32))

    return call


def codes(
    dtype: torch.dtype, count: int, blocks: int, outputs: int, inputs: int, group: int, *, scales: torch.dtype, zeros: str
) -> EncodedMatrices:
    """Matrices in codes of 4 bits; their zeros are those of "e2m1", "none", in "words" or in "bytes"."""
    shape = count, blocks, outputs, -(-inputs // group)
    words = torch.empty(count, blocks, -(-outputs // 8), shape[3], dtype=torch.int32, device=META)
    found = {"words": words, "bytes": torch.empty(shape, dtype=torch.int8, device=META)}.get(zeros)
    return EncodedMatrices(
        codes=torch.empty(count, blocks, outputs, 4 * -(-inputs // 8), dtype=torch.uint8, device=META),
        scales=torch.empty(shape, dtype=scales, device=META), zeros=found, zero=None if zeros == "e2m1" else 8, group=group,
        inputs=inputs, dtype=dtype,
    )  # fmt: skip


def encoded(
    dtype: torch.dtype, tokens: int, choices: int, num_experts: int, hidden: int, intermediate: int, group: int, *,
    scales: torch.dtype, zeros: str, blocks: int = 2, biased: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """Both products of some of a layer's experts, whose gates and ups are stored apart or together."""

    def call() -> None:
        kernels, count = TritonGroupedKernels(), max(num_experts // 3, 1)
        pairs = sorted_pairs(integers(tokens, choices), num_experts)
        window = Window(first=1, count=count, skipped=0, num_rows=tokens * choices)
        first = codes(dtype, count, blocks, 2 * intermediate // blocks, hidden, group, scales=scales, zeros=zeros)
        down = codes(dtype, count, 1, hidden, intermediate, group, scales=scales, zeros=zeros)
        biases = [numbers(count, outputs, dtype=dtype) if biased else None for outputs in (2 * intermediate, hidden)]
        gate, up = kernels.product(numbers(tokens, hidden, dtype=dtype), first, biases[0], pairs, window, gathers=True).chunk(2, dim=-1)
        kernels.product(gate * up, down, biases[1], pairs, window, gathers=False)

    return call


def drawing() -> None:
    exponential_rows(integers(8, 1), integers(8, 1), 128_256)


CASES: dict[str, Callable[[], None]] = {
    "decode-opt": decode(torch.float16, 32, 32, 128, 128),
    "decode-gpt-oss": decode(torch.bfloat16, 64, 8, 64, 64, sinks=numbers(64, dtype=torch.bfloat16)),
    "decode-gemma": decode(torch.bfloat16, 32, 16, 256, 256, softcap=50.0),
    "decode-short": decode(torch.bfloat16, 32, 8, 128, 128, tokens=256, sinks=numbers(32, dtype=torch.bfloat16)),
    "decode-falcon": decode(torch.bfloat16, 71, 1, 64, 64),
    "decode-float32": decode(torch.float32, 32, 8, 256, 256),
    "decode-uneven": decode(torch.bfloat16, 6, 2, 192, 80),
    "prefill-llama": prefill(torch.bfloat16, 32, 8, 128, 128),
    "prefill-gemma": prefill(torch.bfloat16, 8, 4, 256, 256),
    "prefill-deepseek": prefill(torch.bfloat16, 16, 16, 192, 128),
    "prefill-short": prefill(torch.float16, 32, 32, 64, 64, num_queries=9),
    "prefill-float32": prefill(torch.float32, 8, 4, 256, 256),
    "sealed-int8": sealed(torch.bfloat16, 32, 8, 128, "int8"),
    "sealed-k8v4": sealed(torch.bfloat16, 32, 32, 128, "k8v4"),
    "sealed-int4": sealed(torch.float16, 64, 8, 64, "int4"),
    "sealed-gemma": sealed(torch.bfloat16, 8, 4, 256, "int4"),
    "sealed-float32": sealed(torch.float32, 32, 8, 128, "int4"),
    "latents-deepseek": latents(torch.bfloat16, 128, 512, 64),
    "latents-small": latents(torch.float16, 16, 256, 32),
    "decode-longest": decode(torch.bfloat16, 8, 2, 1024, 512),
    "decode-longest-float32": decode(torch.float32, 8, 2, 512, 256),
    "prefill-longest": prefill(torch.bfloat16, 4, 2, 1024, 512),
    "prefill-longest-float32": prefill(torch.float32, 4, 2, 512, 256),
    "latents-float32": latents(torch.float32, 16, 512, 64),
    "experts-gpt-oss": experts(torch.bfloat16, 512, 4, 128, 2880, 2880, biased=True),
    "experts-mixtral": experts(torch.float16, 4096, 2, 8, 4096, 14336),
    "experts-qwen3": experts(torch.bfloat16, 1024, 8, 128, 2048, 768, inputs_first=True),
    "experts-deepseek": experts(torch.bfloat16, 2048, 8, 256, 7168, 2048),
    "experts-uneven": experts(torch.bfloat16, 900, 3, 40, 1000, 333, biased=True, inputs_first=True),
    "experts-float32": experts(torch.float32, 512, 2, 8, 4096, 1024),
    "experts-one": experts(torch.bfloat16, 64, 1, 2, 5120, 8192),
    "encoded-gpt-oss": encoded(torch.bfloat16, 512, 4, 128, 2880, 2880, 32, scales=torch.uint8, zeros="e2m1", blocks=1, biased=True),
    "encoded-one-row": encoded(torch.bfloat16, 8, 8, 128, 2048, 768, 128, scales=torch.bfloat16, zeros="words"),
    "encoded-qwen3": encoded(torch.bfloat16, 1024, 8, 128, 2048, 768, 128, scales=torch.bfloat16, zeros="words"),
    "encoded-mixtral": encoded(torch.float16, 4096, 2, 8, 4096, 14336, 128, scales=torch.float16, zeros="none"),
    "encoded-fp4": encoded(torch.bfloat16, 256, 8, 256, 7168, 2048, 32, scales=torch.float8_e8m0fnu, zeros="e2m1"),
    "encoded-uneven": encoded(torch.bfloat16, 900, 3, 40, 1000, 333, 24, scales=torch.float32, zeros="bytes"),
    "encoded-float32": encoded(torch.float32, 512, 2, 8, 4096, 1024, 64, scales=torch.float32, zeros="words"),
    "random-numbers": drawing,
}


def main(cases: Mapping[str, Callable[[], None]], case: str) -> None:
    """Print what a case launches: of each program and capability, its shared memory and what its PTX is made of."""
    active, found = Driver(), []

    def compiled(kernel: JITFunction[Any], *args: Any, grid: Any, **how: Any) -> None:
        for active.device in CAPABILITIES:
            program = kernel.run(*args, grid=grid, warmup=True, **how)
            ptx = program.asm["ptx"]
            found.append({
                "kernel": kernel.__name__, "capability": active.device, "shared_bytes": program.metadata.shared,
                "fuses": "fma.rn.f" in ptx, "flushes": ".ftz." in ptx, "divides_roughly": "div.full" in ptx or "div.approx" in ptx,
            })  # fmt: skip
            assert len(program.asm["cubin"]) > 0

    driver.set_active(active)
    JITFunction.warmup = compiled
    cases[case]()
    print(json.dumps(found))


if __name__ == "__main__":
    main(CASES, sys.argv[1])
