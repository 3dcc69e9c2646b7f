"""The attention kernels of a device, chosen by a table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexgen.kernels.codes import HeadCodes, SealedPages
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.triton_support import in_triton


def attention_kernels(device: torch.device, num_threads: int) -> AttentionKernels:
    """The attention kernels for tensors on `device`; those of the host compute with `num_threads` threads."""
    make = KERNELS.get(device.type)
    return AttentionKernels() if make is None else make(device, num_threads)


def _cpu_kernels(device: torch.device, num_threads: int) -> AttentionKernels:
    from flexgen.kernels.cpu import CpuKernels

    return CpuKernels(num_threads)


def _cuda_kernels(device: torch.device, num_threads: int) -> AttentionKernels:
    """Triton's kernels where Triton is installed and compiles for the device; elsewhere torch's own operations."""
    if not in_triton(device, "attention", otherwise="in torch's operations"):
        return _gathered_kernels(device, num_threads)
    from flexgen.kernels.triton.sealed_kernels import TritonKernels

    return TritonKernels()


def _gathered_kernels(device: torch.device, num_threads: int) -> AttentionKernels:
    from flexgen.kernels.gathered import GatheredKernels

    return GatheredKernels()


def _priced_kernels(device: torch.device, num_threads: int) -> AttentionKernels:
    from flexgen.kernels.priced import PricedKernels

    return PricedKernels()


KERNELS: dict[str, Callable[[torch.device, int], AttentionKernels]] = {
    "cpu": _cpu_kernels, "cuda": _cuda_kernels, "sim": _gathered_kernels, "meta": _priced_kernels,
}  # fmt: skip


def warm_up(kernels: AttentionKernels, dtype: torch.dtype) -> None:
    """Run every kernel once on a few numbers, so that compiling them happens now."""
    heads, dim, page = 2, 16, 16
    key, value = torch.zeros(4, heads, dim, dtype=dtype), torch.zeros(4, heads, dim, dtype=dtype)
    key_pages = torch.zeros(1, heads, dim, page, dtype=dtype)
    value_pages = torch.zeros(1, heads, page, dim, dtype=dtype)
    zeros, positions = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    query = torch.zeros(4, heads, dim, dtype=dtype)
    kernels.write_kv(key, value, key_pages, value_pages, zeros, positions)
    kernels.decode_attention(query, key_pages, value_pages, zeros[:, None], zeros, positions + 1, scaling=1.0, out=torch.empty_like(query))
    kernels.prefill_attention(query, key, value, zeros, scaling=1.0, out=torch.empty_like(query))


def warm_up_sealed(kernels: AttentionKernels, dtype: torch.dtype) -> None:
    """Run every kernel for sealed pages once on a few numbers."""
    heads, dim, page = 2, 32, 16
    codes = HeadCodes(dim=dim, bits=4, rotated=True)
    memory = torch.zeros(1, heads, page * codes.token_bytes, dtype=torch.uint8)
    pages = SealedPages(keys=memory, values=memory.clone(), key_codes=codes, value_codes=codes, page_tokens=page)
    numbers, zero = torch.zeros(page, heads, dim, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    kernels.seal(numbers, numbers, pages, zero)
    stored = kernels.unseal(pages, zero, 0, page, dtype)
    tails = torch.zeros(1, heads, dim, page, dtype=dtype), torch.zeros(1, heads, page, dim, dtype=dtype)
    query, out = numbers[:1], torch.empty(1, heads, dim, dtype=dtype)
    kernels.decode_sealed_attention(query, pages, *tails, zero[:, None].repeat(1, 2), zero, zero, zero + page + 1, scaling=1.0, out=out)
    kernels.prefill_sealed_attention(query, *stored, query, query, zero, zero + page, page, scaling=1.0, out=out)


def warm_up_sparse(kernels: AttentionKernels, dtype: torch.dtype, *, sealed: bool) -> None:
    """Run the kernel for sparse attention, that for sealed pages or the other one, once on a few numbers."""
    heads, dim, page = 2, 32, 16
    query, out = torch.zeros(1, heads, dim, dtype=dtype), torch.empty(1, heads, dim, dtype=dtype)
    keys, values = torch.zeros(1, heads, dim, page, dtype=dtype), torch.zeros(1, heads, page, dim, dtype=dtype)
    zero = torch.zeros(1, dtype=torch.int64)
    if not sealed:
        kernels.decode_sparse_attention(query, keys, values, zero[:, None], zero, zero + page, zero + 1, scaling=1.0, out=out)
        return
    codes = HeadCodes(dim=dim, bits=4, rotated=True)
    memory = torch.zeros(1, heads, page * codes.token_bytes, dtype=torch.uint8)
    pages = SealedPages(keys=memory, values=memory, key_codes=codes, value_codes=codes, page_tokens=page)
    seen = zero[:, None].repeat(1, 2), zero, zero, zero + page + 1
    kernels.decode_sparse_sealed_attention(query, pages, keys, values, *seen, zero + 1, scaling=1.0, out=out)
