"""Embedding rows for a device: read on the host, looked up beside the computing."""

from __future__ import annotations

from pathlib import Path

import torch

from flexgen.checkpoint.sources import ParameterSource, whole
from flexgen.devices.sim import SimulatedDevice
from flexgen.formats.base import StoredTensor
from flexgen.weights.rows import EmbeddingRows, RowTable


def test_rows_on_a_device_are_verified(tmp_path: Path) -> None:
    """The second reading is compared with the first; ids are on the device, sums and rows in host memory."""
    numbers = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "table"
    path.write_bytes(numbers.numpy().tobytes())
    stored = StoredTensor(name="embed", path=path, offset=0, nbytes=numbers.nbytes, dtype=torch.float32, shape=(16, 8))
    source = ParameterSource(name="embed", shape=(16, 8), dtype=torch.float32, pieces=whole(stored))
    table = RowTable(module="embed", source=source, dtype=torch.float32)
    sim = SimulatedDevice(1 << 20)
    rows = EmbeddingRows([table], sim.device, verify=True)
    ids = torch.tensor([3, 9, 3, 0], device=sim.device)
    for _ in range(2):
        found, renumbered = rows.rows("embed", ids)
        assert found.device == renumbered.device == sim.device
        assert torch.equal(found[renumbered].cpu(), numbers[[3, 9, 3, 0]])
    rows.close()
    sim.close()
