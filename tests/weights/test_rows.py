"""Embedding rows for a device: read on the host, looked up beside the computing."""

from __future__ import annotations

from pathlib import Path

import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.weights.rows import EmbeddingRows, RowTable


def test_rows_on_a_device_are_verified(tmp_path: Path) -> None:
    """The second reading is compared with the first; ids are on the device, sums and rows in host memory."""
    numbers = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "table"
    path.write_bytes(numbers.numpy().tobytes())
    table = RowTable(
        module="embed", path=path, offset=0, num_rows=16, row_elements=8, stored_dtype=torch.float32, dtype=torch.float32
    )  # fmt: skip
    sim = SimulatedDevice(1 << 20)
    rows = EmbeddingRows([table], sim.device, verify=True)
    ids = torch.tensor([3, 9, 3, 0], device=sim.device)
    for _ in range(2):
        found, renumbered = rows.rows("embed", ids)
        assert found.device == renumbered.device == sim.device
        assert torch.equal(found[renumbered].cpu(), numbers[[3, 9, 3, 0]])
    rows.close()
    sim.close()
