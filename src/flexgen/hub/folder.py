"""Which files of a model folder hold its weights, and how its JSON is read.  Opens no weight file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flexgen.base.sizes import MIB, format_size
from flexgen.base.strict_json import MAX_VALUES, strict_json
from flexgen.errors import CheckpointError
from flexgen.hub.foreign import check_fetched, folder_without_weights
from flexgen.hub.links import followed

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 32 * MIB  # the largest honest index files have some 15 MiB
_MAX_CONFIG_VALUES = 1 << 18
_PLAIN_NAME = re.compile(r"[\w][\w.\-]*\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model.

    Raises:
        CheckpointError: unreadable, absurdly large, not an object, or behind a link that is not followed.
    """
    try:
        with followed(path).open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {format_size(MAX_JSON_BYTES)}, which no honest one has")
        check_fetched(path)
        return strict_json(data, max_values=MAX_VALUES if path.name == INDEX_FILE else _MAX_CONFIG_VALUES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def weight_index(folder: Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it; empty where there is no index, or one file that holds everything.

    Raises:
        CheckpointError: the index is malformed, or names a file outside the folder.
    """
    path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not path.is_file():  # transformers' order of preference
        return {}
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{INDEX_FILE} has no weight_map")
    for name in index.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{INDEX_FILE} names {name!r}, which is not a plain *.safetensors file name")
    return index


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the folder's weights, whether or not they are there.

    Raises:
        CheckpointError: as `weight_index`.
    """
    return list(dict.fromkeys(weight_index(folder).values())) or [SINGLE_FILE]


def weight_paths(folder: Path, index: dict[str, str]) -> list[Path]:
    """The weight files of a folder as they are named, because names tell shards apart, once it is known that they may be read.

    Args:
        index: as from `weight_index`.

    Raises:
        CheckpointError: when there are none, or a link leads to what may not be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not index and not (folder / SINGLE_FILE).exists():
        raise CheckpointError(f"{folder} {folder_without_weights(sorted(path.name for path in folder.iterdir()))}")
    paths = [folder / name for name in sorted(set(index.values())) or [SINGLE_FILE]]
    for path in paths:
        followed(path)
    return paths
