"""How kernels that decode stored numbers are launched: one launch for a tensor, whose only other memory is the numbers.

Which groups the columns belong to (`Groups.order`) is not checked as on the host, because to check it would be to wait for it: numbers of
a group that does not exist are NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexgen.base.quantities import power_of_two
from flexgen.kernels.dequantize import tables
from flexgen.kernels.dequantize.blocks import Codes, NestedScales, Scales
from flexgen.kernels.dequantize.groups import WORD_BITS, Groups, Packing, ZeroPoints
from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.triton.arguments import DTYPES, SCALE_KINDS
from flexgen.kernels.triton.dequantize_blocks import run_blocks
from flexgen.kernels.triton.grids import on_grid
from flexgen.kernels.triton.programs.dequantize import decode_matrices, decode_ranges

TILE = 2048  # numbers that a program decodes, at most
MOST_COLUMNS, TURNED_COLUMNS = 128, 32  # of a tile; of one whose codes lie in columns, which are read from top to bottom
LEAST_COLUMNS = 16
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # without which products and sums might be rounded once, not twice
_INTEGERS = (torch.int8, torch.uint8, torch.int32)
# The arguments of a matrix of codes one after the other, of which each has one scale, and nothing else.
_PLAIN: dict[str, Any] = {
    "values": None, "factors": None, "nested": None, "nested_values": None, "zeros": None, "order": None, "numbers": 0, "groups": 0,
    "skipped": 0, "first_zero": 0, "first_scale": 0, "offset": 0.0, "code_matrix_stride": 0, "code_stride": 1, "scale_matrix_stride": 0,
    "factor_stride": 0, "zero_row_stride": 0, "zero_stride": 0, "WORD_BITS": 8, "PADDED": False, "ORDER": "low first", "SIGNED": False,
    "ALONG_ROWS": False, "FLAT": False, "SCALES": "float", "DIVIDED": False, "NESTED": 1, "ZERO": 0, "ZERO_BITS": 0, "ZERO_PADDED": False,
    "ZERO_ORDER": "low first", "LACKS": 0,
}  # fmt: skip


class TritonDequantizeKernels(DequantizeKernels):
    """The kernels that decode on a CUDA device of compute capability 8.0 or more.

    Numbers, scales and zero points in dtypes that they do not know are decoded by the reference.
    """

    def look_up(self, codes: Codes, scales: Scales, out: Tensor) -> None:
        factors = scales.factors
        if out.dtype not in DTYPES or scales.numbers.dtype not in SCALE_KINDS or not (factors is None or factors.dtype in DTYPES):
            super().look_up(codes, scales, out)
            return
        count, rows, columns = out.shape
        stored = scales.numbers if scales.numbers.dtype in DTYPES else scales.numbers.view(torch.uint8)
        arguments = _PLAIN | _of_codes(codes) | {
            "code_matrix_stride": codes.numbers.stride(0), "line_stride": codes.numbers.stride(1),
            "scales": stored, "SCALES": SCALE_KINDS[scales.numbers.dtype], "scale_matrix_stride": stored.stride(0),
            "scale_row_stride": stored.stride(1), "scale_stride": stored.stride(2), "skipped": scales.skipped, "factors": factors,
            "factor_stride": 0 if factors is None or factors.numel() == 1 else 1, "DIVIDED": scales.divided,
        }  # fmt: skip
        _run(arguments, out, (count, rows, columns), scales.block_columns, scales.block_rows)

    def flat(self, codes: Codes, scales: Tensor | NestedScales, size: int, out: Tensor) -> None:
        nested = scales if isinstance(scales, NestedScales) else None
        stored = nested.codes if nested is not None else scales
        assert isinstance(stored, Tensor)
        if out.dtype not in DTYPES or (nested.scales if nested is not None else stored).dtype not in DTYPES:
            super().flat(codes, scales, size, out)
            return
        arguments = _PLAIN | _of_codes(codes) | {
            "line_stride": size // 2, "scales": stored, "scale_row_stride": 1, "scale_stride": 0, "FLAT": True, "numbers": len(out),
        }  # fmt: skip
        if nested is not None:
            arguments |= {
                "SCALES": "nested", "nested": nested.scales, "nested_values": nested.values, "NESTED": nested.size,
                "first_scale": nested.first, "offset": nested.offset,
            }  # fmt: skip
        _run(arguments, out, (1, -(-len(out) // size), size), size, 1)

    def rows(self, packed: Tensor, packing: Packing, groups: Groups, out: Tensor) -> None:
        if not _covers(groups, out):
            super().rows(packed, packing, groups, out)
            return
        codes = packed.view(torch.uint8 if packing.signed else torch.uint32)
        arguments = _PLAIN | _of_groups(groups) | {
            "codes": codes, "line_stride": codes.stride(0), "BITS": packing.bits, "WORD_BITS": 8 if packing.signed else WORD_BITS,
            "PADDED": packing.padded, "SIGNED": packing.signed,
        }  # fmt: skip
        _run(arguments, out, (1, *out.shape), groups.columns, groups.block_rows)

    def gptq(self, words: Tensor, bits: int, groups: Groups, out: Tensor) -> None:
        if not _covers(groups, out):
            super().gptq(words, bits, groups, out)
            return
        codes = words.view(torch.uint32)
        arguments = _PLAIN | _of_groups(groups) | {
            "codes": codes, "line_stride": codes.stride(1), "code_stride": codes.stride(0), "BITS": bits, "WORD_BITS": WORD_BITS,
        }  # fmt: skip
        _run(arguments, out, (1, *out.shape), groups.columns, groups.block_rows, most_columns=TURNED_COLUMNS)

    def awq(self, words: Tensor, groups: Groups, out: Tensor) -> None:
        if not _covers(groups, out):
            super().awq(words, groups, out)
            return
        codes = words.view(torch.uint32)
        arguments = _PLAIN | _of_groups(groups) | {
            "codes": codes, "line_stride": codes.stride(0), "code_stride": codes.stride(1), "BITS": 4, "WORD_BITS": WORD_BITS,
            "ORDER": "awq", "ALONG_ROWS": True,
        }  # fmt: skip
        _run(arguments, out, (1, *out.shape), groups.columns, groups.block_rows, most_columns=TURNED_COLUMNS)

    def gguf_blocks(self, name: str, raw: Tensor, out: Tensor) -> None:
        if out.dtype not in DTYPES or not run_blocks(name, raw, out, TILE, OPTIONS):
            super().gguf_blocks(name, raw, out)

    def ranges(self, codes: Tensor, ranges: Tensor, size: int, start: int, out: Tensor) -> None:
        if out.dtype not in DTYPES:
            super().ranges(codes, ranges, size, start, out)
            return
        rows, columns = out.shape
        tile_rows, tile_columns = _tile(rows, columns, MOST_COLUMNS)
        if out.numel():
            launch = on_grid(decode_ranges, (-(-columns // tile_columns), -(-rows // tile_rows)), out.device)
            launch(codes, ranges, out, rows, columns, start, SIZE=size, ROWS=tile_rows, COLUMNS=tile_columns, **OPTIONS)


def _of_codes(codes: Codes) -> dict[str, Any]:
    """Return the arguments of codes that are looked up; those of E2M1 and E4M3 need no table."""
    device = codes.values.device
    bits, known = (4, tables.E2M1) if codes.per_byte == 2 else (8, tables.e4m3())
    found = {"codes": codes.numbers, "BITS": bits, "ORDER": "high first" if codes.high_first else "low first"}
    if codes.values is tables.on_device(known, device):
        return found | {"VALUES": "small float"}
    return found | {"VALUES": "table", "values": codes.values}


def _covers(groups: Groups, out: Tensor) -> bool:
    zeros = groups.zeros
    stored = zeros.words if isinstance(zeros, ZeroPoints) else zeros
    return out.dtype in DTYPES and groups.scales.dtype in DTYPES and (stored is None or stored.dtype in _INTEGERS)


def _of_groups(groups: Groups) -> dict[str, Any]:
    """Return the arguments of the scales and zero points of integer codes."""
    zeros, scales = groups.zeros, groups.scales
    found: dict[str, Any] = {
        "VALUES": "integer", "scales": scales, "scale_row_stride": scales.stride(0), "scale_stride": scales.stride(1),
        "skipped": groups.skipped, "groups": scales.shape[1], "ZERO": groups.zero,
    }  # fmt: skip
    if groups.order is not None:
        found["order"] = groups.order.contiguous()
    if isinstance(zeros, ZeroPoints):
        words = zeros.words.view(torch.uint32)
        found |= {
            "zeros": words, "zero_row_stride": words.stride(0), "zero_stride": words.stride(1), "first_zero": zeros.first,
            "ZERO_BITS": zeros.packing.bits, "ZERO_PADDED": zeros.packing.padded, "LACKS": zeros.lacks,
            "ZERO_ORDER": "awq" if zeros.interleaved else "low first",
        }  # fmt: skip
    elif zeros is not None:
        found |= {"zeros": zeros, "zero_row_stride": zeros.stride(0), "zero_stride": zeros.stride(1)}
    return found


def _run(
    arguments: dict[str, Any], out: Tensor, shape: tuple[int, ...], group: int, block_rows: int, *, most_columns: int = MOST_COLUMNS
) -> None:
    """Launch the decoding of matrices.

    Args:
        arguments: The arguments that say what is stored.
        out: The numbers.
        shape: Their shape, (matrices, rows, columns); of flattened numbers, that of the blocks.
        group: The columns that share a scale.
        block_rows: The rows that share a scale.
        most_columns: The most columns of a tile.
    """
    count, rows, columns = shape
    if not out.numel():
        return
    tile_rows, tile_columns = _tile(rows, columns, most_columns)
    row_tiles, column_tiles = -(-rows // tile_rows), -(-columns // tile_columns)
    group = 0 if group >= columns else group
    shared = 1 if arguments["order"] is not None else math.gcd(group, tile_columns)  # all, if all columns are a group
    on_grid(decode_matrices, (count * row_tiles * column_tiles,), out.device)(
        **arguments, out=out, rows=rows, columns=columns, row_tiles=row_tiles, column_tiles=column_tiles, GROUP=group, SHARED=shared,
        BLOCK_ROWS=0 if block_rows >= arguments["skipped"] + rows else block_rows, ROWS=tile_rows, COLUMNS=tile_columns, **OPTIONS,
    )  # fmt: skip


def _tile(rows: int, columns: int, most_columns: int) -> tuple[int, int]:
    """Return the rows and columns of a tile."""
    tile_columns = max(min(power_of_two(columns), most_columns), LEAST_COLUMNS)
    return min(power_of_two(rows), TILE // tile_columns), tile_columns
