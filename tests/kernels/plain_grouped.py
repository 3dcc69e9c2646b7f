"""Grouped products in plain torch operations, on any device: what stands in for kernels where there are none.

Nothing waits for the device.  Rows without a product are no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen.kernels.dequantize import tables
from flexgen.kernels.encoded import EncodedMatrices
from flexgen.kernels.grouped import SortedPairs, Window

NAN = float("nan")


def scale_numbers(scales: Tensor) -> Tensor:
    """What stored scales stand for, in float32: plain bytes are powers of two."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return torch.exp2(scales.double() - 127).float()


def zero_numbers(matrices: EncodedMatrices) -> Tensor | int:
    """The codes that stand for zero, of the shape of the scales, or one for all."""
    zeros, outputs = matrices.zeros, matrices.codes.shape[2]
    if zeros is None:
        return matrices.zero or 0
    if zeros.dtype != torch.int32:
        return zeros.to(torch.int32) + (matrices.zero or 0)
    each = torch.stack([(zeros >> shift) & 15 for shift in range(0, 32, 4)], dim=3)  # (E, B, words, 8, G)
    return each.flatten(2, 3)[:, :, :outputs]


def numbers_of(matrices: EncodedMatrices) -> Tensor:
    """The matrices, (experts, inputs, outputs), code by code."""
    inputs, codes = matrices.inputs, matrices.codes
    group = torch.arange(inputs, device=codes.device) // matrices.group
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :inputs]
    zeros = zero_numbers(matrices)
    if matrices.zero is None:
        values = tables.on_device(tables.E2M1, codes.device)[both.long()]
    else:
        values = (both.to(torch.int32) - (zeros if isinstance(zeros, int) else zeros[..., group])).float()
    return (values * scale_numbers(matrices.scales)[..., group]).to(matrices.dtype).flatten(1, 2).mT


class PlainGroupedKernels:
    """Grouped products in torch operations.

    Args:
        encoded_rows: The rows of an expert on average, up to which matrices are multiplied by as they are stored.

    Attributes:
        num_encoded: How many products were those by matrices as they are stored.
        num_decoded: How many were others.
    """

    def __init__(self, encoded_rows: int = 0) -> None:
        self._encoded_rows = encoded_rows
        self.num_encoded = self.num_decoded = 0

    def covers(self, dtype: torch.dtype) -> bool:
        return True

    def offsets_on_host(self, pairs: SortedPairs) -> Sequence[int]:
        return pairs.offsets.tolist()

    def reads_encoded(self, mean_rows: int) -> bool:
        return mean_rows <= self._encoded_rows

    def product(
        self, x: Tensor, weight: Tensor | EncodedMatrices, bias: Tensor | None, pairs: SortedPairs, window: Window, *, gathers: bool
    ) -> Tensor:
        if isinstance(weight, EncodedMatrices):
            self.num_encoded += 1
            weight = numbers_of(weight)
        else:
            self.num_decoded += 1
        rows = torch.arange(window.num_rows, device=x.device)
        places = pairs.offsets[window.first] + window.skipped + rows
        ends = pairs.offsets[window.first + 1 : window.first + window.count + 1]
        expert = torch.searchsorted(ends, places, right=True).clamp(max=window.count - 1)
        if gathers:
            rows = pairs.order[places.clamp(max=len(pairs.order) - 1)] // (len(pairs.order) // len(x))
        out = torch.einsum("ri,rio->ro", x[rows], weight[expert])
        out = out if bias is None else out + bias[expert]
        return out.masked_fill((places >= ends[-1])[:, None], NAN)

    def add(self, rows: Tensor, weights: Tensor | None, pairs: SortedPairs, window: Window, total: Tensor) -> None:
        num_rows = len(total)
        places = pairs.places.view(num_rows, -1)
        begin, end = pairs.offsets[window.first] + window.skipped, pairs.offsets[window.first + window.count]
        inside = (places >= begin) & (places < end) & (places < begin + window.num_rows)
        for choice in range(places.shape[1]):
            found = rows[(places[:, choice] - begin).clamp(0, window.num_rows - 1)].float()
            found = found if weights is None else found * weights[:, choice, None].float()
            total += torch.where(inside[:, choice, None], found, 0.0)
