"""Attention of next tokens to sealed latents, against dense attention and against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.errors import EngineError
from flexgen.kernels.codes import HeadCodes, SealedPages
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.reference import AttentionKernels
from tests.kernels.test_sealed import DTYPES, PAGE, RAGGED, Stored, assert_close, dense, store
from tests.kernels.test_sealed import kernels as kernels  # a fixture


def attend(kernels: AttentionKernels, stored: Stored, lengths: list[int], starts: list[int], **how: Any) -> tuple[torch.Tensor, ...]:
    """Return the queries and their attention."""
    rank, rope, dtype = stored.tail_keys.shape[2], stored.tail_values.shape[3], stored.tail_keys.dtype
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(len(lengths), how.get("heads", 6), rank + rope, generator=generator, dtype=torch.float64).to(dtype)
    out = torch.full((*query.shape[:2], rank), math.nan, dtype=dtype)
    kernels.decode_sealed_latent_attention(
        query[..., :rank], query[..., rank:], stored.pages, stored.tail_keys, stored.tail_values, how.get("tables", stored.tables),
        how.get("tails", stored.tails), torch.tensor(starts), torch.tensor(lengths), scaling=0.3 / math.sqrt(rank + rope), out=out,
    )  # fmt: skip
    return query, out


def check(kernels: AttentionKernels, lengths: list[int], starts: list[int], **how: Any) -> None:
    rank, rope = how.get("rank", 64), how.get("rope", 32)
    stored = store(lengths, 1, rank, rope, "int8", how.get("dtype", torch.float32), how.get("seed", 0))
    if padding := how.get("padding", 0):
        stored = padded(stored, padding)
    query, out = attend(kernels, stored, lengths, starts, **how)
    for row, (start, (latent, turned)) in enumerate(zip(starts, stored.seen, strict=True)):
        seen = slice(max(start, 0), None)
        key = torch.cat([latent, turned], dim=-1)[seen]
        assert_close(out[row], dense(query[row], key, latent[seen], 0.3 / math.sqrt(rank + rope), None, None), latent)


def padded(stored: Stored, padding: int) -> Stored:
    """The same pages with bytes of NaN behind those of a head, as in slots on disk."""
    pages = stored.pages
    keys, values = (torch.nn.functional.pad(each, (0, padding), value=0xFF) for each in (pages.keys, pages.values))
    sealed = SealedPages(keys=keys, values=values, key_codes=pages.key_codes, value_codes=pages.value_codes, page_tokens=PAGE)
    return Stored(
        pages=sealed, tail_keys=stored.tail_keys, tail_values=stored.tail_values, tables=stored.tables, tails=stored.tails, seen=stored.seen
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_ragged_lengths(kernels: AttentionKernels, dtype: torch.dtype) -> None:
    check(kernels, RAGGED, [0] * len(RAGGED), dtype=dtype)


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (32, 16), (6, 3), (70, 33), (100, 1)])
def test_shapes(kernels: AttentionKernels, rank: int, rope: int) -> None:
    check(kernels, [5, 16, 70, 200], [0, 0, 0, 0], rank=rank, rope=rope, heads=16)


def test_more_than_one_block_and_starts_within_pages(kernels: AttentionKernels) -> None:
    check(kernels, [129, 300, 520, 40], [-1, 37, 301, 39], heads=9)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything(kernels: AttentionKernels, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    check(
        kernels,
        lengths,
        [data.draw(st.integers(0, length - 1)) for length in lengths],
        heads=data.draw(st.integers(1, 20)),
        rank=data.draw(st.integers(1, 140)),
        rope=data.draw(st.integers(1, 70)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        padding=data.draw(st.sampled_from([0, 2, 300])),
        seed=data.draw(st.integers(0, 1000)),
    )


def test_four_bits_are_the_references() -> None:
    """No format has latents in 4 bits, and if one had, the reference would compute."""
    stored = store([40, 7], 1, 64, 32, "plain int4", torch.float32)
    with CpuKernels(2) as compiled:
        found, known = (attend(each, stored, [40, 7], [0, 0])[1] for each in (compiled, AttentionKernels()))
    assert torch.equal(found, known)


def test_refusals() -> None:
    stored = store([40], 1, 32, 32, "int8", torch.float32)
    with CpuKernels(1) as compiled:
        for wrong in ({"tables": torch.full_like(stored.tables, 9)}, {"tails": torch.tensor([2])}):
            with pytest.raises(EngineError, match="page of the pool"):
                attend(compiled, stored, [40], [0], **wrong)
        with pytest.raises(EngineError, match="positions from"):
            attend(compiled, stored, [65], [0])
        short = SealedPages(
            keys=stored.pages.keys[..., :-2].contiguous(), values=stored.pages.values, page_tokens=PAGE,
            key_codes=HeadCodes(dim=32, bits=8), value_codes=stored.pages.value_codes,
        )  # fmt: skip
        tails = {"tail_keys": stored.tail_keys, "tail_values": stored.tail_values, "tables": stored.tables, "tails": stored.tails}
        with pytest.raises(EngineError, match="bytes per head"):
            attend(compiled, Stored(pages=short, seen=stored.seen, **tails), [40], [0])
