"""The temporary tensors of attention in torch operations, which are bounded whatever is attended to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.kernels.dense import attend
from flexgen.kernels.gathered import GatheredKernels
from flexgen.kernels.reference import AttentionKernels
from tests.kernels import test_sealed
from tests.kernels.live_bytes import LiveBytes
from tests.kernels.test_gathered import KIB, limit

BOUND = 256 * KIB


def peak_of(run: Any) -> int:
    with torch.inference_mode(), LiveBytes() as live:
        run()
    return live.peak


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_temporary_tensors_of_next_tokens_are_bounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sinks: bool, softcap: float | None
) -> None:
    limit(monkeypatch, BOUND)
    number, tokens, heads = 24, 512, 8
    pages = torch.zeros(2, number * tokens // 16, 2, 32, 16, dtype=dtype)
    tables = torch.randperm(number * tokens // 16).view(number, -1)
    starts, query = torch.zeros(number, dtype=torch.int64), torch.ones(number, heads, 32, dtype=dtype)
    values, out, logits = pages[1].mT.contiguous(), torch.empty_like(query), torch.zeros(heads, dtype=dtype) if sinks else None
    where = query, pages[0], values, tables, starts, starts + tokens
    how: dict[str, Any] = {"scaling": 1.0, "softcap": softcap, "sinks": logits, "out": out}
    assert BOUND / 8 < peak_of(lambda: GatheredKernels().decode_attention(*where, **how)) <= BOUND
    stored = test_sealed.store([tokens] * 3, 2, 64, 64, "int4", dtype)
    query, out = torch.ones(3, heads, 64, dtype=dtype), torch.empty(3, heads, 64, dtype=dtype)
    where = query, stored.pages, stored.tail_keys, stored.tail_values, stored.tables, stored.tails, starts[:3], starts[:3] + tokens
    kernels = GatheredKernels()
    kernels.rotations(query)
    assert BOUND / 8 < peak_of(lambda: kernels.decode_sealed_attention(*where, **how | {"out": out})) <= BOUND


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_temporary_tensors_of_sparse_attention_are_bounded(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sinks: bool) -> None:
    bound = 1024 * KIB
    limit(monkeypatch, bound)
    number, tokens, heads = 24, 256, 8
    pages = torch.zeros(2, number * tokens // 16, 2, 32, 16, dtype=dtype)
    tables = torch.randperm(number * tokens // 16).view(number, -1)
    starts, query = torch.zeros(number, dtype=torch.int64), torch.ones(number, heads, 32, dtype=dtype)
    logits = torch.zeros(heads, dtype=dtype) if sinks else None
    where = query, pages[0], pages[1].mT.contiguous(), tables, starts, starts + tokens, starts + 40
    how: dict[str, Any] = {"scaling": 1.0, "softcap": 3.0, "sinks": logits, "out": torch.empty_like(query)}
    assert bound / 8 < peak_of(lambda: GatheredKernels().decode_sparse_attention(*where, **how)) <= bound


@pytest.mark.parametrize("make", [GatheredKernels, AttentionKernels])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_temporary_tensors_of_prompts_are_bounded(
    monkeypatch: pytest.MonkeyPatch, make: type[AttentionKernels], sinks: bool, softcap: float | None
) -> None:
    limit(monkeypatch, BOUND)
    heads, tokens = 8, 512
    query, (key, value) = torch.ones(tokens, heads, 32), torch.ones(2, tokens, 2, 32)
    starts, logits = torch.zeros(tokens, dtype=torch.int64), torch.zeros(heads) if sinks else None
    how: dict[str, Any] = {"scaling": 1.0, "softcap": softcap, "sinks": logits, "out": torch.empty_like(query)}
    # Sinks are positions of their own, for which keys and values are copied.
    bound = BOUND + sinks * (key.nbytes + value.nbytes) * 2
    assert BOUND / 8 < peak_of(lambda: make().prefill_attention(query, key, value, starts, **how)) <= bound
    assert heads * tokens * tokens * 4 > 8 * bound, "the scores alone would take more"


def test_blocks_of_dense_attention_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(20, heads, 16, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    visible, sinks = torch.ones(20, 20, dtype=torch.bool).tril(), torch.randn(6, generator=generator, dtype=torch.float64)
    known = attend(query, key, value, visible, 0.3, 2.0, sinks)
    limit(monkeypatch, 1)
    torch.testing.assert_close(attend(query, key, value, visible, 0.3, 2.0, sinks), known)
