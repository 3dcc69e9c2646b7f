"""Sparse attention against dense attention over what each head may keep, computed head by head in float64.

Values that no head keeps are NaN where the kernel reads single values, so that reading one shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen.errors import EngineError
from flexgen.kernels.attention import warm_up_sparse
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.cpu.choose import threshold
from flexgen.kernels.cpu.rows import LANES, pointer
from flexgen.kernels.gathered import GatheredKernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.sparse import attend_chosen, chosen, row_blocks
from flexgen.plan.policy import SPARSE_SCORES_BYTES
from tests.kernels import test_attention as plain
from tests.kernels import test_sealed as sealed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CLOSE = 1e-3  # products that differ by less, relative to the largest, may be ordered either way after rounding


MAKE = {
    "reference": AttentionKernels, "one thread": lambda: CpuKernels(1), "three threads": lambda: CpuKernels(3),
    "gathered": GatheredKernels, "gathered head by head": GatheredKernels,
}  # fmt: skip


@pytest.fixture(scope="module", params=MAKE)
def kernels(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    with pytest.MonkeyPatch.context() as patch, MAKE[request.param]() as implementation:
        if request.param == "gathered head by head":
            patch.setattr("flexgen.kernels.gathered_sparse.ATTENTION_BYTES", 1)
        yield implementation


def kept_by(products: np.ndarray, num_kept: int, num_before: int) -> np.ndarray:
    """The positions that one head keeps, bool: those of its own page, which begins at `num_before`, and the highest, earlier ones first."""
    order = sorted(range(len(products)), key=lambda place: (-products[place], place))
    keeps = np.zeros(len(products), bool)
    keeps[order[:num_kept]] = True
    keeps[max(num_before, 0) :] = True
    return keeps


def is_clear(products: np.ndarray, num_kept: int) -> bool:
    """Whether rounding cannot change what is kept."""
    ordered = np.sort(products)[::-1]
    return num_kept >= len(ordered) or ordered[num_kept - 1] - ordered[num_kept] > CLOSE * np.abs(products).max()


def whole_numbers(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose products are exact and often equal."""
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def check_plain(kernels: AttentionKernels, lengths: list[int], starts: list[int], kept: list[int], **how: Any) -> None:
    heads, kv_heads, key_dim, value_dim = how.get("heads", 6), how.get("kv_heads", 2), how.get("key_dim", 64), how.get("value_dim", 64)
    dtype, softcap, page = how.get("dtype", torch.float32), how.get("softcap"), how.get("page_tokens", 16)
    generator = torch.Generator().manual_seed(how.get("seed", 0))
    sequences = [
        plain.Sequence(
            key=whole_numbers(generator, length, kv_heads, key_dim, dtype=dtype),
            value=plain.random(generator, length, kv_heads, value_dim, dtype=dtype),
        )
        for length in lengths
    ]
    query = whole_numbers(generator, len(lengths), heads, key_dim, dtype=dtype)
    sinks = plain.random(generator, heads, dtype=dtype) * 2 if how.get("sinks") else None
    group, scaling, exact, num_unread = heads // kv_heads, 0.7 / math.sqrt(key_dim), [], 0
    for i, sequence in enumerate(sequences):
        start, border, rows = max(starts[i], 0), (lengths[i] - 1) // page * page, []
        wanted = np.zeros((kv_heads, lengths[i]), bool)
        for head in range(heads):
            key, value = sequence.key[start:, head // group, None], sequence.value[start:, head // group, None]
            products = key[:, 0].double().numpy() @ query[i, head].double().numpy()
            keeps = kept_by(products, kept[i], border - start)
            wanted[head // group, start:] |= keeps
            sink = None if sinks is None else sinks[head : head + 1]
            rows.append(plain.dense(query[i, head : head + 1], key[keeps], value[keeps], scaling, softcap, sink)[0])
        exact.append(np.stack(rows))
        num_unread += kv_heads * (lengths[i] - start) - int(wanted.sum())
        sequence.value[torch.tensor(~wanted.T)] = math.nan
    pool = plain.make_pool(generator, sequences, starts, page)
    out = torch.full((len(lengths), heads, value_dim), math.nan, dtype=dtype)
    unread = kernels.decode_sparse_attention(
        query, pool.key_pages, pool.value_pages, pool.page_tables, torch.tensor(starts), torch.tensor(lengths), torch.tensor(kept),
        scaling=scaling, softcap=softcap, sinks=sinks, out=out,
    )  # fmt: skip
    for found, wanted_row in zip(out, exact, strict=True):
        plain.assert_close(found, wanted_row)
    assert unread == (num_unread if isinstance(kernels, CpuKernels) else 0)


def check_sealed(kernels: AttentionKernels, lengths: list[int], starts: list[int], kept: list[int], **how: Any) -> None:
    heads, kv_heads, key_dim, value_dim = how.get("heads", 6), how.get("kv_heads", 2), how.get("key_dim", 64), how.get("value_dim", 64)
    dtype, softcap, seed = how.get("dtype", torch.float32), how.get("softcap"), how.get("seed", 0)
    stored = sealed.store(lengths, kv_heads, key_dim, value_dim, how.get("name", "int4"), dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lengths), heads, key_dim, generator=generator, dtype=torch.float64).to(dtype)
    sinks = torch.randn(heads, generator=generator).to(dtype) if how.get("sinks") else None
    scaling, out = 0.3 / math.sqrt(key_dim), torch.full((len(lengths), heads, value_dim), math.nan, dtype=dtype)
    unread = kernels.decode_sparse_sealed_attention(
        query, stored.pages, stored.tail_keys, stored.tail_values, stored.tables, stored.tails, torch.tensor(starts),
        torch.tensor(lengths), torch.tensor(kept), scaling=scaling, softcap=softcap, sinks=sinks, out=out,
    )  # fmt: skip
    num_compared, num_visible = 0, 0
    for row, (start, (key, value)) in enumerate(zip(starts, stored.seen, strict=True)):
        start, border = max(start, 0), (lengths[row] - 1) // sealed.PAGE * sealed.PAGE
        num_visible += kv_heads * (lengths[row] - start)
        for head in range(heads):
            own_key, own_value = key[start:, head // (heads // kv_heads), None], value[start:, head // (heads // kv_heads), None]
            products = own_key[:, 0].numpy() @ query[row, head].double().numpy()
            if not is_clear(products, kept[row]):
                continue
            keeps, sink = kept_by(products, kept[row], border - start), None if sinks is None else sinks[head : head + 1]
            exact = sealed.dense(query[row, head : head + 1], own_key[keeps], own_value[keeps], scaling, softcap, sink)
            sealed.assert_close(out[row, head : head + 1], exact, value)
            num_compared += 1
    assert out.isfinite().all()
    assert num_compared >= how.get("least_compared", 1)
    assert 0 <= unread < num_visible


@njit
def threshold_of(row: Any, begin: int, end: int, kept: int) -> Any:
    return threshold(pointer(row, 0), begin, end, kept)


RAGGED = [1, 2, 15, 16, 17, 33, 100, 200]
KEPT = [1, 1, 3, 3, 5, 4, 20, 30]


class TestThreshold:
    @settings(max_examples=300)
    @given(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]) | st.floats(width=32), min_size=1, max_size=60),
        st.integers(1, 70),
        st.sampled_from([np.float32, np.float64]),
        st.integers(0, 15),
        st.sampled_from([0.0, 1.0, math.inf, -math.inf, math.nan]),
    )
    def test_the_highest_are_kept_and_of_equal_ones_the_earlier(
        self, numbers: list[float], kept: int, dtype: Any, hidden_before: int, hidden_number: float
    ) -> None:
        products = np.array(numbers, dtype)
        hidden = np.full(hidden_before, hidden_number, dtype)
        row = np.concatenate([hidden, products, np.full(-(len(hidden) + len(products)) % LANES, hidden_number, dtype)])
        least, num_equal = threshold_of(row, len(hidden), len(hidden) + len(products), kept)
        equal, found = 0, []
        for place, product in enumerate(products):
            equal += product == least
            if not product <= least or (product == least and equal <= num_equal):
                found.append(place)
        ranks = [math.inf if math.isnan(each) else each for each in numbers]
        order = sorted(range(len(products)), key=lambda place: (not math.isnan(numbers[place]), -ranks[place], place))
        number = max(kept, sum(map(math.isnan, numbers)))  # what is not a number is never hidden
        assert found == sorted(order[:number])

    def test_the_reference_chooses_alike(self) -> None:
        products = torch.tensor([[[2.0, 3.0, 2.0, 3.0, 9.0, math.nan, 1.0]]])
        visible, own = torch.tensor([[True] * 4 + [False] + [True] * 2]), torch.tensor([[False] * 6 + [True]])
        for kept, wanted in ((1, [5, 6]), (2, [1, 5, 6]), (4, [0, 1, 3, 5, 6]), (9, [0, 1, 2, 3, 5, 6])):
            assert chosen(products, visible, own, torch.tensor([[kept]]))[0, 0].nonzero().flatten().tolist() == wanted


