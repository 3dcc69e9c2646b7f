"""Which files of a model folder hold its weights, and why a folder is refused.  Opens the index, never a weight file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flexgen.errors import CheckpointError
from flexgen.models.headers import MAX_HEADER_BYTES, strict_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_FORMATS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")


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
        return [_contained(folder / SINGLE_FILE)], {}
    if (folder / INDEX_FILE).exists():
        index = _read_index(folder / INDEX_FILE)
        return [_contained(folder / name) for name in sorted(set(index.values()))], index
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        raise CheckpointError(f"{folder}: an adapter without its model; merge it into the model it was trained for, and give that")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise CheckpointError(
            f"{folder}: only pickled weights ({some(pickles)}), which can run code when they are opened and are refused; "
            "use a revision with safetensors files, or convert them where you trust them (load and save_pretrained)"
        )
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    found = f"; there are {some(others)}, which are not in transformers' format" if others else ""
    raise CheckpointError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        path = _contained(path)
        if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: no plausible index")
        weight_map = strict_json(path.read_bytes()).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no valid index: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {str(name)[:80]!r} is not the name of a safetensors file in this folder")
    return weight_map


def _contained(path: Path) -> Path:
    """`path`, unless it is a link that leads out of its folder, or out of its repository in the Hugging Face cache."""
    try:
        folder, real = path.parent.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({error})") from error
    # models--owner--name/snapshots/<commit>/file -> ../../blobs/<digest>
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    if not real.is_relative_to(folder) and not (in_cache and real.is_relative_to(folder.parent.parent)):
        raise CheckpointError(f"{path}: a link to {real}, outside of the model's folder")
    return path


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:count]) + (f" and {len(ordered) - count} more" if len(ordered) > count else "")
