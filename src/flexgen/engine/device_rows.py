"""Chooses tokens for rows of logits by torch operations, all rows at once, none of which waits for the device.

What becomes of a row depends on that row alone, to the last bit: sums are made of pairs in an order that follows from the size of the
vocabulary, because torch's own sums on a device depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.kernels.philox import exponential_rows_on
from flexgen.plan.policy import SAMPLED_BLOCK_BYTES

# What became of a row.
CHOSEN, NOT_FINITE, NOTHING_ALLOWED, OVERFLOWED = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChanges:
    """The `LogitChanges` of several rows.  Places are indices into the flattened logits, each there once, int64 (places,).

    Attributes:
        masked: The rows that only some tokens may come in, int64 (masked,).
        allowed: A bit for each token of these, lowest bit first, uint8 (masked, bytes).
        banned: Places of further tokens that may not come.
        biases: Places, and what is added to the logits there, float64.
        penalties: Places of tokens that are repeated, and what their logits are divided by or multiplied by, float64.
        amounts: Places, and what is subtracted from the logits there, float64.
    """

    masked: Tensor
    allowed: Tensor
    banned: Tensor
    biases: tuple[Tensor, Tensor]
    penalties: tuple[Tensor, Tensor]
    amounts: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How the tokens of several rows are drawn.

    Attributes:
        temperatures: float64 (rows, 1).
        min_p: float64 (rows, 1).
        seeds: The lowest 64 bits of the seeds, int64 (rows, 1).
        positions: The positions of the tokens, int64 (rows, 1).
        kth: The place of the smallest logit that top-k keeps among those of its row in descending order, int64 (rows, 1), -1 where all are
            kept; None if all rows keep all.
        most_kept: One more than the largest of these places.
        top_p: float64 (rows, 1); None if no row has a nucleus.
    """

    temperatures: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    kth: Tensor | None
    most_kept: int
    top_p: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Rows that are chosen by the same operations.

    Attributes:
        rows: Their places in the batch, int64 (rows,).
        changes: What changes their logits first, if anything.
        draws: How their tokens are drawn; None if the likeliest ones are taken.
    """

    rows: Tensor
    changes: RowChanges | None
    draws: Draws | None


def rows_at_once(vocab_size: int) -> int:
    """Return how many rows are held as float64 numbers at a time."""
    return max(1, SAMPLED_BLOCK_BYTES // (8 * vocab_size))


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the lowest of the ids with the largest logit, and what became of it, both int64 (rows,)."""
    tokens: list[Tensor] = []
    states: list[Tensor] = []
    for part in logits.split(rows_at_once(logits.shape[1])):
        finite = part.amax(-1).isfinite() & part.amin(-1).isfinite()  # an extreme of numbers with a NaN is NaN
        tokens.append(_lowest_of_largest(part))
        states.append((~finite).long() * NOT_FINITE)
    return torch.cat(tokens), torch.cat(states)


def chosen(logits: Tensor, block: RowBlock) -> tuple[Tensor, Tensor]:
    """Return the tokens of a block's rows, and what became of each row, both int64 (rows,)."""
    numbers = logits.index_select(0, block.rows).double()  # a copy
    if block.changes is not None:
        _change(numbers, block.changes)
    largest = numbers.amax(-1)
    states = ((~largest.isfinite()).long() * OVERFLOWED).masked_fill(largest == -torch.inf, NOTHING_ALLOWED)
    return _lowest_of_largest(numbers) if block.draws is None else _drawn(numbers, block.draws), states


def logprobs(logits: Tensor, tokens: Tensor, count: int) -> Iterator[Tensor]:
    """Yield for some rows the ranks of their tokens, the log probabilities of these, the likeliest ids, and the log probabilities of these.

    All are int64; log probabilities are the bits of float64 numbers.

    Args:
        logits: The logits as the model returned them, (rows, vocab).
        tokens: The tokens, int64 (rows,).
        count: The number of likeliest tokens.
    """
    numbers, own = logits.double(), tokens[:, None]
    largest = numbers.amax(-1, keepdim=True)
    log_sums = largest + _sums((numbers - largest).exp()).log()
    at, ids = numbers.gather(1, own), torch.arange(logits.shape[1], device=logits.device)
    yield ((numbers > at) | ((numbers == at) & (ids < own))).sum(-1) + 1
    yield _bits(at - log_sums)
    if count:
        best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]  # the lower id first among equals
        yield best
        yield _bits(numbers.gather(1, best) - log_sums)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.int64)


