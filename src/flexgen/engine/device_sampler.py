"""Chooses the tokens of a micro-batch on the device that holds its logits, as `sampler.sample` does on the host.

What the requests ask for goes there in one copy, and all results come back in another: the only time that the host waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexgen.base.isolation import for_one_request
from flexgen.devices.packed import PackedCopies
from flexgen.engine.device_rows import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    OVERFLOWED,
    Draws,
    RowBlock,
    RowChanges,
    chosen,
    likeliest,
    logprobs,
    rows_at_once,
)
from flexgen.engine.processors import LogitChanges, changes_logits, logit_changes
from flexgen.engine.sampler import Sampled, not_finite, nothing_allowed, overflowed
from flexgen.errors import RequestError
from flexgen.kernels.philox import signed
from flexgen.request import TokenLogprobs, TokenRequest

Requests = Sequence[TokenRequest]
Answers = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Rows whose log probabilities are found together.

    Attributes:
        places: Their places in the batch.
        rows: The same, int64 (rows,), where computing happens.
        count: The number of likeliest tokens that are wanted beside their own.
    """

    places: Sequence[int]
    rows: torch.Tensor
    count: int


def start_sampling(
    logits: torch.Tensor, requests: Requests, generated: Answers, copies: PackedCopies
) -> Callable[[], list[Sampled | RequestError]]:
    """Start to choose the next token of every row.

    Args:
        logits: The logits, (rows, vocab), of any floating dtype, where computing happens; they are not changed.
        requests: The request of each row.
        generated: For each row, the ids generated so far.
        copies: The copies to and from the device.

    Returns:
        A function that waits for the tokens and returns them, or the errors that rows have instead (see `sampler.sample`).
    """
    changes, errors = _all_changes(requests, generated, logits.shape[1])
    blocks, scored = _blocks(requests, generated, changes, errors, logits.shape[1]), _scored_rows(requests, logits.shape[1])
    blocks, scored = copies.to_device((blocks, scored))
    tokens, states = likeliest(logits)
    for block in blocks:
        own, found = chosen(logits, block)
        before = states.index_select(0, block.rows)
        tokens.index_copy_(0, block.rows, own)
        states.index_copy_(0, block.rows, torch.where(before == 0, found, before))
    results = [tokens, states]
    for each in scored:
        own = logprobs(logits.index_select(0, each.rows), tokens.index_select(0, each.rows), each.count)
        results += [numbers.flatten() for numbers in own]
    waiting = copies.to_host(torch.cat(results))

    def finish() -> list[Sampled | RequestError]:
        with waiting.arrived() as (packed,):
            numbers = packed.numpy().copy()  # the memory is lent
        found = dict(_logprobs(numbers, len(requests), scored))
        return [
            _error(int(state), request, errors.get(row)) or Sampled(int(token), found.get(row))
            for row, (token, state, request) in enumerate(zip(numbers, numbers[len(requests) :], requests, strict=False))
        ]

    return finish


def _error(state: int, request: TokenRequest, error: RequestError | None) -> RequestError | None:
    """Return the error of a row of which this became, and whose request had that error before; None if it has none."""
    if state == NOT_FINITE:
        return not_finite()
    if error is None and state == NOTHING_ALLOWED:
        return nothing_allowed(request)
    return overflowed() if error is None and state == OVERFLOWED else error


def _logprobs(numbers: np.ndarray, num_rows: int, scored: Iterable[ScoredRows]) -> Iterator[tuple[int, TokenLogprobs]]:
    """Yield the places of rows with their log probabilities, from the results of a batch."""
    at = 2 * num_rows
    for each in scored:
        size = len(each.places)
        ranks, own, ids, values = np.split(numbers[at : at + size * (2 + 2 * each.count)], np.cumsum([size, size, size * each.count]))
        own, values = own.view(np.float64), values.view(np.float64).reshape(size, each.count)
        at += size * (2 + 2 * each.count)
        rows = zip(each.places, ranks.tolist(), own.tolist(), ids.reshape(size, each.count).tolist(), values.tolist(), strict=True)
        for place, rank, logprob, likeliest_ids, likeliest_logprobs in rows:
            token_ids = (int(numbers[place]), *likeliest_ids)
            yield place, TokenLogprobs(token_ids=token_ids, logprobs=(logprob, *likeliest_logprobs), rank=rank)


