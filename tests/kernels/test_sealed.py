"""Codes of few bits: the bits that both implementations find, what rounding may cost, and attention to sealed pages."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.codes import GROUP, HeadCodes, SealedPages, decode, encode, hadamard_blocks, rotated, seal, unseal
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.reference import AttentionKernels

PAGE = 16
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0, torch.float64: 0.0}
CODES = {"int8": (8, 8, False), "k8v4": (8, 4, False), "int4": (4, 4, True), "plain int4": (4, 4, False)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module", params=["reference", "one thread", "three threads"])
def kernels(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    make = {"reference": AttentionKernels, "one thread": lambda: CpuKernels(1), "three threads": lambda: CpuKernels(3)}
    with make[request.param]() as implementation:
        yield implementation


def make_pages(num_pages: int, heads: int, key_dim: int, value_dim: int, name: str) -> SealedPages:
    """Pages of NaN in every parameter, and of all codes."""
    key_bits, value_bits, turns = CODES[name]
    key_codes = HeadCodes(dim=key_dim, bits=key_bits, rotated=turns)
    value_codes = HeadCodes(dim=value_dim, bits=value_bits)
    memory = (torch.full((num_pages, heads, PAGE * codes.token_bytes), 0xFF, dtype=torch.uint8) for codes in (key_codes, value_codes))
    return SealedPages(keys=next(memory), values=next(memory), key_codes=key_codes, value_codes=value_codes, page_tokens=PAGE)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which some heads have one that is much larger, as keys with a bias do."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    numbers[..., 0] += 20 * (torch.rand(shape[:-1], generator=generator) < 0.3)
    return numbers.to(dtype)


class TestCodes:
    @pytest.mark.parametrize(
        ("dim", "blocks"),
        [(64, [(0, 64)]), (80, [(0, 64), (64, 16)]), (96, [(0, 64), (64, 32)]), (1, [(0, 1)]), (7, [(0, 4), (4, 2), (6, 1)])],
    )
    def test_blocks_are_powers_of_two(self, dim: int, blocks: list[tuple[int, int]]) -> None:
        assert hadamard_blocks(dim) == blocks

    @pytest.mark.parametrize("dim", [1, 2, 7, 20, 64, 80, 128])
    def test_rotations_keep_scores_and_are_their_own_inverse(self, dim: int) -> None:
        key, query = noise(0, 30, dim, dtype=torch.float64), noise(1, 30, dim, dtype=torch.float64)
        torch.testing.assert_close(rotated(key) @ rotated(query).T, key @ query.T)
        torch.testing.assert_close(rotated(rotated(key)), key)

    @settings(max_examples=40)
    @given(st.integers(1, 140), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 100), st.sampled_from([1e-4, 1.0, 300.0]))
    def test_numbers_come_back_within_half_a_step(self, dim: int, bits: int, turns: bool, seed: int, size: float) -> None:
        codes = HeadCodes(dim=dim, bits=bits, rotated=turns)
        numbers = noise(seed, 3, 2, dim) * size
        packed, parameters = encode(numbers, codes)
        assert packed.shape[-1] == codes.code_bytes
        assert packed.shape[-1] + 2 * parameters.shape[-1] == codes.token_bytes
        back = decode(packed, parameters, codes, torch.float64)
        known, found = (rotated(each.double()) if turns else each.double() for each in (numbers, back))
        for first in range(0, dim, GROUP):
            group, got = known[..., first : first + GROUP], found[..., first : first + GROUP]
            reach = group.abs().amax(-1, keepdim=True)
            if bits == 4:
                reach_of_codes = group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)
                step = reach_of_codes / 15
            else:
                step = reach / 127
            # Scales and least numbers are float16: off by 2**-11 of themselves, and by 2**-25 where that is too small a number.
            levels = 15 if bits == 4 else 127
            bound = step / 2 + (step * levels + reach) * 2.0**-10 + levels * 2.0**-24 + reach * 1e-5
            assert ((group - got).abs() <= bound).all()

    def test_a_group_that_is_not_finite_stays_so(self, kernels: AttentionKernels) -> None:
        for name in CODES:
            pages, numbers = make_pages(1, 1, 64, 64, name), noise(0, PAGE, 1, 64)
            numbers[3, 0, 40] = math.nan
            numbers[5, 0, 40] = math.inf
            kernels.seal(numbers, numbers, pages, torch.tensor([0]))
            for found in kernels.unseal(pages, torch.tensor([0]), 0, PAGE, torch.float32):
                assert not found[3, 0, 40].isfinite()
                assert not found[5, 0, 40].isfinite()
                assert found[torch.arange(PAGE)[(torch.arange(PAGE) != 3) & (torch.arange(PAGE) != 5)]].isfinite().all()

    def test_zeros_and_huge_numbers(self, kernels: AttentionKernels) -> None:
        numbers = torch.zeros(PAGE, 1, 40)
        numbers[1] = 5.0
        numbers[2, :, ::2] = 1e6
        for name in CODES:
            pages = make_pages(1, 1, 40, 40, name)
            kernels.seal(numbers, numbers, pages, torch.tensor([0]))
            for found in kernels.unseal(pages, torch.tensor([0]), 0, PAGE, torch.float32):
                torch.testing.assert_close(found[:2], numbers[:2], rtol=2e-2, atol=1e-6)
                assert found.isfinite().all()


class TestPages:
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_every_implementation_finds_the_same_bits(self, data: st.DataObject) -> None:
        name, dtype = data.draw(st.sampled_from(list(CODES))), data.draw(st.sampled_from(DTYPES))
        heads, key_dim, value_dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 140))
        ids = torch.tensor(data.draw(st.permutations([4, 1, 3, 0])))[: data.draw(st.integers(1, 4))]
        seed, factor = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1.0, 1e-6, 1e4]))
        key = noise(seed, len(ids) * PAGE, heads, key_dim, dtype=dtype) * factor
        value = noise(seed + 1, len(ids) * PAGE, heads, value_dim, dtype=dtype) * factor
        one, other = make_pages(6, heads, key_dim, value_dim, name), make_pages(6, heads, key_dim, value_dim, name)
        seal(key, value, one, ids)
        start, stop = sorted((data.draw(st.integers(0, len(ids) * PAGE - 1)), data.draw(st.integers(1, len(ids) * PAGE))))
        with CpuKernels(2) as compiled:
            compiled.seal(key, value, other, ids)
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
            assert (one.keys[[2, 5]] == 0xFF).all(), "written elsewhere"
            found = compiled.unseal(one, ids, start, stop, dtype)
        for got, wanted in zip(found, unseal(one, ids, start, stop, dtype), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1.01 * HALF_ULP[dtype] or 1e-6, atol=1e-6 * factor)

    @pytest.mark.parametrize("page", [-1, 2])
    def test_a_page_outside_of_the_pool(self, page: int) -> None:
        pages, numbers = make_pages(2, 1, 8, 8, "int4"), noise(0, PAGE, 1, 8)
        with CpuKernels(1) as kernels:
            with pytest.raises(EngineError, match="not in the pool"):
                kernels.seal(numbers, numbers, pages, torch.tensor([page]))
            with pytest.raises(EngineError, match="page of the pool"):
                kernels.unseal(pages, torch.tensor([page]), 0, 3, torch.float32)

    def test_refusals(self) -> None:
        pages, numbers = make_pages(2, 1, 8, 8, "int4"), noise(0, PAGE + 1, 1, 8)
        with CpuKernels(1) as kernels:
            with pytest.raises(EngineError, match="numbers has the shape"):
                kernels.seal(numbers, numbers, pages, torch.tensor([0]))
            with pytest.raises(EngineError, match="positions from"):
                kernels.unseal(pages, torch.tensor([0]), 0, PAGE + 1, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Sequences of which complete pages are sealed, scattered over a pool; NaN in every page that is not theirs, and behind their ends."""

    pages: SealedPages
    tail_keys: Tensor
    tail_values: Tensor
    tables: Tensor
    tails: Tensor
    seen: list[tuple[Tensor, Tensor]]  # the numbers that a last query sees, in float64


