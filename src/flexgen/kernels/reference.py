"""Paged attention in plain torch operations, on any device: the specification that faster kernels are tested against.

Knows pages and positions; not where pages come from, nor which sequence owns them.

    S sequences          T new tokens        N positions, past ones and the new
    H query heads        K heads of the cache; each serves a group of H / K query heads
    Dk, Dv dimensions of a key and of a value

    key_pages   (pages, K, Dk, page_tokens): transposed within a page, so that scores are computed along tokens
    value_pages (pages, K, page_tokens, Dv)

Position p of a sequence lies in page `page_table[p // page_tokens]` at offset `p % page_tokens`.  Scores, softmax and
sums are float32, for float64 inputs float64.

Where complete pages are sealed (kernels/codes.py), the page of a sequence's last token is a tail: a page of plain numbers as above.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from flexgen.kernels.codes import SealedPages, seal, unseal
from flexgen.kernels.dense import attend, query_blocks
from flexgen.kernels.pages import gather_kv, seen_sealed, write_kv
from flexgen.kernels.prompts import prefill_paged_attention
from flexgen.kernels.sparse import decode_sparse_attention, decode_sparse_sealed_attention


def decode_attention(
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
    """Attend with one query token per sequence, whose own key and value are stored already.

    Args:
        query: (S, H, Dk).
        key_pages: (pages, K, Dk, page_tokens).
        value_pages: (pages, K, page_tokens, Dv).
        page_tables: Integers (S, max_pages).  Entries of pages wholly outside the visible positions are never read.
        starts: int64 (S,).  First visible position of each sequence.  One before the first position (of a window longer than the
            sequence) means the first.
        lengths: int64 (S,).  Sequence i sees positions starts[i] <= p < lengths[i], at least one.
        scaling: Factor of the scores.
        softcap: Caps the scaled scores s to softcap * tanh(s / softcap).
        sinks: (H,).  One more logit per head, which takes its share of the softmax and adds nothing.
        out: (S, H, Dv), of the query's dtype; written.
    """
    for i, (start, length) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), strict=True)):
        key, value = gather_kv(key_pages, value_pages, page_tables[i], start, length)
        visible = torch.ones(1, length - start, dtype=torch.bool, device=query.device)
        out[i] = attend(query[i : i + 1], key, value, visible, scaling, softcap, sinks)[0]


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    *,
    scaling: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Let the last T of a sequence's N positions attend to everything before them and to themselves.

    Args:
        query: (T, H, Dk).
        key: (N, K, Dk).
        value: (N, K, Dv).
        starts: int64 (T,).  Query i stands at position N - T + i and sees starts[i] <= p <= N - T + i: zero for full
            attention, position - window + 1 for a window, the chunk's start for chunked attention.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
        out: (T, H, Dv), of the query's dtype; written.
    """
    num_queries, num_positions = query.shape[0], key.shape[0]
    positions = torch.arange(num_positions, device=query.device)
    own = positions[num_positions - num_queries :, None]
    for rows in query_blocks(num_queries, num_positions):
        visible = (starts[rows, None] <= positions) & (positions <= own[rows])  # (T, N)
        out[rows] = attend(query[rows], key, value, visible, scaling, softcap, sinks)


def decode_latent_attention(
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
    """Attend to cached latents with one query token per sequence.

    This is DeepSeek-V2's attention with absorbed projections (arXiv:2405.04434, section 2.1.2).  Pages hold the latent c_kv as the one
    key head (Dk = rank) and the rotated k_rope as the one value head (Dv = rope): score = query_latent . c_kv + query_rope . k_rope,
    and the result is the weighted sum of c_kv.

    Args:
        query_latent: (S, H, rank).
        query_rope: (S, H, rope).
        key_pages: (pages, 1, rank, page_tokens), the latents.
        value_pages: (pages, 1, page_tokens, rope), the rotated keys.
        page_tables: As for `decode_attention`.
        starts: As for `decode_attention`.
        lengths: As for `decode_attention`.
        scaling: As for `decode_attention`.
        out: (S, H, rank), of the query's dtype; written.
    """
    query = torch.cat([query_latent, query_rope], dim=-1)  # (S, H, rank + rope)
    for i, (start, length) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), strict=True)):
        latent, rope = gather_kv(key_pages, value_pages, page_tables[i], start, length)
        visible = torch.ones(1, length - start, dtype=torch.bool, device=query.device)
        out[i] = attend(query[i : i + 1], torch.cat([latent, rope], dim=-1), latent, visible, scaling, None, None)[0]


