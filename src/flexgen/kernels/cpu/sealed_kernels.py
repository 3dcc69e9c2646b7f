"""The host's kernels with those for sealed pages.  In float64, which has no kernel for codes, the reference computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.checks import (
    check_latent_queries,
    check_positions,
    check_prompt,
    check_sealed_memory,
    check_sealed_queries,
    check_shapes,
    check_stored_part,
)
from flexgen.kernels.codes import HeadCodes, SealedPages
from flexgen.kernels.cpu import decode_sealed, latent_sealed, sealed
from flexgen.kernels.cpu.arguments import Where, accumulator, costs, integers, sinks_array, where_seen, workspace
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.cpu.kernels import PlainKernels
from flexgen.kernels.threads import split_evenly


class CpuKernels(PlainKernels):
    """Attention kernels for tensors in host memory; owns `num_threads - 1` threads."""

    def seal(self, key: Tensor, value: Tensor, pages: SealedPages, page_ids: Tensor) -> None:
        size, ids = pages.page_tokens, integers(page_ids)
        for numbers, codes, memory, by_token in _halves(pages, key, value):
            check_shapes(numbers=(numbers, (len(ids) * size, memory.shape[1], codes.dim)))
            plain = carried((numbers.float() if numbers.dtype == torch.float64 else numbers).contiguous())
            arrays = plain, *_memory(memory), ids, size, codes.bits, codes.rotated, by_token
            self._over_pages(
                lambda begin, end, arrays=arrays, dim=codes.dim: sealed.seal(begin, end, *arrays, workspace(dim, np.float32)), len(ids)
            )

    def unseal(self, pages: SealedPages, page_table: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype == torch.float64:
            return super().unseal(pages, page_table, start, length, dtype)
        size, table = pages.page_tokens, integers(page_table)
        check_positions(np.array([start]), np.array([length]), len(table) * size)
        found: list[Tensor] = []
        for _, codes, memory, by_token in _halves(pages, pages.keys, pages.values):
            out = torch.empty(length - start, memory.shape[1], codes.dim, dtype=dtype)
            arrays = *_memory(memory), table, start, size, codes.bits, codes.rotated, by_token, carried(out)
            self._run_even(
                lambda begin, end, arrays=arrays, dim=codes.dim: sealed.unseal(begin, end, *arrays, workspace(dim, np.float32)),
                length - start,
            )
            found.append(out)
        return found[0], found[1]

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
        if query.dtype == torch.float64:
            plain = query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths
            super().decode_sealed_attention(*plain, scaling=scaling, out=out, softcap=softcap, sinks=sinks)
            return
        heads, kv_heads, number = query.shape[1], tail_keys.shape[1], accumulator(query.dtype)
        seen, where = sealed_step_arrays(query, pages, tail_keys, tail_values, page_tables, tails, starts, lengths, out)
        arrays = (*seen, sinks_array(sinks, heads, number), number(scaling), number(softcap or 0), carried(out))
        size = decode_sealed.decode_sealed_workspace(heads // kv_heads, query.shape[2], tail_values.shape[3], pages.page_tokens)
        self._run(
            lambda begin, end: decode_sealed.decode_sealed_attention(begin, end, *arrays, workspace(size, number)),
            costs(where, kv_heads),
        )

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
        codes = pages.key_codes, pages.value_codes
        if query_latent.dtype == torch.float64 or any(each.bits != 8 or each.rotated for each in codes):
            plain = query_latent, query_rope, pages, tail_keys, tail_values, page_tables, tails, starts, lengths
            super().decode_sealed_latent_attention(*plain, scaling=scaling, out=out)
            return
        dtype, (num_sequences, heads, rank), rope_dim, page_tokens = (
            query_latent.dtype, query_latent.shape, query_rope.shape[2], pages.page_tokens,
        )  # fmt: skip
        check_latent_queries(query_latent, query_rope, tail_keys, tail_values, out)
        check_shapes(tail_keys=(tail_keys, (None, 1, rank, page_tokens)), tails=(tails, (num_sequences,)))
        where = where_seen(num_sequences, page_tables, starts, lengths, page_tokens, last_page_apart=True)
        number, item_heads = accumulator(dtype), self._item_heads(num_sequences, heads)
        arrays = (
            *(carried(tensor.contiguous()) for tensor in (query_latent, query_rope)),
            *_codes(pages.keys, codes[0], 1, page_tokens), *_codes(pages.values, codes[1], 1, page_tokens),
            carried(tail_keys), carried(tail_values), where[0], integers(tails), *where[1:],
            sinks_array(None, heads, number), number(scaling), item_heads, carried(out),
        )  # fmt: skip
        size = latent_sealed.sealed_latent_workspace(item_heads, rank, rope_dim, page_tokens)
        self._run(
            lambda begin, end: latent_sealed.decode_sealed_latent_attention(begin, end, *arrays, workspace(size, number)),
            costs(where, -(-heads // item_heads)),
        )

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
        check_prompt(query, key, value, starts, out)
        check_stored_part(query, stored_key, stored_value, borders, value)
        num_queries, num_exact = len(query), len(value)
        first, border = np.maximum(integers(starts), 0), integers(borders)
        stored_ends = np.minimum(border, len(stored_key))
        exact_first, ends = np.maximum(first, border) - exact_start, np.arange(num_exact - num_queries, num_exact) + 1
        exact_first = np.maximum(exact_first, 0)
        check_positions(exact_first, ends, num_exact)
        stored = stored_key, stored_value, np.minimum(first, stored_ends), stored_ends
        self._prefill(query, stored, (key, value, exact_first, ends), scaling, softcap, sinks, out)

    def _over_pages(self, function: Callable[[int, int], None], num_pages: int) -> None:
        self._threads.run(function, split_evenly(np.ones(num_pages), min(self._threads.num_threads, num_pages)))


def sealed_step_arrays(
    query: Tensor, pages: SealedPages, tail_keys: Tensor, tail_values: Tensor, page_tables: Tensor, tails: Tensor,
    starts: Tensor, lengths: Tensor, out: Tensor,
) -> tuple[tuple[Any, ...], Where]:  # fmt: skip
    """Return the arguments of kernels up to the lengths, and what next tokens see, all checked."""
    kv_heads, page_tokens = tail_keys.shape[1], pages.page_tokens
    check_sealed_queries(query, tail_keys, tail_values, tails, page_tokens, out)
    where = where_seen(len(query), page_tables, starts, lengths, page_tokens, last_page_apart=True)
    memories = (
        (*_codes(memory, codes, kv_heads, page_tokens), codes.bits)
        for codes, memory in ((pages.key_codes, pages.keys), (pages.value_codes, pages.values))
    )
    (keys, key_parameters, key_bits), (values, value_parameters, value_bits) = memories
    return (
        carried(query.contiguous()), keys, key_parameters, key_bits, pages.key_codes.rotated, values, value_parameters, value_bits,
        carried(tail_keys), carried(tail_values), where[0], integers(tails), *where[1:],
    ), where  # fmt: skip


def _halves(pages: SealedPages, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, HeadCodes, Tensor, bool]]:
    """Yield (numbers, codes, memory, whether the codes of a token are adjacent) of keys and of values."""
    for numbers, codes, memory, by_token in ((key, pages.key_codes, pages.keys, False), (value, pages.value_codes, pages.values, True)):
        check_sealed_memory(memory, codes.token_bytes, pages.page_tokens)
        yield numbers, codes, memory, by_token


def _memory(memory: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes and the same memory as float16, in the types that carry them."""
    return memory.numpy(), memory.view(torch.int16).numpy()


def _codes(memory: Tensor, codes: HeadCodes, kv_heads: int, page_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes as signed bytes, and the parameters."""
    check_sealed_memory(memory, codes.token_bytes, page_tokens, kv_heads)
    return memory.view(torch.int8).numpy(), memory.view(torch.int16).numpy()
