"""Chooses tokens from logits on the host.  Each row is sampled by itself: neither its neighbours nor the size of the batch can change its
token.

Knows no sequences and no text: a row comes with its request and the ids generated so far.  `device_sampler.py` chooses the same tokens on a
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexgen.base.isolation import for_one_request
from flexgen.engine.processors import changes_beside_guide, changes_logits, process_logits
from flexgen.errors import RequestError
from flexgen.kernels.philox import exponentials
from flexgen.request import TokenLogprobs, TokenRequest

_FIRST_CANDIDATES = 256  # most nuclei are smaller; a larger one costs another partition


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that was chosen.

    Attributes:
        token_id: The token.
        logprobs: Its log probability and those of the likeliest tokens, if the request asks for them.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample(logits: torch.Tensor, requests: Sequence[TokenRequest], generated: Sequence[Sequence[int]]) -> list[int | RequestError]:
    """Return the next token of every row, or the error that the row has instead.

    First, masks, bias and penalties change the logits (processors.py).  Temperature 0 then takes the largest logit, with the lowest id
    among equals, as transformers' `generate` does.  Otherwise temperature, min-p, top-k and top-p are applied in this order, as in vLLM
    (ties with the k-th logit stay), and the token is drawn as the winner of an exponential race: each id has a random number that depends
    on (seed, position, id) only, and the largest ratio of probability to number, in float64, wins.  A token then changes only if its own
    lead is smaller than a change of the logits, and not because many small changes before it in the vocabulary add up.

    Args:
        logits: The logits, (rows, vocab), of any floating dtype, in host memory; they are not changed.
        requests: The request of each row.
        generated: For each row, the ids generated so far.

    Returns:
        For each row a token id or a `RequestError`.  The error has the code "non_finite_logits" for a row with a NaN or an infinity,
        "no_token_allowed" for a row whose tokens are all masked, and "internal_error" for any other failure.
    """
    if logits.ndim != 2 or not len(logits) == len(requests) == len(generated):
        raise ValueError(f"logits {tuple(logits.shape)} for {len(requests)} requests and {len(generated)} answers")
    if not len(requests):
        return []
    tokens: list[int | RequestError] = []
    for row, request, past in zip(logits, requests, generated, strict=True):
        greedy = lowest_of_largest(row.detach())
        if greedy is None:
            tokens.append(not_finite())
        elif request.temperature > 0 or changes_logits(request):
            tokens.append(for_one_request(_choose, row, greedy, request, past))
        else:
            tokens.append(greedy)
    return tokens


def lowest_of_largest(row: torch.Tensor) -> int | None:
    """Return the index of the largest number of a row, the lowest among equals; None if a number of the row is not finite.

    Extremes and comparisons are vectorised, which `torch.max` with an index is not, and a single row stays in the cache.
    """
    least, largest = torch.aminmax(row)  # NaN if any number is
    if not (math.isfinite(least.item()) and math.isfinite(largest.item())):
        return None
    if row.element_size() > 2:
        return int((row.numpy() == largest.item()).argmax())
    bits = row.view(torch.int16).numpy()  # NumPy knows no bfloat16, and is slow in float16
    if not largest.item():  # the one number of two patterns, 0.0 and -0.0
        return int((bits & 0x7FFF == 0).argmax())
    return int((bits == largest.view(torch.int16).item()).argmax())


def not_finite() -> RequestError:
    """Return the error of a row with a logit that is not finite."""
    return RequestError("the model produced logits that are not finite", code="non_finite_logits")


def overflowed() -> RequestError:
    """Return the error of a row whose logits are not finite once its request has changed them."""
    return RequestError("the request's penalties make logits overflow", code="non_finite_logits")


def nothing_allowed(request: TokenRequest) -> RequestError:
    """Return the error of a row whose every token is masked."""
    guided = "structured_outputs, " if request.guide is not None else ""
    return RequestError(f"{guided}bad_words, min_tokens and allowed_token_ids leave no token to generate", code="no_token_allowed")


def as_float64(row: torch.Tensor) -> np.ndarray:
    """Return the numbers of a tensor as an array on the host, which shares memory with a float64 tensor there."""
    return row.detach().to(device="cpu", dtype=torch.float64).numpy()


def _choose(logits: torch.Tensor, greedy: int, request: TokenRequest, generated: Sequence[int]) -> int | RequestError:
    """Return the token of one row, whose likeliest token is `greedy`."""
    if request.temperature == 0 and not changes_beside_guide(request) and _is_allowed(greedy, request, generated):
        return greedy
    row = as_float64(logits)
    if changes_logits(request):
        row = process_logits(row, request, generated)
        likeliest = row.max()  # NaN if any logit is NaN
        if likeliest == -np.inf:
            return nothing_allowed(request)
        if not np.isfinite(likeliest):
            return overflowed()
    if request.temperature == 0:
        return int(row.argmax())
    return _draw(row, request, len(request.prompt_token_ids) + len(generated))


def _is_allowed(token: int, request: TokenRequest, generated: Sequence[int]) -> bool:
    """Return whether a guide allows the token, so that the rest of its row need not be looked at."""
    if request.guide is None:
        return False
    allowed = request.guide.allowed(generated)
    return token < len(allowed) and bool(allowed[token])


def _draw(row: np.ndarray, request: TokenRequest, position: int) -> int:
    """Draw the token at a position by temperature and the filters.

    min-p and top-k both keep what lies above a threshold, so their order does not matter; top-k first leaves less to exponentiate.
    """
    ids = None
    if 0 < request.top_k < len(row):
        threshold = np.partition(row, -request.top_k)[-request.top_k]
        ids = np.flatnonzero(row >= threshold)
        row = row[ids]
    with np.errstate(over="ignore", under="ignore"):  # tiny temperatures: the others' weights become 0
        weights = np.exp((row - row.max()) / request.temperature)  # relative to the likeliest token
    if request.min_p > 0:
        likely = np.flatnonzero(weights >= request.min_p)
        ids = likely if ids is None else ids[likely]
        weights = weights[likely]
    if request.top_p < 1:
        nucleus = _nucleus(weights, request.top_p)
        ids = nucleus if ids is None else ids[nucleus]
        weights = weights[nucleus]
    # a weight of 0 never wins, since the likeliest token's is 1
    choice = int((weights / exponentials(request.seed, position, len(weights) if ids is None else ids)).argmax())
    return choice if ids is None else int(ids[choice])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices, ascending, of the smallest set of largest weights that sum to at least `top_p` of the total (at least one index).

    Among equal weights, lower indices enter first.
    """
    wanted = top_p * weights.sum()
    size = min(_FIRST_CANDIDATES, len(weights))
    while size < len(weights):
        threshold = np.partition(weights, -size)[-size]
        candidates = np.flatnonzero(weights >= threshold)  # ascending ids, with all ties of the threshold
        if weights[candidates].sum() >= wanted:
            break
        size *= 8
    else:
        candidates = np.arange(len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]  # the mass of the tokens that rank higher
    return np.sort(order[: max(1, int(np.searchsorted(before, wanted, side="left")))])