def store(lengths: list[int], heads: int, key_dim: int, value_dim: int, name: str, dtype: torch.dtype, seed: int = 0) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    whole = [(length - 1) // PAGE for length in lengths]
    pages = make_pages(sum(whole) + 2, heads, key_dim, value_dim, name)
    free, tails = torch.randperm(sum(whole) + 2, generator=generator).tolist(), torch.randperm(len(lengths) + 1, generator=generator)
    tables = torch.full((len(lengths), max(whole) + 1), -1)
    tail_keys = torch.full((len(lengths) + 1, heads, key_dim, PAGE), math.nan, dtype=dtype)
    tail_values = torch.full((len(lengths) + 1, heads, PAGE, value_dim), math.nan, dtype=dtype)
    seen = []
    for row, (length, count) in enumerate(zip(lengths, whole, strict=True)):
        key, value = noise(seed + row, length, heads, key_dim, dtype=dtype), noise(seed - row, length, heads, value_dim, dtype=dtype)
        border, ids = count * PAGE, torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
        tables[row, :count] = ids
        if count:
            seal(key[:border], value[:border], pages, ids)
            as_stored = unseal(pages, ids, 0, border, torch.float64)
        else:
            as_stored = key[:0].double(), value[:0].double()
        tail_keys[tails[row], :, :, : length - border] = key[border:].permute(1, 2, 0)
        tail_values[tails[row], :, : length - border] = value[border:].transpose(0, 1)
        seen.append((torch.cat([as_stored[0], key[border:].double()]), torch.cat([as_stored[1], value[border:].double()])))
    return Stored(pages=pages, tail_keys=tail_keys, tail_values=tail_values, tables=tables, tails=tails[: len(lengths)], seen=seen)


def dense(query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> np.ndarray:
    """One query (H, Dk) over visible keys (n, K, Dk) and values, head by head in float64: (H, Dv)."""
    group, rows = query.shape[0] // key.shape[1], []
    for head in range(query.shape[0]):
        scores = key[:, head // group].double().numpy() @ query[head].double().numpy() * scaling
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        sink = 0.0 if sinks is None else np.exp(sinks[head].double().item() - scores.max())
        rows.append(weights / (weights.sum() + sink) @ value[:, head // group].double().numpy())
    return np.stack(rows)


def assert_close(out: Tensor, exact: np.ndarray, seen: Tensor) -> None:
    """Sums in float32 over numbers as large as those that were seen, and the rounding of the result."""
    tolerance = 2e-5 * (1 + float(seen.abs().max())) + 1.01 * HALF_ULP[out.dtype] * np.abs(exact)
    np.testing.assert_array_less(np.abs(out.double().numpy() - exact), tolerance)


def check_decode(kernels: AttentionKernels, lengths: list[int], starts: list[int], **how: Any) -> None:
    heads, kv_heads, key_dim, value_dim = how.get("heads", 6), how.get("kv_heads", 2), how.get("key_dim", 64), how.get("value_dim", 64)
    dtype, softcap, seed = how.get("dtype", torch.float32), how.get("softcap"), how.get("seed", 0)
    stored = store(lengths, kv_heads, key_dim, value_dim, how.get("name", "int4"), dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lengths), heads, key_dim, generator=generator, dtype=torch.float64).to(dtype)
    sinks = torch.randn(heads, generator=generator).to(dtype) if how.get("sinks") else None
    scaling, out = 0.3 / math.sqrt(key_dim), torch.full((len(lengths), heads, value_dim), math.nan, dtype=dtype)
    kernels.decode_sealed_attention(
        query, stored.pages, stored.tail_keys, stored.tail_values, stored.tables, stored.tails, torch.tensor(starts),
        torch.tensor(lengths), scaling=scaling, softcap=softcap, sinks=sinks, out=out,
    )  # fmt: skip
    for row, (start, (key, value)) in enumerate(zip(starts, stored.seen, strict=True)):
        seen = slice(max(start, 0), None)
        assert_close(out[row], dense(query[row], key[seen], value[seen], scaling, softcap, sinks), value)


def check_anything(kernels: AttentionKernels, seed: int, dtypes: list[torch.dtype]) -> None:
    """Check random shapes, lengths and formats."""
    chance = random.Random(seed)
    lengths, kv_heads = [chance.randint(1, 100) for _ in range(chance.randint(1, 3))], chance.randint(1, 2)
    check_decode(
        kernels,
        lengths,
        [chance.choice([-2, 0, chance.randint(0, length - 1)]) for length in lengths],
        heads=kv_heads * chance.choice([1, 3, 5]),
        kv_heads=kv_heads,
        key_dim=chance.choice([1, 7, 32, 40, 63, 64]),
        value_dim=chance.choice([2, 17, 32, 49, 64]),
        name=chance.choice(list(CODES)),
        dtype=chance.choice(dtypes),
        softcap=chance.choice([None, 5.0]),
        sinks=chance.random() < 0.5,
        seed=seed,
    )


RAGGED = [1, 2, 15, 16, 17, 32, 33, 100, 200]


class TestDecode:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("name", CODES)
    def test_ragged_lengths(self, kernels: AttentionKernels, name: str, dtype: torch.dtype) -> None:
        check_decode(kernels, RAGGED, [0] * len(RAGGED), name=name, dtype=dtype)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1), (12, 2), (14, 2), (8, 1), (22, 1)])
    @pytest.mark.parametrize("name", CODES)
    def test_groups(self, kernels: AttentionKernels, name: str, heads: int, kv_heads: int) -> None:
        check_decode(kernels, [5, 70], [0, 0], name=name, heads=heads, kv_heads=kv_heads)

    @pytest.mark.parametrize("window", [1, 7, 16, 17, 64])
    def test_windows(self, kernels: AttentionKernels, window: int) -> None:
        check_decode(kernels, RAGGED, [length - window for length in RAGGED], softcap=3.0, sinks=True)

    def test_more_than_one_block(self, kernels: AttentionKernels) -> None:
        check_decode(kernels, [513, 529, 1300], [0, 100, 301], sinks=True)

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_anything(self, kernels: AttentionKernels, data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))
        kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        check_decode(
            kernels,
            lengths,
            [data.draw(st.integers(0, length - 1)) for length in lengths],
            heads=kv_heads * group,
            kv_heads=kv_heads,
            key_dim=data.draw(st.integers(1, 140)),
            value_dim=data.draw(st.integers(1, 140)),
            name=data.draw(st.sampled_from(list(CODES))),
            dtype=data.draw(st.sampled_from(DTYPES)),
            softcap=data.draw(st.none() | st.floats(0.5, 100)),
            sinks=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 1000)),
        )

    def test_a_page_or_tail_outside_of_the_pool(self) -> None:
        stored, query = store([40], 1, 32, 32, "int4", torch.float32), torch.zeros(1, 2, 32)
        for changed in ({"tables": torch.full_like(stored.tables, 9)}, {"tails": torch.tensor([2])}):
            given = {"tables": stored.tables, "tails": stored.tails} | changed
            with CpuKernels(1) as kernels, pytest.raises(EngineError, match="page of the pool"):
                kernels.decode_sealed_attention(
                    query, stored.pages, stored.tail_keys, stored.tail_values, given["tables"], given["tails"], torch.tensor([0]),
                    torch.tensor([40]), scaling=1.0, out=torch.empty(1, 2, 32),
                )  # fmt: skip


