"""Units that a device decodes, at once or when somebody asks, and again where others have taken their place; in the ring until released."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexgen.base.parallel import Parallel, serially
from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.devices.sim import SimulatedDevice
from flexgen.formats.mxfp4 import MXFP4
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.kernels import experts
from flexgen.plan.policy import DEVICE_SCRATCH_UNITS
from flexgen.weights.encoded import EncodedNumbers
from flexgen.weights.store import WeightStore
from flexgen.weights.unit import UnitLayout, WantedTensor
from tests.kernels.plain_grouped import PlainGroupedKernels, numbers_of

NAME = "layers.0.mlp.experts.down_proj"


class Counting(MXFP4):
    """Counts what is decoded."""

    def __init__(self) -> None:
        self.count = 0

    def decode(self, parts: Sequence[Tensor], start: int, out: Tensor, parallel: Parallel = serially) -> None:
        self.count += 1
        super().decode(parts, start, out, parallel)


class Model:
    """Remembers what is bound; it takes experts as they are stored if it is told so."""

    def __init__(self, *, takes: bool) -> None:
        self.bound: dict[int, Tensor | EncodedNumbers] = {}
        self._takes = takes

    def takes_encoded(self, unit: int, module: str, parameter: str, *, columns_first: bool) -> bool:
        assert columns_first
        return self._takes

    def bind(self, unit: int, module: str, parameter: str, tensor: Tensor) -> None:
        self.bound[unit] = tensor

    def bind_encoded(self, unit: int, module: str, parameter: str, numbers: EncodedNumbers) -> None:
        self.bound[unit] = numbers

    def unbind(self, unit: int, module: str, parameter: str) -> None:
        del self.bound[unit]


class Opened:
    """A store of equal units that come from disk, with a ring on the device for so many."""

    def __init__(self, folder: Path, *, takes: bool = True, ring_units: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        parts = {"blocks": (4, 24, 2, 16), "scales": (4, 24, 2)}
        stored = {f"{NAME}_{part}": torch.randint(100, 156, shape, dtype=torch.uint8, generator=generator) for part, shape in parts.items()}
        save_file(stored, folder / "model.safetensors")
        self.format, self.model, self.arrived = Counting(), Model(takes=takes), threading.Event()
        tensor = Checkpoint(folder).decoded(self.format, torch.float32).tensors[NAME]
        source = ParameterSource(name=NAME, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        self.numbers = torch.empty(source.shape)
        source.read(self.numbers)
        self.format.count = 0
        self.unit = UnitLayout.of(0, "experts", [WantedTensor(module="m", parameter="w", source=source, dtype=torch.float32)])
        self.backend, self.io, self.files = SimulatedDevice(1 << 20), IOPool(2), FileSet()
        self.store = WeightStore(
            [replace(self.unit, index=index) for index in range(4)], ["disk"] * 4, self.model, self.io, self.files, backend=self.backend,
            host_ring_bytes=8 * 8192, device_ring_bytes=ring_units * self.unit.carried_bytes, on_arrival=self.arrived.set, poison=True,
        )  # fmt: skip
        self.store.load()
        self.store.start()

    def open(self, unit: int) -> Tensor | EncodedNumbers:
        assert self.arrives(unit)
        self.store.open(unit)
        return self.model.bound[unit]

    def arrives(self, unit: int, seconds: float = 10.0) -> bool:
        """Whether a unit becomes ready in this time."""
        for _ in range(max(round(seconds / 0.05), 1)):
            self.arrived.clear()
            if self.store.is_ready(unit):
                return True
            self.arrived.wait(0.05)
        return False

    def close(self) -> None:
        for closed in (self.store, self.io, self.files, self.backend):
            closed.close()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(experts.KERNELS, "sim", lambda device: PlainGroupedKernels())
    experts.grouped_kernels.cache_clear()
    yield
    experts.grouped_kernels.cache_clear()


def test_a_unit_is_decoded_when_somebody_asks_and_only_once(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    for unit in range(3):
        bound = opened.open(unit)
        assert isinstance(bound, EncodedNumbers)
        assert len(bound) == 4
        assert torch.equal(numbers_of(bound.matrices).cpu(), opened.numbers)
        assert opened.format.count == int(unit == 2), "nobody has asked"
        if unit == 1:
            first, second = bound.decoded(), bound.decoded()
            assert torch.equal(first.cpu(), opened.numbers)
            assert first is second
        assert opened.format.count == int(unit >= 1)
        opened.store.release(unit)
    assert not opened.model.bound
    assert opened.backend.used_bytes <= opened.unit.carried_bytes + DEVICE_SCRATCH_UNITS * opened.unit.decoded_bytes
    opened.close()


def test_the_slot_is_held_until_the_unit_is_released(tmp_path: Path) -> None:
    """Then the next unit may take it; what is bound lies in the ring, which is poisoned after use."""
    opened = Opened(tmp_path)
    bound = opened.open(0)
    assert isinstance(bound, EncodedNumbers)
    bound.decoded()
    assert not opened.arrives(1, seconds=0.2)
    assert torch.equal(numbers_of(bound.matrices).cpu(), opened.numbers)
    opened.store.release(0)
    assert opened.arrives(1)
    opened.close()


def test_what_the_model_does_not_take_is_decoded_at_once(tmp_path: Path) -> None:
    opened = Opened(tmp_path, takes=False)
    bound = opened.open(0)
    assert isinstance(bound, Tensor)
    assert torch.equal(bound.cpu(), opened.numbers)
    assert opened.format.count == 1
    assert opened.open(0) is bound
    assert opened.format.count == 1
    assert not opened.arrives(1, seconds=0.2), "it may have to be decoded again"
    opened.store.release(0)
    assert opened.arrives(1)
    opened.close()


@pytest.mark.parametrize("takes", [False, True])
def test_units_make_room_for_those_that_are_used_sooner(tmp_path: Path, takes: bool) -> None:
    """A micro-batch waits for attention in the first unit while two others go on, and then comes after them."""
    opened = Opened(tmp_path, takes=takes, ring_units=4)

    def computes(unit: int, in_use: set[int], decoded: int) -> None:
        """A micro-batch computes with a unit; so many have been decoded then."""
        opened.store.in_use(in_use)
        bound = opened.open(unit)
        numbers = bound if isinstance(bound, Tensor) else bound.decoded()
        assert torch.equal(numbers.cpu(), opened.numbers)
        assert opened.format.count == decoded

    computes(0, {0}, 1)
    computes(1, {1}, 2)
    computes(1, {1}, 2)
    computes(2, {1, 2}, 3)  # the first unit makes room
    opened.store.in_use({1, 3})
    assert not opened.arrives(3, seconds=0.2), "one that is behind will use the others"
    computes(3, {2, 3}, 4)
    computes(0, {0, 2, 3}, 5)  # the attention is there: the lowest goes on, and the highest makes room
    assert not opened.store.is_ready(3), "the others are in use"
    computes(1, {1, 2, 3}, 6)
    opened.store.release(0)
    computes(2, {2, 3}, 6)
    opened.store.release(1)
    computes(3, {2, 3}, 7)
    for unit in (2, 3):
        opened.store.release(unit)
    assert not opened.model.bound
    assert opened.backend.used_bytes <= 4 * opened.unit.carried_bytes + DEVICE_SCRATCH_UNITS * opened.unit.decoded_bytes
    opened.close()


def test_a_device_without_kernels_decodes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(experts.KERNELS, "sim")
    opened = Opened(tmp_path)
    assert isinstance(opened.open(0), Tensor)
    opened.close()
