"""Products in int8 against the same arithmetic by torch, bit for bit, however rows and columns are divided."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from flexgen.errors import OptionError
from flexgen.kernels.int8 import products
from flexgen.kernels.int8.products import (
    Int8Products,
    RoundedInput,
    RoundedRows,
    check_exact,
    round_rows,
    rounded_bytes,
    warm_up_int8,
)
from flexgen.kernels.threads import KernelThreads

DTYPES = products.ROUNDED_AS_STORED
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@pytest.fixture
def exact() -> None:
    """Skip where the engine would refuse the processor."""
    try:
        check_exact()
    except OptionError as error:
        pytest.skip(str(error))


def random(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes; the first is of zeros."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    numbers[0] = 0
    return numbers.to(dtype)


def rounded(numbers: torch.Tensor, **how: Any) -> RoundedRows:
    rows, columns = numbers.shape
    out = RoundedRows.within(torch.full((rounded_bytes(rows, columns),), 99, dtype=torch.int8), rows, columns)
    round_rows(numbers, out, **how)
    return out


def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    computing = Int8Products()
    computing.write(computing.rounded(x), rounded(weight), bias, out)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What is computed, with exact sums; each step in float32."""
    (x_codes, x_scales), (codes, scales) = plainly_rounded(x), plainly_rounded(weight)
    out = (x_codes.long() @ codes.long().t()).float() * (x_scales[:, None] * scales[None])
    return (out if bias is None else out + bias.float()).to(x.dtype)


def plainly_rounded(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = numbers.float()
    most = wide.abs().amax(1)
    inverse = torch.where(most == 0, 0, torch.full_like(most, 127) / most)  # 127 / most would be rounded twice
    return (wide * inverse[:, None]).round().to(torch.int8), most / 127


@pytest.mark.parametrize("columns", [1, 15, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_rows_are_rounded_to_nearest(dtype: torch.dtype, columns: int) -> None:
    numbers = random(7, columns, dtype)
    codes, scales = rounded(numbers)
    wanted_codes, wanted_scales = plainly_rounded(numbers)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(scales, wanted_scales)
    assert (codes.float() * scales[:, None] - numbers.float()).abs().le(0.5001 * scales[:, None]).all()
    assert codes[1:].abs().amax(1).eq(127).all(), "all codes are used"


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")], ids=["inf", "-inf", "nan"])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """In its own row only."""
    x, weight = random(4, 32, torch.float32), random(5, 32, torch.float32, 1)
    x[2, 7] = bad
    out = torch.zeros(4, 5)
    compute(x, weight, None, out)
    assert not out[2].isfinite().any()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(1, 64, 32), (3, 17, 5), (50, 100, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_products_are_those_of_exact_sums(dtype: torch.dtype, shape: tuple[int, int, int], has_bias: bool) -> None:
    rows, features_in, features_out = shape
    x, weight = random(rows, features_in, dtype), random(features_out, features_in, dtype, 1)
    bias = torch.randn(features_out, generator=torch.Generator().manual_seed(2)).to(dtype) if has_bias else None
    out = torch.zeros(rows, features_out, dtype=dtype)
    compute(x, weight, bias, out)
    assert torch.equal(out, reference(x, weight, bias))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_outputs_are_as_near_to_exact_ones_as_half_a_step_of_each_number_allows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = ((torch.randn(rows, 150, generator=generator) * torch.logspace(-1, 1, rows)[:, None]).to(dtype) for rows in (20, 40))
    out = torch.zeros(20, 40, dtype=dtype)
    compute(x, weight, None, out)
    x, weight = x.double(), weight.double()
    steps, weight_steps = (each.abs().amax(1, keepdim=True) / 127 for each in (x, weight))
    # (x + a)(w + b) - xw = aw + xb + ab, where |a| and |b| are at most half a step
    most = (steps @ weight.abs().sum(1)[None] + x.abs().sum(1)[:, None] @ weight_steps.T + 75 * steps @ weight_steps.T) / 2
    exact = x @ weight.T
    arithmetic = 1e-3 * most + torch.finfo(dtype).eps * (exact.abs() + most)  # in float32, and rounded once to the dtype
    assert (out - exact).abs().le(most + arithmetic).all()
    assert (out - exact).abs().max() > 0


@pytest.mark.usefixtures("exact")
def test_results_do_not_depend_on_how_rows_and_columns_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random(60, 96, torch.bfloat16), random(200, 96, torch.bfloat16, 1), torch.randn(200).to(torch.bfloat16)
    whole = torch.zeros(60, 200, dtype=torch.bfloat16)
    compute(x, weight, bias, whole)
    monkeypatch.setattr(products, "INT8_SUMS_BYTES", 4 * 64 * 20)
    with KernelThreads(3) as threads:
        divided, computing = torch.zeros_like(whole), Int8Products(threads.over)
        for rows in (slice(0, 1), slice(1, 18), slice(18, 60)):
            some = torch.zeros(rows.stop - rows.start, 200, dtype=torch.bfloat16)
            for first, stop in ((0, 7), (7, 150), (150, 200)):
                codes = rounded(weight[first:stop], parallel=threads.over)
                computing.write(computing.rounded(x[rows]), codes, bias[first:stop], some, first)
            divided[rows] = some
    assert torch.equal(divided, whole)


def test_a_rounded_input_is_known_by_its_tensor() -> None:
    x = random(4, 32, torch.bfloat16)
    known = RoundedInput(x, Int8Products().rounded(x))
    assert known.is_of(x)
    assert not known.is_of(x.clone()), "equal numbers may be changed later"
    assert not known.is_of(x[:]), "a view is another tensor"
    x[1, 3] = 7
    assert not known.is_of(x), "it was changed in place"
    changed = RoundedInput(x, Int8Products().rounded(x))
    assert changed.is_of(x)
    x.view(-1)[5:9].zero_()
    assert not changed.is_of(x), "it was changed through a view"


def test_a_rounded_input_is_of_no_later_tensor_and_keeps_none_alive() -> None:
    """Memory and the identity of objects are used again as soon as they are free."""
    x = torch.ones(4, 32)
    alive, known = weakref.ref(x), RoundedInput(x, Int8Products().rounded(x))
    del x
    assert alive() is None
    assert not any(known.is_of(torch.ones(4, 32)) for _ in range(100))


def test_changes_that_torch_does_not_count_are_not_missed() -> None:
    with torch.inference_mode():
        x = torch.ones(4, 32)
        assert not RoundedInput(x, Int8Products().rounded(x)).is_of(x)


def test_no_rows() -> None:
    compute(torch.empty(0, 8), torch.ones(3, 8), None, torch.empty(0, 3))


@pytest.mark.usefixtures("exact")
def test_sums_of_the_largest_codes_are_exact() -> None:
    x = torch.ones(2, 20_000)
    out = torch.zeros(2, 3)
    compute(x, -torch.ones(3, 20_000), None, out)
    torch.testing.assert_close(out, torch.full((2, 3), -20_000.0), rtol=1e-6, atol=0)


def test_a_processor_that_adds_in_16_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies codes from 0 to 255 by codes from -127 to 127, and adds two products before they are widened."""

    def saturating(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        pairs = ((one.int() + 128)[:, :, None] * other.int()[None]).unflatten(1, (-1, 2)).sum(2)
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * other.int().sum(0)).int()

    monkeypatch.setattr(products, "_product", saturating)
    with pytest.raises(OptionError, match="cpu_compute='int8': this processor's products of 8-bit integers are not exact"):
        check_exact()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_warming_up_computes(dtype: torch.dtype) -> None:
    warm_up_int8(dtype)
