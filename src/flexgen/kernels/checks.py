"""Checks of arguments before compiled code, which trusts them, sees them: formats, layouts, shapes and positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.encoded import EncodedMatrices


def check_format(dtype: torch.dtype, **tensors: Tensor | EncodedMatrices) -> None:
    """Refuse a tensor of another dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise EngineError(f"{name} holds {tensor.dtype}, the others {dtype}")


def check_layout(**tensors: Tensor) -> None:
    """Refuse a tensor that is not contiguous, if it is written or too large to copy."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise EngineError(f"{name} is not contiguous: its strides are {tensor.stride()} for the shape {tuple(tensor.shape)}")


def check_shapes(**tensors: tuple[Tensor, tuple[int | None, ...]]) -> None:
    """Refuse a tensor whose shape is not the one that stands beside it; None is any size."""
    for name, (tensor, shape) in tensors.items():
        if len(shape) != tensor.dim() or any(want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)):
            raise EngineError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple('any' if want is None else want for want in shape)}")


def check_pages(dtype: torch.dtype, key_pages: Tensor, value_pages: Tensor, kv_heads: int, key_dim: int, value_dim: int) -> None:
    """Refuse pages of another format, layout or shape."""
    num_pages, page_tokens = key_pages.shape[0], key_pages.shape[-1]
    check_format(dtype, key_pages=key_pages, value_pages=value_pages)
    check_layout(key_pages=key_pages, value_pages=value_pages)
    check_shapes(
        key_pages=(key_pages, (None, kv_heads, key_dim, None)), value_pages=(value_pages, (num_pages, kv_heads, page_tokens, value_dim))
    )


def check_out(dtype: torch.dtype, out: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a result of another format, layout or shape."""
    check_format(dtype, out=out)
    check_layout(out=out)
    check_shapes(out=(out, shape))


def check_groups(heads: int, kv_heads: int) -> None:
    """Refuse query heads that the key heads cannot share evenly."""
    if heads % kv_heads:
        raise EngineError(f"{heads} query heads cannot share {kv_heads} key heads evenly")


def check_queries(query: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> None:
    """Refuse queries (S, H, Dk), pages and a result (S, H, Dv) that do not go together."""
    (num_queries, heads, key_dim), kv_heads, value_dim = query.shape, key_pages.shape[1], value_pages.shape[3]
    check_groups(heads, kv_heads)
    check_pages(query.dtype, key_pages, value_pages, kv_heads, key_dim, value_dim)
    check_out(query.dtype, out, (num_queries, heads, value_dim))


def check_sealed_queries(query: Tensor, tail_keys: Tensor, tail_values: Tensor, tails: Tensor, page_tokens: int, out: Tensor) -> None:
    """Refuse queries, unfinished pages and a result that do not go together, or with sealed pages of so many tokens."""
    check_queries(query, tail_keys, tail_values, out)
    shape = None, tail_keys.shape[1], query.shape[2], page_tokens
    check_shapes(tail_keys=(tail_keys, shape), tails=(tails, (len(query),)))


def check_sealed_memory(memory: Tensor, token_bytes: int, page_tokens: int, kv_heads: int | None = None) -> None:
    """Refuse memory that is not that of sealed pages (pages, K, bytes of a head) with so many bytes for each token."""
    check_format(torch.uint8, pages=memory)
    check_layout(pages=memory)
    check_shapes(pages=(memory, (None, kv_heads, None)))
    head_bytes, needed = memory.shape[2], page_tokens * token_bytes
    if head_bytes < needed or head_bytes % 2:
        raise EngineError(f"pages has {head_bytes} bytes per head, not {needed} or a larger even number")
    if page_tokens % 2:
        raise EngineError(f"sealed pages have an even number of tokens, not {page_tokens}")


def check_latent_queries(query_latent: Tensor, query_rope: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> None:
    """Refuse queries of latents (S, H, rank) and (S, H, rope), pages and a result (S, H, rank) that do not go together."""
    (num_sequences, heads, rank), rope, dtype = query_latent.shape, query_rope.shape[2], query_latent.dtype
    check_format(dtype, query_rope=query_rope)
    check_shapes(query_rope=(query_rope, (num_sequences, heads, rope)))
    check_pages(dtype, key_pages, value_pages, 1, rank, rope)
    check_out(dtype, out, (num_sequences, heads, rank))


def check_prompt(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, out: Tensor) -> None:
    """Refuse queries (T, H, Dk), keys (N, K, Dk), values (N, K, Dv), starts (T,) and a result (T, H, Dv) that do not go together."""
    (num_queries, heads, key_dim), (num_positions, kv_heads, value_dim) = query.shape, value.shape
    check_groups(heads, kv_heads)
    check_format(query.dtype, key=key, value=value)
    check_shapes(key=(key, (num_positions, kv_heads, key_dim)), starts=(starts, (num_queries,)))
    check_out(query.dtype, out, (num_queries, heads, value_dim))


def check_stored_part(query: Tensor, stored_key: Tensor, stored_value: Tensor, borders: Tensor, value: Tensor) -> None:
    """Refuse keys (D, K, Dk) and values (D, K, Dv) as they were stored, and borders (T,), that do not go with queries and new values."""
    (num_queries, _, key_dim), (_, kv_heads, value_dim) = query.shape, value.shape
    check_format(query.dtype, stored_key=stored_key, stored_value=stored_value)
    check_shapes(
        stored_key=(stored_key, (None, kv_heads, key_dim)), stored_value=(stored_value, (len(stored_key), kv_heads, value_dim)),
        borders=(borders, (num_queries,)),
    )  # fmt: skip


def check_positions(starts: np.ndarray, lengths: np.ndarray, num_positions: int) -> None:
    """Refuse sequences that see nothing, or more than their page tables hold."""
    if lengths.size and ((starts >= lengths).any() or lengths.max() > num_positions):
        raise EngineError(f"positions from {starts.tolist()} to {lengths.tolist()} in page tables of {num_positions} positions")
