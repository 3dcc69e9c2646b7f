"""Log probabilities of generated tokens and of the tokens of prompts, each with those of the likeliest tokens at its position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flexgen.devices.packed import PackedCopies
from flexgen.errors import RequestError
from flexgen.models.scoring import Scores
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


# From tokens of prompts, and the numbers of likeliest tokens that are wanted beside them, to their log probabilities; waits for these.
Scoring = Callable[[Sequence[int], Sequence[int]], list[TokenLogprobs | RequestError]]


def start_scoring(scores: Scores, copies: PackedCopies) -> Scoring:
    """Start to bring scores to the host; several batches may be started before the first is asked for its log probabilities.

    Args:
        scores: The scores of the positions before the tokens.
        copies: The copies to and from the device.

    Returns:
        A function that waits for the scores and returns what `prompt_logprobs` yields.
    """
    waiting = copies.to_host(scores.logprobs, scores.likeliest, scores.likeliest_logprobs)

    def finish(targets: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs | RequestError]:
        with waiting.arrived() as (logprobs, likeliest, likeliest_logprobs):
            here = Scores(logprobs=logprobs, likeliest=likeliest, likeliest_logprobs=likeliest_logprobs)
            return list(prompt_logprobs(here, targets, counts))

    return finish


def prompt_logprobs(scores: Scores, targets: Sequence[int], counts: Sequence[int]) -> Iterator[TokenLogprobs | RequestError]:
    """Yield the log probabilities of tokens of prompts.

    Args:
        scores: The scores of the positions before these tokens.
        targets: The tokens.
        counts: For each token, the number of likeliest tokens that are wanted beside it; -1 for all.

    Yields:
        The log probabilities, or an error with the code "non_finite_logits".
    """
    rows = zip(targets, counts, scores.logprobs.tolist(), scores.likeliest.tolist(), scores.likeliest_logprobs.tolist(), strict=True)
    for target, count, logprob, likeliest, logprobs in rows:
        if not math.isfinite(logprob):
            yield RequestError("the model produced logits that are not finite", code="non_finite_logits")
            continue
        stop = len(likeliest) if count == -1 else count
        rank = likeliest.index(target) + 1 if target in likeliest else None
        yield TokenLogprobs(token_ids=(target, *likeliest[:stop]), logprobs=(logprob, *logprobs[:stop]), rank=rank)


def _likeliest(row: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the largest entries, largest first."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(row, -count)[-count]
    candidates = np.flatnonzero(row >= threshold)
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]
