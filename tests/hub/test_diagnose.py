"""What people give for a model and is none: told what it is, and what to take instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_model_folder

from flexgen.errors import CheckpointError, ModelError, UnsupportedModelError
from flexgen.hub.resolve import resolve_model, resolve_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.Q4_K_M.gguf", b"GGUF", r"not a sound GGUF file.*cut short"),
        ("model.gguf", POINTER, "git-lfs pointer"),
        ("renamed", b"GGUF\x03", r"not a sound GGUF file.*cut short"),
        ("model.safetensors", b"", "the folder that holds it beside config.json"),
        ("pytorch_model.bin", b"", "pickled.*safetensors"),
        ("model.onnx", b"", "ONNX"),
        ("model.tar.gz", b"", "archive.*unpack"),
        ("anything.txt", b"", "not a folder"),
        ("model.safetensors", POINTER, "git-lfs pointer"),
    ],
)
def test_a_file(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        resolve_model(tmp_path / file)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "empty folder"),
        (["model.Q4_K_M.gguf", "README.md"], r"weights \(model.Q4_K_M.gguf\) are GGUF.*give one of these files"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter.*merge"),
        (["model_index.json", "unet/config.json"], "diffusers.*images"),
        (["modules.json", "config_sentence_transformers.json"], "sentence-transformers.*embeddings"),
        (["params.json", "consolidated.00.pth", "tokenizer.model"], "maker's own format.*transformers' format"),
        (["model.onnx"], "ONNX"),
        (["weights.npz"], "MLX"),
        (["README.md", "train.jsonl"], r"no config\.json, so it is not a model$"),
        (["checkpoint-500/config.json", "trainer_state.json"], "checkpoint-500"),
        (["snapshots/0123/config.json", "blobs/x", "refs/main"], "snapshots/0123, or the hub id"),
        (["models--org--name/refs/main"], "HF_HUB_CACHE"),
        (["flexgen-conversion.json", "model-00001.safetensors"], r"a conversion that was not finished.*the `flexgen convert` command that"),
        (["flexgen-conversion.json.partial"], r"a conversion that was not finished.*the `flexgen convert` command that began it goes on"),
    ],
)
def test_a_folder_without_a_config(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "neither model.safetensors nor"),
        (["pytorch_model.bin", "training_args.bin"], "pickled weights.*refused: use a revision with safetensors"),
        (["model.gguf"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
        (["model.safetensors.incomplete"], "download was not finished"),
        (["consolidated.safetensors"], "consolidated.safetensors.*not in transformers' format"),
        (["flax_model.msgpack"], "Flax"),
    ],
)
def test_a_folder_without_weights(tmp_path: Path, files: list[str], message: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for file in files:
        (folder / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        resolve_model(folder)


@pytest.mark.parametrize(
    ("file", "architecture", "message"),
    [
        ("modules.json", None, "sentence-transformers"),
        ("model_index.json", None, "diffusers"),
        (None, "OPTForSequenceClassification", "OPTForSequenceClassification, which does not generate text"),
        (None, "BertForMaskedLM", "does not generate text"),
    ],
)
def test_a_model_for_something_else(tmp_path: Path, file: str | None, architecture: str | None, message: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    if file is not None:
        (folder / file).write_text("[]")
    if architecture is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(tmp_path: Path, file: str) -> None:
    from flexgen import LLM

    folder = write_model_folder(tmp_path / "model", generation_config={})
    (folder / file).write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"git-lfs pointer.*git lfs pull"):
        LLM(folder).model.check()


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        ({"quantization_config": {"quant_method": "quanto"}}, None, r"quantized \(quanto.*bfloat16"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}, None, "layout marlin"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, None, "config_groups is missing"),
        ({"quantization": {"group_size": 64, "bits": 4}}, None, "MLX, 4 bits"),
        ({}, "hf_quant_config.json", "quant_algo is missing"),
    ],
)
def test_quantized_weights(tmp_path: Path, change: dict[str, object], file: str | None, message: str) -> None:
    from flexgen import LLM

    folder = write_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if file is not None:
        (folder / file).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=message):
        LLM(folder).model.check()


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_quantization_in_the_file_of_an_older_tool(tmp_path: Path, file: str, method: str) -> None:
    """It is read as if config.json stated it, unless config.json states another one."""
    from flexgen import LLM

    folder = write_model_folder(tmp_path / "model")
    (folder / file).write_text('{"bits": 4, "group_size": 64}')
    assert resolve_model(folder).config["quantization_config"] == {"quant_method": method, "bits": 4, "group_size": 64}
    with pytest.raises(CheckpointError, match=f"weights are {method}, but none of its tensors is"):
        LLM(folder).model.check()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "quanto"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model(folder).config == config


def test_quantization_in_a_file_of_modelopt(tmp_path: Path) -> None:
    """Its older repositories state it there alone; a cache in 8 bits leaves weights plain."""
    from flexgen import LLM

    folder = write_model_folder(tmp_path / "model")
    stated = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    assert resolve_model(folder).config["quantization_config"] == {"quant_method": "modelopt", **stated}
    with pytest.raises(CheckpointError, match="weights are modelopt, but none of its tensors is"):
        LLM(folder).model.check()
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    assert "quantization_config" not in resolve_model(folder).config
    LLM(folder).model.check()
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A16_AWQ"}}))
    with pytest.raises(UnsupportedModelError, match="ModelOpt with W4A16_AWQ"):
        LLM(folder).model.check()


def test_a_tokenizer_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        resolve_tokenizer(tmp_path / "model.gguf")


def test_a_broken_index(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="git-lfs"):
        resolve_model(folder)
