"""Measures the attention of next tokens to KV in low-bit formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import Steps
from flexgen.kv.low_bit import LowBitKV, LowBitPages, kv_format
from flexgen.passes.calls import AttentionCall
from flexgen.passes.geometry import KVGeometry
from flexgen.plan.machine import Curve, Rate
from flexgen.profile.compute import HEAD_DIM, PAGE_TOKENS, STEP_HEADS, STEP_TOKENS, page_memory, random_numbers, wait
from flexgen.profile.timing import measured_rate


def low_bit_rates(where: torch.device, dtype: torch.dtype, name: str, max_bytes: int, seconds: float) -> Curve:
    """Measure the attention of next tokens to pages in a low-bit format on `where`: (FLOPs per KV byte, KV bytes/s).

    As in a plan, every token counts as one of a complete page, although the last page of each sequence is not in the format.
    """
    kv = kv_format(name, dtype)
    assert isinstance(kv, LowBitKV)
    points: dict[float, Rate] = {}
    with attention_kernels(where, torch.get_num_threads()) as kernels:
        for heads, key_heads in STEP_HEADS:
            run, kv_bytes = low_bit_steps(kernels, where, kv, heads, key_heads, max_bytes)
            geometry = _geometry(key_heads)
            flops_per_byte = 4 * heads * HEAD_DIM / (kv.key_bytes(geometry) + kv.value_bytes(geometry))
            points[flops_per_byte] = measured_rate(kv_bytes, run, seconds / len(STEP_HEADS))
    return tuple(sorted(points.items()))


def _geometry(key_heads: int) -> KVGeometry:
    return KVGeometry(key_heads=key_heads, key_dim=HEAD_DIM, value_heads=key_heads, value_dim=HEAD_DIM)


def low_bit_steps(
    kernels: AttentionKernels, where: torch.device, kv: LowBitKV, heads: int, key_heads: int, max_bytes: int, num_tokens: int = STEP_TOKENS
) -> tuple[Callable[[], None], int]:
    """Make a function that computes next tokens' attention to as many sequences as half the bytes hold, 64 at most.

    Returns:
        The function, and the KV bytes that it reads.
    """
    geometry, per_sequence = _geometry(key_heads), num_tokens // PAGE_TOKENS
    sizes = kv.key_bytes(geometry), kv.value_bytes(geometry)
    exact_bytes = 2 * key_heads * HEAD_DIM * kv.dtype.itemsize
    sequences = max(min(max_bytes // 2 // (num_tokens * sum(sizes) + PAGE_TOKENS * exact_bytes), 64), 1)
    number = sequences * per_sequence
    keys, values = (page_memory(number * PAGE_TOKENS * size, where).view(number, PAGE_TOKENS * size) for size in sizes)
    tails = kv.tail.pages(
        random_numbers((sequences, key_heads * HEAD_DIM * PAGE_TOKENS), where, kv.dtype).view(torch.uint8),
        random_numbers((sequences, key_heads * PAGE_TOKENS * HEAD_DIM), where, kv.dtype).view(torch.uint8),
        geometry,
        PAGE_TOKENS,
    )
    pages = kv.pages(keys, values, geometry, PAGE_TOKENS).beside(tails)
    _fill(kernels, pages, keys, values, random_numbers((PAGE_TOKENS, key_heads, HEAD_DIM), where, kv.dtype))
    starts = torch.zeros(sequences, dtype=torch.int64, device=where)
    steps = Steps(
        tables=torch.randperm(number, device=where).view(sequences, per_sequence),
        starts=starts,
        lengths=starts + num_tokens,
        tails=torch.arange(sequences, device=where),
    )
    query = random_numbers((sequences, heads, HEAD_DIM), where, kv.dtype)
    out, call = torch.empty_like(query), AttentionCall(layer=0, query=query, key=query, value=query, scaling=HEAD_DIM**-0.5)
    return lambda: wait(out, pages.decode(kernels, call, query, steps, out)), sequences * num_tokens * sum(sizes)


def _fill(kernels: AttentionKernels, pages: LowBitPages, keys: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor) -> None:
    """Seal one page, and copy it to all others."""
    pages.seal(kernels, numbers, numbers, torch.zeros(1, dtype=torch.int64, device=numbers.device))
    keys[1:], values[1:] = keys[0], values[0]
