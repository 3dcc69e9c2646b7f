"""The host's kernels behind the common interface: tensors become arrays, work lists are cut and run on our threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.checks import (
    check_format,
    check_latent_queries,
    check_pages,
    check_positions,
    check_prompt,
    check_queries,
    check_shapes,
)
from flexgen.kernels.cpu import decode, latent, pages, prefill
from flexgen.kernels.cpu.arguments import Where, accumulator, costs, integers, sinks_array, where_seen, workspace
from flexgen.kernels.cpu.formats import bits, carried
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.threads import SLICES_PER_THREAD, KernelThreads, split_evenly

MOVED_AT_ONCE = 64  # tokens for which another thread is worth waking
HEADS_PER_TILE = 8

# Keys, values, and for each query the first row that it sees and the row after the last.
Seen = tuple[Tensor, Tensor, np.ndarray, np.ndarray]


class PlainKernels(AttentionKernels):
    """Attention kernels for pages of plain numbers in host memory; owns `num_threads - 1` threads."""

    def __init__(self, num_threads: int) -> None:
        self._threads = KernelThreads(num_threads)

    def write_kv(self, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        num_tokens, kv_heads, key_dim = key.shape
        value_dim = value.shape[2]
        check_pages(key.dtype, key_pages, value_pages, kv_heads, key_dim, value_dim)
        check_format(key.dtype, value=value)
        check_shapes(value=(value, (num_tokens, kv_heads, value_dim)))
        check_shapes(page_ids=(page_ids, (num_tokens,)), page_offsets=(page_offsets, (num_tokens,)))
        new = bits(key.contiguous()), bits(value.contiguous())
        arrays = *new, bits(key_pages), bits(value_pages), integers(page_ids), integers(page_offsets)
        self._run_even(lambda begin, end: pages.write_kv(begin, end, *arrays), num_tokens)

    def gather_kv(self, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
        _, kv_heads, key_dim, page_tokens = key_pages.shape
        value_dim = value_pages.shape[3]
        check_pages(key_pages.dtype, key_pages, value_pages, kv_heads, key_dim, value_dim)
        check_positions(np.array([start]), np.array([length]), page_table.shape[0] * page_tokens)
        key, value = (torch.empty(length - start, kv_heads, dim, dtype=key_pages.dtype) for dim in (key_dim, value_dim))
        arrays = bits(key_pages), bits(value_pages), integers(page_table), start, bits(key), bits(value)
        self._run_even(lambda begin, end: pages.gather_kv(begin, end, *arrays), length - start)
        return key, value

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
        heads, kv_heads, number = query.shape[1], key_pages.shape[1], accumulator(query.dtype)
        stored, where = step_arrays(query, key_pages, value_pages, page_tables, starts, lengths, out)
        arrays = (*stored, *where, sinks_array(sinks, heads, number), number(scaling), number(softcap or 0), carried(out))
        size = decode.decode_workspace(heads // kv_heads, query.shape[2], value_pages.shape[3], key_pages.shape[3])
        self._run(
            lambda begin, end: decode.decode_attention(begin, end, *arrays, workspace(size, number)),
            costs(where, kv_heads),
        )

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
        check_prompt(query, key, value, starts, out)
        num_queries, num_positions = len(query), len(value)
        first = np.maximum(integers(starts), 0)
        ends = np.arange(num_positions - num_queries, num_positions) + 1
        check_positions(first, ends, num_positions)
        nothing = np.zeros(num_queries, np.int64)
        self._prefill(query, (key[:0], value[:0], nothing, nothing), (key, value, first, ends), scaling, softcap, sinks, out)

    def _prefill(
        self, query: Tensor, stored: Seen, exact: Seen, scaling: float, softcap: float | None, sinks: Tensor | None, out: Tensor
    ) -> None:
        """Let queries see what they see of stored keys and of exact ones."""
        (num_queries, heads, key_dim), (_, kv_heads, value_dim) = query.shape, exact[1].shape
        number, wanted_items = accumulator(query.dtype), SLICES_PER_THREAD * self._threads.num_threads
        item_tokens = max(1, min(prefill.ROWS_PER_ITEM * kv_heads // heads, -(-num_queries * kv_heads // wanted_items)))
        arrays = (
            carried(query.contiguous()), *_arrays(stored), *_arrays(exact),
            sinks_array(sinks, heads, number), number(scaling), number(softcap or 0), item_tokens, carried(out),
        )  # fmt: skip
        size = prefill.prefill_workspace(item_tokens * heads // kv_heads, key_dim, value_dim)
        num_items = -(-num_queries // item_tokens) * kv_heads
        self._threads.run(
            lambda begin, end: prefill.prefill_attention(begin, end, *arrays, workspace(size, number)),
            [(item, item + 1) for item in reversed(range(num_items))],  # the last queries see the most: first
        )

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
        (num_sequences, heads, rank), rope_dim, page_tokens = query_latent.shape, query_rope.shape[2], key_pages.shape[3]
        check_latent_queries(query_latent, query_rope, key_pages, value_pages, out)
        where = where_seen(num_sequences, page_tables, starts, lengths, page_tokens)
        number = accumulator(query_latent.dtype)
        item_heads = self._item_heads(num_sequences, heads)
        arrays = (
            *(carried(tensor.contiguous()) for tensor in (query_latent, query_rope)), carried(key_pages), carried(value_pages), *where,
            sinks_array(None, heads, number), number(scaling), item_heads, carried(out),
        )  # fmt: skip
        size = latent.latent_workspace(item_heads, rank, rope_dim, page_tokens)
        self._run(
            lambda begin, end: latent.decode_latent_attention(begin, end, *arrays, workspace(size, number)),
            costs(where, -(-heads // item_heads)),
        )

    def _item_heads(self, num_sequences: int, heads: int) -> int:
        """Return the heads of a work item on latents: all that share them, if there are sequences enough for the threads."""
        wanted_items = -(-2 * self._threads.num_threads // max(num_sequences, 1))
        return -(-heads // wanted_items // HEADS_PER_TILE) * HEADS_PER_TILE

    def close(self) -> None:
        self._threads.close()

    def _run(self, function: Callable[[int, int], None], costs: np.ndarray) -> None:
        self._threads.run(function, split_evenly(costs, SLICES_PER_THREAD * self._threads.num_threads))

    def _run_even(self, function: Callable[[int, int], None], num_tokens: int) -> None:
        num_slices = min(self._threads.num_threads, -(-num_tokens // MOVED_AT_ONCE))
        self._threads.run(function, split_evenly(np.ones(num_tokens), num_slices))


def step_arrays(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_tables: Tensor, starts: Tensor, lengths: Tensor, out: Tensor
) -> tuple[tuple[np.ndarray, ...], Where]:
    """Return the queries, keys and values of next tokens, and what they see, all checked."""
    check_queries(query, key_pages, value_pages, out)
    where = where_seen(len(query), page_tables, starts, lengths, key_pages.shape[3])
    return (carried(query.contiguous()), carried(key_pages), carried(value_pages)), where


def _arrays(seen: Seen) -> tuple[np.ndarray, ...]:
    key, value, starts, ends = seen
    return carried(key.contiguous()), carried(value.contiguous()), starts, ends
