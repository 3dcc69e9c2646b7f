"""Chooses the tokens of micro-batches where their logits are: on the host row by row, on a device all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flexgen.base.isolation import for_one_request
from flexgen.devices.base import HOST
from flexgen.devices.packed import PackedCopies
from flexgen.engine.device_sampler import start_sampling
from flexgen.engine.logprobs import token_logprobs
from flexgen.engine.sampler import Sampled, as_float64, sample
from flexgen.errors import RequestError
from flexgen.request import TokenRequest

Sampling = Callable[[], list[Sampled | RequestError]]  # waits for the tokens of a batch


class Sampler:
    """Chooses tokens, and finds the log probabilities that are asked for.

    Args:
        copies: The copies to and from the computing device.
    """

    def __init__(self, copies: PackedCopies) -> None:
        self._copies = copies

    def start(self, logits: torch.Tensor, requests: Sequence[TokenRequest], generated: Sequence[Sequence[int]]) -> Sampling:
        """Start to choose the next token of every row; several batches may be started before the first is asked for its tokens.

        Args:
            logits: The logits, (rows, vocab), of any floating dtype, where computing happens; they are not changed.
            requests: The request of each row.
            generated: For each row, the ids generated so far.

        Returns:
            A function that waits for the tokens and returns them, or the errors that rows have instead (see `sampler.sample`).
        """
        if not requests:
            return list
        if self._copies.device != HOST:
            return start_sampling(logits, requests, generated, self._copies)
        tokens = sample(logits, requests, generated)
        chosen = [_with_logprobs(row, request, token) for row, request, token in zip(logits, requests, tokens, strict=True)]
        return lambda: chosen


def _with_logprobs(row: torch.Tensor, request: TokenRequest, token: int | RequestError) -> Sampled | RequestError:
    """Return a row's token with the log probabilities that its request asks for."""
    if isinstance(token, RequestError) or request.num_logprobs is None:
        return token if isinstance(token, RequestError) else Sampled(token)
    found = for_one_request(token_logprobs, as_float64(row), token, request.num_logprobs)
    return found if isinstance(found, RequestError) else Sampled(token, found)
