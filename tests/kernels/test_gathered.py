"""Attention by gathered pages against dense float64 softmax: in one piece and in many, without waiting, and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.errors import EngineError
from flexgen.kernels.codes import SealedPages
from flexgen.kernels.gathered import GatheredKernels
from flexgen.kernels.reference import AttentionKernels
from tests.kernels import test_attention, test_sealed, test_sealed_latents
from tests.kernels.test_attention import anything, check_decode, check_latent, check_prefill, chunked, make_pool, make_sequences, windowed
from tests.kernels.test_sealed import CODES, PAGE, RAGGED, noise

WIDE = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
KIB = 1024


def limit(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    """Let temporary tensors take so many bytes."""
    for module in ("gathered_pages", "gathered_sparse", "padded_buffers", "dense"):
        monkeypatch.setattr(f"flexgen.kernels.{module}.ATTENTION_BYTES", size_bytes)


@pytest.fixture(params=[None, 30 * KIB, 1], ids=["at once", "in pieces", "page by page"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionKernels:
    if request.param is not None:
        limit(monkeypatch, request.param)
    return GatheredKernels()


class TestDecode:
    @pytest.mark.parametrize("seed", range(24))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        chance, how = anything(seed, WIDE)
        lengths = [chance.randint(1, 90) for _ in range(chance.randint(1, 5))]
        starts = [chance.choice([-3, 0, chance.randint(0, length - 1)]) for length in lengths]
        check_decode(kernels, lengths, starts, page_tokens=chance.choice([2, 12, 16, 16, 32, 128]), **how)

    @pytest.mark.parametrize("sinks", [False, True])
    @pytest.mark.parametrize("window", [1, 7, 32, 33])
    def test_windows(self, kernels: AttentionKernels, window: int, sinks: bool) -> None:
        lengths = [1, 31, 33, 64, 200]
        check_decode(kernels, lengths, [length - window for length in lengths], sinks=sinks)

    @pytest.mark.parametrize("sinks", [False, True])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_halves(self, kernels: AttentionKernels, dtype: torch.dtype, sinks: bool) -> None:
        """Weights of the softmax are rounded to the format of the values."""
        generator = torch.Generator().manual_seed(0)
        lengths, starts = [3, 90, 33], [0, 17, -1]
        sequences = make_sequences(generator, lengths, 2, 64, 64, dtype)
        pool, query = make_pool(generator, sequences, starts, 16), test_attention.random(generator, 3, 6, 64, dtype=dtype)
        logits = test_attention.random(generator, 6, dtype=dtype) if sinks else None
        out = torch.full_like(query, math.nan)
        where = pool.key_pages, pool.value_pages, pool.page_tables, torch.tensor(starts), torch.tensor(lengths)
        kernels.decode_attention(query, *where, scaling=0.2, sinks=logits, out=out)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            seen = slice(max(start, 0), None)
            exact = test_attention.dense(query[row], sequence.key[seen], sequence.value[seen], 0.2, sinks=logits)
            largest = float(sequence.value[seen].abs().max())
            assert np.abs(out[row].double().numpy() - exact).max() <= 2.1 * test_attention.HALF_ULP[dtype] * largest + 1e-5

    def test_large_scores_and_numbers_that_are_none(self, kernels: AttentionKernels) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = make_sequences(generator, [70], 1, 32, 32, torch.float32)
        sequences[0].key[17, 0, 5] = math.nan
        pool = make_pool(generator, sequences, [0], 16)
        query, out = test_attention.random(generator, 1, 2, 32, dtype=torch.float32), torch.zeros(1, 2, 32)
        pages, end = (pool.key_pages, pool.value_pages, pool.page_tables), torch.tensor([70])
        kernels.decode_attention(query, *pages, torch.tensor([18]), end, scaling=64.0, out=out)
        exact = test_attention.dense(query[0], sequences[0].key[18:], sequences[0].value[18:], 64.0)
        np.testing.assert_allclose(out[0].numpy(), exact, atol=1e-3)
        kernels.decode_attention(query, *pages, torch.tensor([0]), end, scaling=1.0, out=out)
        assert out.isnan().all(), "it is seen"

    @pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (5, 40, 8)])
    @pytest.mark.parametrize("dtype", WIDE)
    def test_latents(self, kernels: AttentionKernels, heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
        check_latent(kernels, [1, 33, 150, 300], [0, 0, 17, 129], heads=heads, rank=rank, rope=rope, dtype=dtype)

    def test_refusals(self) -> None:
        pages, one = torch.zeros(2, 1, 2, 16, 16), torch.ones(1, dtype=torch.int64)
        query, table = torch.zeros(1, 4, 16), torch.zeros(1, 1, dtype=torch.int64)
        with pytest.raises(EngineError, match="cannot share 2 key heads"):
            GatheredKernels().decode_attention(query[:, :3], *pages, table, one - 1, one, scaling=1.0, out=query[:, :3])
        with pytest.raises(EngineError, match="lengths has the shape"):
            GatheredKernels().decode_attention(query, *pages, table, one - 1, one.repeat(2), scaling=1.0, out=query)


class TestSealedDecode:
    @pytest.mark.parametrize("name", CODES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_ragged_lengths(self, kernels: AttentionKernels, name: str, dtype: torch.dtype) -> None:
        test_sealed.check_decode(kernels, RAGGED[:8], [0] * 8, name=name, dtype=dtype)

    @pytest.mark.parametrize("window", [1, 7, 16, 17, 64])
    def test_windows(self, kernels: AttentionKernels, window: int) -> None:
        test_sealed.check_decode(kernels, RAGGED, [length - window for length in RAGGED], softcap=3.0, sinks=True)

    def test_sequences_without_a_sealed_page(self, kernels: AttentionKernels) -> None:
        """Tables have no column then."""
        stored = test_sealed.store([3, 16], 2, 32, 32, "int8", torch.float32)
        query, out = torch.ones(2, 4, 32), torch.full((2, 4, 32), math.nan)
        starts, lengths = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 16])
        where = stored.pages, stored.tail_keys, stored.tail_values, stored.tables[:, :0], stored.tails, starts, lengths
        kernels.decode_sealed_attention(query, *where, scaling=0.1, out=out)
        for row, (key, value) in enumerate(stored.seen):
            test_sealed.assert_close(out[row], test_sealed.dense(query[row], key, value, 0.1, None, None), value)

    @pytest.mark.parametrize("seed", range(16))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        test_sealed.check_anything(kernels, seed, [torch.float16, torch.float32])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_latents(self, kernels: AttentionKernels, dtype: torch.dtype) -> None:
        test_sealed_latents.check(kernels, [1, 16, 17, 100, 130], [0, 0, 3, 37, 129], dtype=dtype, heads=9, padding=2)

    def test_sealed_pages_come_back_as_by_the_reference(self) -> None:
        stored = test_sealed.store([40], 2, 48, 20, "int4", torch.float32)
        for found, known in zip(
            GatheredKernels().unseal(stored.pages, stored.tables[0], 5, 32, torch.float32),
            AttentionKernels().unseal(stored.pages, stored.tables[0], 0, 32, torch.float32),
            strict=True,
        ):
            assert torch.equal(found, known[5:])


class TestPrefill:
    @pytest.mark.parametrize("seed", range(16))
    def test_anything(self, kernels: AttentionKernels, seed: int) -> None:
        chance, how = anything(seed, WIDE)
        num_queries = chance.choice([1, 3, 16, 17, 64, 65])
        num_positions = num_queries + chance.choice([0, 1, 40])
        window = chance.choice([200, 1, 7, 33])
        starts = [position - window + 1 for position in range(num_positions - num_queries, num_positions)]
        check_prefill(kernels, num_queries, num_positions, starts, **how)

    @pytest.mark.parametrize("sinks", [False, True])
    def test_chunks_and_windows(self, kernels: AttentionKernels, sinks: bool) -> None:
        check_prefill(kernels, 50, 70, chunked(50, 70, 16), sinks=sinks)
        check_prefill(kernels, 50, 70, windowed(50, 70, 9), sinks=sinks)

    @pytest.mark.parametrize("softcap", [None, 4.0])
    @pytest.mark.parametrize("sinks", [False, True])
    def test_pages_as_they_were_stored(self, kernels: AttentionKernels, sinks: bool, softcap: float | None) -> None:
        total, first_query, heads = 77, 20, 6
        exact_start, last_border = first_query // PAGE * PAGE, (total - 1) // PAGE * PAGE
        exact_key, exact_value = noise(1, total, 2, 24), noise(2, total, 2, 24)
        stored_key, stored_value = noise(3, last_border, 2, 24), noise(4, last_border, 2, 24)
        query, logits = noise(5, total - first_query, heads, 24), noise(6, heads) if sinks else None
        positions, out = torch.arange(first_query, total), torch.full((total - first_query, heads, 24), math.nan)
        starts = (positions - 30).clamp(min=0)
        kernels.prefill_sealed_attention(
            query, stored_key, stored_value, exact_key[exact_start:], exact_value[exact_start:], starts, positions // PAGE * PAGE,
            exact_start, scaling=0.1, softcap=softcap, sinks=logits, out=out,
        )  # fmt: skip
        for row, position in enumerate(positions.tolist()):
            border, start = position // PAGE * PAGE, int(starts[row])
            key = torch.cat([stored_key[start:border], exact_key[max(start, border) : position + 1]])
            value = torch.cat([stored_value[start:border], exact_value[max(start, border) : position + 1]])
            test_sealed.assert_close(out[row], test_sealed.dense(query[row], key, value, 0.1, softcap, logits), value)


# -- on a device ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sim() -> Iterator[SimulatedDevice]:
    device = SimulatedDevice(1 << 24)
    with torch.no_grad():
        yield device
    device.close()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_nothing_waits_for_a_device(sim: SimulatedDevice, sinks: bool, softcap: float | None) -> None:
    """All tensors are on a device that is strict about it, and results are those of the host."""
    generator = torch.Generator().manual_seed(0)
    stored = test_sealed.store([100, 33, 5], 2, 32, 32, "int4", torch.float32)
    pool = make_pool(generator, make_sequences(generator, [100, 33, 5], 2, 32, 32, torch.float32), [0, 3, 0], 16)
    query = torch.randn(3, 6, 32, generator=generator)
    starts, lengths = torch.tensor([0, 3, 0]), torch.tensor([100, 33, 5])
    logits = torch.randn(6, generator=generator) if sinks else None
    own = torch.randn(40, 2, 32, generator=generator), torch.randn(40, 2, 32, generator=generator), torch.zeros(20, dtype=torch.int64)
    here, there, outs = GatheredKernels(), GatheredKernels(), list[torch.Tensor]()
    there.rotations(query[0].to(sim.device))  # the matrix is made once
    for kernels, device in ((here, torch.device("cpu")), (there, sim.device)):

        def on(*tensors: torch.Tensor, device: torch.device = device) -> list[torch.Tensor]:
            return [each.to(device) for each in tensors]

        how: dict[str, Any] = {"scaling": 0.2, "softcap": softcap, "sinks": None if logits is None else logits.to(device)}
        sealed = SealedPages(
            keys=stored.pages.keys.to(device), values=stored.pages.values.to(device), key_codes=stored.pages.key_codes,
            value_codes=stored.pages.value_codes, page_tokens=PAGE,
        )  # fmt: skip
        plain = on(query, pool.key_pages, pool.value_pages, pool.page_tables, starts, lengths)
        tails = on(stored.tail_keys, stored.tail_values, stored.tables, stored.tails, starts, lengths)
        prompt, results = on(query.new_ones(20, 6, 32), *own), [torch.empty(3, 6, 32, device=device) for _ in range(2)]
        results += [torch.empty(20, 6, 32, device=device), *(torch.empty(3, 6, 32, device=device) for _ in range(2))]
        (kept,) = on(torch.tensor([3, 20, 9]))
        before = sim.synchronisations
        kernels.decode_attention(*plain, out=results[0], **how)
        kernels.decode_sealed_attention(plain[0], sealed, *tails, out=results[1], **how)
        kernels.prefill_attention(*prompt, out=results[2], **how)
        kernels.decode_sparse_attention(*plain, kept, out=results[3], **how)
        kernels.decode_sparse_sealed_attention(plain[0], sealed, *tails, kept, out=results[4], **how)
        assert sim.synchronisations == before
        outs.append(torch.cat([each.cpu() for each in results]))
    torch.testing.assert_close(outs[1], outs[0])


def test_next_tokens_take_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of sequences, as long as they fit a piece."""

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            schema = func._schema
            self.launches += schema.is_mutable or not any(each.alias_info for each in schema.returns)
            return result

    counts = []
    for number in (1, 40):
        tables, zero = torch.arange(number * 4).view(number, 4), torch.zeros(number, dtype=torch.int64)
        keys, query = torch.zeros(number * 4, 2, 16, 16), torch.zeros(number, 4, 16)
        with Counted() as counted:
            GatheredKernels().decode_attention(query, keys, keys, tables, zero, zero + 50, scaling=1.0, out=torch.empty_like(query))
        counts.append(counted.launches)
    assert counts[0] == counts[1] <= 24  # of which about ten read or write keys and values
