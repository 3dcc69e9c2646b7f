"""The host's kernels with those for sparse attention.  On sealed pages in float64 the reference computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.checks import check_shapes
from flexgen.kernels.codes import SealedPages
from flexgen.kernels.cpu import decode_sparse, decode_sparse_sealed
from flexgen.kernels.cpu.arguments import Where, accumulator, costs, integers, sinks_array, workspace
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.cpu.gather import list_workspace
from flexgen.kernels.cpu.kernels import step_arrays
from flexgen.kernels.cpu.rows import padded
from flexgen.kernels.cpu.sealed_kernels import CpuKernels as SealedKernels
from flexgen.kernels.cpu.sealed_kernels import sealed_step_arrays


class CpuKernels(SealedKernels):
    """Attention kernels for tensors in host memory; owns `num_threads - 1` threads."""

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
        (num_sequences, heads, key_dim), kv_heads, number = query.shape, key_pages.shape[1], accumulator(query.dtype)
        stored, where = step_arrays(query, key_pages, value_pages, page_tables, starts, lengths, out)
        check_shapes(kept=(kept, (num_sequences,)))
        columns, read = _columns(where, key_pages.shape[3]), np.zeros(num_sequences * kv_heads, np.int64)
        arrays = (
            *stored, *where, integers(kept), sinks_array(sinks, heads, number), number(scaling), number(softcap or 0), columns,
            carried(out), read,
        )  # fmt: skip
        size = decode_sparse.decode_sparse_workspace(heads // kv_heads, key_dim, value_pages.shape[3], columns)
        list_size = list_workspace(columns)
        self._run(
            lambda begin, end: decode_sparse.decode_sparse_attention(
                begin, end, *arrays, workspace(size, number), workspace(list_size, np.int64)
            ),
            costs(where, kv_heads),
        )
        return _unread(where, kv_heads, read)

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
        if query.dtype == torch.float64:
            plain = query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths, kept
            return super().decode_sparse_sealed_attention(*plain, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
        (num_sequences, heads, key_dim), kv_heads, number = query.shape, tail_keys.shape[1], accumulator(query.dtype)
        seen, where = sealed_step_arrays(query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths, out)
        check_shapes(kept=(kept, (num_sequences,)))
        columns, read = _columns(where, pages.page_tokens), np.zeros(num_sequences * kv_heads, np.int64)
        arrays = (
            *seen, integers(kept), sinks_array(sinks, heads, number), number(scaling), number(softcap or 0), columns, carried(out), read,
        )  # fmt: skip
        size = decode_sparse_sealed.decode_sparse_sealed_workspace(
            heads // kv_heads, key_dim, tail_values.shape[3], pages.page_tokens, columns
        )
        list_size = list_workspace(columns)
        self._run(
            lambda begin, end: decode_sparse_sealed.decode_sparse_sealed_attention(
                begin, end, *arrays, workspace(size, number), workspace(list_size, np.int64)
            ),
            costs(where, kv_heads),
        )
        return _unread(where, kv_heads, read)


def _columns(where: Where, page_tokens: int) -> int:
    """Return the most positions that one sequence's visible pages have."""
    _, starts, lengths = where
    pages = -(-lengths // page_tokens) - starts // page_tokens
    return padded(int(pages.max(initial=0)) * page_tokens)


def _unread(where: Where, kv_heads: int, read: np.ndarray) -> int:
    """Return the number of visible values that were not read."""
    _, starts, lengths = where
    return kv_heads * int((lengths - starts).sum()) - int(read.sum())
