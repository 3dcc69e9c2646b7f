"""The interface of attention kernels, and the table that chooses the implementation for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

from flexgen.kernels import reference


class AttentionKernels(Protocol):
    """Attention on pages.  `flexgen.kernels.reference` defines shapes and meanings, function by function."""

    def write_kv(
        self, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, page_ids: Tensor, page_offsets: Tensor
    ) -> None: ...

    def gather_kv(self, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]: ...

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
    ) -> None: ...

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
    ) -> None: ...

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
    ) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class ReferenceKernels:
    """The reference as an implementation, for devices that have no other."""

    write_kv = staticmethod(reference.write_kv)
    gather_kv = staticmethod(reference.gather_kv)
    decode_attention = staticmethod(reference.decode_attention)
    prefill_attention = staticmethod(reference.prefill_attention)
    decode_latent_attention = staticmethod(reference.decode_latent_attention)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def attention_kernels(device: torch.device, num_threads: int) -> AttentionKernels:
    """Return the attention kernels for tensors on `device`; where they compute on the host, with `num_threads` threads."""
    return KERNELS.get(device.type, _reference_kernels)(num_threads)


def _cpu_kernels(num_threads: int) -> AttentionKernels:
    from flexgen.kernels.cpu import CpuKernels

    return CpuKernels(num_threads)


def _reference_kernels(num_threads: int) -> AttentionKernels:
    return ReferenceKernels()


KERNELS: dict[str, Callable[[int], AttentionKernels]] = {"cpu": _cpu_kernels}


def warm_up(kernels: AttentionKernels, dtype: torch.dtype) -> None:
    """Run every kernel once on a few numbers, so that it is compiled now."""
    heads, dim, page = 2, 16, 16
    key, value = torch.zeros(4, heads, dim, dtype=dtype), torch.zeros(4, heads, dim, dtype=dtype)
    key_pages = torch.zeros(1, heads, dim, page, dtype=dtype)
    value_pages = torch.zeros(1, heads, page, dim, dtype=dtype)
    zeros, positions = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    query = torch.zeros(4, heads, dim, dtype=dtype)
    kernels.write_kv(key, value, key_pages, value_pages, zeros, positions)
    kernels.decode_attention(query, key_pages, value_pages, zeros[:, None], zeros, positions + 1, scaling=1.0, out=torch.empty_like(query))
    kernels.prefill_attention(query, key, value, zeros, scaling=1.0, out=torch.empty_like(query))
