"""A model's name to a folder: local, cached, or downloaded.  Only configuration, tokenizer and safetensors files are ever fetched.

Knows which files make a model and the hub library's conventions (HF_HOME, HF_HUB_OFFLINE are its own); reads no weights.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.sizes import format_size
from flexgen.errors import CapacityError, CheckpointError, ModelError, UnsupportedModelError
from flexgen.hub.folder import INDEX_FILE, MAX_JSON_BYTES, SINGLE_FILE, read_json, weight_files
from flexgen.hub.foreign import (
    file_instead_of_folder,
    folder_without_config,
    folder_without_weights,
    other_purpose,
    repository_without_config,
)

logger = logging.getLogger(__name__)

# What AutoTokenizer reads; any of the first group is a tokenizer by itself.
_ONE_FILE = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model")
VOCABULARY_FILES = (*_ONE_FILE, "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "merges.txt", "emoji.json", "word_shape.json", "word_pronunciation.json", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
TEMPLATE_FILE, TEMPLATE_FOLDER, _TEMPLATE_ENDING = "chat_template.jinja", "additional_chat_templates", ".jinja"
_TEMPLATES = (TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*{_TEMPLATE_ENDING}")
SMALL_FILES = ("config.json", "generation_config.json", INDEX_FILE, *TOKENIZER_FILES, *_TEMPLATES)

_REPOSITORY = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
_LIKELY_HEADER_BYTES = 128 << 10  # most headers are shorter: one request brings them
_REQUESTS = 8  # at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        name: as the user wrote it.
        folder: where the files are (for a hub model the snapshot of one commit, links into the cache's blobs).
        commit: of a hub model; None for a plain folder.
        config: config.json as written; `model_type` is one that transformers knows.
        generation_config: generation_config.json as written, or empty.
        has_tokenizer: without one, prompts and answers are token ids only.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    commit: str | None
    has_tokenizer: bool


def resolve_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    with_weights: bool = True,
    show_progress: bool = False,
) -> ModelFiles:
    """The files of a local folder or of a hub repository, downloaded if need be.

    Args:
        model: a folder, or a repository id such as "facebook/opt-6.7b".
        revision: branch, tag or commit of a repository.
        token: of the hub; None is the hub library's own (`hf auth login`, HF_TOKEN).
        with_weights: False asks for configuration and tokenizer only (random weights need no more).
        show_progress: let the hub library draw its bars on a terminal.

    Raises:
        ModelError: neither a folder nor a repository that can be read, or files are missing.
        UnsupportedModelError: the `model_type` is unknown to transformers (code from model folders is never run).
        CheckpointError: config.json is no JSON object, or a file of the model is no file.
        CapacityError: the download does not fit on the disk of the cache.
    """
    name = _name("model", model)
    folder = Path(name).expanduser()
    commit = None
    if name and folder.is_dir():  # Path("") is the current folder
        if revision is not None:
            raise ModelError(f"{name} is a folder here; a revision ({revision}) only has a meaning for a hub repository")
    else:
        _check_repository_id(name)
        folder = _download(name, revision or "main", SMALL_FILES, token, show_progress)
        commit = folder.name
    check_regular(folder)
    if not (folder / "config.json").is_file():
        why = folder_without_config(folder) if commit is None else repository_without_config(_file_names(name, commit, token))
        raise ModelError(f"{name} {why}")
    config = read_json(folder / "config.json")
    if (purpose := other_purpose(folder, config)) is not None:
        raise UnsupportedModelError(f"{name} {purpose}")
    _check_model_type(name, config)
    if with_weights:
        if commit is not None:
            _download_weights(name, folder, token, show_progress)
        _check_weight_files(folder)
    generation_path = folder / "generation_config.json"
    return ModelFiles(
        name=name,
        folder=folder,
        config=config,
        generation_config=read_json(generation_path) if generation_path.is_file() else {},
        commit=commit,
        has_tokenizer=has_tokenizer(folder),
    )


def resolve_tokenizer(tokenizer: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a tokenizer given apart from its model: local, or downloaded from the hub (tokenizer files only).

    Raises:
        ModelError: neither a folder nor a repository, or it has no tokenizer files.
    """
    name = _name("tokenizer", tokenizer)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        _check_repository_id(name)
        folder = _download(name, revision or "main", SMALL_FILES, token, show_progress=False)
    check_regular(folder)
    if not has_tokenizer(folder):
        raise ModelError(f"{tokenizer} has no tokenizer files ({', '.join(VOCABULARY_FILES)})")
    return folder


