"""Converted models that runs have made for themselves, each in a folder of the cache that is named by its source and its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.cache_home import cache_home
from flexgen.base.steps import step
from flexgen.errors import OptionError, StorageError
from flexgen.hub.diagnose import some
from flexgen.hub.model_files import ModelFiles, read_json
from flexgen.quantize.convert import ConversionProgress, convert, num_cores
from flexgen.quantize.record import FolderHoldsOther, FolderIsLocked, Record, UnusableRecord, locked, lost, present, read_record
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.source import identity_of

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
_TELL_SECONDS = 5.0
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def cache_folder() -> Path:
    """Return the folder of the cache."""
    return cache_home() / "weights"


def cached_conversion(files: ModelFiles, settings: QuantizeSettings, cache: Path | None = None) -> ModelFiles:
    """Return a converted model from the cache, converting it first if it is not there, and what is missing of it if files are gone or cut.

    If another process converts it, this one waits until that is done, and goes on where the other stopped if it was killed.

    Args:
        files: The model.
        settings: How weights are rounded, and which.
        cache: The folder of the cache; None for `cache_folder()`.

    Raises:
        ModelError: See `convert`.
        CapacityError: See `convert`.
        StorageError: The cache cannot be written, or what is there in place of the conversion is none; the message has the command to
            remove it.
    """
    folder = _entry_folder(files, settings, cache)
    try:
        _convert_or_wait(files, folder, settings)
    except FolderHoldsOther as error:
        raise StorageError(f"{error.what}: `{_removing(folder)}` removes it, and the same command converts again") from error
    except UnusableRecord as error:
        raise StorageError(f"{error} (`{_removing(folder)}` removes it, and the same command converts)") from error
    step(f"weights in {settings.weight_format}: {folder}")
    return dataclasses.replace(
        files,
        folder=folder,
        config=read_json(folder / "config.json"),
        conversion=conversion_of(files, settings),
    )


def conversion_of(files: ModelFiles, settings: QuantizeSettings) -> str:
    """Return what tells the converted weights of a model from others, whatever its name; nothing is converted."""
    return f"{identity_of(files)}, weights in {settings.words}"


def conversion_left(files: ModelFiles, settings: QuantizeSettings, cache: Path | None = None) -> float:
    """Return the share of a conversion into the cache that is still to be done: 0 where all is there, 1 where nothing is.

    Raises:
        StorageError: What is there cannot be understood.
    """
    record = _record_of(_entry_folder(files, settings, cache))
    if record is None or record.complete:
        return 0.0 if record is not None else 1.0
    return max(1 - sum(sums.nbytes for sums in record.files.values()) / max(record.total_bytes, 1), 0.0)


def private_cache() -> Path:
    """Return the folder of the cache, which is made if it is not there.

    Raises:
        StorageError: It cannot be made.
    """
    _make_private(cache_folder())
    return cache_folder()


def _removing(folder: Path) -> str:
    """Return the command that removes an entry."""
    return shlex.join(["flexgen", "cache", "rm", folder.name])


def _entry_folder(files: ModelFiles, settings: QuantizeSettings, cache: Path | None) -> Path:
    """Return the folder of a conversion: one that is there, whatever name the same model had when it was made, or the one to make."""
    home = cache or cache_folder()
    key = json.dumps([identity_of(files), settings.to_json()], sort_keys=True).encode()
    name = _UNSAFE.sub("-", "--".join(Path(files.name).parts[-2:])).strip("-.")[-60:]
    ending = f"-{settings.weight_format}-{hashlib.blake2b(key, digest_size=8).hexdigest()}"
    own = home / f"{name}{ending}"
    return own if own.is_dir() else min(home.glob(f"[!.]*{ending}"), default=own)


def _record_of(folder: Path) -> Record | None:
    """Return the record of what is there of a conversion."""
    record = read_record(folder) if folder.is_dir() else None
    return None if record is None else present(folder, record)


def _damage(folder: Path, record: Record | None) -> str:
    """Return what has become of files of a conversion that was complete; empty where nothing has."""
    return some(lost(folder, record).values()) if record is not None and record.complete else ""


def _convert_or_wait(files: ModelFiles, folder: Path, settings: QuantizeSettings) -> None:
    _make_private(folder.parent)
    waited = False
    while (record := _record_of(folder)) is None or not record.complete:
        if folder.is_dir() and _is_locked(folder):
            if not waited:
                step(f"waiting for another process that converts {files.name} to {settings.weight_format}")
            waited = True
            time.sleep(_WAIT_SECONDS)
            continue
        if folder.is_dir() and (damage := _damage(folder, read_record(folder))):
            logger.warning("%s is damaged (%s): what is missing is converted again", folder, damage)
        step(f"converting {files.name} to {settings.weight_format}, once")
        with contextlib.suppress(FolderIsLocked):  # another process was faster
            convert(files, folder, settings, num_threads=num_cores(), on_progress=announced(files.name, _TELL_SECONDS))


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"the cache {folder} cannot be made ({error.strerror or error}): set XDG_CACHE_HOME") from error


def announced(name: str, interval_seconds: float) -> Callable[[ConversionProgress], None]:
    """Return a function that announces the progress of a conversion as steps, not more often than at an interval."""
    began = time.monotonic()
    due = began + interval_seconds

    def announce(progress: ConversionProgress) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            due = now + interval_seconds
            share = progress.done_bytes / max(progress.total_bytes, 1)
            step(f"converting {name}: {share:.0%}, {progress.file}")

    return announce


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A converted model in the cache.

    Attributes:
        name: The name of its folder.
        folder: The folder.
        nbytes: The bytes that it takes on the disk.
        source: The name of the model that it was made from; empty if that is not known.
        weight_format: The format of its weights; empty if that is not known.
        state: "complete", "not complete", "being written", "damaged" with what has become of its files, or why it cannot be used.
    """

    name: str
    folder: Path
    nbytes: int
    source: str
    weight_format: str
    state: str


