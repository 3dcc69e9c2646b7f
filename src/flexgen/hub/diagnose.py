"""Explains what a path or repository is that is not a model, or not one that can be run, and says what to take instead.

Looks at names and at the first bytes of small files; opens no weights.  Explanations are the rest of a sentence that begins with
the name of the path or repository.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flexgen.base.scalars import in_json
from flexgen.errors import CheckpointError

CONVERSION_FILE = "flexgen-conversion.json"  # what `flexgen convert` has written so far (see quantize/record.py)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER_BYTES = 1024  # at most
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp", ".download")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".7z")

_SAFETENSORS = "a folder or repository with config.json and model.safetensors"
_ORIGINAL = "take the repository that it was made from, with bfloat16, float16 or float32 weights in safetensors"
_GGUF = "GGUF, the format of llama.cpp and Ollama: give one of these files itself, with its folder or its repository before its name"
_ADAPTER = (
    "an adapter (LoRA) without its model: merge it into the model that it was trained for (PEFT's merge_and_unload), save that, and give it"
)
_EMBEDDINGS = "a sentence-transformers model, which makes embeddings and generates no text: give a causal language model"
_PICKLED = (
    "which can run code when they are opened and are refused: use a revision with safetensors files, or convert them where you trust them "
    "(transformers' from_pretrained and save_pretrained)"
)

# Ending of a file's name -> what a folder is whose weights are of that kind only.
_WEIGHTS: Mapping[str, str] = {
    ".gguf": _GGUF,
    ".ggml": "GGML, a former format of llama.cpp, which is not read here: " + _ORIGINAL,
    ".onnx": "ONNX, which is not read here: " + _ORIGINAL,
    ".npz": "MLX's or NumPy's, which are not read here: " + _ORIGINAL,
    ".h5": "TensorFlow's, which are not read here: " + _ORIGINAL,
    ".msgpack": "Flax's, which are not read here: " + _ORIGINAL,
    ".tflite": "TensorFlow Lite's, which are not read here: " + _ORIGINAL,
    ".engine": "TensorRT's, which are not read here: " + _ORIGINAL,
    ".nemo": "NeMo's, which are not read here: " + _ORIGINAL,
    "openvino_model.xml": "OpenVINO's, which are not read here: " + _ORIGINAL,
}

# Endings of architectures that do not generate text.
_OTHER_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice", "ForPreTraining",
    "ForImageClassification", "ForObjectDetection", "ForSemanticSegmentation", "ForAudioClassification", "ForCTC",
    "ForNextSentencePrediction", "ForFeatureExtraction", "ForRewardModeling", "RewardModel",
)  # fmt: skip


def file_instead_of_folder(path: Path) -> str:
    """Explain why a file is not a model."""
    name = path.name.lower()
    if _is_lfs_pointer(path):
        return "is a git-lfs pointer, not the file itself; and a model is a folder: run `git lfs pull` there, then give the folder"
    for ending, what in _WEIGHTS.items():
        if name.endswith(ending) or (ending == ".gguf" and _begins_with(path, b"GGUF")):
            return f"is a file in {what}" if what.startswith(("GG", "ONNX")) else f"is a file of weights that are {what}"
    if name.endswith(".safetensors"):
        return f"is a file of weights; a model is the folder that holds it beside config.json: give {path.parent}"
    if name.endswith(PICKLES):
        return f"is a file of pickled weights, {_PICKLED}"
    if name.endswith(_ARCHIVES):
        return "is an archive, not a folder: unpack it and give the folder that holds config.json"
    if name.endswith(".json") and (path.parent / "config.json").is_file():
        return f"is not a folder but a file in one: give {path.parent}"
    return "is not a folder; give the folder that holds config.json, or a hub id such as facebook/opt-6.7b"


def folder_without_config(folder: Path) -> str:
    """Explain why a folder without config.json is not a model."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is an empty folder: it has no config.json, so it is not a model"
    if any(name.startswith(CONVERSION_FILE) for name in names):
        return f"is a conversion that was not finished, so it is not a model yet: {_going_on(folder)}"
    if found := _by_files(names):
        return f"is not a model that flexgen can run: {found}"
    if (folder / "snapshots").is_dir():
        commits = sorted(path.name for path in (folder / "snapshots").iterdir() if (path / "config.json").is_file())
        take = f"give {folder / 'snapshots' / commits[-1]}, or the hub id" if commits else "it holds no whole copy: give the hub id"
        return f"is a repository's folder in the Hugging Face cache, which keeps its files by commit: {take}"
    if any(name.startswith("models--") for name in names):
        return "is a Hugging Face cache of several models: give a hub id, and set HF_HUB_CACHE to this folder"
    below = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"; {some(below)} in it {'has' if len(below) == 1 else 'have'} one: give {folder / below[0]}" if below else ""
    return f"has no config.json, so it is not a model{hint}"


