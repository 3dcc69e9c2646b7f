"""Log probabilities of the generated token and of the likeliest tokens, from the model's logits of one row."""

from __future__ import annotations

import numpy as np

from flexgen.request import TokenLogprobs


def token_logprobs(row: np.ndarray, token_id: int, num_logprobs: int) -> TokenLogprobs:
    """Return the log probabilities of the generated token and of the `num_logprobs` likeliest tokens (all for -1), computed in float64.

    Among equal logits the lower id ranks higher.

    Args:
        row: The logits as the model returned them, (vocab,) float64, finite.
    """
    largest = row.max()
    log_sum = largest + np.log(np.exp(row - largest).sum())
    likeliest = _likeliest(row, len(row) if num_logprobs == -1 else min(num_logprobs, len(row)))
    ids = [token_id, *likeliest.tolist()]
    above = np.count_nonzero(row > row[token_id]) + np.count_nonzero(row[:token_id] == row[token_id])
    return TokenLogprobs(token_ids=tuple(ids), logprobs=tuple((row[ids] - log_sum).tolist()), rank=int(above) + 1)


def _likeliest(row: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the largest entries, largest first."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(row, -count)[-count]
    candidates = np.flatnonzero(row >= threshold)
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]
