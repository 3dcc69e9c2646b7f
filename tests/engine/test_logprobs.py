"""Log probabilities against a plain log-softmax and sort."""

from __future__ import annotations

import math

import pytest
import torch

from flexgen.engine.logprobs import token_logprobs
from flexgen.engine.sampler import as_float64

VOCAB = 300
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 5, VOCAB, VOCAB + 9, -1])
@pytest.mark.parametrize("token_id", [0, 17, int(LOGITS.argmax())])
def test_like_a_plain_log_softmax(dtype: torch.dtype, count: int, token_id: int) -> None:
    logits = LOGITS.to(dtype)
    wanted = torch.log_softmax(logits.double(), -1)
    order = sorted(range(VOCAB), key=lambda i: (-logits[i].item(), i))
    got = token_logprobs(as_float64(logits), token_id, count)
    assert got.token_ids == (token_id, *order[: VOCAB if count == -1 else count])
    assert got.logprobs == pytest.approx([wanted[i].item() for i in got.token_ids], abs=1e-9)
    assert got.rank == order.index(token_id) + 1


def test_equal_logits_rank_by_id() -> None:
    logits = as_float64(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0]))
    assert token_logprobs(logits, 3, 2).token_ids == (3, 1, 2)
    assert [token_logprobs(logits, token_id, 0).rank for token_id in range(5)] == [4, 1, 2, 3, 5]


def test_large_logits_do_not_overflow() -> None:
    got = token_logprobs(as_float64(torch.tensor([60000.0, 0.0, -60000.0])), 0, -1)
    assert got.logprobs == (0.0, 0.0, -60000.0, -120000.0)
    assert not any(math.isnan(value) for value in got.logprobs)
