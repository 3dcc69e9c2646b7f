"""Triton's kernels behind the common interface.  They are launched without waiting for the device: only shapes are looked at here.

Page tables, starts and lengths are trusted, because to check them would be to wait for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexgen.kernels.checks import check_groups, check_out, check_pages, check_shapes
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.triton.launch import columns, fits, group_rows, options, run_in_parts, tile_tokens
from flexgen.kernels.triton.programs import decode

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonKernels(AttentionKernels):
    """Attention kernels for tensors on a CUDA device of compute capability 8.0 or more.

    For what they do not cover, which is float64 and very long heads, the reference computes.
    """

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
        if query.dtype not in DTYPES or not fits(token_bytes):
            where = query, key_pages, value_pages, page_tables, starts, lengths
            super().decode_attention(*where, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        check_groups(heads, kv_heads)
        check_pages(query.dtype, key_pages, value_pages, kv_heads, key_dim, value_dim)
        check_out(query.dtype, out, (num_sequences, heads, value_dim))
        seen = _seen(num_sequences, page_tables, starts, lengths)
        query, tile, rows = _rows(query), tile_tokens(token_bytes), group_rows(heads // kv_heads)
        shared: dict[str, Any] = {
            "keys": key_pages, "values": value_pages, "scaling": float(scaling), "softcap": _cap(softcap),
            "query_stride": query.stride(0), "head_stride": query.stride(1), "table_stride": page_tables.shape[1],
            "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "PAGE_TOKENS": page_tokens,
            "ROWS": rows, "KEY_COLUMNS": key_columns, "VALUE_COLUMNS": value_columns, "TILE": tile,
            **options(tile * token_bytes, rows * value_columns),
        }  # fmt: skip
        programs = kv_heads * -(-heads // kv_heads // rows)
        positions = page_tables.shape[1] * page_tokens
        run_in_parts(decode.decode_attention, programs, {"query": query, **seen}, shared, _sinks(sinks, heads), out, positions)


def _seen(num_sequences: int, page_tables: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Return the arguments that say what next tokens see, their shapes checked."""
    check_shapes(page_tables=(page_tables, (num_sequences, None)), starts=(starts, (num_sequences,)), lengths=(lengths, (num_sequences,)))
    return {"tables": page_tables.contiguous(), "starts": starts.contiguous(), "lengths": lengths.contiguous()}


def _rows(tensor: Tensor) -> Tensor:
    """Return (tokens, heads, dim) whose heads are contiguous."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _cap(softcap: float | None) -> float | None:
    return None if softcap is None else float(softcap)


def _sinks(sinks: Tensor | None, heads: int) -> Tensor | None:
    if sinks is None:
        return None
    check_shapes(sinks=(sinks, (heads,)))
    return sinks.detach().contiguous()
