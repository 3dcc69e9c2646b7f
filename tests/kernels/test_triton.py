"""Triton's kernels for plain pages and for prompts against dense float64 softmax; how they run is said in triton_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.errors import EngineError
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.triton.arguments import rows_of
from tests.kernels.test_attention import anything, check_decode, check_prefill
from tests.kernels.test_paged_prompts import TestPagedPrompts as TestPagedPrompts
from tests.kernels.triton_kernels import DTYPES, ON_GPU
from tests.kernels.triton_kernels import kernels as kernels  # a fixture

pytestmark = ON_GPU
SMALL: dict[str, Any] = {"heads": 2, "kv_heads": 1, "key_dim": 16, "value_dim": 16, "page_tokens": 16}


class TestDecode:
    @pytest.mark.parametrize("seed", range(24))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        chance, how = anything(seed, DTYPES)
        lengths = [chance.randint(1, 90) for _ in range(chance.randint(1, 4))]
        starts = [chance.choice([-3, 0, chance.randint(0, length - 1)]) for length in lengths]
        check_decode(kernels, lengths, starts, page_tokens=chance.choice([2, 12, 16, 16, 32, 128]), **how)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_parts_that_are_merged(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        check_decode(
            kernels,
            [1, 512, 513, 1030],
            [0, 0, 0, 3],
            heads=2,
            kv_heads=1,
            key_dim=16,
            value_dim=16,
            page_tokens=16,
            sinks=True,
            dtype=dtype,
        )

    def test_windows_that_begin_in_later_parts(self, kernels: AttentionKernels) -> None:
        check_decode(kernels, [700, 1025, 1024], [511, 512, 1023], **SMALL)

    def test_more_parts_than_are_merged_at_once(self, kernels: AttentionKernels, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flexgen.kernels.triton.launch.SPLIT_TOKENS", 64)
        check_decode(kernels, [1100, 64, 65], [0, 0, 1], **SMALL, sinks=True)

    def test_sequences_that_are_launched_one_after_the_other(self, kernels: AttentionKernels, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flexgen.kernels.triton.launch.PARTS_BYTES", 2 * 2 * 2 * (16 + 2) * 4)  # two sequences of two parts
        check_decode(kernels, [600, 5, 513, 1, 700], [0] * 5, **SMALL)

    def test_more_heads_than_rows_of_a_tile(self, kernels: AttentionKernels) -> None:
        check_decode(kernels, [20, 3], [0, 0], heads=71, kv_heads=1, key_dim=16, value_dim=16, page_tokens=16, sinks=True)

    def test_results_do_not_depend_on_the_neighbours(self, kernels: AttentionKernels) -> None:
        """A sequence of one part has the same bits beside one of several, whose parts are merged."""
        generator = torch.Generator().manual_seed(0)
        pages = torch.randn(2, 80, 1, 16, 16, generator=generator)
        tables, query = torch.randperm(80, generator=generator)[None, :64].repeat(2, 1), torch.randn(2, 2, 16, generator=generator)
        starts, lengths, together, alone = torch.zeros(2, dtype=torch.int64), torch.tensor([200, 1000]), query.new_empty(2, 2, 16), None
        kernels.decode_attention(query, *pages, tables, starts, lengths, scaling=0.3, out=together)
        alone = query.new_empty(1, 2, 16)
        kernels.decode_attention(query[:1], *pages, tables[:1, :13], starts[:1], lengths[:1], scaling=0.3, out=alone)
        assert torch.equal(alone[0], together[0])

    def test_queries_in_another_order_in_memory(self, kernels: AttentionKernels) -> None:
        generator = torch.Generator().manual_seed(0)
        pages = torch.randn(2, 3, 2, 16, 16, generator=generator)
        query = torch.randn(4, 3, 16, generator=generator).transpose(0, 1)
        where = torch.tensor([[0], [2], [1]]), torch.zeros(3, dtype=torch.int64), torch.tensor([16, 1, 9])
        found, known = torch.empty(3, 4, 16), torch.empty(3, 4, 16)
        kernels.decode_attention(query, *pages, *where, scaling=0.3, out=found)
        AttentionKernels().decode_attention(query, *pages, *where, scaling=0.3, out=known)
        torch.testing.assert_close(found, known)

    def test_float64_is_the_references(self, kernels: AttentionKernels) -> None:
        check_decode(kernels, [20, 3], [0, 0], key_dim=16, value_dim=16, dtype=torch.float64)

    def test_refusals(self, kernels: AttentionKernels) -> None:
        pages, one = torch.zeros(2, 1, 2, 16, 16), torch.ones(1, dtype=torch.int64)
        query, table = torch.zeros(1, 4, 16), torch.zeros(1, 1, dtype=torch.int64)
        with pytest.raises(EngineError, match="cannot share 2 key heads"):
            kernels.decode_attention(query[:, :3], *pages, table, one - 1, one, scaling=1.0, out=query[:, :3])
        with pytest.raises(EngineError, match="lengths has the shape"):
            kernels.decode_attention(query, *pages, table, one - 1, one.repeat(2), scaling=1.0, out=query)
        with pytest.raises(EngineError, match=r"holds torch\.float16"):
            kernels.decode_attention(query, *pages.half(), table, one - 1, one, scaling=1.0, out=query)


class TestPrefill:
    @pytest.mark.parametrize("seed", range(16))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        chance, how = anything(seed, DTYPES)
        num_queries = chance.choice([1, 3, 16, 17, 64, 65, 100])
        num_positions = num_queries + chance.choice([0, 1, 40])
        window = chance.choice([200, 1, 7, 33])
        starts = [position - window + 1 for position in range(num_positions - num_queries, num_positions)]
        check_prefill(kernels, num_queries, num_positions, starts, **how)

    @pytest.mark.parametrize("chunk", [1, 16, 30])
    def test_chunks(self, kernels: AttentionKernels, chunk: int) -> None:
        starts = [position // chunk * chunk for position in range(20, 90)]
        check_prefill(kernels, 70, 90, starts, heads=2, kv_heads=1, key_dim=16, value_dim=16)

    def test_queries_of_many_bytes_in_smaller_tiles(self, kernels: AttentionKernels) -> None:
        check_prefill(kernels, 40, 45, [0] * 40, heads=1, kv_heads=1, key_dim=260, value_dim=16)

    def test_float64_and_long_heads_are_the_references(self, kernels: AttentionKernels) -> None:
        check_prefill(kernels, 5, 9, [0] * 5, key_dim=16, value_dim=16, dtype=torch.float64)
        check_prefill(kernels, 5, 9, [0] * 5, heads=1, kv_heads=1, key_dim=1100, value_dim=16)

    def test_views_in_another_order(self, kernels: AttentionKernels) -> None:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(heads, 20, 16, generator=generator).transpose(0, 1) for heads in (4, 2, 2))
        starts, found, known = torch.zeros(20, dtype=torch.int64), torch.empty(20, 4, 16), torch.empty(20, 4, 16)
        kernels.prefill_attention(query, key, value, starts, scaling=0.3, out=found)
        AttentionKernels().prefill_attention(query, key, value, starts, scaling=0.3, out=known)
        torch.testing.assert_close(found, known)

    @pytest.mark.parametrize("dim", [8, 12, 16, 32])
    def test_heads_lie_in_one_way_whatever_they_are_a_part_of(self, dim: int) -> None:
        """One program of Triton's is enough, and heads of usual sizes are not copied."""
        generator, ways = torch.Generator().manual_seed(0), set[tuple[bool, ...]]()
        of_tokens = torch.randn(1, 3, 7, dim, generator=generator).half()  # (batch, heads, tokens, dim)
        of_heads = torch.randn(1, 7, 3, dim, generator=generator).half().transpose(1, 2)
        fused = torch.randn(1, 7, 3, 3, dim, generator=generator).half()[:, :, 1].transpose(1, 2)
        for whole in (of_tokens, of_heads, fused):
            for rows in (slice(0, 7), slice(1, 6), slice(0, 1), slice(2, 2)):
                part = whole[0, :, rows].transpose(0, 1)
                found = rows_of(part)
                assert torch.equal(found, part)
                if dim % 16 == 0:
                    assert found.data_ptr() == part.data_ptr()
                ways.add((found.stride(2) == 1, *(each % 16 == 0 for each in (found.stride(0), found.stride(1), found.data_ptr()))))
        assert len(ways) == 1

    def test_no_queries(self, kernels: AttentionKernels) -> None:
        nothing = torch.empty(0, 2, 16)
        kernels.prefill_attention(nothing, nothing, nothing, torch.empty(0, dtype=torch.int64), scaling=1.0, out=nothing)
