"""Kernels for tensors without numbers: nothing is computed, but everything has a price, which the tensors take as time.

They serve a simulated device with a clock, and the host beside it.  Prices follow from shapes.  Of what next tokens see the host knows the
lengths; on the device all sequences of a micro-batch count as if they had as many pages as the longest one, as in the buffer of
gathered.py.  Windows of prompts do not make them cheaper.  The letters of shapes are those of reference.py and grouped.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from flexgen.kernels.dequantize.blocks import Codes, NestedScales, Scales
from flexgen.kernels.dequantize.groups import Groups, Packing
from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.encoded import EncodedMatrices
from flexgen.kernels.grouped import SortedPairs, Window, even_offsets
from flexgen.kernels.reference import AttentionKernels


class PricedTensor(Protocol):
    """A tensor without numbers, as such a device makes them."""

    def spend(self, kind: str, *, flops: float = ..., nbytes: float = ..., rows: float = ...) -> None:
        """Take the time of an operation where the tensor is computed on; for kinds and amounts see plan/price/operations.py."""
        ...


def _priced(tensor: Tensor) -> PricedTensor:
    return cast("PricedTensor", tensor)


class PricedKernels(AttentionKernels):
    """Attention to plain pages."""

    @staticmethod
    def write_kv(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        _priced(key_pages).spend("memory", nbytes=2 * (key.nbytes + value.nbytes))

    @staticmethod
    def gather_kv(key_pages: Tensor, value_pages: Tensor, page_table: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
        key = key_pages.new_empty(length - start, key_pages.shape[1], key_pages.shape[2])
        value = value_pages.new_empty(length - start, value_pages.shape[1], value_pages.shape[3])
        _priced(key_pages).spend("memory", nbytes=2 * (key.nbytes + value.nbytes))
        return key, value

    @staticmethod
    def decode_attention(
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
        seen, (heads, dims) = _seen(page_tables, starts, lengths, key_pages), _heads_and_dims(key_pages, value_pages)
        flops = 2.0 * seen * query.shape[1] * dims
        _priced(key_pages).spend("steps", flops=flops, nbytes=seen * heads * dims * key_pages.element_size())

    @staticmethod
    def decode_latent_attention(
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
        seen, (_, dims) = _seen(page_tables, starts, lengths, key_pages), _heads_and_dims(key_pages, value_pages)
        flops = 2.0 * seen * query_latent.shape[1] * (dims + key_pages.shape[2])
        _priced(key_pages).spend("steps", flops=flops, nbytes=seen * dims * key_pages.element_size())

    @staticmethod
    def prefill_attention(
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
        pairs = len(query) * (len(key) - len(query) / 2)
        _priced(query).spend("prompts", flops=2.0 * pairs * query.shape[1] * (key.shape[2] + value.shape[2]))


def _seen(page_tables: Tensor, starts: Tensor, lengths: Tensor, key_pages: Tensor) -> int:
    """Return how many positions next tokens see, all together."""
    if lengths.device.type == "meta":
        return page_tables.numel() * key_pages.shape[3]
    return int((lengths - starts.clamp(min=0)).sum())


def _heads_and_dims(key_pages: Tensor, value_pages: Tensor) -> tuple[int, int]:
    """Return the heads of the cache, and the numbers of a key and a value of a head together."""
    return key_pages.shape[1], key_pages.shape[2] + value_pages.shape[3]


class PricedGroupedKernels:
    """Products of experts.  Which experts rows choose is not known: all are chosen alike often."""

    def covers(self, dtype: torch.dtype) -> bool:
        return True

    def reads_encoded(self, mean_rows: int) -> bool:
        return False  # plans price all units as decoded, too

    def offsets_on_host(self, pairs: SortedPairs) -> Sequence[int]:
        pairs.offsets.tolist()  # takes the time
        return even_offsets(pairs)

    def product(
        self, x: Tensor, weight: Tensor | EncodedMatrices, bias: Tensor | None, pairs: SortedPairs, window: Window, *, gathers: bool
    ) -> Tensor:
        _, inputs, outputs = weight.shape
        out, count = x.new_empty(window.num_rows, outputs), _expected_pairs(pairs, window)
        nbytes = count * (inputs + outputs) * x.element_size()
        _priced(x).spend("product", flops=2.0 * count * inputs * outputs, nbytes=nbytes, rows=len(pairs.order) / pairs.num_experts)
        return out

    def add(self, rows: Tensor, weights: Tensor | None, pairs: SortedPairs, window: Window, total: Tensor) -> None:
        count = _expected_pairs(pairs, window)  # rows that have none in the window are not touched
        sums = 2 * min(count, len(total)) * total.element_size()
        _priced(rows).spend("memory", nbytes=(count * rows.element_size() + sums) * rows.shape[1])


def _expected_pairs(pairs: SortedPairs, window: Window) -> float:
    """Return how many pairs lie in a window."""
    of_experts = len(pairs.order) * window.count / pairs.num_experts
    return min(max(of_experts - window.skipped, 0.0), float(window.num_rows))


class PricedDequantizeKernels(DequantizeKernels):
    """Decoding, whose price follows from what it yields."""

    def look_up(self, codes: Codes, scales: Scales, out: Tensor) -> None:
        _decode(out)

    def flat(self, codes: Codes, scales: Tensor | NestedScales, size: int, out: Tensor) -> None:
        _decode(out)

    def rows(self, packed: Tensor, packing: Packing, groups: Groups, out: Tensor) -> None:
        _decode(out)

    def gptq(self, words: Tensor, bits: int, groups: Groups, out: Tensor) -> None:
        _decode(out)

    def awq(self, words: Tensor, groups: Groups, out: Tensor) -> None:
        _decode(out)

    def gguf_blocks(self, name: str, raw: Tensor, out: Tensor) -> None:
        _decode(out)

    def ranges(self, codes: Tensor, ranges: Tensor, size: int, start: int, out: Tensor) -> None:
        _decode(out)


def _decode(out: Tensor) -> None:
    _priced(out).spend("decoding", nbytes=out.nbytes)
