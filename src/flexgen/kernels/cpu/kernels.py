"""The host's kernels behind the common interface: tensors become arrays, work lists are cut and run on our threads."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.cpu import decode, latent, pages, prefill
from flexgen.kernels.cpu.formats import bits, carried
from flexgen.kernels.threads import SLICES_PER_THREAD, KernelThreads, split_evenly

ITEM_TOKENS = 16  # what beginning a sequence costs, in tokens read
WRITTEN_AT_ONCE = 64  # tokens for which another thread is worth waking
HEADS_PER_TILE = 8


class CpuKernels:
    """`flexgen.kernels.attention.AttentionKernels` for tensors in host memory; owns `num_threads - 1` threads."""

    def __init__(self, num_threads: int) -> None:
        self._threads = KernelThreads(num_threads)

    def write_kv(self, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        _check(key.dtype, key_pages=key_pages, value_pages=value_pages)
        arrays = (
            bits(key.contiguous()),
            bits(value.contiguous()),
            bits(key_pages),
            bits(value_pages),
            _integers(page_ids),
            _integers(page_offsets),
        )
        self._run_even(lambda begin, end: pages.write_kv(begin, end, *arrays), key.shape[0])

    def gather_kv(self, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
        _check(key_pages.dtype, key_pages=key_pages, value_pages=value_pages)
        _, kv_heads, key_dim, _ = key_pages.shape
        key = torch.empty(length - start, kv_heads, key_dim, dtype=key_pages.dtype)
        value = torch.empty(length - start, kv_heads, value_pages.shape[3], dtype=key_pages.dtype)
        arrays = bits(key_pages), bits(value_pages), _integers(page_table), start, bits(key), bits(value)
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
        _check(query.dtype, key_pages=key_pages, value_pages=value_pages, out=out)
        _, kv_heads, key_dim, page_tokens = key_pages.shape
        number = _accumulator(query.dtype)
        arrays = (
            *(carried(tensor) for tensor in (query.contiguous(), key_pages, value_pages)),
            *(_integers(tensor) for tensor in (page_tables, starts, lengths)),
            _sinks(sinks, number), number(scaling), number(softcap or 0), carried(out),
        )  # fmt: skip
        size = decode.decode_workspace(query.shape[1] // kv_heads, key_dim, value_pages.shape[3], page_tokens)
        costs = np.repeat(_visible(starts, lengths), kv_heads)
        self._run(lambda begin, end: decode.decode_attention(begin, end, *arrays, _workspace(size, number)), costs)

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
        _check(query.dtype, key=key, value=value, out=out, contiguous=("out",))
        (num_queries, heads, key_dim), kv_heads = query.shape, key.shape[1]
        number, group = _accumulator(query.dtype), heads // kv_heads
        item_tokens = max(1, prefill.ROWS_PER_ITEM // group)
        arrays = (
            *(carried(tensor.contiguous()) for tensor in (query, key, value)),
            _integers(starts), _sinks(sinks, number), number(scaling), number(softcap or 0), item_tokens, carried(out),
        )  # fmt: skip
        size = prefill.prefill_workspace(item_tokens * group, key_dim, value.shape[2])
        num_items = -(-num_queries // item_tokens) * kv_heads
        longest_first = [(item, item + 1) for item in reversed(range(num_items))]
        self._threads.run(lambda begin, end: prefill.prefill_attention(begin, end, *arrays, _workspace(size, number)), longest_first)

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
        _check(query_latent.dtype, query_rope=query_rope, key_pages=key_pages, value_pages=value_pages, out=out)
        (num_sequences, heads, rank), rope_dim = query_latent.shape, query_rope.shape[2]
        number = _accumulator(query_latent.dtype)
        items_per_sequence = -(-2 * self._threads.num_threads // max(num_sequences, 1))
        item_heads = -(-heads // items_per_sequence // HEADS_PER_TILE) * HEADS_PER_TILE
        arrays = (
            *(carried(tensor) for tensor in (query_latent.contiguous(), query_rope.contiguous(), key_pages, value_pages)),
            *(_integers(tensor) for tensor in (page_tables, starts, lengths)),
            _sinks(None, number), number(scaling), item_heads, carried(out),
        )  # fmt: skip
        size = latent.latent_workspace(item_heads, rank, rope_dim, key_pages.shape[3])
        costs = np.repeat(_visible(starts, lengths), -(-heads // item_heads))
        self._run(lambda begin, end: latent.decode_latent_attention(begin, end, *arrays, _workspace(size, number)), costs)

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, function: Any, costs: np.ndarray) -> None:
        self._threads.run(function, split_evenly(costs, SLICES_PER_THREAD * self._threads.num_threads))

    def _run_even(self, function: Any, num_tokens: int) -> None:
        num_slices = min(self._threads.num_threads, -(-num_tokens // WRITTEN_AT_ONCE))
        self._threads.run(function, split_evenly(np.ones(num_tokens), num_slices))


def _check(dtype: torch.dtype, *, contiguous: tuple[str, ...] | None = None, **tensors: Tensor) -> None:
    """Compiled code trusts what it is given: refuse other formats and, where bytes are shared, other layouts."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise EngineError(f"{name} holds {tensor.dtype}, the others {dtype}")
        if (contiguous is None or name in contiguous) and not tensor.is_contiguous():
            raise EngineError(f"{name} is not contiguous: its strides are {tensor.stride()} for the shape {tuple(tensor.shape)}")


def _accumulator(dtype: torch.dtype) -> type[np.floating]:
    return np.float64 if dtype == torch.float64 else np.float32


def _integers(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy(), np.int64)


def _sinks(sinks: Tensor | None, number: type[np.floating]) -> np.ndarray:
    """(H,), or (0,) for none."""
    return np.zeros(0, number) if sinks is None else sinks.detach().double().numpy().astype(number)


def _visible(starts: Tensor, lengths: Tensor) -> np.ndarray:
    return (lengths - starts).numpy() + ITEM_TOKENS


def _workspace(size: int, number: type[np.floating]) -> np.ndarray:
    """Memory of one call on one thread; begins on a cache line, so that vectors do not straddle two."""
    line = 64 // np.dtype(number).itemsize
    memory = np.empty(size + line, number)
    skipped = -memory.ctypes.data % 64 // memory.itemsize
    return memory[skipped : skipped + size]
