"""Prompts of a micro-batch attended to in pages, by every implementation, against dense float64 softmax."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from flexgen.kernels.prompts import paged_prompts
from flexgen.kernels.reference import AttentionKernels
from tests.kernels.test_attention import assert_close, dense, make_pool, make_sequences
from tests.kernels.test_attention import random as numbers


def check_paged(kernels: AttentionKernels, spans: list[tuple[int, int]], windows: list[int], **how: Any) -> None:
    """Prompts whose new tokens are those of a span, in pages with NaN wherever no query sees anything."""
    heads, kv_heads, key_dim, value_dim = how.get("heads", 6), how.get("kv_heads", 2), how.get("key_dim", 16), how.get("value_dim", 16)
    dtype, softcap = how.get("dtype", torch.float32), how.get("softcap")
    generator = torch.Generator().manual_seed(how.get("seed", 0))
    sequences = make_sequences(generator, [end for _, end in spans], kv_heads, key_dim, value_dim, dtype)
    seen = [[position - window + 1 for position in range(*span)] for span, window in zip(spans, windows, strict=True)]
    pool = make_pool(generator, sequences, [first for first, *_ in seen], how.get("page", 16))
    prompts = paged_prompts(spans, pool.page_tables.tolist(), [start for starts in seen for start in starts], torch.device("cpu"))
    query, sinks = numbers(generator, len(prompts.starts), heads, key_dim, dtype=dtype), numbers(generator, heads, dtype=dtype)
    scaling, out = 1.5 / math.sqrt(key_dim), torch.full((len(query), heads, value_dim), math.nan, dtype=dtype)
    how = {"softcap": softcap, "sinks": sinks if how.get("sinks") else None}
    kernels.prefill_paged_attention(query, pool.key_pages, pool.value_pages, prompts, scaling=scaling, out=out, **how)
    row = 0
    for span, starts, sequence in zip(spans, seen, sequences, strict=True):
        for start, position in zip(starts, range(*span), strict=True):
            key, value = (each[max(start, 0) : position + 1] for each in (sequence.key, sequence.value))
            assert_close(out[row], dense(query[row], key, value, scaling, **how))
            row += 1


@pytest.fixture
def kernels() -> AttentionKernels:
    return AttentionKernels()


class TestPagedPrompts:
    """Modules with other kernels import this class, and have a fixture of their own."""

    def test_whole_prompts_and_chunks(self, kernels: AttentionKernels) -> None:
        check_paged(kernels, [(0, 5), (0, 70), (16, 33), (40, 41)], [100] * 4)

    def test_windows(self, kernels: AttentionKernels) -> None:
        check_paged(kernels, [(30, 100), (0, 20), (64, 65)], [20, 3, 33], sinks=True)

    def test_short_prompts_only(self, kernels: AttentionKernels) -> None:
        check_paged(kernels, [(0, 1), (0, 16), (31, 34)], [100, 100, 4], softcap=2.0)

    def test_queries_of_many_bytes(self, kernels: AttentionKernels) -> None:
        check_paged(kernels, [(3, 72), (0, 20)], [100, 100], heads=1, kv_heads=1, key_dim=260)

    @pytest.mark.parametrize("seed", range(8))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        chance = random.Random(seed)
        kv_heads, spans = chance.randint(1, 2), []
        for _ in range(chance.randint(1, 4)):
            begin = chance.choice([0, 0, chance.randint(1, 60)])
            spans.append((begin, begin + chance.choice([1, 7, 16, 40, 80])))
        check_paged(
            kernels,
            spans,
            [chance.choice([200, chance.randint(1, 50)]) for _ in spans],
            heads=kv_heads * chance.choice([1, 3]),
            kv_heads=kv_heads,
            key_dim=chance.choice([8, 40]),
            value_dim=chance.choice([16, 30]),
            page=chance.choice([4, 16, 24]),
            dtype=chance.choice([torch.float16, torch.float32]),
            softcap=chance.choice([None, 5.0]),
            sinks=chance.random() < 0.5,
            seed=seed,
        )


def test_tiles() -> None:
    prompts = paged_prompts([(3, 70), (0, 5)], [[4, 2], [7]], [0] * 72, torch.device("cpu"))
    assert prompts.tile_rows == 64
    assert prompts.tiles.tolist() == [[0, 64, 3, 0], [64, 3, 67, 0], [67, 5, 0, 1]]
    assert prompts.page_tables.tolist() == [[4, 2], [7, -1]]
    assert paged_prompts([(3, 19)], [[0, 1]], [0] * 16, torch.device("cpu")).tiles.tolist() == [[0, 16, 3, 0]]
