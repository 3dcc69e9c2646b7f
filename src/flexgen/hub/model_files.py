"""The files that make a model folder: their names, which of them hold the weights, and reading the small ones.  Reads no weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.base.quantities import MIB, counted, format_size
from flexgen.base.strict_json import MAX_VALUES, strict_json
from flexgen.errors import CheckpointError, ModelError
from flexgen.hub.diagnose import check_fetched, folder_without_weights
from flexgen.hub.symlinks import followed

if TYPE_CHECKING:
    from flexgen.hub.gguf_model import GGUFModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# What AutoTokenizer reads; any of the first group is a tokenizer by itself.
_ONE_FILE = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model")
VOCABULARY_FILES = (*_ONE_FILE, "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "merges.txt", "emoji.json", "word_shape.json", "word_pronunciation.json", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
TEMPLATE_FILE, TEMPLATE_FOLDER, _TEMPLATE_ENDING = "chat_template.jinja", "additional_chat_templates", ".jinja"
_TEMPLATES = (TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*{_TEMPLATE_ENDING}")
# Where older tools state how they quantized the weights, and the quant_method that they leave out.
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
SMALL_FILES = ("config.json", "generation_config.json", INDEX_FILE, *QUANTIZATION_FILES, *TOKENIZER_FILES, *_TEMPLATES)

MAX_JSON_BYTES = 32 * MIB  # the largest honest index files have some 15 MiB
_MOST_CONFIG_VALUES = 1 << 18
_PLAIN_NAME = re.compile(r"[\w][\w.\-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        name: The model as the user wrote it.
        folder: Folder of the files.  For a hub model it is the snapshot of one commit, with links into the cache's blobs.
        commit: Commit of a hub model; None for a plain folder.
        conversion: What tells converted weights from others, whatever the name of the model; None for weights as they were found.
        config: config.json as written, with the quantization_config of an older tool's own file; its `model_type` is one that transformers
            knows.
        generation_config: generation_config.json as written, or empty.
        has_tokenizer: Whether there is a tokenizer.  Without one, prompts and answers are token ids only.
        gguf: The headers of the weights if they are in GGUF; `folder` then holds what was made of their metadata, and no weights.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    commit: str | None
    has_tokenizer: bool
    conversion: str | None = None
    gguf: GGUFModel | None = None


def is_template(name: str) -> bool:
    """Return whether a file of this name in the folder of additional templates is a template."""
    return name.endswith(_TEMPLATE_ENDING)


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder holds a vocabulary that AutoTokenizer can read."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def check_regular(folder: Path) -> None:
    """Check that whatever has the name of a configuration or tokenizer file is a regular file.

    Anything else would pass for a file that is missing.

    Raises:
        CheckpointError: One of them is a folder, a pipe, or a link that leads nowhere.
    """
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES, TEMPLATE_FILE):
        _check_regular(folder / name)


def _check_regular(path: Path) -> None:
    if path.is_file() or not os.path.lexists(path):
        return
    if path.is_symlink() and not path.exists():
        target = path.readlink()
        raise CheckpointError(f"{path} is a link to {target}, which is not there: get the file again, or mount the disk that has it")
    raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model.

    Raises:
        CheckpointError: The file cannot be read, is absurdly large, does not hold a JSON object, or is behind a link that is not followed.
    """
    try:
        with followed(path).open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {format_size(MAX_JSON_BYTES)}, which no honest one has")
        check_fetched(path)
        return strict_json(data, max_values=MAX_VALUES if path.name == INDEX_FILE else _MOST_CONFIG_VALUES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read config.json; where it states no quantization, that of an older tool's own file is added to it as quantization_config.

    Raises:
        CheckpointError: A file cannot be read as a JSON object.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config") or config.get("compression_config"):
        return config
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).is_file() and not _is_of_the_cache_alone(stated := read_json(folder / name)):
            return {**config, "quantization_config": {"quant_method": method, **stated}}
    return config


def _is_of_the_cache_alone(stated: dict[str, Any]) -> bool:
    """Return whether ModelOpt's file quantizes the KV cache alone, so that the weights are plain."""
    settings = stated.get("quantization")
    return isinstance(settings, dict) and "quant_algo" in settings and settings["quant_algo"] is None


def check_weight_files(folder: Path) -> None:
    """Check that every file that holds weights exists; their contents are checked when they are read.

    Raises:
        ModelError: The folder has no weights that flexgen can read.
        CheckpointError: Files that the index names are missing, or the index is malformed.
    """
    _check_regular(folder / INDEX_FILE)
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    for name in missing:
        _check_regular(folder / name)
    if missing == [SINGLE_FILE]:
        raise ModelError(f"{folder} {folder_without_weights([path.name for path in folder.iterdir()])}")
    if missing:
        raise CheckpointError(f"{folder}: {counted(len(missing), 'file')} named by {INDEX_FILE} cannot be found ({', '.join(missing[:3])})")


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the folder's weights, whether or not they are there.

    Raises:
        CheckpointError: The index is malformed or names a file outside the folder.
    """
    if (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():  # transformers' order of preference
        return list(dict.fromkeys(_read_index(folder).values()))
    return [SINGLE_FILE]


def weight_stamps(files: ModelFiles) -> list[tuple[str, int, int]]:
    """Return name, size and time of change (in nanoseconds) of each file of weights, which tell a folder's weights from others.

    Raises:
        CheckpointError: The index is malformed or names a file outside the folder.
    """
    found = [(path.name, path.stat()) for path in weight_paths(files)]
    return [(name, each.st_size, each.st_mtime_ns) for name, each in found]


def weight_paths(files: ModelFiles) -> list[Path]:
    """Return the files of weights.

    Raises:
        CheckpointError: The index is malformed or names a file outside the folder.
    """
    if files.gguf is not None:
        return [part.path for part in files.gguf.parts]
    return [files.folder / name for name in sorted(weight_files(files.folder))]


def find_weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the paths of the weight files, checked, and the index (tensor name -> file name; empty for a single file).

    Paths keep the names that they have in the folder, because names tell shards apart.

    Raises:
        CheckpointError: There are no weight files, or a name or link leads out of the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        index = _read_index(folder) if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists() else {}
        paths = [folder / name for name in sorted(set(index.values())) or [SINGLE_FILE]]
        if not index and not paths[0].exists():
            raise CheckpointError(f"{folder} {folder_without_weights(sorted(path.name for path in folder.iterdir()))}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    for path in paths:
        followed(path)
    return paths, index


def _read_index(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name from the index of a folder of several weight files."""
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE} names {name!r:.90}, which is not a plain *.safetensors file name")
    return weight_map
