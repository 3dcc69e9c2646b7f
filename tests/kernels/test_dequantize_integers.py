"""Decoding of packed integers: compiled kernels and torch operations against layouts that are written out here, code by code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen.devices.sim_tensor import register
from flexgen.errors import EngineError
from flexgen.kernels.dequantize.codes import AWQ_WORDS, CHUNK, GPTQ_ROWS
from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints, unpack_awq
from flexgen.kernels.dequantize.integers import decode_awq, decode_gptq, decode_rows, zero_points
from flexgen.kernels.threads import KernelThreads
from tests.formats.layouts import awq_words, padded_words, stream_words

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


def random_scales(*shape: int, seed: int = 1) -> Tensor:
    """Float32 numbers of both signs over the whole range: products overflow, underflow and are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-140, 120, shape, generator=generator).float())


def words_of(codes: Tensor, bits: int, *, padded: bool = False) -> Tensor:
    return (padded_words if padded else stream_words)(codes, bits)


def meant(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """Float32 numbers of codes, with scales and zeros of (rows, groups)."""
    return (codes.float() - zeros.float()[:, groups]) * scales[:, groups]


def adjacent(columns: int, group: int) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // group


def in_pieces(function: Callable[[int, int], None], count: int) -> None:
    for begin in range(0, count, 3):
        function(begin, min(begin + 3, count))


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """The same bits: also the same signs of zeros."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert torch.equal(torch.signbit(got), torch.signbit(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (CHUNK + 40, 128), (37, 16), (96, 96), (5, 64), (50, 3)])
def test_rows(columns: int, group: int, bits: int, dtype: torch.dtype) -> None:
    codes, scales = random_codes(7, columns, bits), random_scales(7, -(-columns // group))
    zeros = random_codes(7, scales.shape[1], bits, seed=2).float()
    out = torch.full((7, columns), 7, dtype=dtype)
    given = Groups(scales=scales, zeros=zeros, columns=group)
    decode_rows(words_of(codes, bits), Packing(bits=bits), given, out, in_pieces)
    assert_same(out, meant(codes, scales, zeros, adjacent(columns, group)).to(dtype))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_with_unused_bits(bits: int) -> None:
    """The older layout of odd widths, and its newer one, in which codes cross the borders of words."""
    codes, scales = random_codes(4, CHUNK + 53, bits), random_scales(4, 1)
    for padded in (True, False):
        packing = Packing(bits=bits, padded=padded)
        out = torch.empty(codes.shape)
        words = words_of(codes, bits, padded=padded)
        assert words.shape[1] == packing.words(codes.shape[1])
        decode_rows(words, packing, Groups(scales=scales, zero=2, columns=CHUNK + 53), out, in_pieces)
        assert_same(out, (codes.float() - 2) * scales)
        assert torch.equal(packing.unpacked(words, codes.shape[1]).long(), codes)


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(2, 8), st.booleans(), st.booleans(), st.integers(0, 5), st.integers(1, 4))
def test_any_shape(columns: int, group: int, bits: int, with_zeros: bool, padded: bool, skipped: int, block_rows: int) -> None:
    """Shapes that are no multiples of anything, and rows that begin in the midst of a block."""
    rows, skipped = 5, skipped % block_rows
    codes = random_codes(rows, columns, bits)
    blocks = torch.arange(skipped, skipped + rows) // block_rows
    scales = random_scales(int(blocks[-1]) + 1, -(-columns // group))
    zeros = random_codes(scales.shape[0], scales.shape[1], bits, seed=2).float() if with_zeros else None
    given = Groups(scales=scales, zeros=zeros, zero=int(not with_zeros), columns=group, block_rows=block_rows, skipped=skipped)
    out = torch.empty(rows, columns)
    decode_rows(words_of(codes, bits, padded=padded), Packing(bits=bits, padded=padded), given, out, in_pieces)
    meaning = torch.ones_like(scales) if zeros is None else zeros
    assert_same(out, meant(codes, scales[blocks], meaning[blocks], adjacent(columns, group)))


def test_signed_bytes() -> None:
    """Alone, and with zero points that are signed bytes, too."""
    codes, scales = torch.arange(-128, 128, dtype=torch.int8).view(2, 128), random_scales(1, 4)
    zeros, out = torch.tensor([[0, -3, 127, -128]], dtype=torch.int8), torch.empty(2, 128, dtype=torch.bfloat16)
    for stored, zero in ((None, 0), (zeros, zeros.float().repeat_interleave(32, dim=1))):
        given = Groups(scales=scales, zeros=stored, zero=128, columns=32, block_rows=2)
        decode_rows(codes, Packing(bits=8, signed=True), given, out, in_pieces)
        assert_same(out, ((codes.float() - zero) * scales.repeat_interleave(32, dim=1)).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(64, 64, 32), (GPTQ_ROWS + 5, CHUNK + 96, 128), (3, 96, 64), (40, 32, 32), (33, 128, 48)]
)
def test_gptq(outputs: int, inputs: int, group: int, bits: int, dtype: torch.dtype) -> None:
    codes, scales = random_codes(outputs, inputs, bits), random_scales(outputs, -(-inputs // group))
    zeros = random_codes(outputs, scales.shape[1], bits, seed=2)
    out = torch.full((outputs, inputs), 7, dtype=dtype)
    decode_gptq(words_of(codes, bits).t(), bits, Groups(scales=scales, zeros=zeros.float(), columns=group), out, in_pieces)
    assert_same(out, meant(codes, scales, zeros, adjacent(inputs, group)).to(dtype))


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_in_any_order(bits: int) -> None:
    """The inputs of a group are scattered."""
    codes, scales = random_codes(40, 128, bits), random_scales(40, 4)
    zeros = random_codes(40, 4, bits, seed=2)
    order = adjacent(128, 32)[torch.randperm(128, generator=torch.Generator().manual_seed(3))]
    out = torch.empty(40, 128)
    decode_gptq(words_of(codes, bits).t(), bits, Groups(scales=scales, zeros=zeros.float(), columns=32, order=order), out, in_pieces)
    assert_same(out, meant(codes, scales, zeros, order))
    wrong = Groups(scales=scales, zeros=zeros.float(), columns=32, order=order + 1)
    with pytest.raises(EngineError, match=r"4 groups.*names group 4"):
        decode_gptq(words_of(codes, bits).t(), bits, wrong, out, in_pieces)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(64, 64, 32), (8 * AWQ_WORDS + 8, CHUNK + 128, 128), (8, 100, 50), (136, 3, 3), (16, 13, 13)]
)
def test_awq(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> None:
    codes, scales = random_codes(outputs, inputs, 4), random_scales(outputs, inputs // group)
    zeros = random_codes(outputs, inputs // group, 4, seed=2)
    words = awq_words(codes.t())
    assert torch.equal(unpack_awq(words).long(), codes.t())
    out = torch.full((outputs, inputs), 7, dtype=dtype)
    decode_awq(words, Groups(scales=scales, zeros=zeros.float(), columns=group), out, in_pieces)
    assert_same(out, meant(codes, scales, zeros, adjacent(inputs, group)).to(dtype))


@pytest.mark.parametrize("lacks", [0, 1])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("bits", "padded"), [(2, False), (4, False), (8, False), (3, False), (3, True), (5, True), (7, True)])
def test_zero_points_along_rows(bits: int, padded: bool, strided: bool, lacks: int) -> None:
    """Words of which each has the zero points of adjacent rows of one group; the first rows of the first word are left out."""
    zeros, packing = random_codes(21, 70, bits).t(), Packing(bits=bits, padded=padded)
    words = words_of(zeros.t(), bits, padded=padded).t()
    wanted = ((zeros[3:] + lacks) % (1 << bits)).float()
    given = words if strided else words.contiguous()
    stored = ZeroPoints(words=given, packing=packing, rows=67, first=3, lacks=lacks)
    assert_same(zero_points(stored, in_pieces), wanted)
    assert_same(replace(stored, words=given.to(register())).unpacked().cpu(), wanted)


def test_zero_points_of_awq() -> None:
    zeros = random_codes(5, 48, 4)
    stored = ZeroPoints(words=awq_words(zeros).t(), packing=Packing(bits=4), rows=48, interleaved=True)
    assert_same(zero_points(stored, in_pieces), zeros.t().float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_devices_compute_the_same_bits(dtype: torch.dtype) -> None:
    device = register()
    codes, scales = random_codes(48, 2200, 4), random_scales(48, 10)
    zeros = random_codes(48, 10, 4, seed=2).float()
    order = adjacent(2200, 220)[torch.randperm(2200, generator=torch.Generator().manual_seed(3))]
    words, turned = words_of(codes, 4), awq_words(codes.t())
    three = words_of(codes % 8, 3)

    def decoded(to: Callable[[Tensor], Tensor]) -> list[Tensor]:
        outs = [to(torch.empty(48, 2200, dtype=dtype)) for _ in range(5)]
        adjacent_groups = Groups(scales=to(scales), zeros=to(zeros), columns=220)
        scattered = Groups(scales=to(scales), zeros=to(zeros), columns=220, order=to(order))
        decode_rows(to(words), Packing(bits=4), adjacent_groups, outs[0], in_pieces)
        decode_rows(to(three), Packing(bits=3), Groups(scales=to(scales), zero=4, columns=220), outs[1], in_pieces)
        decode_gptq(to(words.t().contiguous()), 4, scattered, outs[2], in_pieces)
        decode_gptq(to(three.t().contiguous()), 3, adjacent_groups, outs[3], in_pieces)
        decode_awq(to(turned), adjacent_groups, outs[4], in_pieces)
        return [out.cpu() for out in outs]

    for here, there in zip(decoded(lambda x: x), decoded(lambda x: x.to(device)), strict=True):
        assert_same(there, here)


def test_threads_compute_the_same_bits() -> None:
    codes, scales = random_codes(99, 320, 4), random_scales(99, 10)
    words, turned = words_of(codes, 4), words_of(codes, 4).t().contiguous()
    groups = Groups(scales=scales, zeros=torch.full((99, 10), 8.0), columns=32)
    wanted = meant(codes, scales, torch.full((99, 10), 8), adjacent(320, 32)).bfloat16()
    with KernelThreads(3) as threads:
        for decode in (
            lambda out: decode_rows(words, Packing(bits=4), groups, out, threads.over),
            lambda out: decode_gptq(turned, 4, groups, out, threads.over),
        ):
            out = torch.empty(99, 320, dtype=torch.bfloat16)
            decode(out)
            assert_same(out, wanted)


def test_shapes_that_do_not_go_together() -> None:
    groups = Groups(scales=torch.ones(4, 2), columns=32)
    for words, rows, columns in [((4, 7), 4, 64), ((4, 8), 5, 64), ((3, 8), 4, 64)]:
        with pytest.raises(EngineError, match="expected"):
            decode_rows(torch.zeros(words, dtype=torch.int32), Packing(bits=4), groups, torch.empty(rows, columns), in_pieces)
    with pytest.raises(EngineError, match="expected"):
        decode_gptq(torch.zeros(8, 5, dtype=torch.int32), 4, groups, torch.empty(4, 64), in_pieces)
    with pytest.raises(EngineError, match="expected"):
        decode_awq(torch.zeros(64, 2, dtype=torch.int32), groups, torch.empty(8, 64), in_pieces)
