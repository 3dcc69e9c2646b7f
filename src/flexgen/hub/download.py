"""The Hugging Face hub: snapshots, weight files, and headers of weight files without the weights.

Only configuration, tokenizer, safetensors and GGUF files are ever fetched.  The hub library's own conventions hold (HF_HOME,
HF_HUB_OFFLINE); its errors become a ModelError that says what to do.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flexgen.base.quantities import format_size
from flexgen.errors import CapacityError, CheckpointError, ModelError
from flexgen.hub.diagnose import folder_without_weights, some
from flexgen.hub.gguf_file import GGUFHeader
from flexgen.hub.gguf_model import ENDING, header_from
from flexgen.hub.model_files import INDEX_FILE, MAX_JSON_BYTES, SINGLE_FILE, weight_files

logger = logging.getLogger(__name__)

_LIKELY_HEADER_BYTES = 128 << 10  # most headers are shorter: one request brings them
_REQUESTS = 8  # at a time


def download(repository: str, revision: str, names: Sequence[str], token: str | None, show_progress: bool) -> Path:
    """Return the snapshot folder in the hub's cache, with those of the named files that the repository has.

    When offline, or when the hub does not answer, the cached snapshot is used as it is; the hub library decides that and checks it.
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


def download_weights(repository: str, folder: Path, token: str | None, show_progress: bool) -> None:
    """Fetch the weight files that a snapshot lacks, after checking that they fit on the disk."""
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    if not missing:
        return
    commit = folder.name
    sizes = _file_sizes(repository, commit, missing, token)
    needed_bytes = sum(sizes.values())
    _check_room(repository, needed_bytes, folder, folder.parents[2])
    logger.info("downloading %s: %d files, %s, to %s", repository, len(missing), format_size(needed_bytes), folder)
    download(repository, commit, missing, token, show_progress)


def _check_room(repository: str, needed_bytes: int, folder: Path, cache: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise CapacityError(
            f"{repository} needs {format_size(needed_bytes)} more on the disk of {cache}, "
            f"{format_size(free_bytes)} are free: make room, or set HF_HOME to a folder on a larger disk"
        )


def download_gguf(repository: str, revision: str, names: Sequence[str], token: str | None, show_progress: bool) -> Path:
    """Return the snapshot folder in the hub's cache with the GGUF files of these names.

    Raises:
        ModelError: The repository has no such files, or it cannot be read and the cache lacks them.
        CapacityError: They do not fit on the disk of the cache.
    """
    import huggingface_hub
    from huggingface_hub import constants

    listed = _listed(repository, revision, names, token)
    if listed is not None:
        commit, sizes = listed
        missing = [name for name in names if not isinstance(huggingface_hub.try_to_load_from_cache(repository, name, revision=commit), str)]
        cache = Path(constants.HF_HUB_CACHE)
        _check_room(
            repository, sum(sizes[name] for name in missing), next(each for each in (cache, *cache.parents) if each.is_dir()), cache
        )
    folder = download(repository, revision, names, token, show_progress)
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{repository} is in the hub's cache without {some(absent)}, and the hub cannot be asked")
    return folder


def _listed(repository: str, revision: str, names: Sequence[str], token: str | None) -> tuple[str, dict[str, int]] | None:
    """Return the commit of a revision and the sizes of files in it; None if the hub does not answer.

    Raises:
        ModelError: The repository has no such files.
    """
    import huggingface_hub

    sizes: dict[str, int] = {}
    commit = revision
    with suppress(ModelError), _translated(repository, revision):
        info = huggingface_hub.HfApi(token=token).model_info(repository, revision=revision, files_metadata=True)
        sizes, commit = {file.rfilename: file.size or 0 for file in info.siblings or ()}, info.sha or revision
    if not sizes:
        return None
    if absent := [name for name in names if name not in sizes]:
        others = some(name for name in sizes if name.endswith(ENDING))
        raise ModelError(f"{repository} has no file {some(absent)}" + (f"; its GGUF files are {others}" if others else ""))
    return commit, sizes


def file_names(repository: str, commit: str, token: str | None) -> list[str]:
    """Return the names of all files of a repository, or nothing if the hub does not answer."""
    import huggingface_hub

    with suppress(ModelError), _translated(repository, commit):
        return huggingface_hub.HfApi(token=token).list_repo_files(repository, revision=commit)
    return []


def _file_sizes(repository: str, commit: str, names: Sequence[str], token: str | None) -> dict[str, int]:
    """Return the sizes of weight files as the hub states them.

    Raises:
        ModelError: The hub cannot be asked, or the repository has no weights.
        CheckpointError: The repository lacks files that its index names.
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
    """Fetch the headers of a repository's weight files by range requests.  No weight is fetched, and nothing is kept.

    Args:
        repository: Id of the repository.
        folder: The snapshot that `resolve_model` found; its name is the commit.
        token: Token of the hub; None is the hub library's own.

    Returns:
        File name -> (header without the 8 bytes of its length, size of the whole file as the hub states it).

    Raises:
        ModelError: The hub cannot be asked, or lacks a file.
        CheckpointError: A header is absurdly long.
    """
    names = weight_files(folder)
    sizes = _file_sizes(repository, folder.name, names, token)
    with _translated(repository, folder.name), ThreadPoolExecutor(_REQUESTS, thread_name_prefix="flexgen-headers") as threads:
        headers = threads.map(lambda name: _fetch_header(repository, folder.name, name, token), names)
        return {name: (header, sizes[name]) for name, header in zip(names, headers, strict=True)}


def gguf_headers(repository: str, revision: str, names: Sequence[str], token: str | None = None) -> tuple[list[GGUFHeader], str] | None:
    """Fetch the headers of GGUF files by range requests, and the commit; nothing is kept.  The result is None if the hub does not answer.

    Raises:
        ModelError: The hub lacks a file.
        CheckpointError: A header breaks a rule of the format.
    """
    listed = _listed(repository, revision, names, token)
    if listed is None:
        return None
    commit, sizes = listed
    headers = []
    with _translated(repository, commit):
        for name in names:

            def start(size: int, name: str = name) -> bytes:
                return _fetch_start(repository, commit, name, token, size)

            headers.append(header_from(start, file_bytes=sizes[name], path=Path(repository) / name))
    return headers, commit


def _fetch_header(repository: str, commit: str, name: str, token: str | None) -> bytes:
    start = _fetch_start(repository, commit, name, token, _LIKELY_HEADER_BYTES)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{repository}: {name} states a header of {format_size(length)}, more than any honest one")
    if 8 + length > len(start) == _LIKELY_HEADER_BYTES:
        start = _fetch_start(repository, commit, name, token, 8 + length)
    return start[8 : 8 + length]


def _fetch_start(repository: str, commit: str, name: str, token: str | None, size_bytes: int) -> bytes:
    """Return the first bytes of a file, or all of a shorter one.  From a server without range requests no more is read either."""
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
    """Translate errors of the hub library."""
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
    """Explain in a sentence why the hub library could not do it."""
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
