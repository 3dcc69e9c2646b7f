"""Changes that a request makes to its row of logits before a token is chosen: masks, bias and penalties, in vLLM's order.

What changes is found here, for one row; it is applied here to a row of NumPy numbers, and by `device_rows.py` to the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flexgen.request import TokenRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitChanges:
    """What a request changes in its row of logits; the fields are applied in their order.

    Each id of an array is there once, and has a logit: some vocabularies are larger than the model's head.

    Attributes:
        allowed: Whether each token may come, (vocab,) bool; None if all may.
        banned: Further tokens that may not, int64.
        biased: Tokens to whose logits something is added, int64.
        biases: What is added to each, float64.
        seen: Tokens of the prompt and the answer, int64, if repetition is penalised.
        repetition_penalty: What their logits are divided by if they are positive, and multiplied by otherwise.
        generated: Tokens of the answer, int64, if their presence or frequency is penalised.
        amounts: What is subtracted from the logit of each, float64.
    """

    allowed: np.ndarray | None
    banned: np.ndarray
    biased: np.ndarray
    biases: np.ndarray
    seen: np.ndarray
    repetition_penalty: float
    generated: np.ndarray
    amounts: np.ndarray


def changes_logits(request: TokenRequest) -> bool:
    """Return whether a request changes its logits at all."""
    return request.guide is not None or changes_beside_guide(request)


def changes_beside_guide(request: TokenRequest) -> bool:
    """Return whether a request changes its logits besides keeping what a guide allows."""
    return (
        request.allowed_token_ids is not None
        or bool(request.bad_words_token_ids or request.min_tokens or request.logit_bias)
        or request.repetition_penalty != 1
        or request.frequency_penalty != 0
        or request.presence_penalty != 0
    )


def logit_changes(request: TokenRequest, generated: Sequence[int], vocab_size: int) -> LogitChanges:
    """Return what a request changes in its row.

    Args:
        request: The request.
        generated: The ids that it has generated so far.
        vocab_size: The number of logits of a row.
    """
    banned = [word[-1] for word in request.bad_words_token_ids if _is_completed(word, generated)]
    if len(generated) < request.min_tokens:
        banned += request.stop_token_ids
    biases = [(token_id, bias) for token_id, bias in request.logit_bias if 0 <= token_id < vocab_size]
    seen, counted, amounts = _ids(()), _ids(()), np.empty(0)
    if request.repetition_penalty != 1:
        seen = _within(np.unique(np.array([*request.prompt_token_ids, *generated], dtype=np.int64)), vocab_size)
    if request.frequency_penalty != 0 or request.presence_penalty != 0:
        counted, counts = np.unique(_within(np.array(generated, dtype=np.int64), vocab_size), return_counts=True)
        with np.errstate(over="ignore", invalid="ignore"):  # the sampler checks that a finite logit is left
            amounts = request.frequency_penalty * counts + request.presence_penalty
    return LogitChanges(
        allowed=_allowed(request, generated, vocab_size),
        banned=_ids({token_id for token_id in banned if 0 <= token_id < vocab_size}),
        biased=_ids(token_id for token_id, _ in biases),
        biases=np.array([bias for _, bias in biases], dtype=np.float64),
        seen=seen,
        repetition_penalty=request.repetition_penalty,
        generated=counted,
        amounts=amounts,
    )


def process_logits(logits: np.ndarray, request: TokenRequest, generated: Sequence[int]) -> np.ndarray:
    """Return a changed copy of one row, in which masked tokens are at minus infinity.

    Args:
        logits: The logits, (vocab,) float64.
        request: The request.
        generated: The ids that it has generated so far.
    """
    row, changes = logits.copy(), logit_changes(request, generated, len(logits))
    if changes.allowed is not None:
        row[~changes.allowed] = -np.inf
    row[changes.banned] = -np.inf
    with np.errstate(over="ignore", invalid="ignore"):  # the sampler checks that a finite logit is left
        row[changes.biased] += changes.biases
        seen, penalty = row[changes.seen], changes.repetition_penalty
        row[changes.seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        row[changes.generated] -= changes.amounts
    return row


def _allowed(request: TokenRequest, generated: Sequence[int], vocab_size: int) -> np.ndarray | None:
    """Return which tokens a guide and a list of tokens allow; a head may have more entries than the vocabulary, or fewer."""
    if request.guide is None and request.allowed_token_ids is None:
        return None
    allowed = np.ones(vocab_size, dtype=np.bool_)
    if request.guide is not None:
        known = request.guide.allowed(generated)[:vocab_size]
        allowed[: len(known)], allowed[len(known) :] = known, False
    if request.allowed_token_ids is not None:
        listed = np.zeros(vocab_size, dtype=np.bool_)
        listed[_within(np.array(request.allowed_token_ids, dtype=np.int64), vocab_size)] = True
        allowed &= listed
    return allowed


def _is_completed(word: Sequence[int], generated: Sequence[int]) -> bool:
    """Return whether the last token of a word would follow all its others."""
    start = len(generated) - len(word) + 1
    return start >= 0 and tuple(generated[start:]) == tuple(word[:-1])


def _within(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the ids that have a logit."""
    return token_ids[(token_ids >= 0) & (token_ids < vocab_size)]


def _ids(token_ids: Iterable[int]) -> np.ndarray:
    return np.array(list(token_ids), dtype=np.int64)
