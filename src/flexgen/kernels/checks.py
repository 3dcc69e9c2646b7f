"""Checks of arguments before compiled code, which trusts them, sees them: formats, layouts, shapes and positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import EngineError


def check_format(dtype: torch.dtype, **tensors: Tensor) -> None:
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


def check_positions(starts: np.ndarray, lengths: np.ndarray, num_positions: int) -> None:
    """Refuse sequences that see nothing, or more than their page tables hold."""
    if lengths.size and ((starts >= lengths).any() or lengths.max() > num_positions):
        raise EngineError(f"positions from {starts.tolist()} to {lengths.tolist()} in page tables of {num_positions} positions")
