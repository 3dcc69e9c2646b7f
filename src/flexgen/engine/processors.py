"""Changes that a request makes to its row of logits before a token is chosen: masks, bias and penalties, in vLLM's order.

Works on one row of float64 numbers, and knows no batches; the sampler chooses the token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexgen.request import TokenRequest


def changes_logits(request: TokenRequest) -> bool:
    """Return whether `process_logits` has anything to do."""
    return request.guide is not None or changes_beside_guide(request)


def changes_beside_guide(request: TokenRequest) -> bool:
    """Return whether `process_logits` has anything to do besides keeping what a guide allows."""
    return (
        request.allowed_token_ids is not None
        or bool(request.bad_words_token_ids or request.min_tokens or request.logit_bias)
        or request.repetition_penalty != 1
        or request.frequency_penalty != 0
        or request.presence_penalty != 0
    )


def process_logits(logits: np.ndarray, request: TokenRequest, generated: Sequence[int]) -> np.ndarray:
    """Return a changed copy of one row, in which masked tokens are at minus infinity.

    Args:
        logits: The logits, (vocab,) float64.
        generated: The ids that the request has generated so far.
    """
    row = logits.copy()
    if request.guide is not None:
        _keep_allowed(row, request.guide.allowed(generated))
    if request.allowed_token_ids is not None:
        _keep_only(row, request.allowed_token_ids)
    for word in request.bad_words_token_ids:
        _mask_completion(row, word, generated)
    if len(generated) < request.min_tokens:
        row[_within(sorted(request.stop_token_ids), row)] = -np.inf
    with np.errstate(over="ignore", invalid="ignore"):  # the sampler checks that a finite logit is left
        if request.logit_bias:
            _add_biases(row, request.logit_bias)
        if request.repetition_penalty != 1:
            _penalise_repetition(row, request.repetition_penalty, [*request.prompt_token_ids, *generated])
        if request.frequency_penalty != 0 or request.presence_penalty != 0:
            _penalise_presence(row, request.frequency_penalty, request.presence_penalty, generated)
    return row


def _keep_allowed(row: np.ndarray, allowed: np.ndarray) -> None:
    """Mask what is not allowed; a head may have more entries than the vocabulary, or fewer."""
    size = min(len(row), len(allowed))
    row[:size][~allowed[:size]] = -np.inf
    row[size:] = -np.inf


def _keep_only(row: np.ndarray, token_ids: Sequence[int]) -> None:
    allowed = _within(token_ids, row)
    kept = row[allowed]
    row[:] = -np.inf
    row[allowed] = kept


def _mask_completion(row: np.ndarray, word: Sequence[int], generated: Sequence[int]) -> None:
    """Mask the last token of a word whose other tokens were just generated."""
    start = len(generated) - len(word) + 1
    if start >= 0 and tuple(generated[start:]) == tuple(word[:-1]):
        row[_within([word[-1]], row)] = -np.inf


def _add_biases(row: np.ndarray, biases: Sequence[tuple[int, float]]) -> None:
    ids, values = np.array([token_id for token_id, _ in biases]), np.array([bias for _, bias in biases])
    has_logit = ids < len(row)
    row[ids[has_logit]] += values[has_logit]  # each id occurs once


def _penalise_repetition(row: np.ndarray, penalty: float, token_ids: Sequence[int]) -> None:
    seen = _within(np.unique(np.asarray(token_ids)), row)
    row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)


def _penalise_presence(row: np.ndarray, frequency: float, presence: float, generated: Sequence[int]) -> None:
    ids, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
    row[ids] -= frequency * counts + presence


def _within(token_ids: Sequence[int] | np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the ids that have a logit: some vocabularies are larger than the model's head."""
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[ids < len(row)]
