"""A model as numbers: every stored byte is counted once, and a config alone says what its checkpoint would."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.checkpoint.files import Checkpoint
from flexgen.errors import UnsupportedModelError
from flexgen.io.aligned import ALIGNMENT
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.models.describe import describe_config, describe_headers
from flexgen.weights.unit import UnitLayout
from tests.models.test_parity import REFUSED, SUPPORTED, VARIANTS
from tests.models.tiny_configs import tiny_config

SHARD_BYTES = 40_000
MAX_GAP_BYTES = 128 << 10

Interval = tuple[Path, int, int]  # (file, start, stop)


def config_of(name: str) -> PreTrainedConfig:
    model_type, changes = VARIANTS.get(name, (name, {}))
    return tiny_config(model_type, **changes)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same bytes as disjoint intervals."""
    found: list[Interval] = []
    for path, start, stop in sorted(intervals):
        if found and found[-1][0] == path and start <= found[-1][2]:
            found[-1] = path, found[-1][1], max(stop, found[-1][2])
        else:
            found.append((path, start, stop))
    return found


def length(intervals: Iterable[Interval]) -> int:
    return sum(stop - start for _, start, stop in merged(intervals))


def needed(layouts: Iterable[UnitLayout]) -> list[Interval]:
    """The stored bytes that become the tensors of the layouts."""
    pieces = [piece for layout in layouts for tensor in layout.tensors for piece in tensor.source.pieces]
    return merged((piece.path, piece.offset, piece.offset + piece.nbytes) for piece in pieces)


def pages(intervals: Iterable[Interval]) -> list[Interval]:
    """The whole pages that hold these bytes."""
    return merged((path, start - start % ALIGNMENT, stop + -stop % ALIGNMENT) for path, start, stop in intervals)


def check_every_byte_is_counted_once(model: AssembledModel) -> None:
    spec = model.spec
    placed = length(needed(model.layouts)) + length(needed([model.residents])) + spec.embedding_bytes + model.unused_bytes
    assert placed == model.total_bytes
    # what is read beyond that: the rest of pages, and gaps that are not worth another read
    for unit, layout in zip(spec.units, model.layouts, strict=True):
        touched = pages(needed([layout]))
        gaps = len(touched) - len(layout.extents)
        assert unit.disk_bytes % ALIGNMENT == 0
        assert 0 <= unit.disk_bytes - length(touched) <= gaps * MAX_GAP_BYTES
    # decoded tensors begin at multiples of 256 bytes
    tensors = [tensor for layout in (*model.layouts, model.residents) for tensor in layout.tensors]
    padding = spec.decoded_bytes + spec.resident_bytes - sum(tensor.nbytes for tensor in tensors)
    assert 0 <= padding <= 256 * (len(tensors) + 1)
    assert spec.embedding_bytes + sum(tensor.nbytes for tensor in tensors) + model.unused_bytes == model.total_bytes


@pytest.mark.parametrize(
    ("model_type", "numbers"),
    [("llama", 0), ("mixtral", 2 * 4 * 192), ("gpt_oss", 2 * 4 * 192), ("qwen3_moe", 2 * 4 * 64), ("llama4_text", 2 * 4 * 192)],
)
def test_numbers_of_a_tokens_experts(model_type: str, numbers: int) -> None:
    """Two experts with four times the results of their first products, which are twice as wide as what is between the products."""
    config = tiny_config(model_type, num_experts_per_tok=2) if model_type != "llama" else tiny_config("llama")
    assert describe_config(config, torch.float32, stored=torch.float32, name="x").expert_numbers_per_token == numbers


@pytest.mark.parametrize(
    ("model_type", "passes"),
    # How often a number between the products is read or written: silu and a product; and with two clamps, a factor and one more.
    [("mixtral", 2 + 3), ("gpt_oss", 2 + 2 + 2 + 2 + 3 + 2 + 3)],
)
def test_bytes_of_a_tokens_experts(model_type: str, passes: int) -> None:
    """Each of two experts also has its output read, and a sum in float32 read and written."""
    config = tiny_config(model_type, num_experts_per_tok=2)
    spec = describe_config(config, torch.float32, stored=torch.float32, name="x")
    width, hidden, layers = config.intermediate_size, config.hidden_size, config.num_hidden_layers
    assert spec.expert_bytes_per_token == layers * 2 * 4 * (passes * width + 3 * hidden)
    assert describe_config(tiny_config("llama"), torch.float32, stored=torch.float32, name="x").expert_bytes_per_token == 0


@pytest.mark.matrix(20, always=["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "opt", "llama-tied"])
@pytest.mark.parametrize("name", [*SUPPORTED, *VARIANTS])
def test_bytes_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    write_random_checkpoint(config_of(name), tmp_path, torch.float32, shard_bytes=SHARD_BYTES)
    model = assemble_model(tmp_path, config_of(name), torch.float32)
    check_every_byte_is_counted_once(model)
    alone = describe_config(config_of(name), torch.float32, stored=torch.float32, name=tmp_path.name, shard_bytes=SHARD_BYTES)
    assert alone == model.spec
    assert model.spec.number_format == model.spec.dtype == "float32"


def test_dtypes_of_files_and_of_computing(tmp_path: Path) -> None:
    write_random_checkpoint(tiny_config("llama"), tmp_path, torch.float16)
    headers = Checkpoint(tmp_path)
    same, other, wide = (
        describe_headers(headers, tiny_config("llama"), dtype, name="x") for dtype in (torch.float16, torch.bfloat16, torch.float32)
    )
    assert {each.number_format for each in (same, other, wide)} == {"float16"}
    assert [each.dtype for each in (same, other, wide)] == ["float16", "bfloat16", "float32"]
    assert [any(unit.plain for unit in each.units) for each in (same, other, wide)] == [True, False, False]
    assert other.decoded_bytes == same.decoded_bytes
    assert wide.kv_bytes_per_token == 2 * same.kv_bytes_per_token
    assert wide.embedding_bytes == 2 * same.embedding_bytes
    assert wide.embedding_row_bytes == same.embedding_row_bytes, "rows are read as they are stored"


def test_headers_alone_take_stored_copies_of_tied_weights_for_equal(tmp_path: Path) -> None:
    """What OPT's repositories look like: the head is stored beside the embedding that it is tied to."""
    write_random_checkpoint(tiny_config("llama", tie_word_embeddings=False), tmp_path, torch.float32)
    tied = tiny_config("llama", tie_word_embeddings=True)
    here = assemble_model(tmp_path, tied, torch.float32).spec
    assert here.embedding_bytes > 0, "random copies differ, so both are used"

    class Elsewhere(Checkpoint):
        readable = False

    headers = Elsewhere(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert describe_headers(headers, tied, torch.float32, name="x").embedding_bytes == 0


@pytest.mark.parametrize("model_type", ["minimax", "lfm2", "gemma3n", "doge"])
def test_refused_types_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{model_type}'.*{REFUSED[model_type]}"):
        describe_config(tiny_config(model_type), torch.float32, stored=torch.float32, name="x")
