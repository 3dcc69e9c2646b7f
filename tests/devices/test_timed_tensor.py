"""Tensors without numbers: each operation is priced once, by its FLOPs and bytes, and what is read is zeros."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import pytest
import torch
from devices.manual_clock import timed_device
from torch.nn import functional

from flexgen.devices.timed_tensor import Effect, TimedTensor


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Taken:
    """What operations took."""

    def __init__(self) -> None:
        self.effects: dict[Hashable, Effect] = {}
        self.asked: list[tuple[str, float, float, float]] = []
        self.synchronisations = 0

    def operation(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        self.asked.append((kind, flops, nbytes, rows))

    spend = operation

    def synchronise(self) -> None:
        self.synchronisations += 1


@pytest.fixture
def taken() -> Taken:
    return Taken()


def tensor(taken: Taken, *shape: int, dtype: torch.dtype = torch.float16) -> TimedTensor:
    return TimedTensor(torch.empty(shape, dtype=dtype, device="meta"), taken)


def test_a_linear_layer(taken: Taken) -> None:
    out = functional.linear(tensor(taken, 1, 5, 8), tensor(taken, 16, 8), tensor(taken, 16))
    assert (type(out), out.shape) == (TimedTensor, (1, 5, 16))
    products = [each for each in taken.asked if each[0] == "product"]
    assert [(flops, rows) for _, flops, _, rows in products] == [(2 * 5 * 8 * 16, 5)]
    assert sum(nbytes for _, _, nbytes, _ in taken.asked) == 2 * (5 * 8 + 16 * 8 + 16 + 5 * 16)


def test_batched_products(taken: Taken) -> None:
    assert torch.bmm(tensor(taken, 3, 5, 8), tensor(taken, 3, 8, 16)).shape == (3, 5, 16)
    assert taken.asked == [("product", 3 * 2 * 5 * 8 * 16, 2 * 3 * (5 * 8 + 8 * 16 + 5 * 16), 5)]


def test_elementwise_operations(taken: Taken) -> None:
    one, other = tensor(taken, 4, 8), tensor(taken, 4, 8)
    assert (one + other).shape == (4, 8)
    assert taken.asked.pop() == ("memory", 0, 3 * 64, 1)
    assert one.add_(other) is one
    assert taken.asked.pop() == ("memory", 0, 2 * 64, 1)
    one[1:3].copy_(other[:2])
    assert [each for each in taken.asked if each[2]] == [("memory", 0, 2 * 32, 1)]


def test_views_and_new_memory_are_free(taken: Taken) -> None:
    one = tensor(taken, 4, 8)
    shaped = [one.view(8, 4), one.mT, one[1:], one.view(torch.uint8), one.new_empty(3), one.detach(), *one.split(2)]
    assert all(type(each) is TimedTensor for each in shaped)
    assert taken.asked == []
    parameter = torch.nn.Parameter(one, requires_grad=False)
    assert (parameter.shape, taken.asked) == ((4, 8), [])


def test_gathering_is_priced_by_what_is_gathered(taken: Taken) -> None:
    table, ids = tensor(taken, 50_000, 8), tensor(taken, 3, dtype=torch.int64)
    assert functional.embedding(ids, table).shape == (3, 8)
    assert taken.asked.pop() == ("memory", 0, 2 * 3 * 8 * 2, 1)
    table.index_copy_(0, ids, tensor(taken, 3, 8))
    assert taken.asked.pop() == ("memory", 0, 2 * 3 * 8 * 2, 1)


def test_what_is_read_is_zeros_and_makes_the_host_wait(taken: Taken) -> None:
    one = tensor(taken, 2, 3, dtype=torch.int64)
    assert one.cpu().tolist() == [[0, 0, 0], [0, 0, 0]]
    assert one.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert one[0, 0].item() == 0
    assert torch.ones(2, 3, dtype=torch.int64).copy_(one).sum() == 0
    assert taken.synchronisations == 4


def test_host_memory_reads_as_zeros_without_waiting() -> None:
    device, clock, prices = timed_device()
    found = device.allocate_host(48).view(torch.int64).view(2, 3).numpy()
    np.testing.assert_array_equal(found, np.zeros((2, 3), np.int64))
    assert (clock.time, device.synchronisations, prices["host"].asked) == (0, 0, [])


def test_copies_within_host_memory_take_the_time_of_their_thread() -> None:
    device, clock, prices = timed_device()
    device.allocate_host(64).copy_(torch.zeros(64, dtype=torch.uint8))
    assert clock.time == 128
    assert [kind for kind, *_ in prices["host"].asked] == ["memory"]
    assert device.busy_seconds()["host_compute"] == 0


def test_reading_a_number_waits_for_computing() -> None:
    device, clock, _ = timed_device()
    one = device.allocate(8).view(torch.int64)
    one.add_(1)
    assert one.item() == 0
    assert (clock.time, device.synchronisations) == (8, 1)
