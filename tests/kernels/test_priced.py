"""Kernels for tensors without numbers: their prices, from shapes alone, are those of the work that real kernels would do."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import pytest
import torch
from torch import Tensor

from flexgen.devices.timed_tensor import Effect, TimedTensor
from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.dequantize.choice import dequantize_kernels
from flexgen.kernels.experts import grouped_kernels
from flexgen.kernels.grouped import SortedPairs, Window
from flexgen.kernels.priced import PricedDequantizeKernels, PricedGroupedKernels, PricedKernels

META = torch.device("meta")
KERNELS = PricedKernels()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Taken:
    def __init__(self) -> None:
        self.effects: dict[Hashable, Effect] = {}
        self.asked: list[tuple[str, float, float]] = []
        self.rows = 0.0

    def spend(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        self.asked.append((kind, flops, nbytes))
        self.rows = rows

    def operation(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        """Views and new memory are free."""
        assert False, kind  # noqa: B011, PT015

    def synchronise(self) -> None:
        assert False, "a kernel waits"  # noqa: B011, PT015


@pytest.fixture
def taken() -> Taken:
    return Taken()


def tensor(taken: Taken, *shape: int) -> TimedTensor:
    return TimedTensor(torch.empty(shape, dtype=torch.float16, device="meta"), taken)


def pages(taken: Taken) -> tuple[Tensor, Tensor]:
    """20 pages of 16 tokens, 2 heads of 64 and 32 numbers: a token has 384 bytes."""
    return tensor(taken, 20, 2, 64, 16), tensor(taken, 20, 2, 16, 32)


def test_what_is_chosen_for_tensors_without_numbers() -> None:
    assert isinstance(attention_kernels(META, 4), PricedKernels)
    assert isinstance(grouped_kernels(META), PricedGroupedKernels)
    assert isinstance(dequantize_kernels(META), PricedDequantizeKernels)


def test_attention_of_next_tokens(taken: Taken) -> None:
    key, value = pages(taken)
    query, out = tensor(taken, 3, 8, 64), tensor(taken, 3, 8, 32)
    starts, lengths = torch.tensor([-5, 0, 10]), torch.tensor([20, 40, 30])
    KERNELS.decode_attention(query, key, value, torch.zeros(3, 3), starts, lengths, scaling=1.0, out=out)
    assert taken.asked == [("steps", 2 * 80 * 8 * 96, 80 * 384)], "20, 40 and 20 positions"


def test_where_lengths_are_not_known_all_are_as_long_as_the_longest(taken: Taken) -> None:
    key, value = pages(taken)
    query, out, numbers = tensor(taken, 3, 8, 64), tensor(taken, 3, 8, 32), tensor(taken, 3)
    KERNELS.decode_attention(query, key, value, tensor(taken, 3, 3), numbers, numbers, scaling=1.0, out=out)
    assert taken.asked == [("steps", 2 * 3 * 48 * 8 * 96, 3 * 48 * 384)]


def test_attention_to_latents(taken: Taken) -> None:
    key, value = tensor(taken, 20, 1, 64, 16), tensor(taken, 20, 1, 16, 32)
    latent, rope = tensor(taken, 1, 8, 64), tensor(taken, 1, 8, 32)
    seen = torch.zeros(1, 3), torch.tensor([0]), torch.tensor([40])
    KERNELS.decode_latent_attention(latent, rope, key, value, *seen, scaling=1.0, out=tensor(taken, 1, 8, 64))
    assert taken.asked == [("steps", 2 * 40 * 8 * (64 + 32 + 64), 40 * 96 * 2)], "values are the latents of the keys"


@pytest.mark.parametrize(("stored", "pairs"), [(0, 50), (30, 350)])
def test_attention_of_prompts(taken: Taken, stored: int, pairs: int) -> None:
    query, key, value = tensor(taken, 10, 8, 64), tensor(taken, 10 + stored, 2, 64), tensor(taken, 10 + stored, 2, 32)
    KERNELS.prefill_attention(query, key, value, tensor(taken, 10), scaling=1.0, out=tensor(taken, 10, 8, 32))
    assert taken.asked == [("prompts", 2 * pairs * 8 * 96, 0)]


def test_pages_are_written_and_gathered(taken: Taken) -> None:
    key, value = pages(taken)
    ids = torch.zeros(5, dtype=torch.int64)
    KERNELS.write_kv(tensor(taken, 5, 2, 64), tensor(taken, 5, 2, 32), key, value, ids, ids)
    found = KERNELS.gather_kv(key, value, ids, 3, 8)
    assert [each.shape for each in found] == [(5, 2, 64), (5, 2, 32)]
    assert taken.asked == [("memory", 0, 2 * 5 * 384)] * 2


def test_experts_are_chosen_alike_often(taken: Taken) -> None:
    """40 rows choose 2 of 16 experts each: 5 rows an expert, and 20 the first four."""
    kernels, numbers = PricedGroupedKernels(), torch.zeros(80, dtype=torch.int64)
    pairs = SortedPairs(order=numbers, places=numbers, offsets=torch.zeros(17, dtype=torch.int64))
    first, second = (Window(first=0, count=4, skipped=skipped, num_rows=15) for skipped in (0, 15))
    x, weight = tensor(taken, 40, 8), tensor(taken, 4, 8, 32)
    assert kernels.covers(torch.float16)
    out = [kernels.product(x, weight, None, pairs, window, gathers=True) for window in (first, second)]
    assert [each.shape for each in out] == [(15, 32), (15, 32)]
    assert taken.asked == [("product", 2 * rows * 8 * 32, rows * 40 * 2) for rows in (15, 5)]
    assert taken.rows == 5
    taken.asked.clear()
    kernels.add(out[1], None, pairs, second, tensor(taken, 40, 32))
    assert taken.asked == [("memory", 0, 5 * 32 * 2 + 2 * 5 * 32 * 2)], "five of the forty sums"


def test_decoding_is_priced_by_what_it_yields(taken: Taken) -> None:
    from flexgen.formats.mxfp4 import MXFP4

    out = tensor(taken, 2, 32, 64).new_empty(2, 64, 32).mT
    MXFP4().decode([tensor(taken, 2, 16, 32).view(torch.uint8), tensor(taken, 2 * 64, 1)], 0, out)
    assert taken.asked == [("decoding", 0, 2 * 32 * 64 * 2)]
