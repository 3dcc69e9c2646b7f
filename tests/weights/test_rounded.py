"""Weights that are rounded as they are decoded equal those that are decoded first, in every format and however they are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexgen.base.parallel import Parallel, serially
from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.pieces import Piece, whole
from flexgen.checkpoint.sources import ParameterSource, read_bytes
from flexgen.formats.base import Encoding, EncodingPart, NumberFormat, StoredTensor
from flexgen.kernels.int8.products import RoundedRows, round_rows, rounded_bytes
from flexgen.weights import rounded as module
from flexgen.weights.rounded import RoundedSource
from flexgen.weights.unit import UnitForm, UnitLayout, WantedTensor

ROWS, COLUMNS = 26, 40


class PairScaled(NumberFormat):
    """8-bit integers and a float32 scale for each pair of rows."""

    name = "pair_scaled"
    runs = True

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


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, ParameterSource]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(ROWS, COLUMNS, generator=generator)
    codes = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8, generator=generator)
    stored = {"bfloat16": numbers.bfloat16(), "float16": numbers.half(), "float32": numbers, "float64": numbers.double()}
    stored |= {"coded": codes, "coded_scale": torch.rand(ROWS // 2, generator=generator) / 100}
    save_file(stored, tmp_path / "model.safetensors")
    headers = Checkpoint(tmp_path).decoded(PairScaled(), torch.float32)
    return {
        name: ParameterSource(name=name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        for name, tensor in headers.tensors.items()
    }


def numbers_of(source: ParameterSource | RoundedSource, dtype: torch.dtype) -> torch.Tensor:
    """What a unit of this tensor binds."""
    layout = UnitLayout.of(0, "unit", [WantedTensor(module="m", parameter="w", source=source, dtype=dtype)])
    data = torch.zeros(layout.stored_bytes, dtype=torch.uint8)
    for each, at in zip(source.ranges, layout.tensors[0].stored_at, strict=True):
        data[at : at + each.nbytes] = read_bytes(each.path, each.offset, each.nbytes)
    return layout.tensors[0].numbers(data, UnitForm.STORED, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


@pytest.mark.parametrize("block_rows", [1, 7, 100])
@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (0, 5), (3, 18), (ROWS - 1, ROWS)], ids=str)
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64", "coded"])
def test_rows_equal_those_of_decoded_numbers(
    sources: dict[str, ParameterSource], name: str, start: int, stop: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_rows * COLUMNS * 4)
    source, rows = sources[name].rows(start, stop), stop - start
    decoded = torch.empty(rows, COLUMNS, dtype=torch.float32)
    source.read(decoded)
    wanted = RoundedRows.within(torch.zeros(rounded_bytes(rows, COLUMNS), dtype=torch.int8), rows, COLUMNS)
    round_rows(decoded, wanted)
    found = RoundedRows.within(numbers_of(RoundedSource(source, torch.float32), torch.int8), rows, COLUMNS)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)


def test_two_matrices_that_become_one(sources: dict[str, ParameterSource]) -> None:
    """As the projections of queries and keys do that a model holds as one."""
    first, second = sources["float32"].pieces[0], sources["coded"].pieces[0].narrow(0, 5, ROWS)
    assert second is not None
    joined = ParameterSource(
        name="both", shape=(2 * ROWS - 5, COLUMNS), dtype=torch.float32,
        pieces=(first, Piece(second.tensor, second.first, second.shape, second.strides, (ROWS, 0))),
    )  # fmt: skip
    apart = [RoundedRows.within(numbers_of(RoundedSource(source, torch.float32), torch.int8), rows, COLUMNS) for source, rows in (
        (sources["float32"], ROWS), (sources["coded"].rows(5, ROWS), ROWS - 5),
    )]  # fmt: skip
    found = RoundedRows.within(numbers_of(RoundedSource(joined, torch.float32), torch.int8), 2 * ROWS - 5, COLUMNS)
    assert torch.equal(found.codes, torch.cat([each.codes for each in apart]))
    assert torch.equal(found.scales, torch.cat([each.scales for each in apart]))


def test_a_rounded_unit_takes_half_the_memory(sources: dict[str, ParameterSource]) -> None:
    source = RoundedSource(sources["bfloat16"], torch.bfloat16)
    layout = UnitLayout.of(0, "unit", [WantedTensor(module="m", parameter="w", source=source, dtype=torch.int8)])
    assert not layout.plain
    assert layout.decoded_bytes == layout.to_decode_bytes(UnitForm.STORED) < ROWS * COLUMNS + 512
