"""Random checkpoints: complete, loadable by transformers and by us, and what they are said to be."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexgen.checkpoint import dummy, random_tensors
from flexgen.checkpoint.dummy import RandomFiles, size_on_disk, write_random_checkpoint
from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.parameters import ModelSources, parameter_sources
from flexgen.errors import StorageError, UnsupportedModelError
from flexgen.formats.base import NumberFormat
from flexgen.formats.mxfp4 import MXFP4
from flexgen.formats.table import stated_format
from flexgen.hub.model_files import INDEX_FILE, SINGLE_FILE
from flexgen.io.aligned import ALIGNMENT, Extent
from tests.models.tiny_configs import tiny_config


def sources_of(folder: Path, config: PreTrainedConfig) -> ModelSources:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return parameter_sources(model, Checkpoint(folder))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return tensors


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "mixtral", "deepseek_v3", "gpt_oss", "gemma3_text", "hrm_text", "minimax"])
def test_loads_here_and_in_transformers(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    written = write_random_checkpoint(config, tmp_path, torch.bfloat16, shard_bytes=40_000)
    expected, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values()), "nothing is missing, unexpected or of another shape"
    found = sources_of(tmp_path, AutoConfig.from_pretrained(tmp_path))
    state = expected.state_dict()
    assert found.parameters.keys() | found.tied.keys() == state.keys()
    assert not found.unexpected
    for name, source in found.parameters.items():
        out = torch.full(source.shape, 77, dtype=state[name].dtype)
        source.read(out)
        assert torch.equal(out, state[name]), name
    assert written == Checkpoint(tmp_path).total_bytes == json.loads((tmp_path / INDEX_FILE).read_text())["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("model_type", "quantization", "encoded"),
    [
        ("gpt_oss", {"quant_method": "mxfp4"}, "mlp.experts.gate_up_proj_blocks"),
        ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "mlp.gate_proj.weight_scale_inv"),
    ],
)
def test_weights_in_the_format_that_the_config_states(
    model_type: str, quantization: dict[str, Any], encoded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_tensors, "_SAMPLED_BYTES", 3000)  # so that rows are repeated
    config = tiny_config(model_type)
    config.quantization_config = quantization
    written = write_random_checkpoint(config, tmp_path, torch.bfloat16)
    assert written == Checkpoint(tmp_path).total_bytes
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == quantization
    stored, number_format = tensors_of(tmp_path), stated_format(config)
    assert any(name.endswith(encoded) for name in stored)
    assert number_format is not None
    found = Checkpoint(tmp_path).decoded(number_format, torch.bfloat16)
    scales = {name for name in stored if name.endswith(("_scale_inv", "_scales"))}
    assert len([tensor for tensor in found.tensors.values() if tensor.encoding is not None]) == len(scales) > 0
    for name, tensor in stored.items():
        assert tensor.float().isfinite().all(), name
        if name.endswith("_blocks"):
            assert tensor.float().std() > 60, "random bytes"
        if tensor.dtype == torch.float8_e4m3fn:
            assert tensor.float().std().item() == pytest.approx(1.0, rel=0.2)


def test_config_names_the_class_and_the_dtype(tmp_path: Path) -> None:
    config = tiny_config("llama")
    write_random_checkpoint(config, tmp_path, torch.float16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["architectures"], written["dtype"]) == (["LlamaForCausalLM"], "float16")
    assert config.architectures is None, "the caller's config is not changed"


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    config = tiny_config("llama")
    total_bytes = write_random_checkpoint(config, tmp_path / "several", torch.bfloat16, shard_bytes=30_000)
    shards = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) >= total_bytes / 30_000
    sizes = dict.fromkeys(shards, 0)
    for tensor in Checkpoint(tmp_path / "several").tensors.values():
        sizes[tensor.path.name] += tensor.nbytes
    assert max(sizes.values()) <= 30_000
    assert write_random_checkpoint(config, tmp_path / "one", torch.bfloat16) == total_bytes
    assert [path.name for path in (tmp_path / "one").iterdir() if "model" in path.name] == [SINGLE_FILE]


def test_numbers(tmp_path: Path) -> None:
    write_random_checkpoint(tiny_config("gpt2", n_embd=256), tmp_path, torch.float32)
    for name, tensor in tensors_of(tmp_path).items():
        if tensor.ndim > 1:
            assert abs(tensor.std().item() - 0.02) < 0.002, name
            assert abs(tensor.mean().item()) < 0.002, name
        else:
            assert (tensor == (0 if "bias" in name else 1)).all(), name


def test_layers_and_rows_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_tensors, "_BLOCK_ELEMENTS", 1009)  # a matrix of 96 x 64 takes six
    write_random_checkpoint(tiny_config("mixtral"), tmp_path, torch.float32)
    tensors = [tensor for tensor in tensors_of(tmp_path).values() if tensor.ndim > 1]
    assert len({tensor.flatten()[:32].numpy().tobytes() for tensor in tensors}) == len(tensors)
    assert all(len(torch.unique(tensor, dim=0)) == len(tensor) for tensor in tensors)


def test_seeds(tmp_path: Path) -> None:
    config = tiny_config("llama")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(config, tmp_path / name, torch.bfloat16, seed=seed)
    a, b, c = ((tmp_path / name / SINGLE_FILE).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    write_random_checkpoint(config, tmp_path, torch.bfloat16)
    assert sources_of(tmp_path, config).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tensors_of(tmp_path)


def test_files_are_their_owners(tmp_path: Path) -> None:
    write_random_checkpoint(tiny_config("llama"), tmp_path, torch.bfloat16, shard_bytes=50_000)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_text("precious")
    with pytest.raises(StorageError, match="could not be written"):
        write_random_checkpoint(tiny_config("llama"), tmp_path, torch.bfloat16)
    (tmp_path / SINGLE_FILE).unlink()
    (tmp_path / SINGLE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        write_random_checkpoint(tiny_config("llama"), tmp_path, torch.bfloat16)
    assert not (tmp_path / "elsewhere").exists()


def test_tensors_larger_than_the_write_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    write_random_checkpoint(config, tmp_path / "large", torch.bfloat16)
    monkeypatch.setattr(dummy, "_BUFFER_BYTES", 4096)
    write_random_checkpoint(config, tmp_path / "small", torch.bfloat16)
    assert (tmp_path / "large" / SINGLE_FILE).read_bytes() == (tmp_path / "small" / SINGLE_FILE).read_bytes()


def extent(path: Path, start: int, stop: int) -> Extent:
    return Extent(path=path, offset=start, size=stop - start, position=0)


def read(files: RandomFiles, path: Path, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    with contextlib.closing(files.open_file(path, direct=False)) as file:
        file.read_into(memoryview(data), start)
    return bytes(data)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_what_is_not_written_reads_the_same(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_tensors, "_BLOCK_ELEMENTS", 10_007)
    monkeypatch.setattr(random_tensors, "_SAMPLED_BYTES", 3000)
    config = tiny_config(model_type)
    if model_type == "gpt_oss":
        config.quantization_config = {"quant_method": "mxfp4"}
    write_random_checkpoint(config, tmp_path / "whole", torch.bfloat16, shard_bytes=60_000)
    files = RandomFiles(config, tmp_path / "holes", torch.bfloat16, shard_bytes=60_000)
    paths = sorted((tmp_path / "holes").glob("*.safetensors"))
    assert len(paths) > 2
    files.write([extent(paths[0], 8192, 16384), extent(paths[0], 12288, 20480), extent(paths[1], 4096, 1 << 20)])
    for path in paths:
        wanted = (tmp_path / "whole" / path.name).read_bytes()
        assert path.stat().st_size == len(wanted)
        for start, stop in [(0, len(wanted)), (8192, 20480), (4000, 9000), (20000, 21000), (len(wanted) - 5, len(wanted) + 100)]:
            if start >= len(wanted):
                continue
            assert read(files, path, start, stop)[: len(wanted) - start] == wanted[start:stop], (path.name, start, stop)
    assert paths[0].read_bytes()[8192:20480] == (tmp_path / "whole" / paths[0].name).read_bytes()[8192:20480]
    for path in paths:  # a later read past the file system's cache of what was written finds the header
        assert path.read_bytes()[:100] == (tmp_path / "whole" / path.name).read_bytes()[:100]


def test_a_format_without_random_numbers_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    monkeypatch.setattr(MXFP4, "sample", NumberFormat.sample)
    with pytest.raises(UnsupportedModelError, match="random weights in mxfp4 cannot be made"):
        RandomFiles(config, tmp_path / "model", torch.bfloat16)
    assert not (tmp_path / "model").exists()


def test_what_is_not_written_takes_no_room(tmp_path: Path) -> None:
    files = RandomFiles(tiny_config("llama", hidden_size=512, vocab_size=4096), tmp_path, torch.float32)
    path = tmp_path / SINGLE_FILE
    assert path.stat().st_size >= files.total_bytes > 30 * ALIGNMENT
    before = path.stat().st_blocks * 512
    assert before < files.total_bytes / 10
    parts = [extent(path, 40 * ALIGNMENT, 50 * ALIGNMENT), extent(path, 45 * ALIGNMENT, 52 * ALIGNMENT)]
    files.write(parts)
    assert size_on_disk(parts) == 12 * ALIGNMENT
    assert 12 * ALIGNMENT <= path.stat().st_blocks * 512 - before < files.total_bytes / 10
    files.write_all()
    assert path.stat().st_blocks * 512 >= files.total_bytes


def test_every_part_is_finite_whatever_its_name(tmp_path: Path) -> None:
    """Parts of an encoded tensor are made one by one, and parts of other tensors are others."""
    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    write_random_checkpoint(config, tmp_path, torch.bfloat16)
    blocks = [tensor for name, tensor in tensors_of(tmp_path).items() if name.endswith("_blocks")]
    assert len(blocks) > 1
    assert len({tensor.numpy().tobytes() for tensor in blocks}) == len(blocks)
