"""From a model's name to its files: a local folder, the hub's cache, or a download."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from flexgen.errors import ModelError, UnsupportedModelError
from flexgen.hub.diagnose import file_instead_of_folder, folder_without_config, other_purpose, repository_without_config
from flexgen.hub.download import download, download_gguf, download_weights, file_names, gguf_headers
from flexgen.hub.gguf_folder import gguf_model_files
from flexgen.hub.gguf_model import GGUFModel, gguf_model, is_gguf, part_names, read_gguf
from flexgen.hub.model_files import (
    SMALL_FILES,
    VOCABULARY_FILES,
    ModelFiles,
    check_regular,
    check_weight_files,
    has_tokenizer,
    read_json,
    read_model_config,
)

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
_HUB_GGUF = re.compile(r"(?P<repository>[\w][\w.\-]*/[\w][\w.\-]*)/(?P<file>([\w][\w.\-]*/)*[\w][\w.\-]*\.gguf)")


def resolve_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    with_weights: bool = True,
    show_progress: bool = False,
) -> ModelFiles:
    """Find the files of a model: a local folder or GGUF file, or what is downloaded from the hub if need be.

    Args:
        model: A folder, a GGUF file, a repository id such as "facebook/opt-6.7b", or a repository's id and the name of a GGUF file in it.
        revision: Branch, tag or commit of a repository.
        token: Token of the hub; None is the hub library's own (`hf auth login`, HF_TOKEN).
        with_weights: Whether weights are needed; without them only configuration and tokenizer are fetched.
        show_progress: Whether the hub library may draw its progress bars on a terminal.

    Raises:
        ModelError: It is neither a folder nor a repository that can be read, or files are missing.
        UnsupportedModelError: transformers does not know the `model_type` (code from model folders is never run).
        CheckpointError: config.json does not hold a JSON object, or something that should be a file is not one.
        CapacityError: The download does not fit on the disk of the cache.
    """
    name = _name("model", model)
    folder = Path(name).expanduser()
    if is_gguf(folder):
        if revision is not None:
            raise ModelError(f"{name} is a file here; a revision ({revision}) only has a meaning for a hub repository")
        return gguf_model_files(name, read_gguf(folder))
    if (match := _HUB_GGUF.fullmatch(name)) is not None and not folder.parent.is_dir():
        found, commit = _gguf_of_hub(match["repository"], match["file"], revision or "main", token, with_weights, show_progress)
        return gguf_model_files(name, found, commit)
    commit = None
    if name and folder.is_dir():  # Path("") is the current folder
        if revision is not None:
            raise ModelError(f"{name} is a folder here; a revision ({revision}) only has a meaning for a hub repository")
    else:
        _check_repository_id(name)
        folder = download(name, revision or "main", SMALL_FILES, token, show_progress)
        commit = folder.name
    check_regular(folder)
    if not (folder / "config.json").is_file():
        why = folder_without_config(folder) if commit is None else repository_without_config(file_names(name, commit, token))
        raise ModelError(f"{name} {why}")
    config = read_model_config(folder)
    if (purpose := other_purpose(folder, config)) is not None:
        raise UnsupportedModelError(f"{name} {purpose}")
    _check_model_type(name, config)
    if with_weights:
        if commit is not None:
            download_weights(name, folder, token, show_progress)
        check_weight_files(folder)
    generation_path = folder / "generation_config.json"
    return ModelFiles(
        name=name,
        folder=folder,
        config=config,
        generation_config=read_json(generation_path) if generation_path.is_file() else {},
        commit=commit,
        has_tokenizer=has_tokenizer(folder),
    )


def _gguf_of_hub(
    repository: str, file: str, revision: str, token: str | None, with_weights: bool, show_progress: bool
) -> tuple[GGUFModel, str]:
    """Return the headers of a GGUF file in a hub repository, and the commit; without weights, only headers are fetched."""
    within = Path(file)
    names = [str(within.with_name(name)) for name in part_names(within.name)]
    if not with_weights and (found := gguf_headers(repository, revision, names, token)) is not None:
        headers, commit = found
        return gguf_model(headers), commit
    folder = download_gguf(repository, revision, names, token, show_progress)
    return read_gguf(folder / file), folder.name


def resolve_tokenizer(tokenizer: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """Find the folder of a tokenizer that is given apart from its model: a folder, a GGUF file, or tokenizer files of a hub repository.

    Raises:
        ModelError: It is neither a folder nor a repository, or it has no tokenizer files.
    """
    name = _name("tokenizer", tokenizer)
    folder = Path(name).expanduser()
    if is_gguf(folder):
        folder = gguf_model_files(name, read_gguf(folder)).folder
    if not folder.is_dir():
        _check_repository_id(name)
        folder = download(name, revision or "main", SMALL_FILES, token, show_progress=False)
    check_regular(folder)
    if not has_tokenizer(folder):
        raise ModelError(f"{tokenizer} has no tokenizer files ({', '.join(VOCABULARY_FILES)})")
    return folder


def _name(what: str, given: object) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise ModelError(f"a {what} is given as a folder or a hub id, not as {given!r}")
    return os.fspath(given)


def _check_repository_id(name: str) -> None:
    if Path(name).expanduser().is_file():
        raise ModelError(f"{name} {file_instead_of_folder(Path(name).expanduser())}")
    if name and Path(name).exists():
        raise ModelError(f"{name} is not a folder; give the folder that holds config.json, or a hub id such as facebook/opt-6.7b")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith((".gguf", ".safetensors")):
        path = Path(name).expanduser()
        why = f"there is no {path.name} in {path.parent}" if path.parent.is_dir() else f"there is no folder {path.parent}"
        raise ModelError(f"{name} does not exist: {why} (and a hub id is like facebook/opt-6.7b)")
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        raise ModelError(f"{name!r} is neither a folder here nor a hub id such as facebook/opt-6.7b")


def _check_model_type(name: str, config: dict[str, Any]) -> None:
    import transformers

    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING
    if known and config.get("auto_map"):
        logger.info("%s brings its own code (auto_map); it is ignored, transformers' own %s is used", name, model_type)
    if known:
        return
    if model_type is None:
        raise UnsupportedModelError(f"{name}: config.json names no model_type")
    reason = f"model_type {model_type!r} is unknown to transformers {transformers.__version__}"
    if config.get("auto_map"):
        raise UnsupportedModelError(f"{name}: {reason}; it needs code from its own folder (auto_map), which flexgen does not run")
    raise UnsupportedModelError(f"{name}: {reason}; a newer transformers may know it")