def _change(numbers: Tensor, changes: RowChanges) -> None:
    """Change float64 logits (rows, vocab) in place."""
    flat = numbers.view(-1)
    if len(changes.masked):
        bits = torch.arange(8, dtype=torch.uint8, device=numbers.device)
        allowed = ((changes.allowed[:, :, None] >> bits) & 1).flatten(1)[:, : numbers.shape[1]]  # (masked, vocab)
        numbers.index_copy_(0, changes.masked, numbers.index_select(0, changes.masked).masked_fill(allowed == 0, -torch.inf))
    if len(changes.banned):
        flat.index_fill_(0, changes.banned, -torch.inf)
    places, biases = changes.biases
    if len(places):
        flat.index_copy_(0, places, flat.index_select(0, places) + biases)
    places, penalties = changes.penalties
    if len(places):
        seen = flat.index_select(0, places)
        flat.index_copy_(0, places, torch.where(seen > 0, seen / penalties, seen * penalties))
    places, amounts = changes.amounts
    if len(places):
        flat.index_copy_(0, places, flat.index_select(0, places) - amounts)


def _drawn(numbers: Tensor, draws: Draws) -> Tensor:
    """Return the tokens that win the exponential race, int64 (rows,), by temperature and the filters, from float64 logits."""
    weights = ((numbers - numbers.amax(-1, keepdim=True)) / draws.temperatures).exp()  # relative to the likeliest token
    if draws.kth is not None:
        least = numbers.topk(draws.most_kept, dim=-1).values.gather(1, draws.kth.clamp(min=0))
        weights = weights.masked_fill(numbers < least.masked_fill(draws.kth < 0, -torch.inf), 0)
    weights = weights.masked_fill(weights < draws.min_p, 0)
    noise = exponential_rows_on(numbers.device)(draws.seeds, draws.positions, numbers.shape[1])
    if draws.top_p is None:
        return _lowest_of_largest(weights / noise)
    ranked, ids = weights.sort(dim=-1, descending=True, stable=True)  # among equal weights, lower ids enter the nucleus first
    sums = _running_sums(ranked)
    ranked = ranked.masked_fill(sums - ranked >= draws.top_p * sums[:, -1:], 0)  # those that rank higher have the mass already
    race = ranked / noise.gather(1, ids)
    lost = race != race.amax(-1, keepdim=True)
    return ids.masked_fill(lost, numbers.shape[1] - 1).amin(-1)


def _lowest_of_largest(numbers: Tensor) -> Tensor:
    """Return the lowest index of each row's largest number, int64 (rows,); of a row with a NaN the last index."""
    last = numbers.shape[1] - 1
    ids = torch.arange(last + 1, dtype=torch.int32, device=numbers.device).expand(numbers.shape)
    return ids.masked_fill(numbers != numbers.amax(-1, keepdim=True), last).amin(-1).long()


def _sums(numbers: Tensor) -> Tensor:
    """Return the sum of each row, (rows, 1)."""
    while (width := numbers.shape[1]) > 1:
        half = width // 2
        pairs = numbers[:, :half] + numbers[:, half : 2 * half]
        numbers = pairs if width == 2 * half else torch.cat([pairs, numbers[:, 2 * half :]], dim=1)
    return numbers


def _running_sums(numbers: Tensor) -> Tensor:
    """Return for each number the sum of its row up to it, itself included (Hillis and Steele, "Data parallel algorithms", 1986)."""
    step = 1
    while step < numbers.shape[1]:
        numbers = torch.cat([numbers[:, :step], numbers[:, step:] + numbers[:, :-step]], dim=1)
        step *= 2
    return numbers