class TestPlain:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_ragged_lengths(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        check_plain(kernels, RAGGED, [0] * len(RAGGED), KEPT, dtype=dtype)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (5, 1), (12, 2), (22, 1)])
    def test_groups(self, kernels: AttentionKernels, heads: int, kv_heads: int) -> None:
        check_plain(kernels, [5, 170], [0, 0], [2, 11], heads=heads, kv_heads=kv_heads)

    @pytest.mark.parametrize("window", [1, 7, 16, 17, 64])
    def test_windows(self, kernels: AttentionKernels, window: int) -> None:
        check_plain(kernels, RAGGED, [length - window for length in RAGGED], [3] * len(RAGGED), softcap=3.0, sinks=True)

    def test_a_long_sequence(self, kernels: AttentionKernels) -> None:
        check_plain(kernels, [1300, 40], [301, 0], [100, 2], sinks=True)

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_anything(self, kernels: AttentionKernels, data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))
        kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        check_plain(
            kernels,
            lengths,
            [data.draw(st.integers(-3, length - 1)) for length in lengths],
            [data.draw(st.integers(1, length + 3)) for length in lengths],
            heads=kv_heads * group,
            kv_heads=kv_heads,
            key_dim=data.draw(st.integers(1, 140)),
            value_dim=data.draw(st.integers(1, 140)),
            page_tokens=data.draw(st.sampled_from([1, 4, 16, 32])),
            dtype=data.draw(st.sampled_from(DTYPES)),
            softcap=data.draw(st.none() | st.floats(0.5, 100)),
            sinks=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 1000)),
        )

    def test_keeping_all_is_dense_attention(self, kernels: AttentionKernels) -> None:
        generator = torch.Generator().manual_seed(3)
        sequences = plain.make_sequences(generator, [70, 9], 2, 32, 32, torch.float32)
        pool, query = plain.make_pool(generator, sequences, [0, 0], 16), plain.random(generator, 2, 4, 32, dtype=torch.float32)
        where = pool.key_pages, pool.value_pages, pool.page_tables, torch.zeros(2, dtype=torch.int64), torch.tensor([70, 9])
        dense, sparse = torch.empty(2, 4, 32), torch.empty(2, 4, 32)
        kernels.decode_attention(query, *where, scaling=0.2, out=dense)
        assert kernels.decode_sparse_attention(query, *where, torch.tensor([70, 9]), scaling=0.2, out=sparse) == 0
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)

    def test_refusals(self) -> None:
        pages, zero = torch.zeros(1, 1, 8, 16), torch.zeros(1, dtype=torch.int64)
        with CpuKernels(1) as kernels, pytest.raises(EngineError, match="kept has the shape"):
            kernels.decode_sparse_attention(
                torch.zeros(1, 2, 8), pages, pages.view(1, 1, 16, 8), zero[:, None], zero, zero + 3, torch.ones(2, dtype=torch.int64),
                scaling=1.0, out=torch.empty(1, 2, 8),
            )  # fmt: skip


