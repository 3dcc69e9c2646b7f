"""Every implementation of the attention kernels against dense float64 softmax, written here in NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.reference import AttentionKernels

HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0, torch.float64: 0.0}
ACCURACY = {torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module", params=["reference", "one thread", "three threads"])
def kernels(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    make = {
        "reference": AttentionKernels,
        "one thread": lambda: CpuKernels(1),
        "three threads": lambda: CpuKernels(3),
    }
    with make[request.param]() as implementation:
        yield implementation


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Keys (N, K, Dk) and values (N, K, Dv) of all positions."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Sequences scattered over pages in random order; NaN wherever no position in [start, length) is stored."""

    key_pages: Tensor
    value_pages: Tensor
    page_tables: Tensor


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_sequences(
    generator: torch.Generator, lengths: list[int], kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> list[Sequence]:
    return [
        Sequence(key=random(generator, n, kv_heads, key_dim, dtype=dtype), value=random(generator, n, kv_heads, value_dim, dtype=dtype))
        for n in lengths
    ]


def make_pool(generator: torch.Generator, sequences: list[Sequence], starts: list[int], page_tokens: int) -> Pool:
    """Position by position, as slow as can be."""
    _, kv_heads, key_dim = sequences[0].key.shape
    value_dim, dtype = sequences[0].value.shape[2], sequences[0].key.dtype
    pages_of = [math.ceil(len(sequence.key) / page_tokens) for sequence in sequences]
    key_pages = torch.full((sum(pages_of) + 2, kv_heads, key_dim, page_tokens), math.nan, dtype=dtype)
    value_pages = torch.full((sum(pages_of) + 2, kv_heads, page_tokens, value_dim), math.nan, dtype=dtype)
    page_tables = torch.full((len(sequences), max(pages_of) + 1), -1, dtype=torch.int32)
    free = torch.randperm(sum(pages_of) + 2, generator=generator).tolist()
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        for position in range(max(start, 0), len(sequence.key)):
            index, offset = divmod(position, page_tokens)
            if page_tables[i, index] < 0:
                page_tables[i, index] = free.pop()
            key_pages[page_tables[i, index], :, :, offset] = sequence.key[position]
            value_pages[page_tables[i, index], :, offset] = sequence.value[position]
    return Pool(key_pages=key_pages, value_pages=value_pages, page_tables=page_tables)


def dense(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> np.ndarray:
    """One query (H, Dk) over visible keys (n, K, Dk) and values (n, K, Dv), head by head in float64: (H, Dv)."""
    group = query.shape[0] // key.shape[1]
    rows = []
    for head in range(query.shape[0]):
        scores = key[:, head // group].double().numpy() @ query[head].double().numpy() * scaling
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        sink = 0.0 if sinks is None else np.exp(sinks[head].double().item() - scores.max())
        rows.append(weights / (weights.sum() + sink) @ value[:, head // group].double().numpy())
    return np.stack(rows)


def assert_close(out: Tensor, exact: np.ndarray) -> None:
    """Nothing but the accumulator's error and the rounding of the result."""
    tolerance = ACCURACY[out.dtype] * np.abs(exact).max() + 1.01 * HALF_ULP[out.dtype] * np.abs(exact)
    if out.dtype == torch.float16:
        tolerance += 2.0**-25  # subnormal results
    np.testing.assert_array_less(np.abs(out.double().numpy() - exact), tolerance + 1e-300)


def check_decode(
    kernels: AttentionKernels,
    lengths: list[int],
    starts: list[int],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    key_dim: int = 64,
    value_dim: int = 64,
    page_tokens: int = 32,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    sinks: bool = False,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = make_sequences(generator, lengths, kv_heads, key_dim, value_dim, dtype)
    pool = make_pool(generator, sequences, starts, page_tokens)
    query = random(generator, len(lengths), heads, key_dim, dtype=dtype)
    sink_logits = random(generator, heads, dtype=dtype) * 2 if sinks else None
    scaling = 1.5 / math.sqrt(key_dim)
    out = torch.full((len(lengths), heads, value_dim), math.nan, dtype=dtype)
    kernels.decode_attention(
        query,
        pool.key_pages,
        pool.value_pages,
        pool.page_tables,
        torch.tensor(starts),
        torch.tensor(lengths),
        scaling=scaling,
        softcap=softcap,
        sinks=sink_logits,
        out=out,
    )
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        seen = slice(max(start, 0), None)
        assert_close(out[i], dense(query[i], sequence.key[seen], sequence.value[seen], scaling, softcap, sink_logits))


def check_prefill(
    kernels: AttentionKernels,
    num_queries: int,
    num_positions: int,
    starts: list[int],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    key_dim: int = 64,
    value_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    sinks: bool = False,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (sequence,) = make_sequences(generator, [num_positions], kv_heads, key_dim, value_dim, dtype)
    query = random(generator, num_queries, heads, key_dim, dtype=dtype)
    sink_logits = random(generator, heads, dtype=dtype) * 2 if sinks else None
    scaling = 1.5 / math.sqrt(key_dim)
    out = torch.full((num_queries, heads, value_dim), math.nan, dtype=dtype)
    kernels.prefill_attention(
        query, sequence.key, sequence.value, torch.tensor(starts), scaling=scaling, softcap=softcap, sinks=sink_logits, out=out
    )
    for i, start in enumerate(starts):
        seen = slice(max(start, 0), num_positions - num_queries + i + 1)
        assert_close(out[i], dense(query[i], sequence.key[seen], sequence.value[seen], scaling, softcap, sink_logits))


def check_latent(
    kernels: AttentionKernels, lengths: list[int], starts: list[int], *, heads: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = make_sequences(generator, lengths, 1, rank, rope, dtype)
    pool, count = make_pool(generator, sequences, starts, 32), len(lengths)
    query_latent, query_rope = random(generator, count, heads, rank, dtype=dtype), random(generator, count, heads, rope, dtype=dtype)
    scaling, out = 1 / math.sqrt(rank + rope), torch.full((count, heads, rank), math.nan, dtype=dtype)
    pages = pool.key_pages, pool.value_pages, pool.page_tables
    kernels.decode_latent_attention(query_latent, query_rope, *pages, torch.tensor(starts), torch.tensor(lengths), scaling=scaling, out=out)
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        query = torch.cat([query_latent[i], query_rope[i]], dim=-1)
        key = torch.cat([sequence.key, sequence.value], dim=-1)[start:]
        assert_close(out[i], dense(query, key, sequence.key[start:], scaling))


ALL_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:]
)
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1), (8, 2), (12, 2), (14, 2), (8, 1), (22, 1)])
DIMS = pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (128, 128), (192, 128), (16, 16), (20, 12), (100, 100)])


def anything(seed: int, dtypes: list[torch.dtype]) -> tuple[Random, dict[str, Any]]:
    """Return random shapes, and how scores are made."""
    chance = Random(seed)
    kv_heads = chance.randint(1, 3)
    return chance, {
        "heads": kv_heads * chance.choice([1, 2, 3, 7]),
        "kv_heads": kv_heads,
        "key_dim": chance.choice([5, 16, 40, 64]),
        "value_dim": chance.choice([7, 16, 33, 64]),
        "dtype": chance.choice(dtypes),
        "softcap": chance.choice([None, None, 0.7, 20.0]),
        "sinks": chance.random() < 0.5,
        "seed": seed,
    }


RAGGED = [1, 2, 31, 32, 33, 64, 65, 100, 200]


class TestDecode:
    def test_starts_before_the_first_position(self, kernels: AttentionKernels) -> None:
        check_decode(kernels, [3, 90], [-5, -1])

    @ALL_DTYPES
    def test_ragged_lengths(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        check_decode(kernels, RAGGED, [0] * len(RAGGED), dtype=dtype)

    @HEADS
    def test_groups(self, kernels: AttentionKernels, heads: int, kv_heads: int) -> None:
        check_decode(kernels, [5, 70], [0, 0], heads=heads, kv_heads=kv_heads)

    @DIMS
    def test_dims(self, kernels: AttentionKernels, key_dim: int, value_dim: int) -> None:
        check_decode(kernels, [5, 70], [0, 3], key_dim=key_dim, value_dim=value_dim)

    @pytest.mark.parametrize("page_tokens", [16, 32, 64, 128])
    def test_page_sizes(self, kernels: AttentionKernels, page_tokens: int) -> None:
        check_decode(kernels, RAGGED, [max(0, n - 50) for n in RAGGED], page_tokens=page_tokens, dtype=torch.bfloat16)

    @pytest.mark.parametrize("window", [1, 7, 32, 33, 64])
    def test_pages_before_a_window_are_never_read(self, kernels: AttentionKernels, window: int) -> None:
        check_decode(kernels, RAGGED, [max(0, n - window) for n in RAGGED])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("softcap", [0.5, 50.0])
    def test_softcap(self, kernels: AttentionKernels, softcap: float, dtype: torch.dtype) -> None:
        check_decode(kernels, [3, 90], [0, 40], softcap=softcap, dtype=dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_sinks(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        check_decode(kernels, [1, 3, 90], [0, 0, 40], sinks=True, dtype=dtype)
        check_decode(kernels, [1, 3, 90], [0, 0, 40], sinks=True, softcap=2.0, dtype=dtype)

    def test_more_than_one_block(self, kernels: AttentionKernels) -> None:
        check_decode(kernels, [512, 513, 1500], [0, 100, 301], page_tokens=128, sinks=True)

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_anything(self, kernels: AttentionKernels, data: st.DataObject) -> None:
        lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))
        starts = [data.draw(st.integers(0, length - 1)) for length in lengths]
        kv_heads, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
        check_decode(
            kernels,
            lengths,
            starts,
            heads=kv_heads * group,
            kv_heads=kv_heads,
            key_dim=data.draw(st.integers(1, 40)),
            value_dim=data.draw(st.integers(1, 70)),
            page_tokens=data.draw(st.sampled_from([16, 32, 64])),
            dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32])),
            softcap=data.draw(st.none() | st.floats(0.1, 100)),
            sinks=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 1000)),
        )

    def test_results_do_not_depend_on_the_neighbours(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = make_sequences(generator, [700, 33, 90], 2, 40, 40, torch.float32)
        pool = make_pool(generator, sequences, [0, 0, 0], 32)
        query, together = random(generator, 3, 6, 40, dtype=torch.float32), torch.empty(3, 6, 40)
        starts, lengths = torch.tensor([0, 0, 17]), torch.tensor([700, 33, 90])
        pages = pool.key_pages, pool.value_pages
        with CpuKernels(3) as kernels:
            kernels.decode_attention(query, *pages, pool.page_tables, starts, lengths, scaling=0.2, out=together)
        for i in range(3):
            alone, own = torch.empty(1, 6, 40), slice(i, i + 1)
            with CpuKernels(1) as kernels:
                kernels.decode_attention(query[own], *pages, pool.page_tables[own], starts[own], lengths[own], scaling=0.2, out=alone)
            assert torch.equal(alone, together[own])

    def test_large_scores_do_not_overflow(self, kernels: AttentionKernels) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = make_sequences(generator, [700], 1, 32, 32, torch.float32)
        pool = make_pool(generator, sequences, [0], 32)
        query, out = random(generator, 1, 2, 32, dtype=torch.float32), torch.empty(1, 2, 32)
        pages = pool.key_pages, pool.value_pages, pool.page_tables
        kernels.decode_attention(query, *pages, torch.tensor([0]), torch.tensor([700]), scaling=64.0, out=out)
        # The exponentials of scores around 1000, of which float32 keeps about 1e-4.
        np.testing.assert_allclose(out[0].numpy(), dense(query[0], sequences[0].key, sequences[0].value, 64.0), atol=1e-3)

    def test_nan_in_a_visible_key_is_not_hidden(self, kernels: AttentionKernels) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = make_sequences(generator, [40], 1, 32, 32, torch.float32)
        sequences[0].key[17, 0, 5] = math.nan
        pool = make_pool(generator, sequences, [0], 32)
        query, out = random(generator, 1, 2, 32, dtype=torch.float32), torch.zeros(1, 2, 32)
        pages = pool.key_pages, pool.value_pages, pool.page_tables
        kernels.decode_attention(query, *pages, torch.tensor([0]), torch.tensor([40]), scaling=1.0, out=out)
        assert out.isnan().all()


def full(num_queries: int) -> list[int]:
    return [0] * num_queries


def windowed(num_queries: int, num_positions: int, window: int) -> list[int]:
    return [position - window + 1 for position in range(num_positions - num_queries, num_positions)]


def chunked(num_queries: int, num_positions: int, chunk: int) -> list[int]:
    return [position // chunk * chunk for position in range(num_positions - num_queries, num_positions)]


class TestPrefill:
    @ALL_DTYPES
    def test_causal(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        check_prefill(kernels, 90, 90, full(90), dtype=dtype)

    @HEADS
    def test_groups(self, kernels: AttentionKernels, heads: int, kv_heads: int) -> None:
        check_prefill(kernels, 45, 45, full(45), heads=heads, kv_heads=kv_heads)

    @DIMS
    def test_dims(self, kernels: AttentionKernels, key_dim: int, value_dim: int) -> None:
        check_prefill(kernels, 33, 40, full(33), key_dim=key_dim, value_dim=value_dim)

    @pytest.mark.parametrize(("num_queries", "num_positions"), [(1, 1), (1, 300), (2, 33), (100, 101), (20, 600), (260, 260)])
    def test_past(self, kernels: AttentionKernels, num_queries: int, num_positions: int) -> None:
        check_prefill(kernels, num_queries, num_positions, full(num_queries), heads=3, kv_heads=1, dtype=torch.bfloat16)

    @pytest.mark.parametrize("window", [1, 5, 32, 100, 257])
    def test_window(self, kernels: AttentionKernels, window: int) -> None:
        check_prefill(kernels, 60, 400, windowed(60, 400, window), heads=3, kv_heads=1)

    @pytest.mark.parametrize("chunk", [8, 50, 256])
    def test_chunks(self, kernels: AttentionKernels, chunk: int) -> None:
        check_prefill(kernels, 60, 400, chunked(60, 400, chunk), heads=3, kv_heads=1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_softcap_and_sinks(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        check_prefill(kernels, 40, 50, full(40), softcap=3.0, dtype=dtype)
        check_prefill(kernels, 40, 50, full(40), sinks=True, dtype=dtype)
        check_prefill(kernels, 40, 50, windowed(40, 50, 9), softcap=30.0, sinks=True, dtype=dtype)

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_anything(self, kernels: AttentionKernels, data: st.DataObject) -> None:
        num_positions = data.draw(st.integers(1, 120))
        num_queries = data.draw(st.integers(1, num_positions))
        kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        starts = [data.draw(st.integers(0, position)) for position in range(num_positions - num_queries, num_positions)]
        check_prefill(
            kernels,
            num_queries,
            num_positions,
            starts,
            heads=kv_heads * group,
            kv_heads=kv_heads,
            key_dim=data.draw(st.integers(1, 40)),
            value_dim=data.draw(st.integers(1, 70)),
            dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32])),
            softcap=data.draw(st.none() | st.floats(0.1, 100)),
            sinks=data.draw(st.booleans()),
        )

    def test_results_do_not_depend_on_how_the_work_is_cut(self) -> None:
        """Bit by bit: other threads, and the same tokens in two chunks."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (random(generator, 700, h, 40, dtype=torch.float32) for h in (6, 2, 2))
        starts, outs = torch.tensor(windowed(700, 700, 300)), []
        for num_threads in (1, 2, 5):
            outs.append(torch.empty(700, 6, 40))
            with CpuKernels(num_threads) as kernels:
                kernels.prefill_attention(query, key, value, starts, scaling=0.2, out=outs[-1])
        outs.append(torch.empty(700, 6, 40))
        with CpuKernels(1) as kernels:
            kernels.prefill_attention(query[:333], key[:333], value[:333], starts[:333], scaling=0.2, out=outs[-1][:333])
            kernels.prefill_attention(query[333:], key, value, starts[333:], scaling=0.2, out=outs[-1][333:])
        assert all(torch.equal(out, outs[0]) for out in outs)

    def test_views_of_a_larger_tensor(self, kernels: AttentionKernels) -> None:
        """Projections arrive as (heads, tokens, dim), transposed."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (random(generator, h, 20, 16, dtype=torch.float32).transpose(0, 1) for h in (4, 2, 2))
        out = torch.empty(20, 4, 16)
        kernels.prefill_attention(query, key, value, torch.zeros(20, dtype=torch.int64), scaling=0.25, out=out)
        for i in range(20):
            assert_close(out[i], dense(query[i], key[: i + 1], value[: i + 1], 0.25))


class TestLatents:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (5, 40, 8), (20, 64, 32)])
    def test_absorbed_projections(self, kernels: AttentionKernels, heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
        check_latent(kernels, [1, 33, 150, 300], [0, 0, 17, 129], heads=heads, rank=rank, rope=rope, dtype=dtype)

    @pytest.mark.parametrize("page_tokens", [16, 128])
    def test_page_sizes(self, kernels: AttentionKernels, page_tokens: int) -> None:
        generator = torch.Generator().manual_seed(1)
        sequences = make_sequences(generator, [400], 1, 64, 16, torch.float32)
        pool = make_pool(generator, sequences, [70], page_tokens)
        query_latent, query_rope = random(generator, 1, 9, 64, dtype=torch.float32), random(generator, 1, 9, 16, dtype=torch.float32)
        out = torch.empty(1, 9, 64)
        pages = pool.key_pages, pool.value_pages, pool.page_tables
        kernels.decode_latent_attention(query_latent, query_rope, *pages, torch.tensor([70]), torch.tensor([400]), scaling=0.1, out=out)
        key = torch.cat([sequences[0].key, sequences[0].value], dim=-1)[70:]
        assert_close(out[0], dense(torch.cat([query_latent, query_rope], dim=-1)[0], key, sequences[0].key[70:], 0.1))


class TestPages:
    @ALL_DTYPES
    @pytest.mark.parametrize("page_tokens", [16, 32, 128])
    def test_written_where_told_and_nowhere_else(self, kernels: AttentionKernels, page_tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = make_sequences(generator, [1, 70, 130, 5], 3, 20, 12, dtype)
        pool = make_pool(generator, sequences, [0, 40, 0, 2], page_tokens)
        key_pages, value_pages = torch.full_like(pool.key_pages, math.nan), torch.full_like(pool.value_pages, math.nan)
        places = [
            (sequence.key[p], sequence.value[p], int(pool.page_tables[i, p // page_tokens]), p % page_tokens)
            for i, (sequence, start) in enumerate(zip(sequences, [0, 40, 0, 2], strict=True))
            for p in range(start, len(sequence.key))
        ]
        for i in (3, 20, 21):  # runs that end within a page
            places.append(places.pop(i))
        key, value, page_ids, page_offsets = zip(*places, strict=True)
        kernels.write_kv(torch.stack(key), torch.stack(value), key_pages, value_pages, torch.tensor(page_ids), torch.tensor(page_offsets))
        torch.testing.assert_close(key_pages, pool.key_pages, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(value_pages, pool.value_pages, rtol=0, atol=0, equal_nan=True)

    @ALL_DTYPES
    @pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 64), (17, 64), (31, 33), (64, 65), (70, 150)])
    def test_gathered(self, kernels: AttentionKernels, start: int, length: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = make_sequences(generator, [length], 3, 20, 12, dtype)
        pool = make_pool(generator, sequences, [start], 32)
        key, value = kernels.gather_kv(pool.key_pages, pool.value_pages, pool.page_tables[0], start, length)
        assert key.is_contiguous()
        assert value.is_contiguous()
        torch.testing.assert_close(key, sequences[0].key[start:], rtol=0, atol=0)
        torch.testing.assert_close(value, sequences[0].value[start:], rtol=0, atol=0)


class TestRefusals:
    """Compiled code has no bounds checks of its own."""

    @pytest.fixture
    def pool(self) -> Pool:
        generator = torch.Generator().manual_seed(0)
        return make_pool(generator, make_sequences(generator, [70], 2, 16, 16, torch.float32), [0], 32)

    @pytest.mark.parametrize("page", [-1, 5])
    def test_page_outside_of_the_pool(self, pool: Pool, page: int) -> None:
        pool.page_tables[0, 1] = page
        arguments: Any = torch.zeros(1, 2, 16), pool.key_pages, pool.value_pages, pool.page_tables, torch.tensor([0]), torch.tensor([70])
        with CpuKernels(2) as kernels, pytest.raises(EngineError, match="page"):
            kernels.decode_attention(*arguments, scaling=1.0, out=torch.zeros(1, 2, 16))

    @pytest.mark.parametrize(("page", "offset"), [(-1, 0), (5, 0), (0, 32), (0, -1)])
    def test_written_outside_of_the_pool(self, pool: Pool, page: int, offset: int) -> None:
        new = torch.zeros(1, 2, 16)
        with CpuKernels(1) as kernels, pytest.raises(EngineError, match="place"):
            kernels.write_kv(new, new, pool.key_pages, pool.value_pages, torch.tensor([page]), torch.tensor([offset]))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"query": torch.zeros(1, 2, 16).bfloat16()}, "key_pages holds"),
            ({"query": torch.zeros(1, 3, 16)}, "3 query heads cannot share 2"),
            ({"query": torch.zeros(1, 2, 17)}, "key_pages has the shape"),
            ({"out": torch.zeros(1, 16, 2).transpose(1, 2)}, "out is not contiguous"),
            ({"out": torch.zeros(2, 2, 16)}, "out has the shape"),
            ({"starts": torch.tensor([0, 0])}, "starts has the shape"),
            ({"starts": torch.tensor([70])}, "positions from"),
            ({"lengths": torch.tensor([129])}, "page tables of 128 positions"),
            ({"page_tables": torch.zeros(2, 4, dtype=torch.int64)}, "page_tables has the shape"),
            ({"sinks": torch.zeros(3)}, "sinks has the shape"),
        ],
    )
    def test_what_does_not_fit_together(self, pool: Pool, changed: dict[str, Tensor], message: str) -> None:
        arguments: dict[str, Any] = {
            "query": torch.zeros(1, 2, 16),
            "key_pages": pool.key_pages,
            "value_pages": pool.value_pages,
            "page_tables": pool.page_tables,
            "starts": torch.tensor([0]),
            "lengths": torch.tensor([70]),
            "out": torch.zeros(1, 2, 16),
        }
        with CpuKernels(1) as kernels, pytest.raises(EngineError, match=message):
            kernels.decode_attention(**{**arguments, **changed}, scaling=1.0)