def decode_sealed_attention(
    query: Tensor,
    pages: SealedPages,
    tail_keys: Tensor,
    tail_values: Tensor,
    page_tables: Tensor,
    tails: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attend as `decode_attention` does, to sealed pages and to the query's own page, which is the tail.

    Args:
        query: (S, H, Dk).
        pages: The sealed pages; those of whole pages before the last visible position are read.
        tail_keys: (tails, K, Dk, page_tokens).
        tail_values: (tails, K, page_tokens, Dv).
        page_tables: As for `decode_attention`; the entry of the page of the last visible position is not read.
        tails: int64 (S,).  The tail of each sequence.
        starts: As for `decode_attention`.
        lengths: As for `decode_attention`.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
        out: (S, H, Dv), of the query's dtype; written.
    """
    for i, (start, length) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), strict=True)):
        key, value = seen_sealed(pages, tail_keys, tail_values, page_tables[i], tails[i : i + 1], start, length, query.dtype)
        visible = torch.ones(1, length - start, dtype=torch.bool, device=query.device)
        out[i] = attend(query[i : i + 1], key, value, visible, scaling, softcap, sinks)[0]


def decode_sealed_latent_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    pages: SealedPages,
    tail_keys: Tensor,
    tail_values: Tensor,
    page_tables: Tensor,
    tails: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    out: Tensor,
) -> None:
    """Attend to cached latents as `decode_latent_attention` does, of which those of earlier pages are sealed.

    Args:
        query_latent: (S, H, rank).
        query_rope: (S, H, rope).
        pages: The sealed pages; keys are the latents, values the rotated keys, neither of them rotated by a Hadamard matrix.
        tail_keys: (tails, 1, rank, page_tokens).
        tail_values: (tails, 1, page_tokens, rope).
        page_tables: As for `decode_sealed_attention`.
        tails: As for `decode_sealed_attention`.
        starts: As for `decode_attention`.
        lengths: As for `decode_attention`.
        scaling: As for `decode_attention`.
        out: (S, H, rank), of the query's dtype; written.
    """
    query = torch.cat([query_latent, query_rope], dim=-1)  # (S, H, rank + rope)
    for i, (start, length) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), strict=True)):
        latent, rope = seen_sealed(pages, tail_keys, tail_values, page_tables[i], tails[i : i + 1], start, length, query.dtype)
        visible = torch.ones(1, length - start, dtype=torch.bool, device=query.device)
        out[i] = attend(query[i : i + 1], torch.cat([latent, rope], dim=-1), latent, visible, scaling, None, None)[0]


def prefill_sealed_attention(
    query: Tensor,
    stored_key: Tensor,
    stored_value: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    borders: Tensor,
    exact_start: int,
    *,
    scaling: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Let the last T positions of a sequence attend: to earlier pages as they were stored, to their own pages exactly.

    Args:
        query: (T, H, Dk).
        stored_key: (D, K, Dk), positions 0 <= p < D as they come back from sealed pages.
        stored_value: (D, K, Dv).
        key: (N, K, Dk), positions exact_start <= p < exact_start + N.
        value: (N, K, Dv).
        starts: int64 (T,).  The first position that each query sees, as for `prefill_attention`.
        borders: int64 (T,).  The first position of each query's own page.  Query i stands at position exact_start + N - T + i; it sees
            starts[i] <= p < borders[i] as stored, and the rest up to itself exactly.
        exact_start: The position of the first exact key.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
        out: (T, H, Dv), of the query's dtype; written.
    """
    num_queries, device = query.shape[0], query.device
    stored = torch.arange(stored_key.shape[0], device=device)
    exact = torch.arange(exact_start, exact_start + key.shape[0], device=device)
    own = exact[key.shape[0] - num_queries :, None]
    keys, values = torch.cat([stored_key, key]), torch.cat([stored_value, value])
    for rows in query_blocks(num_queries, len(keys)):
        as_stored = (starts[rows, None] <= stored) & (stored < borders[rows, None])  # (T, D)
        as_exact = (torch.maximum(starts, borders)[rows, None] <= exact) & (exact <= own[rows])  # (T, N)
        out[rows] = attend(query[rows], keys, values, torch.cat([as_stored, as_exact], dim=1), scaling, softcap, sinks)


class AttentionKernels:
    """Attention on pages by the functions above, on any device.

    Kernels of a device derive from this class and override what they compute faster.

    Attributes:
        attends_in_pages: Whether prompts whose tokens all lie in pages are attended to there, all at once, by `prefill_paged_attention`;
            otherwise what was stored before is gathered for one after the other.
    """

    attends_in_pages: ClassVar[bool] = False

    write_kv = staticmethod(write_kv)
    gather_kv = staticmethod(gather_kv)
    decode_attention = staticmethod(decode_attention)
    prefill_attention = staticmethod(prefill_attention)
    prefill_paged_attention = staticmethod(prefill_paged_attention)
    decode_latent_attention = staticmethod(decode_latent_attention)
    seal = staticmethod(seal)
    unseal = staticmethod(unseal)
    decode_sealed_attention = staticmethod(decode_sealed_attention)
    decode_sealed_latent_attention = staticmethod(decode_sealed_latent_attention)
    decode_sparse_attention = staticmethod(decode_sparse_attention)
    decode_sparse_sealed_attention = staticmethod(decode_sparse_sealed_attention)
    prefill_sealed_attention = staticmethod(prefill_sealed_attention)

    def covers_in_pages(self, query: Tensor, value_dim: int) -> bool:
        """Whether `prefill_paged_attention` is to be asked for such queries, (T, H, Dk), and values; the reference waits for a device."""
        return self.attends_in_pages

    def close(self) -> None:
        """End what the kernels run on.  Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
