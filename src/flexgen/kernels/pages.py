"""Reading and writing pages in plain torch operations, on any device.  The letters of shapes and the layouts are those of reference.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.codes import SealedPages, unseal


def page_tables(tables: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> Tensor:
    """Return the page ids of sequences as int64 (S, max_pages), filled up with -1."""
    lengths = np.fromiter(map(len, tables), dtype=np.int64, count=len(tables))
    padded = np.full((len(tables), int(lengths.max(initial=1))), -1, dtype=np.int64)
    ids = np.fromiter(itertools.chain.from_iterable(tables), dtype=np.int64, count=int(lengths.sum()))
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = ids
    return torch.from_numpy(padded).to(device)


def write_kv(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
    """Store the keys (T, K, Dk) and values (T, K, Dv) of T tokens at (page_ids[t], page_offsets[t]); both int64 (T,)."""
    key_pages[page_ids, :, :, page_offsets] = key
    value_pages[page_ids, :, page_offsets] = value


def gather_kv(key_pages: Tensor, value_pages: Tensor, page_table: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Return positions start <= p < length of one sequence as contiguous keys (length - start, K, Dk) and values (.., Dv)."""
    page_tokens = key_pages.shape[-1]
    first = start // page_tokens
    pages = page_table[first : -(-length // page_tokens)].long()
    key = key_pages[pages].permute(0, 3, 1, 2).flatten(0, 1)  # (tokens, K, Dk)
    value = value_pages[pages].permute(0, 2, 1, 3).flatten(0, 1)  # (tokens, K, Dv)
    visible = slice(start - first * page_tokens, length - first * page_tokens)
    return key[visible].contiguous(), value[visible].contiguous()


def seen_sealed(
    pages: SealedPages, tail_keys: Tensor, tail_values: Tensor, page_table: Tensor, tail: Tensor, start: int, length: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the keys and values that a query at position length - 1 sees: earlier pages as they are stored, its own from the tail."""
    border = (length - 1) // pages.page_tokens * pages.page_tokens
    key, value = gather_kv(tail_keys, tail_values, tail, max(start - border, 0), length - border)
    if start >= border:
        return key, value
    wide = torch.promote_types(dtype, torch.float32)
    earlier = unseal(pages, page_table, start, border, wide)
    return torch.cat([earlier[0], key.to(wide)]), torch.cat([earlier[1], value.to(wide)])
