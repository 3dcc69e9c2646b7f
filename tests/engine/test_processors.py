"""Masks, bias and penalties against transformers' processors, OpenAI's formula, and what they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from flexgen.engine.processors import changes_logits, process_logits
from flexgen.request import TokenRequest

VOCAB = 50
PROMPT, GENERATED = (3, 4, 4, 7), [9, 4, 9, 9, 20]
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def request(**how: Any) -> TokenRequest:
    return TokenRequest(index=0, prompt_token_ids=PROMPT, max_tokens=99, **how)


def processed(generated: list[int] = GENERATED, **how: Any) -> np.ndarray:
    assert changes_logits(request(**how))
    return process_logits(LOGITS.numpy(), request(**how), generated)


@pytest.mark.parametrize(
    ("how", "theirs", "sees_prompt"),
    [
        ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3), True),
        ({"repetition_penalty": 0.7}, RepetitionPenaltyLogitsProcessor(0.7), True),
        ({"logit_bias": ((4, 2.5), (30, -100.0))}, SequenceBiasLogitsProcessor([[[4], 2.5], [[30], -100.0]]), True),
        (
            {"bad_words_token_ids": ((8,), (9, 20, 5), (20, 6), (4, 6), (9, 9, 20, 11))},
            NoBadWordsLogitsProcessor([[8], [9, 20, 5], [20, 6], [4, 6], [9, 9, 20, 11]]),
            False,  # words are counted in the answer only
        ),
        (
            {"min_tokens": 6, "stop_token_ids": frozenset({1, 2})},
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [1, 2]),
            True,
        ),
        (
            {"allowed_token_ids": (5, 17, 40)},
            SuppressTokensLogitsProcessor([i for i in range(VOCAB) if i not in (5, 17, 40)]),
            True,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_like_transformers(how: dict[str, Any], theirs: LogitsProcessor, sees_prompt: bool) -> None:
    ids = torch.tensor([[*PROMPT, *GENERATED] if sees_prompt else GENERATED])
    wanted = theirs(ids, LOGITS[None].clone())[0].double()
    torch.testing.assert_close(torch.from_numpy(processed(**how)), wanted, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(processed(**how), LOGITS.numpy())


def test_presence_and_frequency_penalties() -> None:
    """OpenAI's formula: each logit less count * frequency and, where the count is not 0, presence; prompts do not count."""
    wanted = LOGITS.numpy().copy()
    for token_id in range(VOCAB):
        count = GENERATED.count(token_id)
        wanted[token_id] -= count * 0.5 + (count > 0) * -1.25
    np.testing.assert_allclose(processed(frequency_penalty=0.5, presence_penalty=-1.25), wanted)
    assert np.array_equal(processed([], frequency_penalty=0.5, presence_penalty=1), LOGITS.numpy())


def test_a_word_that_is_longer_than_the_answer_is_left_alone() -> None:
    assert np.array_equal(processed([20], bad_words_token_ids=((9, 20, 5),)), LOGITS.numpy())


@pytest.mark.parametrize(("num_generated", "masked"), [(0, True), (2, True), (3, False)])
def test_nothing_stops_before_min_tokens(num_generated: int, masked: bool) -> None:
    row = processed(GENERATED[:num_generated], min_tokens=3, stop_token_ids=frozenset({11, VOCAB + 5}))
    assert np.isneginf(row[11]) == masked
    assert np.isfinite(np.delete(row, 11)).all()


def test_penalties_come_after_the_bias() -> None:
    """As in vLLM: a bias can change the sign that decides how a repetition penalty works."""
    token_id = PROMPT[0]
    row = processed([], repetition_penalty=2.0, logit_bias=((token_id, 50.0),))
    assert row[token_id] == pytest.approx((LOGITS[token_id].item() + 50) / 2)


def test_ids_beyond_the_head_count_for_nothing() -> None:
    beyond = TokenRequest(index=0, prompt_token_ids=(VOCAB + 3,), max_tokens=9, repetition_penalty=1.5)
    assert np.array_equal(process_logits(LOGITS.numpy(), beyond, []), LOGITS.numpy())


def test_the_row_itself_is_not_changed() -> None:
    before = LOGITS.clone()
    processed(allowed_token_ids=(1,), repetition_penalty=1.5, logit_bias=((2, 1.0),))
    assert torch.equal(LOGITS, before)


def test_what_changes_nothing() -> None:
    assert not changes_logits(request(temperature=0.5, top_p=0.5, top_k=3, min_p=0.1, stop_token_ids=frozenset({1})))