def entries(cache: Path | None = None) -> list[CacheEntry]:
    """Return what is in the cache, by name.

    Raises:
        StorageError: The cache cannot be read.
    """
    folder = cache or cache_folder()
    try:
        return [_entry(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise StorageError(f"the cache {folder} cannot be read: {error.strerror or error}") from error


def _entry(folder: Path) -> CacheEntry:
    nbytes = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    try:
        record = read_record(folder)
    except StorageError as error:
        return CacheEntry(name=folder.name, folder=folder, nbytes=nbytes, source="", weight_format="", state=str(error))
    if record is None:
        return CacheEntry(name=folder.name, folder=folder, nbytes=nbytes, source="", weight_format="", state="not complete")
    state = "complete" if record.complete else "being written" if _is_locked(folder) else "not complete"
    if damage := _damage(folder, record):
        state = f"damaged: {damage}"
    weight_format = str(record.settings.get("weight_format", ""))
    return CacheEntry(name=folder.name, folder=folder, nbytes=nbytes, source=record.source, weight_format=weight_format, state=state)


def _is_locked(folder: Path) -> bool:
    try:
        with locked(folder):
            return False
    except FolderIsLocked:
        return True


def find_entries(names: list[str], cache: Path | None = None) -> list[CacheEntry]:
    """Return the entries of these names, or those made from the models of these names.

    Raises:
        OptionError: There is no entry of a name.
        StorageError: The cache cannot be read.
    """
    every, found = entries(cache), dict[str, CacheEntry]()
    for name in names:
        those = [entry for entry in every if _is_meant(entry, name)]
        if not those:
            known = ", ".join(f"{entry.name} (of {entry.source or 'an unknown model'})" for entry in every) or "nothing"
            raise OptionError(f"{name} is not in the cache, which has {known}")
        found |= {entry.name: entry for entry in those}
    return list(found.values())


def _is_meant(entry: CacheEntry, name: str) -> bool:
    """Return whether a name is that of an entry, of its folder, or of its model, of which a folder may be written in several ways."""
    folder = Path(name).expanduser()
    if name == entry.name or {name.rstrip("/"), str(folder.absolute())} & {entry.source.rstrip("/"), str(entry.folder)}:
        return True
    if not entry.source or not folder.is_dir():
        return False
    return folder.resolve() in (entry.folder.resolve(), Path(entry.source).expanduser().resolve())


def remove(entry: CacheEntry) -> None:
    """Remove an entry at once, so that no run finds a part of it.

    Raises:
        StorageError: Another process writes it, or it cannot be removed.
    """
    gone = entry.folder.with_name(f".removed-{os.getpid()}-{entry.name}")
    try:
        with locked(entry.folder):
            entry.folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise StorageError(f"{entry.folder} cannot be removed: {error.strerror or error}") from error
