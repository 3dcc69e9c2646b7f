"""A format of two stored tensors through all of its way: found in headers, cut by rows, carried stored or decoded, decoded once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource, read_bytes
from flexgen.devices.sim import SimulatedDevice
from flexgen.errors import EngineError
from flexgen.formats.base import (
    RANDOM_DEVIATION,
    Encoding,
    EncodingPart,
    NamedTensor,
    NumberFormat,
    Parallel,
    StoredTensor,
    serially,
)
from flexgen.formats.mxfp4 import MXFP4
from flexgen.formats.random_numbers import encoded_as, sampled_parts
from flexgen.formats.table import FORMATS, runs
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.options import DTYPE_BYTES
from flexgen.plan.policy import DEVICE_SCRATCH_UNITS
from flexgen.weights.store import WeightStore
from flexgen.weights.unit import UnitForm, UnitLayout, WantedTensor

ROWS, COLUMNS, CUT = 24, 40, 10
LOW_BIT = [each for each in FORMATS.values() if each.runs and each.name not in DTYPE_BYTES]


class RowScaled(NumberFormat):
    """8-bit integers and a float32 scale for each pair of rows."""

    name = "row_scaled"
    runs = True

    def __init__(self, *, carried_as_stored: bool) -> None:
        self.carried_as_stored = carried_as_stored
        self.threads: list[str] = []

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        if len(tensor.shape) != 2:
            return [tensor]
        scales = NamedTensor(f"{tensor.name}_scale", (tensor.shape[0] // 2,), torch.float32)
        return [NamedTensor(tensor.name, tensor.shape, torch.int8), scales]

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        if stored.name.endswith("_scale"):
            return torch.full(stored.shape, RANDOM_DEVIATION / 74)
        return torch.randint(-128, 128, stored.shape, dtype=torch.int8, generator=generator)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        names = [name for name in tensors if f"{name}_scale" in tensors]
        return {
            name: Encoding(self, tensors[name].shape, (EncodingPart(tensors[name], 1), EncodingPart(tensors[f"{name}_scale"], 2)))
            for name in names
        }

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        numbers, scales = parts
        scale = scales.repeat_interleave(2)[start % 2 :][: len(out)]
        out.copy_(numbers.view(out.shape) * scale[:, None])
        self.threads.append(threading.current_thread().name)


class Model:
    """Remembers what is bound."""

    def __init__(self) -> None:
        self.bound: dict[tuple[int, str], torch.Tensor] = {}

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None:
        self.bound[unit, parameter] = tensor

    def unbind(self, unit: int, module: str, parameter: str) -> None:
        del self.bound[unit, parameter]


def write(folder: Path) -> torch.Tensor:
    """A matrix in the format beside a plain one; returns the decoded matrix."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8, generator=generator)
    scales = torch.rand(ROWS // 2, generator=generator)
    save_file({"w": numbers, "w_scale": scales, "plain": torch.ones(3, COLUMNS)}, folder / "model.safetensors")
    return numbers * scales.repeat_interleave(2)[:, None]


def layouts(folder: Path, number_format: NumberFormat) -> list[UnitLayout]:
    """Two units: the first rows, and the others with the plain tensor."""
    headers = Checkpoint(folder).decoded(number_format, torch.float32)
    sources = {
        name: ParameterSource(name=name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        for name, tensor in headers.tensors.items()
    }
    assert sources.keys() == {"w", "plain"}

    def wanted(name: str, source: ParameterSource) -> WantedTensor:
        return WantedTensor(module="m", parameter=name, source=source, dtype=torch.float32)

    return [
        UnitLayout.of(0, "first", [wanted("w", sources["w"].rows(0, CUT - 1))]),
        UnitLayout.of(1, "second", [wanted("w", sources["w"].rows(CUT - 1, ROWS)), wanted("plain", sources["plain"])]),
    ]


@pytest.fixture(params=[True, False], ids=["carried as stored", "carried decoded"])
def number_format(request: pytest.FixtureRequest) -> RowScaled:
    return RowScaled(carried_as_stored=request.param)


@pytest.fixture
def io() -> Iterator[IOPool]:
    pool = IOPool(2)
    yield pool
    pool.close()


ON_CPU = [("disk", "disk"), ("host", "disk"), ("host", "host"), ("encoded", "disk"), ("encoded", "encoded"), ("host", "encoded")]
ON_DEVICE = [*ON_CPU, ("device", "disk"), ("device", "device")]


@pytest.mark.parametrize(("on_device", "homes"), [(False, homes) for homes in ON_CPU] + [(True, homes) for homes in ON_DEVICE])
def test_what_is_bound_is_decoded(tmp_path: Path, number_format: RowScaled, io: IOPool, homes: tuple[str, str], on_device: bool) -> None:
    decoded, units, model, files = write(tmp_path), layouts(tmp_path, number_format), Model(), FileSet()
    backend = SimulatedDevice(1 << 20) if on_device else None
    arrived = threading.Event()
    store = WeightStore(
        units, homes, model, io, files, backend=backend, host_ring_bytes=3 * 4096, device_ring_bytes=8192,
        on_arrival=arrived.set, poison=True,
    )  # fmt: skip
    store.load()
    store.start()
    for _ in range(3):
        for unit, (start, stop) in enumerate([(0, CUT - 1), (CUT - 1, ROWS)]):
            while not store.is_ready(unit):
                arrived.wait(0.1)
                arrived.clear()
            store.open(unit)
            assert torch.equal(model.bound[unit, "w"].cpu(), decoded[start:stop])
            store.release(unit)
    decoding = set(number_format.threads) - {"MainThread"}
    link_decodes = on_device and not number_format.carried_as_stored and bool({"encoded", "disk"} & set(homes))
    assert decoding == ({"flexgen-device-link"} if link_decodes else set()), "the host decodes before the link only"
    store.close()
    files.close()
    if backend is not None:
        backend.close()


@pytest.mark.parametrize("form", UnitForm)
def test_experts_lie_in_memory_as_they_are_stored(tmp_path: Path, form: UnitForm) -> None:
    """MXFP4 experts of one unit: columns side by side, and the numbers that any other order has."""
    name, parts = "layers.0.mlp.experts.down_proj", {"blocks": (4, 24, 2, 16), "scales": (4, 24, 2)}
    generator = torch.Generator().manual_seed(0)
    stored = {f"{name}_{part}": torch.randint(100, 156, shape, dtype=torch.uint8, generator=generator) for part, shape in parts.items()}
    save_file(stored, tmp_path / "model.safetensors")
    tensor = Checkpoint(tmp_path).decoded(MXFP4(), torch.float32).tensors[name]
    source = ParameterSource(name=name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
    wanted = torch.empty(source.shape)
    source.read(wanted)
    some = source.rows(1, 3)
    unit = UnitLayout.of(0, "experts", [WantedTensor(module="m", parameter="w", source=some, dtype=torch.float32)])
    assert some.columns_first
    positions = unit.tensors[0].stored_at if form is UnitForm.STORED else unit.tensors[0].carried_at
    data = torch.zeros(max(unit.stored_bytes, unit.carried_bytes), dtype=torch.uint8)
    for each, position in zip(some.ranges, positions, strict=True):
        data[position : position + each.nbytes] = read_bytes(each.path, each.offset, each.nbytes)
    memory = torch.empty(unit.tensors[0].nbytes, dtype=torch.uint8)
    numbers = unit.tensors[0].numbers(data, form, lambda each: each.view(memory, 0))
    assert torch.equal(numbers, wanted[1:3])
    assert torch.equal(memory.view(torch.float32).view(2, 24, 64), wanted[1:3].mT)


def test_what_stays_in_memory_does_not_keep_the_encoded_bytes(tmp_path: Path, number_format: RowScaled, io: IOPool) -> None:
    """The plain tensor of the second unit is copied; a view of what was read would keep all of that in memory."""
    write(tmp_path)
    model, files = Model(), FileSet()
    store = WeightStore(
        layouts(tmp_path, number_format), ("host", "host"), model, io, files, backend=None, host_ring_bytes=0, device_ring_bytes=0
    )
    store.load()
    assert {tensor.untyped_storage().nbytes() for tensor in model.bound.values()} == {tensor.nbytes for tensor in model.bound.values()}
    store.close()
    files.close()


def test_units_land_on_the_device_in_the_same_memory_before_it_decodes_them(tmp_path: Path, io: IOPool) -> None:
    write(tmp_path)
    units, model, files, backend = layouts(tmp_path, RowScaled(carried_as_stored=True)), Model(), FileSet(), SimulatedDevice(1 << 20)
    store = WeightStore(units, ("device", "device"), model, io, files, backend=backend, host_ring_bytes=0, device_ring_bytes=0)
    store.load()
    bound = sum(tensor.nbytes for tensor in model.bound.values())
    assert backend.used_bytes == bound + max(unit.carried_bytes for unit in units)
    store.close()
    files.close()
    backend.close()


def test_a_device_decodes_two_units_at_a_time(tmp_path: Path, io: IOPool) -> None:
    """Memory for decoded numbers is that of the plan; in the ring units stay until they are released."""
    decoded, files, backend, arrived = write(tmp_path), FileSet(), SimulatedDevice(1 << 20), threading.Event()
    units, model = [*layouts(tmp_path, RowScaled(carried_as_stored=True))[:1]], Model()
    units += [dataclasses.replace(units[0], index=index) for index in range(1, DEVICE_SCRATCH_UNITS + 1)]
    ring_bytes = len(units) * units[0].carried_bytes
    store = WeightStore(
        units, ("disk",) * len(units), model, io, files, backend=backend, host_ring_bytes=8 * 4096, device_ring_bytes=ring_bytes,
        on_arrival=arrived.set, poison=True,
    )  # fmt: skip
    store.load()
    store.start()

    def wait(unit: int) -> None:
        for _ in range(100):
            arrived.clear()
            if store._links[-1].is_ready(unit):
                return
            arrived.wait(0.1)
        raise AssertionError(f"unit {unit} never arrived")

    store.in_use(range(len(units)))
    for unit in range(DEVICE_SCRATCH_UNITS):
        wait(unit)
        store.open(unit)
    wait(DEVICE_SCRATCH_UNITS)
    assert not store.is_ready(DEVICE_SCRATCH_UNITS), "there is no memory to decode it"
    store.release(0)
    assert store.is_ready(DEVICE_SCRATCH_UNITS)
    store.open(DEVICE_SCRATCH_UNITS)
    for unit in range(1, DEVICE_SCRATCH_UNITS + 1):
        assert torch.equal(model.bound[unit, "w"].cpu(), decoded[: CUT - 1])
    assert backend.used_bytes == ring_bytes + DEVICE_SCRATCH_UNITS * units[0].decoded_bytes
    store.close()
    files.close()
    backend.close()


def test_a_unit_has_three_sizes(tmp_path: Path, number_format: RowScaled) -> None:
    write(tmp_path)
    first, second = layouts(tmp_path, number_format)
    assert first.stored_bytes == 4096
    assert first.decoded_bytes == -(-4 * (CUT - 1) * COLUMNS // 256) * 256
    stored = (CUT - 1) * COLUMNS, 4 * CUT // 2  # numbers, and the scales of the pairs of rows that are touched
    carried = sum(-(-size // 256) * 256 for size in stored)
    assert first.carried_bytes == (carried if number_format.carried_as_stored else first.decoded_bytes)
    assert (second.carried_bytes < second.decoded_bytes) == number_format.carried_as_stored
    assert not first.plain


def test_random_numbers_decode_to_weights_of_a_common_size() -> None:
    """Those of the formats in the table are tested with the examples by which they are measured."""
    each = RowScaled(carried_as_stored=False)
    encoding = encoded_as(each, each.example(1 << 20))
    decoded = torch.empty(encoding.shape)
    each.decode(sampled_parts(each, encoding), 0, decoded)
    assert decoded.std().item() == pytest.approx(RANDOM_DEVIATION, rel=0.1)
    assert abs(decoded.mean().item()) < 0.1 * RANDOM_DEVIATION


def test_formats_that_can_be_run() -> None:
    assert [name for name in (*FORMATS, "unknown", "") if runs(name)] == [*DTYPE_BYTES, *(each.name for each in LOW_BIT)]
    assert all(each.name == name for name, each in FORMATS.items())


@pytest.mark.parametrize("name", [*DTYPE_BYTES, "mxfp4", "fp8_block", "modelopt"])
def test_norms_are_plain_in_every_format(name: str) -> None:
    assert FORMATS[name].encode(NamedTensor("norm.weight", (64,), torch.bfloat16)) == [NamedTensor("norm.weight", (64,), torch.bfloat16)]


def test_plain_numbers_are_not_decoded() -> None:
    parts: list[Any] = []
    with pytest.raises(EngineError, match="bfloat16"):
        FORMATS["bfloat16"].decode(parts, 0, torch.empty(1))