# -- what the requests ask for, in host memory ------------------------------------------------------------------------------------------


def _all_changes(requests: Requests, generated: Answers, vocab_size: int) -> tuple[dict[int, LogitChanges], dict[int, RequestError]]:
    """Return what the requests change in their rows, by row, and the errors of those for which that cannot be found."""
    changes: dict[int, LogitChanges] = {}
    errors: dict[int, RequestError] = {}
    for row, (request, past) in enumerate(zip(requests, generated, strict=True)):
        if changes_logits(request):
            found = for_one_request(logit_changes, request, past, vocab_size)
            if isinstance(found, RequestError):
                errors[row] = found
            else:
                changes[row] = found
    return changes, errors


def _blocks(
    requests: Requests, generated: Answers, changes: Mapping[int, LogitChanges], errors: Mapping[int, RequestError], vocab_size: int
) -> list[RowBlock]:
    """Return the rows of which more is asked than the likeliest token, in blocks of rows that are chosen by the same operations."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row, request in enumerate(requests):
        draws = request.temperature > 0
        if row not in errors and (draws or row in changes):
            kinds.setdefault((draws, draws and request.top_p < 1), []).append(row)
    step, blocks = rows_at_once(vocab_size), list[RowBlock]()
    for (draws, _), members in kinds.items():
        for rows in (members[start : start + step] for start in range(0, len(members), step)):
            own = [requests[row] for row in rows]
            positions = [len(requests[row].prompt_token_ids) + len(generated[row]) for row in rows]
            blocks.append(
                RowBlock(
                    rows=torch.tensor(rows),
                    changes=_row_changes([(place, changes[row]) for place, row in enumerate(rows) if row in changes], vocab_size),
                    draws=_draws(own, positions, vocab_size) if draws else None,
                )
            )
    return blocks


def _draws(requests: Requests, positions: Sequence[int], vocab_size: int) -> Draws:
    """Return how the tokens of rows are drawn, all of which have a nucleus, or none."""
    kept = [request.top_k if 0 < request.top_k < vocab_size else 0 for request in requests]
    return Draws(
        temperatures=_column([request.temperature for request in requests], torch.float64),
        min_p=_column([request.min_p for request in requests], torch.float64),
        seeds=_column([signed(request.seed) for request in requests], torch.int64),
        positions=_column(positions, torch.int64),
        kth=_column([each - 1 for each in kept], torch.int64) if any(kept) else None,
        most_kept=max(kept),
        top_p=_column([request.top_p for request in requests], torch.float64) if requests[0].top_p < 1 else None,
    )


def _column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def _row_changes(changes: Sequence[tuple[int, LogitChanges]], vocab_size: int) -> RowChanges | None:
    """Return the changes of a block's rows, each with its place in the block; None if there are none."""
    if not changes:
        return None

    def places(ids_of: Callable[[LogitChanges], np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([place * vocab_size + ids_of(each) for place, each in changes]))

    def numbers(numbers_of: Callable[[LogitChanges], Any]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([numbers_of(each) for _, each in changes]))

    masks = [(place, np.packbits(each.allowed, bitorder="little")) for place, each in changes if each.allowed is not None]
    return RowChanges(
        masked=torch.tensor([place for place, _ in masks], dtype=torch.int64),
        allowed=torch.from_numpy(np.stack([mask for _, mask in masks])) if masks else torch.empty(0, 0, dtype=torch.uint8),
        banned=places(lambda each: each.banned),
        biases=(places(lambda each: each.biased), numbers(lambda each: each.biases)),
        penalties=(places(lambda each: each.seen), numbers(lambda each: np.full(len(each.seen), each.repetition_penalty))),
        amounts=(places(lambda each: each.generated), numbers(lambda each: each.amounts)),
    )


def _scored_rows(requests: Requests, vocab_size: int) -> list[ScoredRows]:
    """Return the rows whose log probabilities are wanted, those with as many of them together."""
    counts: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        if request.num_logprobs is not None:
            count = vocab_size if request.num_logprobs == -1 else min(request.num_logprobs, vocab_size)
            counts.setdefault(count, []).append(row)
    step = rows_at_once(vocab_size)
    return [
        ScoredRows(places=rows[start : start + step], rows=torch.tensor(rows[start : start + step]), count=count)
        for count, rows in counts.items()
        for start in range(0, len(rows), step)
    ]
