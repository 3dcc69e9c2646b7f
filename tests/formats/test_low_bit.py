"""Published low-bit formats in headers: what is found, what is read for which rows, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.pieces import Piece, whole
from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.table import FORMATS as ALL_FORMATS
from flexgen.formats.table import stated_format
from flexgen.models.describe import describe_config, describe_headers
from flexgen.models.units import cut_model
from tests.models.tiny_configs import tiny_config

MXFP4, FP8_BLOCK = ALL_FORMATS["mxfp4"], ALL_FORMATS["fp8_block"]
FORMATS = {"gpt_oss": MXFP4, "deepseek_v3": FP8_BLOCK}
QUANTIZATION = {"gpt_oss": {"quant_method": "mxfp4"}, "deepseek_v3": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
WIDE = {"hidden_size": 320, "intermediate_size": 416, "moe_intermediate_size": 192}  # blocks of 128 that do not come out even


def config_of(model_type: str) -> PreTrainedConfig:
    return tiny_config(model_type, **(WIDE if model_type == "deepseek_v3" else {}))


def encoded_config(model_type: str) -> PreTrainedConfig:
    config = config_of(model_type)
    config.quantization_config = QUANTIZATION[model_type]
    return config


def encoded_headers(model_type: str, shard_bytes: int = 10**9) -> Headers:
    plain = saved_tensors(meta_model(config_of(model_type), torch.bfloat16), torch.bfloat16)
    return headers_of("x", sharded([part for tensor in plain for part in FORMATS[model_type].encode(tensor)], shard_bytes))


@pytest.mark.parametrize("model_type", FORMATS)
def test_what_is_encoded_is_found_again(model_type: str) -> None:
    headers = encoded_headers(model_type)
    decoded = headers.decoded(FORMATS[model_type], torch.bfloat16)
    plain = {tensor.name: tensor for tensor in saved_tensors(meta_model(config_of(model_type), torch.bfloat16), torch.bfloat16)}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in decoded.tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in plain.items()
    }
    assert headers.total_bytes < 0.62 * decoded.total_bytes


@pytest.mark.parametrize("unit_bytes", [2_000, 20_000, None])
@pytest.mark.parametrize("model_type", FORMATS)
def test_units_read_every_stored_byte(model_type: str, unit_bytes: int | None) -> None:
    """Rows of numbers are read by exactly one unit; a row of block scales by each unit that has rows of its block."""
    headers = encoded_headers(model_type, shard_bytes=50_000)
    units = cut_model(encoded_config(model_type), torch.bfloat16, headers, unit_bytes)
    tensors = [tensor for layout in (*units.layouts, units.residents) for tensor in layout.tensors]
    ranges = [(each.path, each.offset, each.nbytes) for tensor in tensors for each in tensor.source.ranges]
    ranges += [(table.path, table.source.ranges[0].offset, table.num_rows * table.row_bytes) for table in units.tables]
    ends = {tensor.path: tensor.offset + tensor.nbytes for tensor in sorted(headers.tensors.values(), key=lambda each: each.offset)}
    times = {path: torch.zeros(end, dtype=torch.int32) for path, end in ends.items()}
    for path, offset, size in ranges:
        times[path][offset : offset + size] += 1
    scales = [name for name in headers.tensors if name.endswith("_scale_inv")]
    counted = {name: set(times[x.path][x.offset : x.offset + x.nbytes].tolist()) for name, x in headers.tensors.items()}
    assert all(found == {1} for name, found in counted.items() if name not in scales)
    assert all(min(found) >= 1 for found in counted.values())


def test_rows_of_blocks() -> None:
    """576 rows of 300 numbers: scales in 5 rows of 3."""
    headers = headers_of("x", sharded(FP8_BLOCK.encode(NamedTensor("layers.0.a_proj.weight", (576, 300), torch.bfloat16)), 10**9))
    decoded = headers.decoded(FP8_BLOCK, torch.bfloat16)
    weight, scales = headers.tensors["layers.0.a_proj.weight"], headers.tensors["layers.0.a_proj.weight_scale_inv"]
    assert (weight.nbytes, scales.shape) == (576 * 300, (5, 3))
    (all_rows,) = whole(decoded.tensors["layers.0.a_proj.weight"])

    def read(start: int, stop: int) -> list[tuple[int, int]]:
        piece = all_rows.narrow(0, start, stop)
        assert piece is not None
        return [(each.offset, each.nbytes) for each in piece.ranges]

    def rows(start: int, stop: int, first: int, last: int) -> list[tuple[int, int]]:
        return [(weight.offset + 300 * start, 300 * (stop - start)), (scales.offset + 12 * first, 12 * (last - first))]

    assert read(0, 576) == rows(0, 576, 0, 5)
    assert read(0, 128) == rows(0, 128, 0, 1)
    assert read(120, 129) == rows(120, 129, 0, 2)
    assert read(128, 256) == rows(128, 256, 1, 2)
    assert read(575, 576) == rows(575, 576, 4, 5)


@pytest.mark.parametrize("model_type", FORMATS)
def test_as_shipped_and_as_computed(model_type: str) -> None:
    config = encoded_config(model_type)
    encoded = describe_config(config, torch.bfloat16, stored=torch.bfloat16, name="x")
    plain = describe_config(config_of(model_type), torch.bfloat16, stored=torch.bfloat16, name="x")
    assert encoded.number_format == FORMATS[model_type].name
    assert FORMATS[model_type].runs
    assert encoded.decoded_bytes == plain.decoded_bytes
    assert encoded.kv_groups == plain.kv_groups
    assert sum(unit.flops_per_token for unit in encoded.units) == sum(unit.flops_per_token for unit in plain.units)
    assert not any(unit.plain for unit in encoded.units if "experts" in unit.name)
    assert {unit.plain for unit in encoded.units if unit.head} == {unit.plain for unit in plain.units if unit.head}
    assert encoded == describe_headers(encoded_headers(model_type), config, torch.bfloat16, name="x")
    assert config.quantization_config == QUANTIZATION[model_type], "the caller's config is not changed"


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "quanto"}, {"bits": 4}],
)
def test_unknown_formats_are_refused_by_name(quantization: dict[str, Any]) -> None:
    config = tiny_config("llama")
    config.quantization_config = quantization
    with pytest.raises(UnsupportedModelError, match=str(quantization.get("quant_method", "unnamed")).strip("[]")):
        stated_format(config)


@pytest.mark.parametrize(
    ("number_format", "tensors", "message"),
    [
        (MXFP4, [NamedTensor("a.weight", (64, 64), torch.bfloat16)], "mxfp4, but none"),
        (MXFP4, [NamedTensor("a_blocks", (2, 3, 4, 15), torch.uint8), NamedTensor("a_scales", (2, 3, 4), torch.uint8)], "but none"),
        (FP8_BLOCK, [NamedTensor("a.weight", (256, 256), torch.float8_e4m3fn)], "a.weight without scales"),
        (
            FP8_BLOCK,
            [NamedTensor("a.weight", (256, 256), torch.float8_e4m3fn), NamedTensor("a.weight_scale_inv", (3, 2), torch.float32)],
            "a.weight has the shape.*no scales of blocks of 128 by 128",
        ),
    ],
)
def test_headers_that_contradict_the_config(number_format: NumberFormat, tensors: list[NamedTensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        headers_of("x", sharded(tensors, 10**9)).decoded(number_format, torch.bfloat16)


def test_plain_headers_stay_as_they_are() -> None:
    stored = StoredTensor(name="a", path=Path("f"), offset=8, nbytes=8, dtype=torch.float16, shape=(4,))
    decoded = Headers(Path("x"), [{"a": stored}]).decoded(None, torch.float32)
    assert decoded.tensors == {"a": stored}
    assert decoded.number_format == "float16"
    assert Piece(stored, 1, (2,), (1,), (0,)).ranges == [(Path("f"), 10, 4, torch.float16)]
