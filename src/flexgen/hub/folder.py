"""Which files of a model folder hold its weights, and why a folder is refused.  Opens the index, never a weight file."""

from __future__ import annotations

from pathlib import Path

from flexgen.base.strict_json import strict_json
from flexgen.errors import CheckpointError
from flexgen.hub.foreign import check_fetched, folder_without_weights
from flexgen.hub.links import followed

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 50_000_000  # the largest published ones have some 15 MB


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a model folder and, where there are several, the index: tensor name -> file name.

    The order of preference is transformers'.

    Raises:
        CheckpointError: when there are none, or a name or link leads out of the folder.
    """
    try:
        return _weight_files(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / SINGLE_FILE).exists():
        return [_checked(folder / SINGLE_FILE)], {}
    if (folder / INDEX_FILE).exists():
        index = _read_index(folder / INDEX_FILE)
        return [_checked(folder / name) for name in sorted(set(index.values()))], index
    raise CheckpointError(f"{folder} {folder_without_weights(sorted(path.name for path in folder.iterdir()))}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        if followed(path).stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: no plausible index")
        check_fetched(path)
        weight_map = strict_json(path.read_bytes()).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no valid index: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {str(name)[:80]!r} is not the name of a safetensors file in this folder")
    return weight_map


def _checked(path: Path) -> Path:
    """`path` as it is named, because names tell shards apart, once it is known that it may be read."""
    followed(path)
    return path
