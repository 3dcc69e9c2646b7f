"""How Triton's grouped products are launched.  Only shapes are looked at here: which rows an expert has is read on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.base.quantities import power_of_two
from flexgen.kernels.checks import check_format, check_out, check_shapes
from flexgen.kernels.grouped import SortedPairs, Window
from flexgen.kernels.triton.arguments import DTYPES
from flexgen.kernels.triton.grids import on_grid
from flexgen.kernels.triton.launch import STAGED_BYTES, columns
from flexgen.kernels.triton.programs import experts as programs

LEAST_ROWS, MOST_ROWS = 16, 128  # of a tile; tensor cores multiply no fewer
MEAN_ROWS = (16, 32, 64, 128)  # of an expert on average, for which tiles have different sizes
MOST_STAGES = 4
SUMMED_COLUMNS = 1024  # of a program that adds results


class TritonGroupedKernels:
    """Grouped products and their sums in Triton.

    Tiles have about as many rows as experts have on average, so that few rows are computed in vain.
    """

    def covers(self, dtype: torch.dtype) -> bool:
        return dtype in DTYPES

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, pairs: SortedPairs, window: Window, *, gathers: bool) -> Tensor:
        inputs, outputs = weight.shape[1:]
        num_pairs, num_rows = len(pairs.order), len(x) if gathers else window.num_rows
        check_format(x.dtype, weight=weight)
        check_shapes(x=(x, (num_rows, inputs)), weight=(weight, (window.count, None, None)), offsets=(pairs.offsets, (None,)))
        if bias is not None:
            check_shapes(bias=(bias, (window.count, outputs)))
            bias = bias.detach().contiguous()
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(window.num_rows, outputs)
        tile = _tile(x.dtype, num_pairs // pairs.num_experts)
        grid = -(-window.num_rows // tile["ROWS"]) + window.count, -(-outputs // tile["COLUMNS"])
        on_grid(programs.grouped_product, grid, out.device)(
            x, weight.detach(), bias, pairs.order, pairs.offsets, out, **_places(window), x_stride=x.stride(0),
            expert_stride=weight.stride(0), input_stride=weight.stride(1), output_stride=weight.stride(2),
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


def _tile(dtype: torch.dtype, mean_rows: int) -> dict[str, int]:
    """Return the sizes and options of tiles where an expert has so many rows on average."""
    wide = dtype.itemsize > 2  # computed without tensor cores
    rows = max(LEAST_ROWS, min(power_of_two(max(mean_rows, 1)), 32 if wide else MOST_ROWS))
    width, depth = (64, 32) if wide else (128, 64)
    stages = min(STAGED_BYTES // ((rows + width) * depth * dtype.itemsize), MOST_STAGES)
    return {"ROWS": rows, "COLUMNS": width, "DEPTH": depth, "num_warps": 8 if rows == MOST_ROWS else 4, "num_stages": stages}
