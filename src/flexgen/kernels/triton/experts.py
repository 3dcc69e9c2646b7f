"""How Triton's grouped products are launched.  Only shapes are looked at here: which rows an expert has is read on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexgen.base.quantities import power_of_two
from flexgen.errors import EngineError
from flexgen.kernels.checks import check_format, check_out, check_shapes
from flexgen.kernels.encoded import ZEROS_OF_WORD, EncodedMatrices
from flexgen.kernels.grouped import SortedPairs, Window, even_offsets
from flexgen.kernels.triton.arguments import DTYPES, SCALE_KINDS
from flexgen.kernels.triton.grids import on_grid
from flexgen.kernels.triton.launch import STAGED_BYTES, columns
from flexgen.kernels.triton.programs import experts as programs
from flexgen.kernels.triton.programs.encoded_experts import encoded_product

LEAST_ROWS, MOST_ROWS = 16, 128  # of a tile; tensor cores multiply no fewer
MEAN_ROWS = (16, 32, 64, 128)  # of an expert on average, for which tiles have different sizes
MOST_STAGES = 4
ENCODED_ROWS = 64  # of an expert on average, up to which its matrices are decoded for every tile: there are few tiles
SUMMED_COLUMNS = 1024  # of a program that adds results


class TritonGroupedKernels:
    """Grouped products and their sums in Triton.

    Tiles have about as many rows as experts have on average, so that few rows are computed in vain.
    """

    def covers(self, dtype: torch.dtype) -> bool:
        return dtype in DTYPES

    def reads_encoded(self, mean_rows: int) -> bool:
        return mean_rows <= ENCODED_ROWS

    def offsets_on_host(self, pairs: SortedPairs) -> Sequence[int]:
        return even_offsets(pairs) if pairs.offsets.is_meta else pairs.offsets.tolist()

    def product(
        self, x: Tensor, weight: Tensor | EncodedMatrices, bias: Tensor | None, pairs: SortedPairs, window: Window, *, gathers: bool
    ) -> Tensor:
        is_encoded = isinstance(weight, EncodedMatrices)
        inputs, outputs = weight.shape[1:]
        num_pairs, num_rows = len(pairs.order), len(x) if gathers else window.num_rows
        check_format(x.dtype, weight=weight)
        check_shapes(x=(x, (num_rows, inputs)), offsets=(pairs.offsets, (None,)))
        if bias is not None:
            check_shapes(bias=(bias, (window.count, outputs)))
            bias = bias.detach().contiguous()
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(window.num_rows, outputs)
        tile = _tile(x.dtype, num_pairs // pairs.num_experts, is_encoded=is_encoded)
        arguments = _of_codes(weight, window.count, tile["DEPTH"]) if is_encoded else _of_numbers(weight, window.count)
        grid = -(-window.num_rows // tile["ROWS"]) + window.count, -(-outputs // tile["COLUMNS"])
        on_grid(encoded_product if is_encoded else programs.grouped_product, grid, out.device)(
            x=x, bias=bias, order=pairs.order, offsets=pairs.offsets, out=out, **_places(window), x_stride=x.stride(0), **arguments,
            CHOICES=num_pairs // num_rows if gathers else 0, INPUTS=inputs, OUTPUTS=outputs, GROUPS=power_of_two(window.count), **tile,
        )  # fmt: skip
        return out

    def add(self, rows: Tensor, weights: Tensor | None, pairs: SortedPairs, window: Window, total: Tensor) -> None:
        num_totals, dim = total.shape
        choices = len(pairs.order) // num_totals
        check_shapes(rows=(rows, (window.num_rows, dim)))
        check_out(torch.float32, total, (num_totals, dim))
        if weights is not None:
            check_shapes(weights=(weights, (num_totals, choices)))
            weights = weights.contiguous()
        width = min(columns(dim), SUMMED_COLUMNS)
        on_grid(programs.add_rows, (num_totals, -(-dim // width)), total.device)(
            rows.contiguous(), weights, pairs.places, pairs.offsets, total, **_places(window),
            CHOICES=choices, CHOICE_COLUMNS=power_of_two(choices), DIM=dim, COLUMNS=width,
        )  # fmt: skip


def _places(window: Window) -> dict[str, int]:
    return {"first": window.first, "count": window.count, "skipped": window.skipped, "num_rows": window.num_rows}


def _of_numbers(weight: Tensor, count: int) -> dict[str, Any]:
    """Return the arguments of the decoded matrices of `count` experts."""
    check_shapes(weight=(weight, (count, None, None)))
    strides = weight.stride()
    return {"weight": weight.detach(), "expert_stride": strides[0], "input_stride": strides[1], "output_stride": strides[2]}


def _of_codes(weight: EncodedMatrices, count: int, depth: int) -> dict[str, Any]:
    """Return the arguments of the matrices of `count` experts in codes, of which a tile has `depth` inputs."""
    codes, scales, zeros, group = weight.codes, weight.scales, weight.zeros, weight.group
    _, blocks, outputs, line = codes.shape
    groups = -(-weight.inputs // group)
    packed = zeros is not None and zeros.dtype == torch.int32
    check_shapes(codes=(codes, (count, None, None, None)), scales=(scales, (count, blocks, outputs, groups)))
    if zeros is not None:
        check_shapes(zeros=(zeros, (count, blocks, -(-outputs // ZEROS_OF_WORD) if packed else outputs, groups)))
    for each in (codes, scales, zeros):
        if each is not None and each.stride()[2:] != (each.shape[3], 1):
            raise EngineError(f"matrices in codes are not stored row by row: the strides are {each.stride()} for {tuple(each.shape)}")
    if 2 * line < weight.inputs or scales.dtype not in SCALE_KINDS:
        raise EngineError(f"codes of {2 * line} inputs with scales in {scales.dtype} do not make {weight.inputs} inputs")
    group = 0 if groups == 1 else group
    return {
        "codes": codes, "scales": scales if scales.dtype in DTYPES else scales.view(torch.uint8), "zeros": zeros,
        "code_expert_stride": codes.stride(0), "code_block_stride": codes.stride(1),
        "scale_expert_stride": scales.stride(0), "scale_block_stride": scales.stride(1),
        "zero_expert_stride": 0 if zeros is None else zeros.stride(0), "zero_block_stride": 0 if zeros is None else zeros.stride(1),
        "BLOCK": outputs, "LINE": line, "LINE_GROUPS": groups, "E2M1": weight.zero is None, "ZERO": weight.zero or 0,
        "PACKED": packed, "SCALES": SCALE_KINDS[scales.dtype], "GROUP": group, "SHARED": math.gcd(group, depth),
    }  # fmt: skip


def _tile(dtype: torch.dtype, mean_rows: int, *, is_encoded: bool) -> dict[str, int]:
    """Return the sizes and options of tiles where an expert has so many rows on average; a tile of codes is decoded beside them."""
    wide = dtype.itemsize > 2  # computed without tensor cores
    rows = max(LEAST_ROWS, min(power_of_two(max(mean_rows, 1)), 32 if wide else MOST_ROWS))
    width, depth = (64, 32) if wide else (128, 64)
    numbers = width * depth * dtype.itemsize
    staged = STAGED_BYTES - numbers * is_encoded, rows * depth * dtype.itemsize + (width * depth // 2 if is_encoded else numbers)
    stages = min(staged[0] // staged[1], MOST_STAGES)
    return {"ROWS": rows, "COLUMNS": width, "DEPTH": depth, "num_warps": 8 if rows == MOST_ROWS else 4, "num_stages": stages}
