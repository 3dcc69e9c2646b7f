"""Triton's kernels behind the common interface.  They are launched without waiting for the device: only shapes are looked at here.

Page tables, starts and lengths are trusted, because to check them would be to wait for them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flexgen.kernels.checks import check_latent_queries, check_prompt, check_queries, check_shapes
from flexgen.kernels.gathered import GatheredKernels
from flexgen.kernels.prompts import PagedPrompts
from flexgen.kernels.triton.arguments import DTYPES, cap, of_scores, rows_of, seen, sink_logits
from flexgen.kernels.triton.launch import columns, fits, group_rows, options, run_in_parts, tile_tokens
from flexgen.kernels.triton.launch_prompts import run_prefill
from flexgen.kernels.triton.programs import decode, latent

LATENT_ROWS = 16  # query heads of a program on latents, whose sums are long


class PlainKernels(GatheredKernels):
    """Attention kernels for pages of plain numbers.  What they do not cover is computed by torch operations."""

    attends_in_pages: ClassVar[bool] = True

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
        (num_sequences, heads, key_dim), (_, kv_heads, page_tokens, value_dim) = query.shape, value_pages.shape
        key_columns, value_columns = columns(key_dim), columns(value_dim)
        token_bytes = (key_columns + value_columns) * query.dtype.itemsize
        if not covers(query, value_dim):
            where = query, key_pages, value_pages, page_tables, starts, lengths
            super().decode_attention(*where, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_queries(query, key_pages, value_pages, out)
        what = seen(num_sequences, page_tables, starts, lengths)
        query, tile, rows = rows_of(query), tile_tokens(token_bytes), group_rows(heads // kv_heads)
        shared: dict[str, Any] = {
            "keys": key_pages, "values": value_pages, "scaling": float(scaling), "softcap": cap(softcap),
            "query_stride": query.stride(0), "head_stride": query.stride(1), "table_stride": page_tables.shape[1],
            "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "PAGE_TOKENS": page_tokens,
            "ROWS": rows, "KEY_COLUMNS": key_columns, "VALUE_COLUMNS": value_columns, "TILE": tile,
            **options(tile * token_bytes, rows * value_columns),
        }  # fmt: skip
        programs = kv_heads * -(-heads // kv_heads // rows)
        positions = page_tables.shape[1] * page_tokens
        run_in_parts(decode.decode_attention, programs, {"query": query, **what}, shared, sink_logits(sinks, heads), out, positions)

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
        if not covers(query, value.shape[2]):
            super().prefill_attention(query, key, value, starts, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_prompt(query, key, value, starts, out)
        how = of_scores(scaling, softcap, sinks, query.shape[1])
        run_prefill(query, rows_of(key), rows_of(value), starts, out, how)

    def prefill_paged_attention(
        self,
        query: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        prompts: PagedPrompts,
        *,
        scaling: float,
        out: Tensor,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if not covers(query, value_pages.shape[3]):
            super().prefill_paged_attention(query, key_pages, value_pages, prompts, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_queries(query, key_pages, value_pages, out)
        check_shapes(starts=(prompts.starts, (len(query),)), tiles=(prompts.tiles, (None, 4)))
        how = of_scores(scaling, softcap, sinks, query.shape[1])
        run_prefill(query, key_pages, value_pages, prompts.starts, out, how, prompts=prompts)

    def covers_in_pages(self, query: Tensor, value_dim: int) -> bool:
        return covers(query, value_dim)

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
        if not covers(query_latent, query_rope.shape[2]):
            where = query_latent, query_rope, key_pages, value_pages, page_tables, starts, lengths
            super().decode_latent_attention(*where, scaling=scaling, out=out)
            return
        what = seen(len(query_latent), page_tables, starts, lengths)
        shared = latent_arguments(query_latent, query_rope, key_pages, value_pages, scaling, out)
        shared |= dict.fromkeys(("codes", "code_parameters", "rope_codes", "rope_parameters", "code_tables"))
        shared |= {"RANK_HEAD_BYTES": 0, "ROPE_HEAD_BYTES": 0, "CODE_TILE": 0, "table_stride": page_tables.shape[1]}
        run_latents({"query": rows_of(query_latent), "query_rope": rows_of(query_rope), **what}, shared, out, page_tables.shape[1])


def covers(query: Tensor, value_dim: int) -> bool:
    """Whether there are kernels for queries of this format and dimension, and values of that dimension."""
    size = query.dtype.itemsize
    return query.dtype in DTYPES and fits(columns(query.shape[2]) * size, columns(value_dim) * size)


def latent_arguments(
    query_latent: Tensor, query_rope: Tensor, key_pages: Tensor, value_pages: Tensor, scaling: float, out: Tensor
) -> dict[str, Any]:
    """Return the arguments of a launch on latents that do not depend on how they are stored, all checked."""
    (_, heads, rank), rope = query_latent.shape, query_rope.shape[2]
    check_latent_queries(query_latent, query_rope, key_pages, value_pages, out)
    query, turned = rows_of(query_latent), rows_of(query_rope)
    rank_columns, rope_columns = columns(rank), columns(rope)
    token_bytes = (rank_columns + rope_columns) * query.dtype.itemsize
    tile, rows = tile_tokens(token_bytes), min(columns(heads), LATENT_ROWS)
    return {
        "keys": key_pages, "values": value_pages, "scaling": float(scaling), "query_stride": query.stride(0),
        "head_stride": query.stride(1), "rope_stride": turned.stride(0), "rope_head_stride": turned.stride(1),
        "HEADS": heads, "RANK": rank, "ROPE": rope, "PAGE_TOKENS": key_pages.shape[3], "ROWS": rows, "RANK_COLUMNS": rank_columns,
        "ROPE_COLUMNS": rope_columns, "TILE": tile, **options(tile * token_bytes, rows * rank_columns, rows * token_bytes),
    }  # fmt: skip


def run_latents(by_sequence: dict[str, Tensor], shared: dict[str, Any], out: Tensor, num_pages: int) -> None:
    """Launch attention on latents for page tables of so many pages."""
    programs = -(-out.shape[1] // shared["ROWS"])
    run_in_parts(latent.decode_latent_attention, programs, by_sequence, shared, None, out, num_pages * shared["PAGE_TOKENS"])
