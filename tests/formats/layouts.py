"""Matrices in the layouts of published integer formats, written out code by code, and the numbers that they stand for.

Known to tests of kernels, of headers and of whole models; knows nothing about flexgen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """What a file holds for one matrix, by parameter name, and its numbers in float32."""

    tensors: dict[str, Tensor]
    numbers: Tensor


def stream_words(codes: Tensor, bits: int) -> Tensor:
    """int32 words of each row of codes, low bits first, without gaps."""
    rows = []
    for row in codes.tolist():
        stream = 0
        for i, code in enumerate(row):
            stream |= code << (bits * i)
        rows.append([(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def padded_words(codes: Tensor, bits: int) -> Tensor:
    """int32 words of each row of codes, with as many whole codes as fit into a word."""
    fit, rows = 32 // bits, []
    for row in codes.tolist():
        parts = [row[first : first + fit] for first in range(0, len(row), fit)]
        rows.append([sum(code << (bits * i) for i, code in enumerate(part)) for part in parts])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def awq_words(codes: Tensor) -> Tensor:
    """int32 words of each row of codes: eight, of columns 0, 2, 4, 6, 1, 3, 5, 7."""
    order, rows = (0, 2, 4, 6, 1, 3, 5, 7), []
    for row in codes.tolist():
        rows.append([sum(row[first + column] << (4 * i) for i, column in enumerate(order)) for first in range(0, len(row), 8)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def quantized(
    weight: Tensor, bits: int, group: int, scale_dtype: torch.dtype, *, symmetric: bool, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros of a matrix (outputs, inputs), each group of whose columns has its own."""
    outputs, inputs = weight.shape
    order = torch.arange(inputs) // group if order is None else order
    groups, most = int(order.max()) + 1, (1 << bits) - 1
    scales, zeros = torch.empty(outputs, groups), torch.empty(outputs, groups, dtype=torch.int64)
    for index in range(groups):
        part = weight[:, order == index]
        low, high = part.amin(dim=1).clamp(max=0), part.amax(dim=1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            scales[:, index], zeros[:, index] = 2 * high / most, (most + 1) // 2
        else:
            scales[:, index] = (high - low) / most
            zeros[:, index] = (-low / scales[:, index].clamp(min=1e-9)).round().clamp(1, most).long()
    scales = scales.clamp(min=1e-4).to(scale_dtype)
    codes = ((weight / scales.float()[:, order]).round().long() + zeros[:, order]).clamp(0, most)
    return codes, scales, zeros, (codes - zeros[:, order]).float() * scales.float()[:, order]


def gptq(
    weight: Tensor, bits: int = 4, group: int = 32, *, version: int = 1, symmetric: bool = True, order: Tensor | None = None
) -> Stored:
    """GPTQ's layout: words along the inputs, zero points along the outputs; version 1 stores zero points minus one."""
    codes, scales, zeros, numbers = quantized(weight, bits, group, torch.float16, symmetric=symmetric, order=order)
    kept = (zeros - int(version == 1)) & ((1 << bits) - 1)
    inputs = torch.arange(weight.shape[1])
    tensors = {
        "qweight": stream_words(codes, bits).t().contiguous(),
        "qzeros": stream_words(kept.t(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": (inputs // group if order is None else order).to(torch.int32),
    }
    return Stored(tensors, numbers)


def awq(weight: Tensor, group: int = 32) -> Stored:
    """AWQ's layout: words along the outputs."""
    codes, scales, zeros, numbers = quantized(weight, 4, group, torch.float16, symmetric=False)
    return Stored({"qweight": awq_words(codes.t()), "qzeros": awq_words(zeros.t()), "scales": scales.t().contiguous()}, numbers)


def packed(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    padded: bool = False,
) -> Stored:
    """compressed-tensors' pack-quantized: words along the inputs, zero points along the outputs in words of their own."""
    codes, scales, zeros, numbers = quantized(weight, bits, group, scale_dtype, symmetric=symmetric)
    words = padded_words if padded else stream_words
    tensors = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return Stored(tensors, numbers)
