"""Decoding by tables: the compiled kernels against what is written out here, and against the torch operations of other devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexgen.devices.sim_tensor import register
from flexgen.errors import EngineError
from flexgen.kernels.dequantize import tables
from flexgen.kernels.dequantize.blocks import Codes, Scales
from flexgen.kernels.dequantize.lookup import decode, in_vectors
from flexgen.kernels.threads import KernelThreads

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CPU = torch.device("cpu")


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_scales(*shape: int, seed: int = 1) -> Tensor:
    """Float32 numbers over the whole range: products overflow, underflow and are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-140, 127, shape, generator=generator).float())


def in_pieces(function: Callable[[int, int], None], count: int) -> None:
    for begin in range(0, count, 3):
        function(begin, min(begin + 3, count))


def nibbles(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """(rows, bytes) -> (rows, 2 * bytes), one code after the other."""
    pairs = [[(byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4) for byte in row] for row in codes.tolist()]
    return torch.tensor([[code for pair in row for code in pair] for row in pairs])


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """The same bits, apart from the bits of a NaN."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(wanted)[~wanted.isnan()])


@pytest.fixture(params=["vectors", "one by one"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look codes up in vectors, if the processor can, and as on a processor that cannot."""
    if request.param == "one by one":
        monkeypatch.setattr("flexgen.kernels.dequantize.lookup.has_vectors", lambda: False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("high_first", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(32, 16), (4096 + 96, 32), (4224, 64), (4320, 48), (10, 4), (70, 32), (6, 64)])
def test_four_bits(columns: int, group: int, high_first: bool, dtype: torch.dtype) -> None:
    """Of any values, and of E2M1 with its negative zero."""
    codes, scales = random_bytes(7, columns // 2), random_scales(7, -(-columns // group))
    for values in (torch.randn(16, generator=torch.Generator().manual_seed(2)), tables.on_device(tables.E2M1, CPU)):
        wanted = values[nibbles(codes, high_first=high_first)] * scales.repeat_interleave(group, dim=1)[:, :columns]
        out = torch.full((7, columns), 7, dtype=dtype)
        given = Scales(numbers=scales, block_columns=group)
        decode(Codes(numbers=codes, values=values, high_first=high_first), given, out, in_pieces)
        assert_same(out, wanted.to(dtype))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [256, 255])
def test_every_code_of_eight_bits(columns: int, dtype: torch.dtype) -> None:
    """Of E4M3, and of a table that differs from it in one code, in the sign of zero."""
    codes = torch.arange(256, dtype=torch.uint8)[:columns].repeat(4, 1)
    e4m3 = tables.on_device(tables.e4m3(), CPU)
    other = e4m3.clone()
    other[0] = -0.0
    scales = torch.tensor([1.0, -1.0, 2.0**-100, 2.0**-130])[:, None]
    for values, wanted in ((e4m3, codes.view(torch.float8_e4m3fn).float()), (other, other[codes.int()])):
        out = torch.full(codes.shape, 7, dtype=dtype)
        decode(Codes(numbers=codes, values=values), Scales(numbers=scales, block_columns=256), out, in_pieces)
        assert_same(out, (wanted * scales).to(dtype))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "block", "start"), [(9, 40, (4, 16), 0), (6, 5000, (4, 128), 3), (3, 33, (128, 128), 126)])