class TestSealed:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("name", sealed.CODES)
    def test_ragged_lengths(self, kernels: AttentionKernels, name: str, dtype: torch.dtype) -> None:
        check_sealed(kernels, RAGGED, [0] * len(RAGGED), KEPT, name=name, dtype=dtype, least_compared=20)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (5, 1), (12, 2)])
    @pytest.mark.parametrize("name", sealed.CODES)
    def test_groups(self, kernels: AttentionKernels, name: str, heads: int, kv_heads: int) -> None:
        check_sealed(kernels, [5, 170], [0, 0], [2, 11], name=name, heads=heads, kv_heads=kv_heads, least_compared=heads)

    @pytest.mark.parametrize("window", [1, 7, 16, 17, 64])
    @pytest.mark.parametrize("name", sealed.CODES)
    def test_windows(self, kernels: AttentionKernels, name: str, window: int) -> None:
        starts = [length - window for length in RAGGED]
        check_sealed(kernels, RAGGED, starts, [3] * len(RAGGED), name=name, softcap=3.0, sinks=True, least_compared=20)

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_anything(self, kernels: AttentionKernels, data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))
        kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        check_sealed(
            kernels,
            lengths,
            [data.draw(st.integers(-3, length - 1)) for length in lengths],
            [data.draw(st.integers(1, length + 3)) for length in lengths],
            heads=kv_heads * group,
            kv_heads=kv_heads,
            key_dim=data.draw(st.integers(1, 140)),
            value_dim=data.draw(st.integers(1, 140)),
            name=data.draw(st.sampled_from(list(sealed.CODES))),
            dtype=data.draw(st.sampled_from(DTYPES)),
            softcap=data.draw(st.none() | st.floats(0.5, 100)),
            sinks=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 1000)),
            least_compared=0,
        )

    def test_most_values_are_not_read(self) -> None:
        """One head keeps 10 of 320: at most ten values and the tail, or whole pages where it keeps half of one."""
        stored, kept = sealed.store([330], 1, 64, 64, "int4", torch.float32), torch.tensor([10])
        with CpuKernels(1) as kernels:
            unread = kernels.decode_sparse_sealed_attention(
                torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)), stored.pages, stored.tail_keys, stored.tail_values,
                stored.tables, stored.tails, torch.tensor([0]), torch.tensor([330]), kept, scaling=0.1, out=torch.empty(1, 1, 64),
            )  # fmt: skip
        assert 330 - 10 - 10 - 16 <= unread <= 330 - 10


