"""Measures sparse attention of next tokens with a certain share of the positions; only where it is needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from flexgen.base.heap import trim_heap
from flexgen.base.steps import step
from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import KVFormat, KVPages, Steps, default_kv_format
from flexgen.kv.low_bit import LowBitPages, kv_format
from flexgen.options import KV_FORMATS
from flexgen.passes.calls import AttentionCall
from flexgen.passes.geometry import KVGeometry
from flexgen.plan.machine import Curve, Machine, Rate, kv_rate_name, sparse_rate_name
from flexgen.profile.compute import HEAD_DIM, PAGE_TOKENS, STEP_HEADS, page_memory, random_numbers, wait
from flexgen.profile.timing import measured_rate

TOKENS = 2048  # that each next token sees: enough for a small share to be more than the positions of its own page
FORMAT_SECONDS = 0.5  # how long a format is measured
QUICK_SHARE = 0.3


class SparseSteps(NamedTuple):
    """Sparse attention of next tokens to pages of random numbers: heads that share keys keep different positions.

    Attributes:
        run: A function that computes it.
        seen_bytes: The KV bytes that dense attention would read.
        share_not_read: The share of the values that is not read.
    """

    run: Callable[[], None]
    seen_bytes: int
    share_not_read: float


def with_sparse(machine: Machine, dtype: str, share: float, max_bytes: int, *, quick: bool) -> Machine:
    """Return the machine with the rates of sparse attention with a share, in every format of KV; those that are missing are measured now.

    In float64 there is no kernel for low-bit formats, and no rate.

    Args:
        machine: The machine.
        dtype: The dtype of computing.
        share: The share of positions that each head keeps, less than 1.
        max_bytes: The most memory of all buffers at the same time.
        quick: Whether to measure less.
    """
    computed, known = getattr(torch, dtype), machine.decode_attention
    formats = ["auto"] if computed == torch.float64 else list(KV_FORMATS)
    names = {sparse_rate_name(dtype if kv == "auto" else kv_rate_name(dtype, kv), share): kv_format(kv, computed) for kv in formats}
    if all(name in curves for curves in known.values() for name in names):
        return machine
    step(f"measuring sparse attention with a share of {share:g}")
    seconds = FORMAT_SECONDS * (QUICK_SHARE if quick else 1.0)
    with torch.inference_mode():
        found = {
            place: curves | {name: _rates(_where(place), kv, computed, share, max_bytes, seconds) for name, kv in names.items()}
            for place, curves in known.items()
        }
    trim_heap()
    return dataclasses.replace(machine, decode_attention=found)


def _where(place: str) -> torch.device:
    return torch.device("cpu" if place == "host" else "cuda")


def _rates(where: torch.device, kv: KVFormat, dtype: torch.dtype, share: float, max_bytes: int, seconds: float) -> Curve:
    """Measure one format on `where`: (FLOPs per KV byte, bytes/s of the KV that is seen), as for dense attention."""
    points: dict[float, Rate] = {}
    exact = default_kv_format(dtype)
    with attention_kernels(where, torch.get_num_threads()) as kernels:
        for heads, key_heads in STEP_HEADS:
            geometry = geometry_of(key_heads)
            token_bytes, exact_bytes = (each.key_bytes(geometry) + each.value_bytes(geometry) for each in (kv, exact))
            room = max_bytes // (2 * (token_bytes + exact_bytes))  # tokens; pages are filled from exact numbers
            num_tokens = max(min(TOKENS, room // PAGE_TOKENS * PAGE_TOKENS), PAGE_TOKENS)
            sequences, kept = max(room // num_tokens, 1), math.ceil(share * num_tokens)
            steps = sparse_steps(kernels, where, kv, dtype, (heads, key_heads), kept, sequences, num_tokens)
            points[4 * heads * HEAD_DIM / token_bytes] = measured_rate(steps.seen_bytes, steps.run, seconds / len(STEP_HEADS))
    return tuple(sorted(points.items()))


def geometry_of(key_heads: int) -> KVGeometry:
    """Return the geometry of layers with so many key heads of HEAD_DIM."""
    return KVGeometry(key_heads=key_heads, key_dim=HEAD_DIM, value_heads=key_heads, value_dim=HEAD_DIM)


def sparse_steps(
    kernels: AttentionKernels, where: torch.device, kv: KVFormat, dtype: torch.dtype, heads: tuple[int, int], num_kept: int,
    sequences: int, num_tokens: int,
) -> SparseSteps:  # fmt: skip
    """Make sparse attention of next tokens.

    Args:
        kernels: The kernels of `where`.
        where: The device of the pages.
        kv: The format of the pages.
        dtype: The dtype of computing.
        heads: The number of query heads and of key heads.
        num_kept: How many positions each head keeps besides its own page.
        sequences: The number of next tokens.
        num_tokens: How many positions each sees; whole pages.
    """
    geometry = geometry_of(heads[1])
    pages = filled_pages(kernels, where, kv, dtype, geometry, sequences, num_tokens)
    query = random_numbers((sequences, heads[0], HEAD_DIM), where, dtype)
    steps = seen_steps(where, sequences, num_tokens, torch.full((sequences,), num_kept, device=where))
    out, call = torch.empty_like(query), AttentionCall(layer=0, query=query, key=query, value=query, scaling=HEAD_DIM**-0.5)
    unread = pages.decode(kernels, call, query, steps, out)
    return SparseSteps(
        run=lambda: wait(out, pages.decode(kernels, call, query, steps, out)),
        seen_bytes=sequences * num_tokens * (kv.key_bytes(geometry) + kv.value_bytes(geometry)),
        share_not_read=unread / (sequences * num_tokens * heads[1]),
    )


def filled_pages(
    kernels: AttentionKernels, where: torch.device, kv: KVFormat, dtype: torch.dtype, geometry: KVGeometry, sequences: int, num_tokens: int
) -> KVPages:
    """Make the pages of sequences of random numbers in a format, `num_tokens` each, with empty tails where the format has tails."""
    number = sequences * num_tokens // PAGE_TOKENS
    shapes = (geometry.key_heads, geometry.key_dim), (geometry.value_heads, geometry.value_dim)
    key, value = (random_numbers((number * PAGE_TOKENS, *shape), where, dtype) for shape in shapes)
    keys, values = (
        page_memory(number * PAGE_TOKENS * size, where).view(number, -1) for size in (kv.key_bytes(geometry), kv.value_bytes(geometry))
    )
    pages, ids = kv.pages(keys, values, geometry, PAGE_TOKENS), torch.arange(number, device=where)
    if not isinstance(pages, LowBitPages):
        pages.write(kernels, key, value, ids.repeat_interleave(PAGE_TOKENS), torch.arange(PAGE_TOKENS, device=where).repeat(number))
        return pages
    pages.seal(kernels, key, value, ids)
    own, other = (
        torch.zeros(sequences, PAGE_TOKENS * math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=where) for shape in shapes
    )
    return pages.beside(default_kv_format(dtype).pages(own, other, geometry, PAGE_TOKENS))


def seen_steps(where: torch.device, sequences: int, num_tokens: int, kept: torch.Tensor | None = None) -> Steps:
    """Return next tokens of sequences of equal lengths whose pages are anywhere."""
    starts = torch.zeros(sequences, dtype=torch.int64, device=where)
    return Steps(
        tables=torch.randperm(sequences * num_tokens // PAGE_TOKENS, device=where).view(sequences, -1),
        starts=starts,
        lengths=starts + num_tokens,
        tails=torch.arange(sequences, device=where),
        kept=kept,
    )
