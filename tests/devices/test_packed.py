"""Values with many tensors in them cross the link in one copy, and come out as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flexgen.devices.packed import PackedCopies
from flexgen.devices.staging import Staging
from tests.devices.counting import CountingDevice
from tests.devices.counting import device as device  # a fixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    numbers: torch.Tensor
    name: str = "inner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    parts: tuple[Inner, ...]
    pair: tuple[torch.Tensor, int, int] | None
    plain: Inner | None = None
    sizes: tuple[int, ...] = (1, 2)


def a_value() -> list[Any]:
    outer = Outer(
        parts=(Inner(numbers=torch.arange(7, dtype=torch.uint8)), Inner(numbers=torch.ones(3, 5, dtype=torch.float64).T)),
        pair=(torch.tensor([[4, 5], [6, 7]]), 8, 9),
    )
    return [outer, torch.empty(0, 4, dtype=torch.int64), (torch.tensor([True, False]), None)]


def test_one_copy_brings_all_tensors_of_a_value(device: CountingDevice) -> None:
    value, before = a_value(), device.synchronisations
    (outer, empty, (flags, nothing)) = PackedCopies(Staging(device)).to_device(value)
    assert (device.num_in, device.synchronisations) == (1, before)
    assert (outer.pair[1:], outer.parts[0].name, nothing) == ((8, 9), "inner", None)
    assert outer.sizes is value[0].sizes, "what holds no tensor stays as it is"
    found = [outer.parts[0].numbers, outer.parts[1].numbers, outer.pair[0], empty, flags]
    wanted = [value[0].parts[0].numbers, value[0].parts[1].numbers, value[0].pair[0], value[1], value[2][0]]
    for one, other in zip(found, wanted, strict=True):
        assert (one.device, one.dtype) == (device.device, other.dtype)
        assert torch.equal(one.cpu(), other)


def test_the_value_itself_is_not_changed(device: CountingDevice) -> None:
    value = a_value()
    PackedCopies(Staging(device)).to_device(value)
    assert value[0].parts[0].numbers.device.type == value[1].device.type == "cpu"


def test_a_value_without_tensors_costs_no_copy(device: CountingDevice) -> None:
    assert PackedCopies(Staging(device)).to_device((1, "two", [])) == (1, "two", [])
    (empty,) = PackedCopies(Staging(device)).to_device([torch.empty(0)])
    assert (empty.device, device.num_in) == (device.device, 0)


def test_results_come_back_in_one_copy(device: CountingDevice) -> None:
    numbers = torch.arange(5).to(device.device)
    with PackedCopies(Staging(device)).to_host(numbers).arrived() as (copy,):
        assert copy.tolist() == [0, 1, 2, 3, 4]


def test_on_the_host_nothing_is_copied() -> None:
    value, copies = a_value(), PackedCopies(Staging(None))
    assert copies.to_device(value) is value
    assert copies.device.type == "cpu"