@pytest.mark.parametrize("shape", [(1, 1, 1), (1000, 32, 4096), (7, 32, 1 << 20), (0, 4, 10)], ids=str)
def test_scores_that_are_held_are_bounded(shape: tuple[int, int, int]) -> None:
    """By a number of bytes, or by those of one query."""
    num_queries, heads, positions = shape
    blocks = list(row_blocks(num_queries, heads, positions))
    assert [row for some in blocks for row in range(some.start, some.stop)] == list(range(num_queries))
    most = max(SPARSE_SCORES_BYTES, 4 * heads * positions)
    assert all(4 * (some.stop - some.start) * heads * positions <= most for some in blocks)


class Largest(TorchDispatchMode):
    """Finds out how many bytes the largest tensor has that is made of numbers in float32."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("heads_at_a_time", [1, 3, 8])
def test_key_heads_are_held_in_float32_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, heads_at_a_time: int) -> None:
    positions, key_heads, group, dim = 2048, 8, 2, 64
    generator = torch.Generator().manual_seed(0)
    shapes = (3, key_heads * group, dim), (positions, key_heads, dim), (positions, key_heads, dim)
    tensors = [plain.random(generator, *shape, dtype=torch.float64) for shape in shapes]
    visible, own = torch.ones(3, positions, dtype=torch.bool), torch.zeros(3, positions, dtype=torch.bool)

    def attended(*tensors: Tensor) -> Tensor:
        sinks = torch.linspace(-1, 1, key_heads * group)
        return attend_chosen(*tensors, visible, own, torch.tensor([70, 80, 90]), scaling=0.1, sinks=sinks)

    whole, in_half = attended(*tensors), [tensor.to(torch.bfloat16) for tensor in tensors]
    monkeypatch.setattr("flexgen.kernels.sparse.SPARSE_KV_BYTES", heads_at_a_time * positions * 2 * dim * 4)
    torch.testing.assert_close(attended(*tensors), whole, rtol=0, atol=1e-12)
    with Largest() as largest:
        attended(*in_half)
    assert largest.num_bytes == 4 * positions * dim * heads_at_a_time


def test_kernels_are_warmed_up() -> None:
    with CpuKernels(1) as kernels:
        for is_sealed in (False, True):
            warm_up_sparse(kernels, torch.bfloat16, sealed=is_sealed)
