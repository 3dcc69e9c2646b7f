"""Paged attention for devices without kernels of their own: the pages of many sequences are gathered into one padded buffer.

torch's scaled dot product attention attends to the buffer, in about ten launches however many sequences there are.  Only shapes are
looked at: nothing waits for the device.  What is held at a time takes ATTENTION_BYTES, or is what one page of one head needs; sparse
attention holds one head of one sequence at least.
The letters of shapes and the layouts are those of reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.checks import check_latent_queries, check_prompt, check_queries, check_sealed_queries, check_shapes, check_stored_part
from flexgen.kernels.codes import Rotations, SealedPages
from flexgen.kernels.gathered_pages import (
    PagesToGather,
    attend_to_pages,
    cleared,
    plain_reader,
    sealed_reader,
    temporary_bytes,
    visible_in,
)
from flexgen.kernels.gathered_sparse import attend_sparsely
from flexgen.kernels.padded_buffers import Part, attend_rows, query_tiles
from flexgen.kernels.reference import AttentionKernels


class GatheredKernels(AttentionKernels):
    """Attention kernels of torch operations alone.  Prompts in pages are the reference's."""

    def __init__(self) -> None:
        self.rotations = Rotations()

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
        pages = _plain_pages(query, key_pages, value_pages, page_tables, starts, lengths, out)
        attend_to_pages(query, pages, out, scaling, softcap, sinks)

    def decode_sparse_attention(
        self,
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
        pages = _plain_pages(query, key_pages, value_pages, page_tables, starts, lengths, out)
        check_shapes(kept=(kept, (len(query),)))
        borders = (lengths - 1) // pages.page_tokens * pages.page_tokens
        attend_sparsely(query, pages, borders, kept, out, scaling, softcap, sinks)
        return 0

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
        check_latent_queries(query_latent, query_rope, key_pages, value_pages, out)
        check_seen(len(query_latent), page_tables, starts, lengths)
        page_tokens, rank = key_pages.shape[3], key_pages.shape[2]

        def read(some: slice, heads: slice, columns: slice) -> Part:
            ids = page_tables[some, columns].long().clamp(min=0)
            seen = visible_in(columns, page_tokens, starts[some], lengths[some])
            latent, rope = key_pages[ids].permute(0, 2, 1, 4, 3), value_pages[ids].transpose(1, 2)
            key = cleared(torch.cat([latent, rope], dim=-1).flatten(2, 3), seen)  # (B, 1, N, rank + rope)
            return key, key[..., :rank], seen

        query = torch.cat([query_latent, query_rope], dim=-1)
        position_bytes = temporary_bytes(query, query.shape[2], query.shape[1])
        pages = PagesToGather(
            read=read, heads=1, columns=page_tables.shape[1], page_tokens=page_tokens, position_bytes=position_bytes
        )  # fmt: skip
        attend_to_pages(query, pages, out, scaling, None, None)

    def decode_sealed_attention(
        self,
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
        check_sealed_queries(query, tail_keys, tail_values, tails, pages.page_tokens, out)
        turned, sealed = self._sealed_pages(query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths)
        attend_to_pages(turned, sealed, out, scaling, softcap, sinks)

    def decode_sparse_sealed_attention(
        self,
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
        check_sealed_queries(query, tail_keys, tail_values, tails, pages.page_tokens, out)
        check_shapes(kept=(kept, (len(query),)))
        turned, sealed = self._sealed_pages(query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths)
        borders = torch.full_like(lengths, page_tables.shape[1] * pages.page_tokens)  # tails lie behind the last column
        attend_sparsely(turned, sealed, borders, kept, out, scaling, softcap, sinks)
        return 0

    def _sealed_pages(
        self, query: Tensor, pages: SealedPages, tail_keys: Tensor, tail_values: Tensor, page_tables: Tensor, tails: Tensor,
        starts: Tensor, lengths: Tensor,
    ) -> tuple[Tensor, PagesToGather]:  # fmt: skip
        """Return queries, rotated if keys are and in float32 or a wider dtype, and what they see."""
        check_seen(len(query), page_tables, starts, lengths)
        wide, turned = torch.promote_types(query.dtype, torch.float32), pages.key_codes.rotated

        def of_tails(some: slice, heads: slice) -> tuple[Tensor, Tensor]:
            key, value = tail_keys[:, heads][tails[some]].mT.to(wide), tail_values[:, heads][tails[some]].to(wide)
            return self.rotations(key) if turned else key, value

        dims = tail_keys.shape[2] + tail_values.shape[3]
        return self.rotations(query) if turned else query.to(wide), PagesToGather(
            read=sealed_reader(pages, page_tables, starts, lengths, of_tails, wide, turned=True), heads=tail_keys.shape[1],
            columns=max(page_tables.shape[1], 1), page_tokens=pages.page_tokens,
            position_bytes=temporary_bytes(query, dims, query.shape[1] // tail_keys.shape[1], decodes=True),
        )  # fmt: skip

    def decode_sealed_latent_attention(
        self,
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
        check_latent_queries(query_latent, query_rope, tail_keys, tail_values, out)
        check_shapes(tail_keys=(tail_keys, (None, 1, None, pages.page_tokens)), tails=(tails, (len(query_latent),)))
        check_seen(len(query_latent), page_tables, starts, lengths)
        wide, rank = torch.promote_types(query_latent.dtype, torch.float32), tail_keys.shape[2]

        def of_tails(some: slice, heads: slice) -> tuple[Tensor, Tensor]:
            return tail_keys[tails[some]].mT.to(wide), tail_values[tails[some]].to(wide)

        sealed = sealed_reader(pages, page_tables, starts, lengths, of_tails, wide, turned=False)

        def read(some: slice, heads: slice, columns: slice) -> Part:
            latent, rope, seen = sealed(some, heads, columns)
            key = torch.cat([latent, rope], dim=-1)
            return key, key[..., :rank], seen

        query = torch.cat([query_latent, query_rope], dim=-1).to(wide)
        seen = PagesToGather(
            read=read, heads=1, columns=max(page_tables.shape[1], 1), page_tokens=pages.page_tokens,
            position_bytes=temporary_bytes(query_latent, query.shape[2], query.shape[1], decodes=True),
        )  # fmt: skip
        attend_to_pages(query, seen, out, scaling, None, None)

    def prefill_attention(
        self,
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
        if softcap is not None:
            super().prefill_attention(query, key, value, starts, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_prompt(query, key, value, starts, out)
        positions, before = torch.arange(len(key), device=query.device), len(key) - len(query)
        for rows in query_tiles(query, key, value, sinks):
            seen, own = positions[: before + rows.stop], positions[before + rows.start : before + rows.stop, None]
            visible = (starts[rows, None] <= seen) & (seen <= own)  # (T, N)
            out[rows] = attend_rows(query[rows], key[: len(seen)], value[: len(seen)], visible, scaling, sinks)

    def prefill_sealed_attention(
        self,
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
        if softcap is not None:
            what = query, stored_key, stored_value, key, value, starts, borders, exact_start
            super().prefill_sealed_attention(*what, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_prompt(query, key, value, starts, out)
        check_stored_part(query, stored_key, stored_value, borders, value)
        stored = torch.arange(len(stored_key), device=query.device)
        exact = torch.arange(exact_start, exact_start + len(key), device=query.device)
        own, keys, values = exact[len(key) - len(query) :, None], torch.cat([stored_key, key]), torch.cat([stored_value, value])
        for rows in query_tiles(query, keys, values, sinks):
            as_stored = (starts[rows, None] <= stored) & (stored < borders[rows, None])
            as_exact = (torch.maximum(starts, borders)[rows, None] <= exact) & (exact <= own[rows])
            visible = torch.cat([as_stored, as_exact], dim=1)  # (T, D + N)
            out[rows] = attend_rows(query[rows], keys, values, visible, scaling, sinks)


def _plain_pages(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_tables: Tensor, starts: Tensor, lengths: Tensor, out: Tensor
) -> PagesToGather:
    """Return what next tokens see of pages of plain numbers, all arguments checked."""
    check_queries(query, key_pages, value_pages, out)
    check_seen(len(query), page_tables, starts, lengths)
    kv_heads, dims = key_pages.shape[1], key_pages.shape[2] + value_pages.shape[3]
    return PagesToGather(
        read=plain_reader(key_pages, value_pages, page_tables, starts, lengths), heads=kv_heads, columns=page_tables.shape[1],
        page_tokens=key_pages.shape[3], position_bytes=temporary_bytes(query, dims, query.shape[1] // kv_heads),
    )  # fmt: skip


def check_seen(num_sequences: int, page_tables: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Refuse what says which positions next tokens see, if it is not that of so many."""
    check_shapes(page_tables=(page_tables, (num_sequences, None)), starts=(starts, (num_sequences,)), lengths=(lengths, (num_sequences,)))
