"""Linear layers computed with weights and inputs that are rounded, row by row, to 8 bits with a float32 scale each.

Sums of products are exact integers, so that an output depends on its own row of inputs and of weights alone.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import align_up
from flexgen.errors import OptionError
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.int8 import compiled
from flexgen.plan.policy import INT8_SUMS_BYTES

ROUNDED_AS_STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ALIGNMENT = 64  # of the codes of weights, which follow their scales
_LEAST_OUTPUTS = 64  # that are computed at a time


_product: Any = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


class RoundedRows(NamedTuple):
    """Rows of numbers, rounded.

    Attributes:
        codes: The codes, int8 (rows, columns).
        scales: The scale of each row, float32 (rows,).
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def within(cls, data: torch.Tensor, rows: int, columns: int) -> RoundedRows:
        """Return rows that lie in memory of `rounded_bytes`, int8 (bytes,): first the scales, then the codes."""
        begin = align_up(4 * rows, _ALIGNMENT)
        return cls(data[begin : begin + rows * columns].view(rows, columns), data[: 4 * rows].view(torch.float32))


def rounded_bytes(rows: int, columns: int) -> int:
    """Return the bytes of rounded rows."""
    return align_up(4 * rows, _ALIGNMENT) + rows * columns


def round_rows(numbers: torch.Tensor, out: RoundedRows, parallel: Parallel = serially) -> None:
    """Round rows of numbers, (rows, columns), contiguous, in a dtype of ROUNDED_AS_STORED."""
    stored, codes, scales = carried(numbers), out.codes.numpy(), out.scales.numpy()
    parallel(lambda begin, end: compiled.round_rows(begin, end, stored, codes, scales), len(numbers))


class RoundedInput:
    """Inputs of linear layers as they were rounded, for all layers that take the very same tensor.

    It knows the tensor without keeping it alive.  A tensor that was changed in place since then is another one.

    Attributes:
        rows: The rounded inputs, a row for each token.
    """

    def __init__(self, x: torch.Tensor, rows: RoundedRows) -> None:
        self.rows = rows
        self._known, self._version = weakref.ref(x), _version(x)

    def is_of(self, x: torch.Tensor) -> bool:
        """Return whether this is the tensor that was rounded, unchanged."""
        return self._known() is x and self._version is not None and self._version == _version(x)


def _version(x: torch.Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where torch does not count that."""
    return None if x.is_inference() else x._version


class Int8Products:
    """Computes linear layers; sums are held in memory that is used again and again, so by one thread at a time.

    Attributes:
        parallel: Runs the loops over rows.
        last: The input that was rounded last, for the layers that follow; None if there is none.
    """

    def __init__(self, parallel: Parallel = serially) -> None:
        self.parallel = parallel
        self.last: RoundedInput | None = None
        self._sums = torch.empty(0, dtype=torch.int32)

    def rounded(self, x: torch.Tensor) -> RoundedRows:
        """Return inputs, (rows, in_features), contiguous, in a dtype of ROUNDED_AS_STORED, as `write` takes them."""
        rounded = RoundedRows(torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32))
        round_rows(x, rounded, self.parallel)
        return rounded

    def write(self, x: RoundedRows, weight: RoundedRows, bias: torch.Tensor | None, out: torch.Tensor, first: int = 0) -> None:
        """Compute outputs of a linear layer.

        Args:
            x: The inputs, (rows, in_features).
            weight: The weights, (outputs, in_features).
            bias: The bias, (outputs,); None if there is none.
            out: All outputs of the layer, (rows, out_features), contiguous; columns from `first` on are written.
            first: The column of the first output.
        """
        num_rows, num_outputs = len(x.codes), len(weight.codes)
        if not num_rows:
            return
        step = max(INT8_SUMS_BYTES // (4 * num_rows) // _LEAST_OUTPUTS, 1) * _LEAST_OUTPUTS
        added = torch.empty(0) if bias is None else bias.float()
        for start in range(0, num_outputs, step):
            columns = slice(start, min(start + step, num_outputs))
            sums = self._held_sums(num_rows, columns.stop - start)
            _product(x.codes, weight.codes[columns].t(), out=sums)
            self._scale(sums, x.scales, weight.scales[columns], added[columns], first + start, out)

    def _scale(
        self, sums: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        arrays = [each.numpy() for each in (sums, rows, columns, bias)]
        target = carried(out)
        self.parallel(lambda begin, end: compiled.scale_sums(begin, end, *arrays, first, target), len(sums))

    def _held_sums(self, rows: int, columns: int) -> torch.Tensor:
        if len(self._sums) < rows * columns:
            self._sums = torch.empty(rows * columns, dtype=torch.int32)
        return self._sums[: rows * columns].view(rows, columns)


def warm_up_int8(dtype: torch.dtype) -> None:
    """Compile (or load) the loops for a dtype of computing, and for weights stored in any."""
    for stored in ROUNDED_AS_STORED:
        rounded = RoundedRows.within(torch.empty(rounded_bytes(1, 16), dtype=torch.int8), 1, 16)
        round_rows(torch.ones(1, 16, dtype=stored), rounded)
        if stored == dtype:
            products = Int8Products()
            products.write(products.rounded(torch.ones(1, 16, dtype=dtype)), rounded, None, torch.empty(1, 1, dtype=dtype))


def check_exact() -> None:
    """Refuse a processor on which sums of products of int8 numbers are not exact: some add pairs of products in 16 bits.

    Raises:
        OptionError: A product of the largest codes is wrong.
    """
    ones = torch.full((32, 256), 127, dtype=torch.int8)
    signs = torch.where(torch.arange(256) < 128, 127, -127).to(torch.int8).expand(32, -1).contiguous()
    for one, other in ((ones, ones), (ones, -ones), (signs, ones), (signs, signs)):
        wanted = one.int() @ other.int().t()
        if not torch.equal(_product(one, other.t()), wanted):
            raise OptionError(
                "cpu_compute='int8': this processor's products of 8-bit integers are not exact, as they are with VNNI or AMX; leave it out"
            )