def is_template(name: str) -> bool:
    """Whether a file of the folder of additional templates is one."""
    return name.endswith(_TEMPLATE_ENDING)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a vocabulary that AutoTokenizer can read."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def check_regular(folder: Path) -> None:
    """What has the name of a model's configuration or tokenizer is a file: anything else must not pass for one that is missing.

    Raises:
        CheckpointError: a folder, a pipe, or a link that leads nowhere.
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


def _name(what: str, given: object) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise ModelError(f"a {what} is given as a folder or a hub id, not as {given!r}")
    return os.fspath(given)


def _check_repository_id(name: str) -> None:
    if Path(name).expanduser().is_file():
        raise ModelError(f"{name} {file_instead_of_folder(Path(name).expanduser())}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ModelError(f"{name} is not a folder; give the folder that holds config.json, or a hub id such as facebook/opt-6.7b")
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


def _check_weight_files(folder: Path) -> None:
    """Every file that holds weights is there (their contents are checked where they are read)."""
    _check_regular(folder / INDEX_FILE)
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    for name in missing:
        _check_regular(folder / name)
    if missing == [SINGLE_FILE]:
        raise ModelError(f"{folder} {folder_without_weights([path.name for path in folder.iterdir()])}")
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} files named by {INDEX_FILE} are missing ({', '.join(missing[:3])})")


# -- the hub ------------------------------------------------------------------------------------------------------------------------


def _download(repository: str, revision: str, names: Sequence[str], token: str | None, show_progress: bool) -> Path:
    """The snapshot folder in the hub's cache, holding those of the named files that the repository has.

    Offline, or where the hub does not answer, the cached snapshot is what there is (the hub library decides, and checks it).
    """
    import huggingface_hub
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    with _translated(repository, revision):
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(names), token=token, tqdm_class=tqdm if show_progress else Silent
        )
    return Path(folder)


def _download_weights(repository: str, folder: Path, token: str | None, show_progress: bool) -> None:
    """Complete a snapshot by the weight files that it lacks, after asking whether they fit."""

    missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    if not missing:
        return
    commit = folder.name
    sizes = _file_sizes(repository, commit, missing, token)
    needed_bytes = sum(sizes.values())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise CapacityError(
            f"{repository} needs {format_size(needed_bytes)} more on the disk of {folder.parents[2]}, "
            f"{format_size(free_bytes)} are free: make room, or set HF_HOME to a folder on a larger disk"
        )
    logger.info("downloading %s: %d files, %s, to %s", repository, len(missing), format_size(needed_bytes), folder)
    _download(repository, commit, missing, token, show_progress)


def _file_names(repository: str, commit: str, token: str | None) -> list[str]:
    """What a repository holds; nothing where the hub does not answer."""
    import huggingface_hub

    with suppress(ModelError), _translated(repository, commit):
        return huggingface_hub.HfApi(token=token).list_repo_files(repository, revision=commit)
    return []


def _file_sizes(repository: str, commit: str, names: Sequence[str], token: str | None) -> dict[str, int]:
    """Bytes of weight files, as the hub states them.

    Raises:
        ModelError: when the repository lacks one.
    """
    import huggingface_hub

    with _translated(repository, commit, f"; the cached copy lacks {', '.join(names[:3])}"):
        info = huggingface_hub.HfApi(token=token).model_info(repository, revision=commit, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if absent := [name for name in names if name not in sizes]:
        if absent == [SINGLE_FILE]:
            raise ModelError(f"{repository} {folder_without_weights(sizes)}")
        raise CheckpointError(f"{repository} lacks files that its {INDEX_FILE} names ({', '.join(absent[:3])})")
    return {name: sizes[name] for name in names}


def weight_headers(repository: str, folder: Path, *, token: str | None = None) -> dict[str, tuple[bytes, int]]:
    """The headers of a repository's weight files, by range requests: no weight is fetched, nothing is kept.

    Args:
        folder: the snapshot that `resolve_model` found; its name is the commit.

    Returns:
        file name -> (header without the 8 bytes of its length, size of the whole file as the hub states it).

    Raises:
        ModelError: when the hub cannot be asked or lacks a file.
        CheckpointError: when a header is absurdly long.
    """
    names = weight_files(folder)
    sizes = _file_sizes(repository, folder.name, names, token)
    with _translated(repository, folder.name), ThreadPoolExecutor(_REQUESTS, thread_name_prefix="flexgen-headers") as threads:
        headers = threads.map(lambda name: _fetch_header(repository, folder.name, name, token), names)
        return {name: (header, sizes[name]) for name, header in zip(names, headers, strict=True)}


def _fetch_header(repository: str, commit: str, name: str, token: str | None) -> bytes:
    start = _fetch_start(repository, commit, name, token, _LIKELY_HEADER_BYTES)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{repository}: {name} states a header of {format_size(length)}, more than any honest one")
    if 8 + length > len(start) == _LIKELY_HEADER_BYTES:
        start = _fetch_start(repository, commit, name, token, 8 + length)
    return start[8 : 8 + length]


def _fetch_start(repository: str, commit: str, name: str, token: str | None, size_bytes: int) -> bytes:
    """The first bytes of a file, or all of a shorter one.  A server that knows no ranges is left when these have come."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(token=token), "range": f"bytes=0-{size_bytes - 1}", "accept-encoding": "identity"}
    found = bytearray()
    with get_session().stream("GET", hf_hub_url(repository, name, revision=commit), headers=headers) as response:
        if response.status_code >= 400:
            response.read()  # the error's text is in it
        hf_raise_for_status(response)
        for portion in response.iter_bytes():
            found += portion
            if len(found) >= size_bytes:
                break
    return bytes(found[:size_bytes])


