"""Softmax attention over positions of which each query sees some, in plain torch operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexgen.plan.policy import ATTENTION_BYTES

# Tensors as large as the scores, and as keys and values in the wide dtype, that are held at a time.
SCORE_COPIES, WIDE_COPIES = 4, 2
VISIBLE_BYTES = 16  # of tensors that say whether a query sees a position, more than are held at a time


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute softmax attention (T, H, Dv) of T queries over N positions, of which each query sees some: `visible` (T, N).

    Queries and key heads are taken in blocks whose temporary tensors take ATTENTION_BYTES, or are those of one query and one key head.
    """
    group, out = query.shape[1] // key.shape[1], query.new_empty(*query.shape[:2], value.shape[2])
    item_bytes = torch.promote_types(query.dtype, torch.float32).itemsize
    head_bytes = WIDE_COPIES * item_bytes * key.shape[0] * (key.shape[2] + value.shape[2])
    for heads in _blocks(key.shape[1], head_bytes):
        some = slice(heads.start * group, heads.stop * group)
        row_bytes = SCORE_COPIES * item_bytes * key.shape[0] * (some.stop - some.start)
        for rows in _blocks(len(query), row_bytes):
            how = scaling, softcap, None if sinks is None else sinks[some]
            out[rows, some] = _attend(query[rows, some], key[:, heads], value[:, heads], visible[rows], *how)
    return out


def query_blocks(num_queries: int, num_positions: int) -> Iterator[slice]:
    """Yield ranges of queries for which it can be said at once which of so many positions they see."""
    return _blocks(num_queries, VISIBLE_BYTES * num_positions)


def _blocks(number: int, each_bytes: int) -> Iterator[slice]:
    """Yield ranges of so many things that take half of ATTENTION_BYTES, or are one."""
    at_once = max(ATTENTION_BYTES // 2 // max(each_bytes, 1), 1)
    for first in range(0, number, at_once):
        yield slice(first, min(first + at_once, number))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    (num_queries, num_heads, key_dim), kv_heads = query.shape, key.shape[1]
    grouped = query.to(dtype).view(num_queries, kv_heads, num_heads // kv_heads, key_dim)
    scores = torch.einsum("tkgd,nkd->kgtn", grouped, key.to(dtype)).flatten(0, 1) * scaling  # (H, T, N)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, num_queries, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[0]]
    weights = weights.view(kv_heads, num_heads // kv_heads, num_queries, -1)  # (K, G, T, N)
    return torch.einsum("kgtn,nkd->tkgd", weights, value.to(dtype)).flatten(1, 2).to(query.dtype)
