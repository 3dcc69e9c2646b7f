"""Embedding rows for a device: read on the host, looked up beside the computing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexgen.checkpoint.sources import ParameterSource, whole
from flexgen.devices.sim import SimulatedDevice
from flexgen.formats.base import StoredTensor
from flexgen.weights.rows import EmbeddingRows, RowTable

NUMBERS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([3, 9, 3, 0])


@pytest.fixture
def sim() -> Iterator[SimulatedDevice]:
    device = SimulatedDevice(1 << 20)
    yield device
    device.close()


def table_in(folder: Path, dtype: torch.dtype = torch.float32) -> RowTable:
    path = folder / "table"
    path.write_bytes(NUMBERS.numpy().tobytes())
    stored = StoredTensor(name="embed", path=path, offset=0, nbytes=NUMBERS.nbytes, dtype=torch.float32, shape=(16, 8))
    source = ParameterSource(name="embed", shape=(16, 8), dtype=torch.float32, pieces=whole(stored))
    return RowTable(module="embed", source=source, dtype=dtype)


def test_rows_on_a_device_are_verified(tmp_path: Path, sim: SimulatedDevice) -> None:
    """The second reading is compared with the first; ids are on the device, sums and rows in host memory."""
    rows = EmbeddingRows([table_in(tmp_path)], sim, verify=True)
    ids = IDS.to(sim.device)
    for _ in range(2):
        found, renumbered = rows.rows("embed", ids)
        assert found.device == renumbered.device == sim.device
        assert torch.equal(found[renumbered].cpu(), NUMBERS[IDS])
    rows.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_known_ids_cross_the_link_without_waiting(tmp_path: Path, sim: SimulatedDevice, dtype: torch.dtype) -> None:
    rows = EmbeddingRows([table_in(tmp_path, dtype)], sim)
    waited = sim.synchronisations
    gathered = [rows.rows("embed", ids.to(sim.device), ids) for ids in (IDS, IDS + 1, IDS + 2)]
    assert sim.synchronisations == waited
    assert sim.bytes_in == 3 * (3 * 8 * dtype.itemsize + IDS.nbytes), "three different rows each time, and their numbers"
    for number, (found, renumbered) in enumerate(gathered):
        assert torch.equal(found[renumbered].cpu(), NUMBERS[IDS + number].to(dtype))
    rows.rows("embed", IDS.to(sim.device))
    assert sim.synchronisations > waited, "unknown ids are copied to the host"
    rows.close()
