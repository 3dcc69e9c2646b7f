"""The weight store with a fake skeleton: bound tensors equal the file's, under every mixture of homes, pass after pass."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import align_up
from flexgen.base.ring import ByteRing
from flexgen.devices.sim import SimulatedDevice
from flexgen.errors import EngineError, StorageError
from flexgen.formats.base import StoredRange
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.plan.policy import HOME_ALIGNMENT, SCRATCH_UNITS
from flexgen.weights.store import WeightStore
from flexgen.weights.unit import UnitLayout, WantedTensor

NUM_UNITS = 9


@dataclass(frozen=True)
class Stored:
    """A tensor in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset: int
    is_view: bool = True
    carried_as_stored: bool = False
    columns_first: bool = False

    @property
    def ranges(self) -> list[StoredRange]:
        nbytes = torch.Size(self.shape).numel() * self.dtype.itemsize
        return [StoredRange(self.path, self.offset, nbytes, self.dtype)]

    def assemble(self, raws: Sequence[torch.Tensor], out: torch.Tensor, parallel: Parallel = serially) -> None:
        out.copy_(raws[0].view(self.shape))


class FakeModel:
    """Remembers what is bound, and that everything is unbound before it is bound again."""

    def __init__(self) -> None:
        self.bound: dict[tuple[int, str], torch.Tensor] = {}

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None:
        assert (unit, parameter) not in self.bound
        self.bound[unit, parameter] = tensor

    def unbind(self, unit: int, module: str, parameter: str) -> None:
        del self.bound[unit, parameter]