@contextmanager
def _translated(repository: str, revision: str, hint: str = "") -> Iterator[None]:
    """The hub library's errors as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision}") from error
    except errors.GatedRepoError as error:
        raise ModelError(f"{repository} is gated: ask for access on its hub page, then log in (`hf auth login`)") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{repository} is neither a folder here nor a hub repository (a private one needs `hf auth login`)") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"{repository} is neither a folder here nor in the hub's cache, and {_reason(error)}") from error
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]  (its HTTP library's, by version)
        raise ModelError(f"{repository} cannot be read from the hub{hint}: {_reason(error)}") from error


_STATUS = {
    401: "the hub does not accept the token: log in again (`hf auth login`, or HF_TOKEN)",
    403: "the hub refuses access: ask for it on the model's page, and log in with a token that may read it (`hf auth login`)",
    404: "the hub has no such file",
    429: "the hub answers no more requests for a while: try again later, or log in (`hf auth login`)",
}


def _reason(error: BaseException) -> str:
    """Why the hub library could not do it, in a sentence."""
    from huggingface_hub import constants, errors

    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    status = next((each.response.status_code for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if status is not None:
        return _STATUS.get(status, f"the hub answers with HTTP status {status}" + ": try again later" * (status >= 500))
    if any("Connect" in type(each).__name__ or "Timeout" in type(each).__name__ for each in chain):  # its HTTP library's, by version
        return f"the hub ({constants.ENDPOINT}) cannot be reached: check the network, or give a folder"
    return str(error).strip().partition("\n")[0]