class TestPrefill:
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_earlier_pages_as_stored_and_the_own_one_exactly(self, kernels: AttentionKernels, data: st.DataObject) -> None:
        total, dtype = data.draw(st.integers(1, 700)), data.draw(st.sampled_from(DTYPES))
        first_query = data.draw(st.integers(max(0, total - 60), total - 1))
        kv_heads, group, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
        window, softcap = data.draw(st.none() | st.integers(1, 40)), data.draw(st.none() | st.floats(0.5, 100))
        exact_start, last_border = first_query // PAGE * PAGE, (total - 1) // PAGE * PAGE
        exact_key, exact_value = noise(1, total, kv_heads, dim, dtype=dtype), noise(2, total, kv_heads, dim, dtype=dtype)
        stored_key, stored_value = noise(3, last_border, kv_heads, dim, dtype=dtype), noise(4, last_border, kv_heads, dim, dtype=dtype)
        query = noise(5, total - first_query, kv_heads * group, dim, dtype=dtype)
        sinks = noise(6, kv_heads * group, dtype=dtype) if data.draw(st.booleans()) else None
        positions = torch.arange(first_query, total)
        starts = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(min=0)
        scaling, out = 0.1, torch.full((len(positions), kv_heads * group, dim), math.nan, dtype=dtype)
        kernels.prefill_sealed_attention(
            query, stored_key, stored_value, exact_key[exact_start:], exact_value[exact_start:], starts, positions // PAGE * PAGE,
            exact_start, scaling=scaling, softcap=softcap, sinks=sinks, out=out,
        )  # fmt: skip
        for row, position in enumerate(positions.tolist()):
            border, start = position // PAGE * PAGE, int(starts[row])
            key = torch.cat([stored_key[start:border], exact_key[max(start, border) : position + 1]])
            value = torch.cat([stored_value[start:border], exact_value[max(start, border) : position + 1]])
            assert_close(out[row], dense(query[row], key, value, scaling, softcap, sinks), value)
