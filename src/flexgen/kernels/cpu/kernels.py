"""The host's kernels behind the common interface: tensors to arrays, work lists cut and run on our threads."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels import reference
from flexgen.kernels.cpu import decode, prefill
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.threads import SLICES_PER_THREAD, KernelThreads, split_evenly

ITEM_TOKENS = 16  # what beginning a work item costs, in tokens read


class CpuKernels:
    """`AttentionKernels` for tensors in host memory; owns its threads."""

    def __init__(self, num_threads: int) -> None:
        self._threads = KernelThreads(num_threads)

    def decode_attention(self, query, key_pages, value_pages, page_tables, starts, lengths, *, scaling, out, softcap=None, sinks=None):
        accumulator = np.float64 if query.dtype == torch.float64 else np.float32
        kv_heads = key_pages.shape[1]
        num_slices = self._threads.num_threads * SLICES_PER_THREAD
        costs = np.repeat((lengths - starts).numpy() + ITEM_TOKENS, kv_heads)
        sinks = np.zeros(0, accumulator) if sinks is None else sinks.numpy().astype(accumulator)
        args = (carried(query), carried(key_pages), carried(value_pages), page_tables.to(torch.int64).numpy(), starts.numpy(), lengths.numpy(), sinks, accumulator(scaling), accumulator(softcap or 0), carried(out))
        size = decode.decode_workspace.__wrapped__ if False else decode.decode_workspace(query.shape[1]//kv_heads, query.shape[2], value_pages.shape[3], key_pages.shape[3])
        self._threads.run(lambda begin, end: decode.decode_attention(begin, end, *args, np.empty(size, accumulator)), split_evenly(costs, num_slices))

    def prefill_attention(self, query, key, value, starts, *, scaling, out, softcap=None, sinks=None):
        accumulator = np.float64 if query.dtype == torch.float64 else np.float32
        T,H,Dk=query.shape; N,K,Dv=value.shape; G=H//K
        item=max(1,prefill.ROWS_PER_ITEM//G)
        sinks = np.zeros(0, accumulator) if sinks is None else sinks.numpy().astype(accumulator)
        args=(carried(query),carried(key),carried(value),starts.numpy(),sinks,accumulator(scaling), accumulator(softcap or 0),item,carried(out))
        size=prefill.prefill_workspace(item*G,Dk,Dv)
        items=-(-T//item)*K
        self._threads.run(lambda b,e: prefill.prefill_attention(b,e,*args,np.empty(size,accumulator)), [(i,i+1) for i in reversed(range(items))])

    def close(self) -> None:
        self._threads.close()
