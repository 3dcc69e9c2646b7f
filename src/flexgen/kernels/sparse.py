"""Sparse attention in plain torch operations, on any device: the specification that faster kernels are tested against.

Each query head keeps the positions with the highest scores of those that it sees, and all of its own page; the softmax is over the kept
ones alone (Sheng et al. 2023, arXiv:2303.06865, section 5).  The letters of shapes are those of reference.py.

* Positions are chosen by the product of query and key, before scaling and cap, which keep the order.
* Of equal products the one at the earlier position is kept.
* A product that is not a number counts as the highest, so that it is never hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexgen.kernels.codes import SealedPages
from flexgen.kernels.pages import gather_kv, seen_sealed
from flexgen.plan.policy import SPARSE_KV_BYTES, SPARSE_SCORES_BYTES


def chosen(products: Tensor, visible: Tensor, own: Tensor, kept: Tensor) -> Tensor:
    """Return which positions each head of each query keeps, bool (..., N).

    Args:
        products: Products of queries and keys, (..., N).
        visible: The positions that each query sees, bool; shapes of this and of what follows expand to that of the products.
        own: The visible positions of each query's own page, bool.
        kept: How many positions each query keeps for their products, int64 (..., 1).
    """
    order = products.masked_fill(~visible, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(products.shape[-1], device=products.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return ((ranks < kept) & visible) | own


def kept_weights(products: Tensor, keeps: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Return the softmax over the positions that are kept, (..., N), for the products of queries and keys.

    Args:
        products: The products, (..., N).
        keeps: Which positions are kept, of the same shape.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`, of a shape that expands to (..., 1).
    """
    scores = products * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~keeps, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(scores, dim=-1)[..., : products.shape[-1]]


def row_blocks(num_queries: int, num_heads: int, num_positions: int) -> Iterator[slice]:
    """Yield ranges of queries that `attend_chosen` can take at a time, whose scores take SPARSE_SCORES_BYTES or are those of one query."""
    rows = max(1, SPARSE_SCORES_BYTES // max(num_heads * num_positions * 4, 1))
    for first in range(0, num_queries, rows):
        yield slice(first, min(first + rows, num_queries))


def head_blocks(num_positions: int, num_key_heads: int, head_dims: int) -> Iterator[slice]:
    """Yield ranges of key heads that are attended to at a time.

    Their keys and values, of `head_dims` numbers together, take SPARSE_KV_BYTES in float32, or are those of one head.
    """
    heads = max(1, SPARSE_KV_BYTES // max(num_positions * head_dims * 4, 1))
    for first in range(0, num_key_heads, heads):
        yield slice(first, min(first + heads, num_key_heads))


def attend_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    own: Tensor,
    kept: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the sparse attention, (T, H, Dv) in the dtype of the query, of T queries over N positions in ascending order.

    Args:
        query: (T, H, Dk), of a range that `row_blocks` yields: some ten tensors of the size of their scores are held.
        key: (N, K, Dk).
        value: (N, K, Dv).  What no head of a key head keeps has no influence, whatever it is.
        visible: The positions that each query sees, bool (T, N).
        own: The visible positions of each query's own page, bool (T, N).
        kept: How many positions each query keeps for their products, int64 (T,).
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
    """
    out, group = query.new_empty(*query.shape[:2], value.shape[2]), query.shape[1] // key.shape[1]
    for some in head_blocks(key.shape[0], key.shape[1], key.shape[2] + value.shape[2]):
        heads = slice(some.start * group, some.stop * group)
        how = scaling, softcap, None if sinks is None else sinks[heads]
        out[:, heads] = _attend_heads(query[:, heads], key[:, some], value[:, some], visible, own, kept, *how)
    return out


def _attend_heads(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, own: Tensor, kept: Tensor, scaling: float, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32)
    (num_queries, num_heads, key_dim), kv_heads = query.shape, key.shape[1]
    grouped = query.to(dtype).reshape(num_queries, kv_heads, num_heads // kv_heads, key_dim)
    products = torch.einsum("tkgd,nkd->kgtn", grouped, key.to(dtype)).flatten(0, 1)  # (H, T, N)
    keeps = chosen(products, visible, own, kept[:, None])
    weights = kept_weights(products, keeps, scaling, softcap, None if sinks is None else sinks[:, None, None])
    weights = weights.view(kv_heads, num_heads // kv_heads, num_queries, -1)  # (K, G, T, N)
    wanted = keeps.view(weights.shape).any(dim=2).any(dim=1).T  # (N, K)
    read = value.to(dtype).masked_fill(~wanted[..., None], 0.0)
    return torch.einsum("kgtn,nkd->tkgd", weights, read).flatten(1, 2).to(query.dtype)


def seen_by_last(start: int, length: int, page_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `visible` and `own` of one query at position length - 1 that sees all positions from `start` on, each (1, length - start)."""
    positions = torch.arange(start, length, device=device)
    border = (length - 1) // page_tokens * page_tokens
    return torch.ones(1, length - start, dtype=torch.bool, device=device), (positions >= border)[None]


def decode_sparse_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    kept: Tensor,
    *,
    scaling: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> int:
    """Attend as `decode_attention` does, but only to the positions that each head keeps (kernels/sparse.py).

    Args:
        query: (S, H, Dk).
        key_pages: (pages, K, Dk, page_tokens).
        value_pages: (pages, K, page_tokens, Dv).
        page_tables: As for `decode_attention`.
        starts: As for `decode_attention`.
        lengths: As for `decode_attention`.
        kept: int64 (S,).  How many positions each head keeps for their scores, besides its own page.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
        out: (S, H, Dv), of the query's dtype; written.

    Returns:
        The number of visible values, (Dv,) each, that were not read: here none.
    """
    size = key_pages.shape[-1]
    for i, (start, length) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), strict=True)):
        key, value = gather_kv(key_pages, value_pages, page_tables[i], start, length)
        seen = seen_by_last(start, length, size, query.device)
        out[i] = attend_chosen(query[i : i + 1], key, value, *seen, kept[i : i + 1], scaling=scaling, softcap=softcap, sinks=sinks)[0]
    return 0


def decode_sparse_sealed_attention(
    query: Tensor,
    pages: SealedPages,
    tail_keys: Tensor,
    tail_values: Tensor,
    page_tables: Tensor,
    tails: Tensor,
    starts: Tensor,
    lengths: Tensor,
    kept: Tensor,
    *,
    scaling: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> int:
    """Attend as `decode_sealed_attention` does, but only to the positions that each head keeps; the tail is its own page.

    Args:
        query: (S, H, Dk).
        pages: As for `decode_sealed_attention`.
        tail_keys: As for `decode_sealed_attention`.
        tail_values: As for `decode_sealed_attention`.
        page_tables: As for `decode_sealed_attention`.
        tails: As for `decode_sealed_attention`.
        starts: As for `decode_attention`.
        lengths: As for `decode_attention`.
        kept: As for `decode_sparse_attention`.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
        out: (S, H, Dv), of the query's dtype; written.

    Returns:
        As for `decode_sparse_attention`.
    """
    for i, (start, length) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), strict=True)):
        key, value = seen_sealed(pages, tail_keys, tail_values, page_tables[i], tails[i : i + 1], start, length, query.dtype)
        seen = seen_by_last(start, length, pages.page_tokens, query.device)
        out[i] = attend_chosen(query[i : i + 1], key, value, *seen, kept[i : i + 1], scaling=scaling, softcap=softcap, sinks=sinks)[0]
    return 0
