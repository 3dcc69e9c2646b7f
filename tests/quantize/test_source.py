"""Reading the source of a conversion: portions in order, in the dtypes that are rounded, in memory that is used again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexgen.checkpoint.headers import read_header
from flexgen.errors import CheckpointError
from flexgen.quantize import source as source_module
from flexgen.quantize.source import Reader


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes in a file; blocks are small."""
    monkeypatch.setattr(source_module, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(source_module, "_COPIED_BYTES", 1000)
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(50, 64, generator=generator).to(dtype)
        for name, dtype in {"b": torch.bfloat16, "h": torch.float16, "f": torch.float32, "d": torch.float64}.items()
    }
    save_file(made | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}, tmp_path / "w.safetensors")
    return made


def read(path: Path, wanted: list[tuple[str, int]]) -> tuple[dict[int, list[torch.Tensor]], set[int]]:
    """The portions of each tensor, and where in memory they were."""
    headers, found, places = read_header(path), dict[int, list[torch.Tensor]](), set[int]()
    with closing(Reader()) as reader:
        for index, portion in reader.portions((headers[name], granule) for name, granule in wanted):
            found.setdefault(index, []).append(portion.clone())
            places.add(portion.data_ptr())
    return found, places


def test_matrices_come_in_rows_one_after_the_other(tmp_path: Path, numbers: dict[str, torch.Tensor]) -> None:
    wanted = [("b", 8), ("h", 4), ("f", 8), ("d", 8)]
    found, _ = read(tmp_path / "w.safetensors", wanted)
    assert list(found) == [0, 1, 2, 3]
    for index, (name, granule) in enumerate(wanted):
        portions, expected = found[index], numbers[name]
        assert len(portions) > 3
        assert all(len(portion) % granule == 0 for portion in portions[:-1])
        assert torch.equal(torch.cat(portions), expected.float() if name == "d" else expected)


def test_bytes_are_copied_as_they_are(tmp_path: Path, numbers: dict[str, torch.Tensor]) -> None:
    found, _ = read(tmp_path / "w.safetensors", [("d", 0), ("scalar", 0), ("empty", 0), ("b", 0)])
    assert list(found) == [0, 1, 3]
    assert torch.equal(torch.cat(found[0]).view(torch.float64).view(50, 64), numbers["d"])
    assert torch.cat(found[1]).view(torch.float32).item() == 3.5
    assert torch.equal(torch.cat(found[3]).view(torch.bfloat16).view(50, 64), numbers["b"])


def test_memory_is_used_again(tmp_path: Path, numbers: dict[str, torch.Tensor]) -> None:
    found, places = read(tmp_path / "w.safetensors", [("f", 8)])
    assert len(found[0]) > 3
    assert len(places) == 2


def test_a_file_that_became_shorter_is_told(tmp_path: Path, numbers: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    headers = read_header(path)
    path.write_bytes(path.read_bytes()[:-100])
    last = max(headers.values(), key=lambda tensor: tensor.offset)
    with closing(Reader()) as reader, pytest.raises(CheckpointError, match="it was longer when its header was read"):
        list(reader.portions([(last, 8)]))
