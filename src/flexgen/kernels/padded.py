"""Decode attention of all sequences at once, in plain torch operations, for devices that have no kernels of their own.

Nothing waits for the device: the pages of every sequence are gathered to the width of the page tables, and positions that a sequence does
not see are masked.  The letters of shapes are those of reference.py.  The last bits of a result may depend on the longest sequence beside
it, because sums are as long as the tables are wide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexgen.kernels.reference import AttentionKernels

GATHERED_BYTES = 64 << 20  # keys and values in float32 that are attended to at a time


class PaddedKernels(AttentionKernels):
    """Attention kernels for pages of plain numbers.  For what they do not cover the reference computes."""

    def decode_attention(
        self,
        query: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        page_tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        *,
        scaling: float,
        out: Tensor,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        _, kv_heads, page_tokens, value_dim = value_pages.shape
        for rows in _blocks(page_tables, page_tokens * kv_heads * (query.shape[2] + value_dim)):
            visible, ids = _seen(page_tables[rows], starts[rows], lengths[rows], page_tokens)
            key = key_pages[ids].permute(0, 2, 3, 1, 4).flatten(3)  # (S, K, Dk, N)
            value = value_pages[ids].transpose(1, 2).flatten(2, 3)  # (S, K, N, Dv)
            out[rows] = _attended(query[rows], key, value, visible, scaling, softcap, sinks)

    def decode_latent_attention(
        self,
        query_latent: Tensor,
        query_rope: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        page_tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        *,
        scaling: float,
        out: Tensor,
    ) -> None:
        query, page_tokens = torch.cat([query_latent, query_rope], dim=-1), value_pages.shape[2]
        for rows in _blocks(page_tables, page_tokens * (query.shape[2] + query_latent.shape[2])):
            visible, ids = _seen(page_tables[rows], starts[rows], lengths[rows], page_tokens)
            latent = key_pages[ids].permute(0, 2, 3, 1, 4).flatten(3)  # (S, 1, rank, N)
            rope = value_pages[ids].permute(0, 2, 4, 1, 3).flatten(3)  # (S, 1, rope, N)
            key, value = torch.cat([latent, rope], dim=2), latent.transpose(2, 3)
            out[rows] = _attended(query[rows], key, value, visible, scaling, None, None)


def _blocks(page_tables: Tensor, page_numbers: int) -> Iterator[slice]:
    """Yield ranges of sequences whose pages, of so many numbers each, take GATHERED_BYTES in float32, or are those of one sequence."""
    num_sequences, num_pages = page_tables.shape
    step = max(1, GATHERED_BYTES // max(4 * num_pages * page_numbers, 1))
    return (slice(first, first + step) for first in range(0, num_sequences, step))


def _seen(page_tables: Tensor, starts: Tensor, lengths: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Return which positions sequences see, bool (S, N), and the ids of their pages, (S, pages): 0 for those of which they see nothing."""
    positions = torch.arange(page_tables.shape[1] * page_tokens, device=page_tables.device)
    visible = (starts[:, None] <= positions) & (positions < lengths[:, None])
    needed = visible.unflatten(1, (-1, page_tokens)).any(-1)
    return visible, page_tables.long().masked_fill(~needed, 0)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute softmax attention (S, H, Dv) of one query (S, H, Dk) each over keys (S, K, Dk, N) and values (S, K, N, Dv)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    (num_sequences, heads, key_dim), kv_heads = query.shape, key.shape[1]
    grouped = query.to(dtype).reshape(num_sequences, kv_heads, heads // kv_heads, key_dim)
    scores = torch.matmul(grouped, key.to(dtype)).flatten(1, 2) * scaling  # (S, H, N)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[None, :, None].expand(num_sequences, -1, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[3]].unflatten(1, (kv_heads, -1))  # (S, K, G, N)
    value = value.to(dtype).masked_fill(~visible[:, None, :, None], 0)  # nothing may be stored there, not even numbers
    return torch.matmul(weights, value).flatten(1, 2).to(query.dtype)