def _going_on(folder: Path) -> str:
    """Say which command completes a conversion, by its record."""
    try:
        record = json.loads((folder / CONVERSION_FILE).read_text(encoding="utf-8"))
        source, settings = record["source"], record["settings"]
        words = ["flexgen", "convert", source, "-o", str(folder), "--weight-format", settings["weight_format"]]
        words += ["--group-size", str(settings["group_size"]), "--shard-size", str(record["shard_bytes"])]
        words += [word for pattern in settings["keep"] for word in ("--keep", pattern)]
        words += [word for pattern in settings["eight_bits"] for word in ("--int8", pattern)]
        words += ["--quantize-head"] * settings["quantize_head"]
        words += ["--allow-requantize"] * record.get("allow_requantize", False)  # earlier versions have not written it
        if (commit := re.match(rf"{re.escape(source)} at (\w+), ", record["identity"])) is not None:
            words += ["--revision", commit[1]]
        return f"`{shlex.join(words)}` goes on"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "the `flexgen convert` command that began it goes on"


def repository_without_config(names: Collection[str]) -> str:
    """Explain why a hub repository with these files, none of them config.json, is not a model."""
    found = _by_files(names)
    return f"is not a model that flexgen can run: {found}" if found else "has no config.json, so it is not a model"


def folder_without_weights(names: Collection[str]) -> str:
    """Explain why a folder with these files, config.json among them, has no weights."""
    if found := _by_files(names):
        return f"has no weights that can be read: {found}"
    if unfinished := [name for name in names if name.endswith(_UNFINISHED)]:
        return f"has neither model.safetensors nor model.safetensors.index.json: a download was not finished ({some(unfinished)})"
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"; there are {some(others)}, which are not in transformers' format: {_SAFETENSORS} is needed" if others else ""
    return f"has neither model.safetensors nor model.safetensors.index.json{found}"


def other_purpose(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Explain why a folder with a config is not a language model; None if nothing indicates that."""
    if (folder / "model_index.json").is_file():
        return "is a diffusers pipeline, which makes images: give a causal language model"
    if (folder / "modules.json").is_file() or (folder / "config_sentence_transformers.json").is_file():
        return f"is {_EMBEDDINGS}"
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if names and all(name.endswith(_OTHER_HEADS) for name in names):
        return f"is a {names[0]}, which does not generate text (architectures in config.json): give a causal language model"
    return None


def other_quantization(config: Mapping[str, Any]) -> str | None:
    """Name the tool that quantized the weights where quantization_config does not say it, as MLX leaves it.

    The result is None if nothing indicates a quantization.
    """
    if isinstance(quantization := config.get("quantization"), dict) and "bits" in quantization:
        return f"MLX, {in_json(quantization['bits']):.10} bits"
    return None


def check_fetched(path: Path) -> None:
    """Check that a file is not a git-lfs pointer, which git leaves instead of a large file that was not fetched.

    Raises:
        CheckpointError: The file is such a pointer.
    """
    if _is_lfs_pointer(path):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in that folder")


def _is_lfs_pointer(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _LFS_POINTER_BYTES and _begins_with(path, _LFS_POINTER)


def _begins_with(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def _by_files(names: Collection[str]) -> str | None:
    """Say what kind of folder these files make; None if they say nothing."""
    found = set(names)
    if "adapter_config.json" in found:
        return _ADAPTER
    if "model_index.json" in found:
        return "it is a diffusers pipeline, which makes images"
    if "modules.json" in found or "config_sentence_transformers.json" in found:
        return f"it is {_EMBEDDINGS}"
    if any(name.startswith("consolidated.") for name in found) and "params.json" in found:
        return "it is in its maker's own format (consolidated weights and params.json): take the repository in transformers' format"
    for ending, what in _WEIGHTS.items():
        if those := [name for name in names if name.lower().endswith(ending)]:
            return f"its weights ({some(those)}) are {what}"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"it has only pickled weights ({some(pickles)}), {_PICKLED}"
    return None


def some(names: Iterable[str], count: int = 3) -> str:
    """List the first few names for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:count]) + (f" and {len(ordered) - count} more" if len(ordered) > count else "")
