"""Attention to keys and values in padded buffers: by torch's scaled dot product attention, and part by part in plain torch operations.

    B sequences       R queries of a key head       N positions, of which a query sees some

Nothing waits for the device.  K, Dk and Dv are as in reference.py.  Numbers at positions that no query of a sequence sees must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from flexgen.plan.policy import ATTENTION_BYTES

# Columns before all others, of which the first stands for the sink; memory-efficient kernels want rows at multiples of so many numbers.
SINK_COLUMNS = 8

Part = tuple[Tensor, Tensor, Tensor]  # keys (B, K, N, Dk), values (B, K, N, Dv), and which are visible, bool (B, 1, R or 1, N)


def attend_at_once(query: Tensor, part: Part, scaling: float, sinks: Tensor | None) -> Tensor:
    """Return attention (B, K, R, Dv) in the dtype of the queries; torch chooses the kernel.

    A sink is a position of its own: its key is zero, so that what is added to its score is all of it, and so is its value.

    Args:
        query: (B, K, R, Dk).
        part: All positions, in the dtype of the queries.
        scaling: Factor of the scores.
        sinks: (K, R).  One more logit per query, which takes its share of the softmax and adds nothing.
    """
    key, value, visible = part
    if sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    key, value = pad(key, (0, 0, SINK_COLUMNS, 0)), pad(value, (0, 0, SINK_COLUMNS, 0))
    added = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(~visible, float("-inf"))
    added = pad(added, (SINK_COLUMNS, 0), value=float("-inf")).expand(*query.shape[:3], -1).clone()  # (B, K, R, N)
    added[..., 0] = sinks.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scaling)


def attend_in_parts(
    query: Tensor, parts: Iterable[Callable[[], Part]], scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return attention (B, K, R, Dv) in float32, for float64 inputs float64, merged over parts that are held one after the other.

    This is the online softmax of Milakov and Gimelshein 2018 (arXiv:1805.02867).

    Args:
        query: (B, K, R, Dk).
        parts: Functions that return the positions.
        scaling: Factor of the scores.
        softcap: Caps the scaled scores s to softcap * tanh(s / softcap).
        sinks: As for `attend_at_once`.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    # The least base is finite, since a part may have no visible position.
    base = query.new_full((*query.shape[:3], 1), torch.finfo(query.dtype).min)
    merged = _Merged(base, torch.zeros_like(base), torch.zeros_like(base))
    if sinks is not None:
        merged = _Merged(base.copy_(sinks[..., None]), torch.ones_like(base), torch.zeros_like(base))
    for read in parts:
        merged = merged.with_part(query, read(), scaling, softcap)
    return merged.sums / merged.total


class _Merged(NamedTuple):
    """Sums over positions, each (B, K, R, 1) or with Dv columns: of exp(score - base), and of values with these weights."""

    base: Tensor
    total: Tensor
    sums: Tensor

    def with_part(self, query: Tensor, part: Part, scaling: float, softcap: float | None) -> _Merged:
        """Return the sums over more positions."""
        key, value, visible = part
        scores = query @ key.to(query.dtype).mT * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        base = torch.maximum(self.base, scores.amax(-1, keepdim=True))
        weights, factor = torch.exp(scores - base), torch.exp(self.base - base)
        return _Merged(base, self.total * factor + weights.sum(-1, keepdim=True), self.sums * factor + weights @ value.to(query.dtype))


def query_tiles(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Iterator[slice]:
    """Yield ranges of queries of a prompt that are attended with at a time."""
    heads, kv_heads, (num_positions, _, dims) = query.shape[1], key.shape[1], key.shape
    # For each query: which positions it sees, and what is added to its scores, which is each head's own where there are sinks.
    added = heads if sinks is not None else heads // kv_heads
    row_bytes = num_positions * (4 + added * (1 + 2 * query.dtype.itemsize)) + 4 * heads * (dims + value.shape[2]) * query.dtype.itemsize
    at_once = max(ATTENTION_BYTES // row_bytes, 1)
    for first in range(0, len(query), at_once):
        yield slice(first, min(first + at_once, len(query)))


def attend_rows(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, sinks: Tensor | None) -> Tensor:
    """Return the attention (T, H, Dv) of queries of one prompt to keys (N, K, Dk) and values (N, K, Dv); `visible` is bool (T, N)."""
    num_queries, groups = len(query), (key.shape[1], query.shape[1] // key.shape[1])

    def of_groups(each: Tensor) -> Tensor:  # (T, K, G, ..) as (1, K, T * G, ..)
        return each.transpose(0, 1).flatten(1, 2)[None]

    seen = visible[:, None].expand(-1, groups[1], -1).flatten(0, 1)[None, None]  # (1, 1, T * G, N)
    logits = None if sinks is None else of_groups(sinks.detach().unflatten(0, groups).expand(num_queries, -1, -1))[0]
    part = key.transpose(0, 1)[None], value.transpose(0, 1)[None], seen
    found = attend_at_once(of_groups(query.unflatten(1, groups)), part, scaling, logits)  # (1, K, T * G, Dv)
    return found[0].unflatten(1, (num_queries, groups[1])).transpose(0, 1).flatten(1, 2)
