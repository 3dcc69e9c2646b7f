"""Triton's kernels for sealed pages and for latents against dense float64 softmax; how they run is said in triton_kernels.py."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from flexgen.errors import EngineError
from flexgen.kernels.codes import SealedPages
from flexgen.kernels.reference import AttentionKernels
from tests.kernels import test_attention, test_sealed, test_sealed_latents
from tests.kernels.test_sealed import CODES, PAGE, RAGGED, noise
from tests.kernels.triton_kernels import DTYPES, ON_GPU
from tests.kernels.triton_kernels import kernels as kernels  # a fixture

pytestmark = ON_GPU


class TestSealedDecode:
    @pytest.mark.parametrize("name", CODES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ragged_lengths(self, kernels: AttentionKernels, name: str, dtype: torch.dtype) -> None:
        test_sealed.check_decode(kernels, RAGGED[:7], [0] * 7, name=name, dtype=dtype, heads=2, kv_heads=1)

    @pytest.mark.parametrize("window", [1, 7, 16, 17, 64])
    def test_windows(self, kernels: AttentionKernels, window: int) -> None:
        lengths = [17, 33, 100]
        test_sealed.check_decode(kernels, lengths, [length - window for length in lengths], softcap=3.0, sinks=True, heads=2, kv_heads=1)

    def test_parts_that_are_merged(self, kernels: AttentionKernels, monkeypatch: pytest.MonkeyPatch) -> None:
        """Among them one whose last part is the tail alone, and parts without any."""
        monkeypatch.setattr("flexgen.kernels.triton.launch.SPLIT_TOKENS", 64)
        lengths, starts = [65, 64, 63, 200, 129], [0, 1, 0, 130, 128]
        test_sealed.check_decode(kernels, lengths, starts, sinks=True, heads=2, kv_heads=1)

    @pytest.mark.parametrize("seed", range(24))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        test_sealed.check_anything(kernels, seed, DTYPES)

    def test_float64_and_long_heads_are_the_references(self, kernels: AttentionKernels) -> None:
        test_sealed.check_decode(kernels, [40, 3], [0, 0], dtype=torch.float64)
        test_sealed.check_decode(kernels, [40, 3], [0, 0], key_dim=300, heads=1, kv_heads=1)

    def test_pages_that_are_too_short_are_refused(self, kernels: AttentionKernels) -> None:
        stored = test_sealed.store([40], 1, 32, 32, "int8", torch.float32)
        pages, one, query = stored.pages, torch.ones(1, dtype=torch.int64), torch.zeros(1, 1, 32)
        short = SealedPages(
            keys=pages.keys[..., :-2].contiguous(), values=pages.values, key_codes=pages.key_codes, value_codes=pages.value_codes,
            page_tokens=PAGE,
        )  # fmt: skip
        with pytest.raises(EngineError, match="bytes per head"):
            kernels.decode_sealed_attention(
                query, short, stored.tail_keys, stored.tail_values, stored.tables, one * 0, one * 0, one, scaling=1.0, out=query
            )


class TestSealedPrefill:
    @pytest.mark.parametrize("seed", range(12))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        chance = random.Random(seed)
        total, dtype, dim = chance.randint(1, 150), chance.choice(DTYPES), chance.choice([8, 20, 32])
        first_query = chance.randint(max(0, total - 70), total - 1)
        kv_heads, group = chance.randint(1, 2), chance.choice([1, 3])
        window, softcap = chance.choice([None, 1, 20, 40]), chance.choice([None, 5.0])
        exact_start, last_border = first_query // PAGE * PAGE, (total - 1) // PAGE * PAGE
        exact, stored = (
            [noise(place + i, size, kv_heads, dim, dtype=dtype) for i in range(2)] for place, size in ((1, total), (3, last_border))
        )
        query = noise(5, total - first_query, kv_heads * group, dim, dtype=dtype)
        sinks = noise(6, kv_heads * group, dtype=dtype) if chance.random() < 0.5 else None
        positions = torch.arange(first_query, total)
        starts = torch.zeros_like(positions) if window is None else positions - window + 1
        how: dict[str, Any] = {"scaling": 0.1, "softcap": softcap, "sinks": sinks}
        out = torch.full((len(positions), kv_heads * group, dim), math.nan, dtype=dtype)
        kernels.prefill_sealed_attention(
            query, *stored, *(each[exact_start:] for each in exact), starts, positions // PAGE * PAGE, exact_start, out=out, **how
        )
        for row, position in enumerate(positions.tolist()):
            border, start = position // PAGE * PAGE, max(int(starts[row]), 0)
            own = slice(max(start, border), position + 1)
            key, value = (torch.cat([earlier[start:border], later[own]]) for earlier, later in zip(stored, exact, strict=True))
            test_sealed.assert_close(out[row], test_sealed.dense(query[row], key, value, 0.1, softcap, sinks), value)


class TestLatents:
    @pytest.mark.parametrize(("heads", "rank", "rope"), [(4, 32, 16), (1, 16, 16), (20, 40, 9), (2, 512, 64)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_absorbed_projections(self, kernels: AttentionKernels, heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
        test_attention.check_latent(kernels, [5, 40, 17], [0, 3, 16], heads=heads, rank=rank, rope=rope, dtype=dtype)

    def test_parts_that_are_merged(self, kernels: AttentionKernels, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flexgen.kernels.triton.launch.SPLIT_TOKENS", 64)
        test_attention.check_latent(kernels, [65, 64, 200], [0, 1, 130], heads=2, rank=32, rope=16, dtype=torch.float32)


class TestSealedLatents:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ragged_lengths(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        test_sealed_latents.check(kernels, RAGGED[:7], [0] * 7, dtype=dtype, heads=2)

    @pytest.mark.parametrize(("rank", "rope"), [(512, 64), (32, 16), (6, 3), (70, 33)])
    def test_shapes(self, kernels: AttentionKernels, rank: int, rope: int) -> None:
        test_sealed_latents.check(kernels, [5, 16, 70], [0, 2, 0], rank=rank, rope=rope, heads=17, padding=6, dtype=torch.float16)

    def test_parts_that_are_merged(self, kernels: AttentionKernels, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flexgen.kernels.triton.launch.SPLIT_TOKENS", 64)
        test_sealed_latents.check(kernels, [65, 64, 200, 129], [-1, 1, 130, 128], rank=32, rope=16, heads=2, dtype=torch.float16)

    def test_float32_and_four_bits_are_the_references(self, kernels: AttentionKernels) -> None:
        test_sealed_latents.check(kernels, [40, 7], [0, 0], heads=2)
        stored = test_sealed.store([40, 7], 1, 64, 32, "plain int4", torch.float32)
        found, known = (test_sealed_latents.attend(each, stored, [40, 7], [0, 0])[1] for each in (kernels, AttentionKernels()))
        torch.testing.assert_close(found, known)
