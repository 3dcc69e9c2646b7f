"""Embedding rows for a device: read on the host, looked up beside the computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import align_up
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.staging import TENSOR_ALIGNMENT, Staging
from flexgen.formats.base import Encoding, EncodingPart, NumberFormat, StoredTensor
from flexgen.weights.rows import EmbeddingRows, RowTable


class Interleaved(NumberFormat):
    """Rows of 8-bit integers, and a float32 scale for each in another place."""

    name = "interleaved"

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        out.copy_(parts[0].view(out.shape) * parts[1][:, None])


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
    rows = EmbeddingRows([table_in(tmp_path)], Staging(sim), verify=True)
    ids = IDS.to(sim.device)
    for _ in range(2):
        found, renumbered = rows.rows("embed", ids)
        assert found.device == renumbered.device == sim.device
        assert torch.equal(found[renumbered].cpu(), NUMBERS[IDS])
    rows.close()


def test_rows_of_an_encoded_table(tmp_path: Path) -> None:
    """The bytes of a row are gathered from all parts, and counted as stored."""
    integers = torch.randint(-99, 99, (16, 8), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(16, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "table"
    path.write_bytes(b"before" + integers.numpy().tobytes() + scales.numpy().tobytes())
    parts = (
        StoredTensor(name="w", path=path, offset=6, nbytes=128, dtype=torch.int8, shape=(16, 8)),
        StoredTensor(name="s", path=path, offset=134, nbytes=64, dtype=torch.float32, shape=(16,)),
    )
    encoding = Encoding(Interleaved(), (16, 8), tuple(EncodingPart(part, 1) for part in parts))
    whole_tensor = StoredTensor(
        name="embed", path=path, offset=0, nbytes=256, dtype=torch.bfloat16, shape=(16, 8), encoding=encoding
    )  # fmt: skip
    source = ParameterSource(name="embed", shape=(16, 8), dtype=torch.bfloat16, pieces=whole(whole_tensor))
    assert source.rows_apart
    table = RowTable(module="embed", source=source, dtype=torch.bfloat16)
    assert table.row_bytes == 8 + 4
    rows = EmbeddingRows([table], Staging(None), verify=True)
    for _ in range(2):
        found, renumbered = rows.rows("embed", IDS)
        assert torch.equal(found[renumbered], (integers * scales[:, None]).to(torch.bfloat16)[IDS])
    assert rows.bytes_gathered == 2 * 3 * 12
    rows.close()


def test_rows_that_lie_together_are_not_gathered(tmp_path: Path) -> None:
    source = table_in(tmp_path).source
    assert isinstance(source, ParameterSource)
    assert source.rows_apart
    (piece,) = source.pieces
    shared = Encoding(Interleaved(), (16, 8), (EncodingPart(piece.tensor, 1), EncodingPart(piece.tensor, 2)))
    for change in (replace(piece, strides=(1, 16)), replace(piece, tensor=replace(piece.tensor, encoding=shared))):
        assert not replace(source, pieces=(change,)).rows_apart
    assert not replace(source, pieces=(piece, piece)).rows_apart
    assert not replace(source, convert=lambda tensors: tensors[0]).rows_apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_known_ids_cross_the_link_without_waiting(tmp_path: Path, sim: SimulatedDevice, dtype: torch.dtype) -> None:
    rows = EmbeddingRows([table_in(tmp_path, dtype)], Staging(sim))
    known = [(ids.to(sim.device), ids) for ids in (IDS, IDS + 1, IDS + 2)]
    waited = sim.synchronisations
    gathered = [rows.rows("embed", there, ids) for there, ids in known]
    assert sim.synchronisations == waited
    sizes = (3 * 8 * dtype.itemsize, IDS.nbytes)  # three different rows each time, and their numbers
    assert sim.bytes_in == 3 * sum(align_up(size, TENSOR_ALIGNMENT) for size in sizes)
    for number, (found, renumbered) in enumerate(gathered):
        assert torch.equal(found[renumbered].cpu(), NUMBERS[IDS + number].to(dtype))
    there = IDS.to(sim.device)
    waited = sim.synchronisations
    rows.rows("embed", there)
    assert sim.synchronisations > waited, "unknown ids are copied to the host"
    rows.close()
