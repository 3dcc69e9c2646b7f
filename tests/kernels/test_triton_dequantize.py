"""Triton's kernels that decode stored numbers against torch operations, to the bit; how they run is said in triton_kernels.py."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from flexgen.hub.gguf_file import BY_NAME
from flexgen.kernels.dequantize.blocks import Codes, NestedScales, Scales
from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints
from flexgen.kernels.dequantize.reference import DequantizeKernels
from tests.formats.layouts import awq_words, padded_words, stream_words
from tests.gguf_files import BLOCK_TYPES, random_blocks
from tests.kernels.test_dequantize import random_bytes
from tests.kernels.triton_dequantize import DTYPES, To, check, codes_of, numbers, of_kind
from tests.kernels.triton_dequantize import arithmetic as arithmetic  # a fixture, and another one
from tests.kernels.triton_dequantize import kernels as kernels
from tests.kernels.triton_kernels import DEVICE, ON_GPU

pytestmark = ON_GPU


class TestLookUp:
    @pytest.mark.parametrize("seed", range(30))
    def test_anything(self, kernels: DequantizeKernels, seed: int) -> None:
        chance = random.Random(seed)
        kind = ["e2m1", "e4m3", "nf4", "other"][seed % 4]
        per_byte, count = 2 if kind in ("e2m1", "nf4") else 1, chance.randint(1, 3)
        rows, columns = chance.randint(1, 70), per_byte * chance.randint(1, 150)
        block = chance.choice([1, 1, 3, 16, 128]), chance.choice([2, 16, 32, 48, 128, 1000])
        skipped = chance.randrange(block[0])
        grid = count, -(-(skipped + rows) // block[0]), -(-columns // block[1])
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn])
        stored = numbers(chance, *grid).to(dtype) if dtype.itemsize > 1 else random_bytes(*grid, seed=seed).view(dtype)
        factors = chance.choice([None, numbers(chance, count, wide=False), numbers(chance, 1, wide=False)])
        raw, high_first, divided = random_bytes(count, rows, columns // per_byte, seed=seed), chance.random() < 0.5, chance.random() < 0.5

        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            given = to(raw)
            scales = Scales(
                numbers=to(stored), block_rows=block[0], block_columns=block[1], skipped=skipped,
                factors=None if factors is None else to(factors), divided=divided,
            )  # fmt: skip
            kernels.look_up(Codes(numbers=given, values=of_kind(kind, given.device), high_first=high_first), scales, out)

        check(kernels, decode, (count, rows, columns), chance.choice(DTYPES))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn])
    @pytest.mark.parametrize("kind", ["e2m1", "e4m3"])
    def test_every_code_with_every_scale(self, kernels: DequantizeKernels, kind: str, stored: torch.dtype, dtype: torch.dtype) -> None:
        every = torch.arange(256, dtype=torch.uint8)
        raw = every[None, None].repeat(1, 256, 1)
        columns = 512 if kind == "e2m1" else 256

        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            given = to(raw)
            scales = Scales(numbers=to(every.view(1, 256, 1).view(stored)), block_columns=columns)
            kernels.look_up(Codes(numbers=given, values=of_kind(kind, given.device)), scales, out)

        found = check(kernels, decode, (1, 256, columns), dtype)
        assert bool(found.isnan().any())  # those of NaN, and of 0 times infinity

    def test_known_values_are_not_looked_up(self, kernels: DequantizeKernels) -> None:
        """Those of E2M1 and E4M3 are computed; another table that is equal to one of them is looked up."""
        from flexgen.kernels.triton.dequantize import _of_codes

        for kind, found in (("e2m1", "small float"), ("e4m3", "small float"), ("nf4", "table"), ("other", "table")):
            raw = random_bytes(1, 1, 1).to(DEVICE)
            assert _of_codes(Codes(numbers=raw, values=of_kind(kind, raw.device)))["VALUES"] == found

    def test_float64_is_the_references(self, kernels: DequantizeKernels) -> None:
        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            codes = to(random_bytes(1, 3, 5))
            scales = Scales(numbers=to(numbers(random.Random(0), 1, 3, 1)), block_columns=5)
            kernels.look_up(Codes(numbers=codes, values=of_kind("e4m3", codes.device)), scales, out)

        check(kernels, decode, (1, 3, 5), torch.float64)


class TestFlat:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("seed", range(12))
    def test_anything(self, kernels: DequantizeKernels, seed: int, nested: bool) -> None:
        """Matrices that end within a block, and within a byte; scales that begin within the scales of others."""
        chance = random.Random(seed)
        size, count = chance.choice([2, 32, 64, 64, 128, 96, 4096]), chance.randint(1, 9000)
        raw, blocks = random_bytes(-(-count // 2), seed=seed), -(-count // size)
        first, nested_size = chance.randrange(300), chance.choice([7, 256])
        of_scales = numbers(chance, -(-(first + blocks) // nested_size), wide=False)
        plain, stored, table = numbers(chance, blocks), random_bytes(blocks, seed=seed), torch.linspace(-1, 1, 256).pow(3)

        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            given = to(raw)
            scales: Tensor | NestedScales = to(plain)
            if nested:
                scales = NestedScales(
                    codes=to(stored), values=to(table), scales=to(of_scales), size=nested_size, first=first, offset=0.1 + 0.01 * seed
                )
            kernels.flat(Codes(numbers=given, values=of_kind("nf4", given.device), high_first=True), scales, size, out)

        check(kernels, decode, (count,), chance.choice(DTYPES))


class TestIntegers:
    @pytest.mark.parametrize("seed", range(40))
    def test_rows(self, kernels: DequantizeKernels, seed: int) -> None:
        """Of any width, with codes that cross the borders of words or leave bits unused; zero points of every kind; scattered groups."""
        chance = random.Random(seed)
        bits, padded, rows, columns = 2 + seed % 7, chance.random() < 0.3, chance.randint(1, 40), chance.randint(1, 300)
        packing = Packing(bits=8, signed=True) if seed % 5 == 0 else Packing(bits=bits, padded=padded)
        codes = codes_of(chance, rows, columns, bits=packing.bits)
        packed = (codes - 128).to(torch.int8) if packing.signed else (padded_words if padded else stream_words)(codes, bits)
        group, block_rows = chance.choice([3, 16, 32, 64, 128, 1000]), chance.choice([1, 1, 4, 1000])
        skipped = chance.randrange(min(block_rows, 50))
        shape = -(-(skipped + rows) // block_rows), -(-columns // group)
        scales = numbers(chance, *shape).to(chance.choice([torch.float32, torch.float16, torch.bfloat16]))
        order = torch.randint(0, shape[1], (columns,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        with_order, first = chance.random() < 0.3, chance.randrange(6)
        zero_packing = Packing(bits=bits, padded=chance.random() < 0.3)
        in_words = (padded_words if zero_packing.padded else stream_words)(codes_of(chance, shape[1], first + shape[0], bits=bits), bits)
        in_bytes = codes_of(chance, *shape, bits=4).to(torch.int8) - 8
        kind = chance.choice(["none", "packed", "bytes"])

        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            words = ZeroPoints(words=to(in_words).t(), packing=zero_packing, rows=shape[0], first=first, lacks=seed % 2)
            groups = Groups(
                scales=to(scales), zeros={"none": None, "packed": words, "bytes": to(in_bytes)}[kind], zero=5, columns=group,
                order=to(order) if with_order else None, block_rows=block_rows, skipped=skipped,
            )  # fmt: skip
            kernels.rows(to(packed), packing, groups, out)

        check(kernels, decode, (rows, columns), chance.choice(DTYPES))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("lacks", [0, 1])
    @pytest.mark.parametrize("ordered", [False, True])
    def test_gptq(self, kernels: DequantizeKernels, bits: int, lacks: int, ordered: bool) -> None:
        chance = random.Random(bits)
        outputs, inputs, group = 32 * chance.randint(1, 4), 32 * chance.randint(1, 5), chance.choice([32, 64, 128])
        words = stream_words(codes_of(chance, outputs, inputs, bits=bits), bits).t().contiguous()
        zeros = stream_words(codes_of(chance, -(-inputs // group), outputs, bits=bits), bits)
        scales = numbers(chance, -(-inputs // group), outputs).half()
        order = (torch.arange(inputs) // group)[torch.randperm(inputs, generator=torch.Generator().manual_seed(bits))].to(torch.int32)

        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            points = ZeroPoints(words=to(zeros).t(), packing=Packing(bits=bits), rows=outputs, lacks=lacks)
            groups = Groups(scales=to(scales).t(), zeros=points, columns=group, order=to(order) if ordered else None)
            kernels.gptq(to(words), bits, groups, out)

        check(kernels, decode, (outputs, inputs), DTYPES[bits % 3])

    @pytest.mark.parametrize("with_zeros", [False, True])
    @pytest.mark.parametrize(("outputs", "inputs", "group"), [(8, 64, 32), (136, 100, 128), (24, 33, 16)])
    def test_awq(self, kernels: DequantizeKernels, outputs: int, inputs: int, group: int, with_zeros: bool) -> None:
        chance = random.Random(outputs)
        words = awq_words(codes_of(chance, inputs, outputs, bits=4))
        zeros = awq_words(codes_of(chance, -(-inputs // group), outputs, bits=4))
        scales = numbers(chance, -(-inputs // group), outputs).half()

        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            points = ZeroPoints(words=to(zeros).t(), packing=Packing(bits=4), rows=outputs, interleaved=True)
            groups = Groups(scales=to(scales).t(), zeros=points if with_zeros else None, zero=8, columns=group)
            kernels.awq(to(words), groups, out)

        check(kernels, decode, (outputs, inputs), DTYPES[outputs % 3])

    def test_numbers_of_groups_that_do_not_exist_are_nan(self, kernels: DequantizeKernels) -> None:
        words = stream_words(codes_of(random.Random(0), 3, 64, bits=4), 4).to(DEVICE)
        order = torch.tensor([0, 1, 2, -1] * 16, dtype=torch.int32, device=DEVICE)
        groups = Groups(scales=torch.ones(3, 2, device=DEVICE), zero=8, columns=32, order=order)
        out = torch.zeros(3, 64, device=DEVICE)
        kernels.rows(words, Packing(bits=4), groups, out)
        assert torch.equal(out.isnan().cpu(), (order > 1).logical_or(order < 0).cpu().expand(3, -1))

    def test_what_is_not_stored_as_integers_is_the_references(self, kernels: DequantizeKernels) -> None:
        def decode(kernels: DequantizeKernels, to: To, out: Tensor) -> None:
            words = to(stream_words(codes_of(random.Random(0), 3, 64, bits=4), 4))
            kernels.rows(words, Packing(bits=4), Groups(scales=to(torch.ones(3, 2)), zeros=to(torch.full((3, 2), 2.5)), columns=32), out)

        check(kernels, decode, (3, 64), torch.float32)


@pytest.mark.parametrize("num_blocks", [1, 37])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_of_gguf(kernels: DequantizeKernels, kind: str, num_blocks: int) -> None:
    """Random ones of common sizes, and any bytes: scales are infinite, subnormal or no numbers."""
    block, block_bytes = BY_NAME[kind].block, BY_NAME[kind].block_bytes
    common = torch.frombuffer(bytearray(random_blocks(kind, (num_blocks, block))[2]), dtype=torch.uint8)
    for raw, dtypes in ((common, DTYPES), (random_bytes(num_blocks * block_bytes, seed=1), DTYPES)):
        for dtype in dtypes:
            check(kernels, lambda kernels, to, out, raw=raw: kernels.gguf_blocks(kind, to(raw), out), (num_blocks, block), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "rows", "columns"), [(0, 128, 40), (1, 64, 7), (63, 70, 130), (64, 1, 16), (127, 3, 33)])
def test_ranges(kernels: DequantizeKernels, start: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Ranges that begin within a group and within a byte, and a group of one number, whose scale is infinite."""
    chance = random.Random(rows)
    raw = random_bytes((start + rows + 1) // 2 - start // 2, columns, seed=start)
    ranges = numbers(chance, -(-(start + rows) // 64) - start // 64, 2, columns, wide=False).half()
    ranges[0, 0, 0] = math.inf
    check(kernels, lambda kernels, to, out: kernels.ranges(to(raw), to(ranges), 64, start, out), (rows, columns), dtype)