@dataclass
class Written:
    """A file of units, their layouts, and what they hold, in float32."""

    layouts: list[UnitLayout]
    values: dict[tuple[int, str], torch.Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Units of unequal sizes; each has a plain tensor, one at an odd offset, and one that is cast (every third only casts)."""
    path = tmp_path_factory.mktemp("weights") / "file"
    content, layouts, values = bytearray(b"header!"), [], {}
    generator = torch.Generator().manual_seed(0)
    for unit in range(NUM_UNITS):
        names = ["cast"] if unit % 3 == 2 else ["plain", "odd", "cast"]
        wanted = []
        for name in names:
            dtype = torch.float16 if name == "cast" else torch.float32
            value = torch.randn(5 + unit, 100 * (unit + 1), generator=generator).to(dtype)
            content += bytes((1 if name == "odd" else -len(content)) % 8)
            source = Stored(tuple(value.shape), dtype, path, len(content))
            wanted.append(WantedTensor(module="m", parameter=name, source=source, dtype=torch.float32))
            content += value.numpy().tobytes()
            values[unit, name] = value.float()
        layouts.append(UnitLayout.of(unit, f"unit {unit}", wanted))
    path.write_bytes(content)
    return Written(layouts, values)


class Opened:
    """A store with all that it needs."""

    def __init__(self, written: Written, homes: list[str], device: bool, *, slots: int = 3, runs_ahead: bool = True) -> None:
        self.written, self.model = written, FakeModel()
        self.backend = SimulatedDevice(8 << 20) if device else None
        self.io, self.files, self.arrived = IOPool(2), FileSet(), threading.Event()
        self.store = WeightStore(
            written.layouts, homes, self.model, self.io, self.files, backend=self.backend,
            host_ring_bytes=slots * max(layout.stored_bytes for layout in written.layouts),
            device_ring_bytes=slots * max(layout.carried_bytes for layout in written.layouts), on_arrival=self.arrived.set,
            runs_ahead=runs_ahead, poison=True,
        )  # fmt: skip

    def __enter__(self) -> "Opened":
        self.store.load()
        self.store.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        self.io.close()
        self.files.close()
        if self.backend is not None:
            self.backend.close()

    def wait(self, unit: int) -> None:
        """Until a unit is ready, as the sweep does."""
        for _ in range(100):
            self.arrived.clear()
            if self.store.is_ready(unit):
                return
            self.arrived.wait(0.1)
        raise AssertionError(f"unit {unit} never arrived")

    def check(self, unit: int) -> None:
        names = [tensor.parameter for tensor in self.written.layouts[unit].tensors]
        for name in names:
            assert torch.equal(self.model.bound[unit, name].cpu(), self.written.values[unit, name])


MIXTURES = {
    "cpu, host": (["host"] * NUM_UNITS, False),
    "cpu, disk": (["disk"] * NUM_UNITS, False),
    "cpu, encoded": (["encoded"] * NUM_UNITS, False),
    "cpu, mixed": (["host", "disk", "disk"] * 3, False),
    "cpu, mixed, encoded": (["host", "encoded", "disk"] * 3, False),
    "sim, device": (["device"] * NUM_UNITS, True),
    "sim, host": (["host"] * NUM_UNITS, True),
    "sim, encoded": (["encoded"] * NUM_UNITS, True),
    "sim, mixed, encoded": (["encoded", "host", "disk"] * 3, True),
    "sim, disk": (["disk"] * NUM_UNITS, True),
    "sim, mixed": (["device", "host", "disk", "disk", "host", "device", "host", "disk", "device"], True),
}


@pytest.fixture(params=list(MIXTURES))
def opened(request: pytest.FixtureRequest, written: Written) -> Iterator[Opened]:
    homes, device = MIXTURES[request.param]
    with Opened(written, homes, device) as opened:
        yield opened


@pytest.mark.parametrize("lag", [0, 1])
def test_bound_tensors_are_the_files(opened: Opened, lag: int) -> None:
    """`lag`: units that stay open behind the front, as when one micro-batch is slower."""
    for _ in range(4):
        for unit in range(NUM_UNITS):
            opened.wait(unit)
            opened.store.open(unit)
            opened.store.open(unit)  # a second micro-batch enters
            for each in range(max(unit - lag, 0), unit + 1):
                opened.check(each)
            if unit >= lag:
                opened.store.release(unit - lag)
        for unit in range(NUM_UNITS - lag, NUM_UNITS):
            opened.store.release(unit)
    homes = opened.store._homes
    streamed = {unit for unit, home in enumerate(homes) if home in ("encoded", "disk") or (opened.backend and home == "host")}
    assert not any(unit in streamed for unit, _ in opened.model.bound)


def test_a_released_unit_is_poisoned(opened: Opened) -> None:
    """A use after release shows as NaN, unless the next unit has arrived in its place.  What stays encoded holds its plain tensors."""
    opened.wait(0)
    opened.store.open(0)
    kept = {name: tensor for (unit, name), tensor in opened.model.bound.items() if unit == 0}
    resident = 0 not in opened.store._streamed
    opened.store.release(0)
    for name, tensor in kept.items():
        stays = resident or (opened.store._stays_encoded(0) and name == "plain")
        assert torch.equal(tensor.cpu(), opened.written.values[0, name]) == stays


ONE_FROM_DISK = {
    "cpu, one from disk": (["host"] * (NUM_UNITS - 1) + ["disk"], False),
    "sim, one from disk": (["device"] * (NUM_UNITS - 1) + ["disk"], True),
}


@pytest.mark.parametrize("mixture", ["cpu, disk", "cpu, mixed, encoded", "sim, host", "sim, disk", "sim, mixed", *ONE_FROM_DISK])
def test_links_that_do_not_run_ahead_bring_what_is_asked_for(mixture: str, written: Written) -> None:
    """Each unit once in every pass, and none before it is asked for; also where there is only one."""
    homes, device = (MIXTURES | ONE_FROM_DISK)[mixture]
    with Opened(written, homes, device, runs_ahead=False) as opened:
        links, loaded = opened.store._links, opened.io.bytes_read
        for _ in range(3):
            for unit in range(NUM_UNITS):
                opened.wait(unit)
                opened.store.open(unit)
                opened.check(unit)
                opened.store.release(unit)
                assert not any(link._arrivals for link in links)
        time.sleep(0.05)  # for what must not come
        assert not any(link._arrivals for link in links)
        from_disk = [layout for layout, home in zip(written.layouts, homes, strict=True) if home == "disk"]
        assert opened.io.bytes_read - loaded == 3 * sum(extent.size for layout in from_disk for extent in layout.extents)


@pytest.mark.parametrize("home", ["encoded", "disk"])
def test_no_more_units_are_decoded_at_a_time_than_there_is_memory_for(written: Written, home: str) -> None:
    with Opened(written, [home] * NUM_UNITS, False) as opened:
        for unit in range(SCRATCH_UNITS):
            opened.wait(unit)
            opened.store.open(unit)
        assert not opened.store.is_ready(SCRATCH_UNITS)
        assert opened.store.is_ready(SCRATCH_UNITS - 1), "what is open is ready"
        opened.store.release(0)
        opened.wait(SCRATCH_UNITS)
        opened.store.open(SCRATCH_UNITS)
        for unit in range(1, SCRATCH_UNITS + 1):
            opened.check(unit)
        largest = max(layout.decoded_bytes for layout in written.layouts)
        pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in decoded_of(opened)}
        assert len(pieces) <= SCRATCH_UNITS
        assert max(pieces.values()) <= largest


def decoded_of(opened: Opened) -> list[torch.Tensor]:
    return [tensor for (_, name), tensor in opened.model.bound.items() if name == "cast"]


def test_held_bytes_are_those_of_each_home(written: Written) -> None:
    first, second, third = written.layouts[:3]
    homes = ["host", "encoded", "disk", *["disk"] * (NUM_UNITS - 3)]
    from_disk = third.stored_bytes + sum(layout.stored_bytes for layout in written.layouts[3:])
    on_cpu, beside_device = (Opened(written, homes, device) for device in (False, True))
    assert on_cpu.store.held_bytes() == {"host": first.decoded_bytes, "encoded": second.stored_bytes, "disk": from_disk}
    pages = align_up(first.carried_bytes, HOME_ALIGNMENT)
    assert beside_device.store.held_bytes() == {"host": pages, "encoded": second.stored_bytes, "disk": from_disk}
    for each in (on_cpu, beside_device):
        with each:
            pass


def test_homes_beside_a_device_are_pages_of_their_own(written: Written) -> None:
    """From which the disk is read directly, and as many bytes as the store says that it holds."""
    with Opened(written, ["host", "encoded", "host"] * 3, True) as opened:
        homes = sorted((each.data.data_ptr(), each.data.nbytes) for each in opened.store._host_homes.values())
        assert len(homes) == NUM_UNITS
        assert not any(at % HOME_ALIGNMENT for at, _ in homes)
        assert all(at + size <= following for (at, size), (following, _) in itertools.pairwise(homes))
        assert opened.backend is not None
        to_decode = max(layout.carried_bytes for layout in written.layouts[1::3])
        assert opened.backend.host.size_bytes == sum(opened.store.held_bytes().values()) + align_up(to_decode, HOME_ALIGNMENT)


def test_the_rings_stay_within_their_capacity(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    most: dict[int, int] = {}
    really = ByteRing.take

    def take(ring: ByteRing, size_bytes: int):
        slot = really(ring, size_bytes)
        if slot is not None:
            assert slot.offset + slot.size <= ring.capacity_bytes
            held = sum(each.size for each in ring._slots)
            most[id(ring)] = max(most.get(id(ring), 0), held)
            assert held <= ring.capacity_bytes
        return slot

    monkeypatch.setattr(ByteRing, "take", take)
    with Opened(written, ["disk"] * NUM_UNITS, True, slots=2) as opened:
        for unit in range(NUM_UNITS):
            opened.wait(unit)
            opened.store.open(unit)
            opened.store.release(unit)
        assert opened.backend is not None
        assert opened.backend.used_bytes == opened.store._links[-1].ring.capacity_bytes
    assert len(most) == 2


@pytest.mark.parametrize("device", [False, True])
def test_a_failing_read_is_raised_in_the_sweep(written: Written, monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    really, limit = os.preadv, written.layouts[4].extents[0].offset

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= limit:
            raise OSError(errno.EIO, "Input/output error")
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with Opened(written, ["disk"] * NUM_UNITS, device) as opened:

        def sweep() -> None:
            for unit in range(5):
                opened.wait(unit)
                opened.store.open(unit)
                opened.store.release(unit)

        with pytest.raises(StorageError, match="Input/output error"):
            sweep()


@pytest.mark.parametrize("device", [False, True])
def test_a_file_that_vanished_is_raised_in_the_sweep(written: Written, monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    monkeypatch.setattr(FileSet, "__getitem__", lambda self, path: (_ for _ in ()).throw(StorageError(f"cannot open {path}")))
    with Opened(written, ["disk"] * NUM_UNITS, device) as opened, pytest.raises(StorageError, match="cannot open"):
        opened.wait(0)


@pytest.mark.parametrize("device", [False, True])
def test_a_unit_that_cannot_fit_its_ring(written: Written, device: bool) -> None:
    with Opened(written, ["disk"] * NUM_UNITS, device) as opened:
        pass
    opened = Opened(written, ["disk"] * NUM_UNITS, device)
    opened.store._links[0].ring = ByteRing(100)
    with opened, pytest.raises(EngineError, match="cannot fit"):
        opened.wait(0)


@pytest.mark.parametrize("device", [False, True])
def test_close_while_reads_are_in_flight(written: Written, monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    begun, may_go_on, really = threading.Event(), threading.Event(), os.preadv

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        may_go_on.wait(10)
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    with Opened(written, ["disk"] * NUM_UNITS, device) as opened:
        assert begun.wait(10)
        threads = [link.thread for link in opened.store._links]
        threading.Timer(0.05, may_go_on.set).start()
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("device", [False, True])
def test_a_signal_while_a_link_starts(written: Written, monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    opened = Opened(written, ["disk"] * NUM_UNITS, device)

    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened.store.start()
    opened.__exit__()


@pytest.mark.parametrize("device", [False, True])
def test_arrivals_are_announced_without_the_lock(written: Written, device: bool) -> None:
    """Whoever is told may look whether the unit is ready, in another thread and under a lock of its own."""
    opened, mine = Opened(written, ["disk"] * NUM_UNITS, device), threading.Condition()

    def on_arrival() -> None:
        with mine:
            mine.notify_all()

    opened.store._state._on_arrival = on_arrival
    with opened:
        for unit in range(NUM_UNITS):
            with mine:
                assert mine.wait_for(lambda unit=unit: opened.store.is_ready(unit), timeout=20)
            opened.store.open(unit)
            opened.check(unit)
            opened.store.release(unit)


def test_units_come_in_order_only(written: Written) -> None:
    with Opened(written, ["disk"] * NUM_UNITS, False) as opened:
        opened.wait(0)
        with pytest.raises(EngineError, match="unit 1 is wanted, unit 0 is next"):
            opened.store.is_ready(1)