def test_eight_bits_in_blocks(rows: int, columns: int, block: tuple[int, int], start: int, dtype: torch.dtype) -> None:
    """Rows begin in the midst of a block, the last block of a row is short, NaN stays NaN."""
    codes, scales = random_bytes(rows, columns), random_scales(-(-(start % block[0] + rows) // block[0]), -(-columns // block[1]))
    expanded = scales.repeat_interleave(block[0], dim=0)[start % block[0] :][:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    wanted = codes.view(torch.float8_e4m3fn).float() * expanded
    out = torch.full((rows, columns), 7, dtype=dtype)
    given = Scales(numbers=scales, block_rows=block[0], block_columns=block[1], skipped=start % block[0])
    decode(Codes(numbers=codes, values=tables.on_device(tables.e4m3(), CPU)), given, out, in_pieces)
    assert_same(out, wanted.to(dtype))
    assert bool(out.isnan().any())


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_scales_of_every_kind(stored: torch.dtype) -> None:
    """Every code of a byte is a scale once, and a number beside it multiplies or divides them in float32."""
    raw = torch.arange(256, dtype=torch.uint8)
    scales = raw.view(stored) if stored.itemsize == 1 else random_scales(256).to(stored)
    wide = torch.pow(2.0, raw.double() - 127).float() if stored == torch.uint8 else scales.float()
    values = tables.on_device(tables.E2M1, CPU)
    codes = Codes(numbers=torch.arange(8, dtype=torch.uint8).repeat(256, 1) * 33, values=values)
    of_codes = values[nibbles(codes.numbers)]
    number, out = torch.tensor([0.37]), torch.empty(256, 16)
    for name, effective in {"": wide, "factor": wide * number, "divisor": wide / number}.items():
        given = Scales(numbers=scales[:, None], block_columns=16, factors=number if name else None, divided=name == "divisor")
        decode(codes, given, out, in_pieces)
        assert_same(out, of_codes * effective[:, None])


def test_values_of_formats() -> None:
    assert tables.on_device(tables.E2M1, CPU).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    raw = torch.arange(256, dtype=torch.uint8)
    assert_same(tables.on_device(tables.e8m0(), CPU), raw.view(torch.float8_e8m0fnu).float())
    assert tables.e4m3()[0x7E] == 448
    assert tables.e4m3()[1] == 2**-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_devices_decode_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch operations, in several portions."""
    monkeypatch.setattr("flexgen.kernels.dequantize.portions.DECODED_AT_ONCE", 300)
    device = register()
    codes, bytes_of_scales = random_bytes(9, 48), random_bytes(9, 6, seed=4)
    fp8, blocks = random_bytes(9, 100), random_scales(4, 4)
    results = []
    for place in (CPU, device):
        four = Codes(numbers=codes.to(place), values=tables.on_device(tables.E2M1, place))
        eight = Codes(numbers=fp8.to(place), values=tables.on_device(tables.e4m3(), place))
        of_groups = bytes_of_scales.view(torch.float8_e4m3fn).to(place)
        groups = Scales(numbers=of_groups, block_columns=16, factors=torch.tensor([0.3]).to(place))
        grid = Scales(numbers=blocks.to(place), block_rows=3, block_columns=32, skipped=1)
        outs = [torch.empty(shape, dtype=dtype).to(place) for shape in ((9, 96), (9, 100))]
        decode(four, groups, outs[0], in_pieces)
        decode(eight, grid, outs[1], in_pieces)
        results.append([out.cpu() for out in outs])
    for host, other in zip(*results, strict=True):
        assert_same(other, host)


def test_vectors_are_for_four_bits_and_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.kernels.dequantize.lookup.has_vectors", lambda: True)
    for values, wanted in ((torch.randn(16), True), (tables.on_device(tables.e4m3(), CPU), True), (torch.randn(256), False)):
        assert in_vectors(Codes(numbers=random_bytes(1, 1), values=values)) is wanted


def test_threads_share_the_rows() -> None:
    codes, scales = random_bytes(500, 64), random_scales(500, 4)
    out, alone = torch.empty(500, 128, dtype=torch.bfloat16), torch.empty(500, 128, dtype=torch.bfloat16)
    four = Codes(numbers=codes, values=tables.on_device(tables.E2M1, CPU))
    given = Scales(numbers=scales, block_columns=32)
    with KernelThreads(3) as threads:
        decode(four, given, out, threads.over)
    decode(four, given, alone, in_pieces)
    assert_same(out, alone)


def test_what_does_not_fit_is_refused() -> None:
    codes = Codes(numbers=random_bytes(4, 8), values=tables.on_device(tables.E2M1, CPU))
    scales = Scales(numbers=random_scales(4, 1), block_columns=16)
    for shape in ((4, 15), (5, 16), (4, 17)):
        with pytest.raises(EngineError, match="do not make"):
            decode(codes, scales, torch.empty(shape), in_pieces)
    with pytest.raises(EngineError, match="do not make"):
        decode(codes, Scales(numbers=random_scales(4, 2), block_columns=16), torch.empty(4, 16), in_pieces)


@pytest.mark.parametrize("divided", [False, True])
def test_several_matrices_each_with_a_factor(divided: bool) -> None:
    """As if each were decoded by itself; or all with one factor."""
    codes, scales, factors = random_bytes(3, 5, 16), random_scales(3, 5, 2), torch.tensor([0.3, -2.0, 7.1])
    values = tables.on_device(tables.E2M1, CPU)
    for of_each in (factors, factors[:1], None):
        out, alone = torch.empty(3, 5, 32), torch.empty(5, 32)
        decode(
            Codes(numbers=codes, values=values), Scales(numbers=scales, block_columns=16, factors=of_each, divided=divided), out, in_pieces
        )
        for index in range(3):
            factor = None if of_each is None else of_each[min(index, len(of_each) - 1)]
            given = Scales(numbers=scales[index], block_columns=16, factors=factor, divided=divided)
            decode(Codes(numbers=codes[index], values=values), given, alone, in_pieces)
            assert_same(out[index], alone)
