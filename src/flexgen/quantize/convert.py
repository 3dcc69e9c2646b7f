"""Writes the folder of a converted model, file by file: a file counts when it is durable, and a second start goes on after the last one.

Files are written under another name first.  config.json comes last, so that a folder without all of its weights is not taken for a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.files import sync_folder
from flexgen.base.quantities import format_size
from flexgen.base.scalars import in_json
from flexgen.errors import CapacityError, StorageError, UnsupportedModelError, no_room
from flexgen.hub.model_files import INDEX_FILE, ModelFiles
from flexgen.hub.private_folder import tokenizer_files
from flexgen.hub.symlinks import followed
from flexgen.kernels.threads import KernelThreads
from flexgen.quantize.layout import SHARD_BYTES, Shard, check_rounded_once, lay_out, written_config
from flexgen.quantize.record import PARTIAL, RECORD_FILE, FileSums, FolderHoldsOther, Record, locked, present, read_record, replace_file
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.shard import write_shard
from flexgen.quantize.source import Reader, identity_of, open_source
from flexgen.quantize.sums import sums_of
from flexgen.quantize.targets import Targets, find_targets

_SPARE_BYTES = 1 << 20  # for config.json, the record, and the ends of blocks of the file system
_ENTRY_BYTES = 64  # of a tensor in the index, besides its name


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionProgress:
    """How far a conversion is.

    Attributes:
        done_bytes: The bytes of weights that are written, those of earlier starts included.
        total_bytes: The bytes of weights when all are written.
        file: The file that is being written.
    """

    done_bytes: int
    total_bytes: int
    file: str


def convert(
    files: ModelFiles,
    folder: Path,
    settings: QuantizeSettings,
    *,
    num_threads: int,
    shard_bytes: int = SHARD_BYTES,
    allow_requantize: bool = False,
    on_progress: Callable[[ConversionProgress], None] = lambda progress: None,
) -> Record:
    """Write a model with rounded weights into a folder, or go on with it; nothing is done if it is complete.

    At most 64 MiB of numbers are in memory at a time (more for rows of more than half a million inputs), and the headers of all files.

    Args:
        files: The model.
        folder: The folder; it must be new, empty, or hold the beginning of the same conversion.
        settings: How weights are rounded, and which.
        num_threads: The threads that round.
        shard_bytes: The most bytes of a file of weights, unless a single tensor takes more.
        allow_requantize: Whether weights may be rounded that are in a low-bit format already.
        on_progress: Called after each portion that is written.

    Raises:
        ModelError: The model cannot be converted, its weights cannot be read, or they are in a low-bit format and `allow_requantize` is
            false.
        OptionError: A setting cannot be honoured for this model, or the folder holds something else (FolderHoldsOther).
        CapacityError: There is not enough free space.
        StorageError: Another process writes to the folder, or writing fails.
    """
    source = open_source(files)
    targets = find_targets(source.config, source.headers, settings)
    shards = lay_out(source.headers, targets, settings, shard_bytes)
    record = _new_record(files, settings, targets, shards, shard_bytes, allow_requantize=allow_requantize)
    made = _made(folder)
    try:
        with locked(folder), KernelThreads(num_threads) as threads, closing(Reader()) as reader:
            record = _begun(folder, record)
            if record.complete:
                return record
            check_rounded_once(files.name, shards, settings, allow=allow_requantize)
            _check_space(folder, record, shards, source.files)
            record.write(folder)
            writing = _Writing(folder, record, threads, on_progress)
            for shard in shards:
                writing.add_shard(shard, settings, reader)
            writing.add_small_files(source.files, shards, settings, targets)
            return writing.finish()
    except (CapacityError, UnsupportedModelError):
        if made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        raise
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror or error}); what is complete is kept, and the same command goes on"
        ) from error


def _made(folder: Path) -> bool:
    """Make a folder unless it is there, and return whether it was made."""
    try:
        if folder.is_dir():
            return False
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror or error}") from error
    return True


def _new_record(
    files: ModelFiles, settings: QuantizeSettings, targets: Targets, shards: list[Shard], shard_bytes: int, *, allow_requantize: bool
) -> Record:
    return Record(
        source=files.name if files.commit is not None else str(files.folder.absolute()),
        identity=identity_of(files),
        settings=settings.to_json(),
        shard_bytes=shard_bytes,
        total_bytes=sum(shard.nbytes for shard in shards),
        kept=targets.kept,
        allow_requantize=allow_requantize,
    )


def _begun(folder: Path, wanted: Record) -> Record:
    """Return the record to go on from."""
    found = read_record(folder)
    if found is None:
        if others := [path.name for path in folder.iterdir() if path.name != RECORD_FILE + PARTIAL]:
            raise FolderHoldsOther(f"{folder} holds {others[0]} and is not the folder of a conversion", "give a new folder")
        return wanted
    if not found.made_of(wanted):
        settings = _differing(found, wanted)
        how = f"with other settings ({settings})" if settings else "by another version of flexgen"
        what = "other weights" if found.identity != wanted.identity else f"these weights {how}"
        raise FolderHoldsOther(f"{folder} holds a conversion of {what} (of {found.source})", "give another folder, or remove it")
    return present(folder, found)


def _differing(found: Record, wanted: Record) -> str:
    """Return the settings of a conversion that differ from those asked for, and both values."""
    old, new = ({**record.settings, "shard_size": record.shard_bytes} for record in (found, wanted))
    return "; ".join(f"{name} {in_json(old.get(name))}, not {in_json(new[name])}" for name in new if old.get(name) != new[name])


def _check_space(folder: Path, record: Record, shards: list[Shard], source: ModelFiles) -> None:
    """Refuse a conversion that would fill the disk; a file of an earlier start that is not complete is written over."""
    small = sum(path.stat().st_size for name, path in _copied(source).items() if name not in record.files)
    index = sum(len(tensor.name) + _ENTRY_BYTES for shard in shards for tensor in shard.tensors)
    needed = sum(shard.nbytes for shard in shards if shard.name not in record.files) + small + index + _SPARE_BYTES
    free = shutil.disk_usage(folder).free + sum(path.stat().st_blocks * 512 for path in folder.glob(f"*{PARTIAL}"))
    if needed > free:
        room = f"{format_size(needed)} more, {format_size(free)} are free"
        raise CapacityError(f"{folder}: the conversion takes {room}: make room, or take another folder") from no_room()


class _Writing:
    """Adds files to a folder, and records each when it is durable."""

    def __init__(self, folder: Path, record: Record, threads: KernelThreads, on_progress: Callable[[ConversionProgress], None]) -> None:
        self._folder, self._record, self._threads, self._on_progress = folder, record, threads, on_progress
        self._done_bytes = 0

    def add_shard(self, shard: Shard, settings: QuantizeSettings, reader: Reader) -> None:
        """Write a file of weights, unless it is there."""
        if shard.name not in self._record.files:
            partial = self._folder / (shard.name + PARTIAL)
            write_shard(partial, shard, settings, reader, self._threads.over, lambda done: self._tell(shard.name, done))
            sums = sums_of(partial, self._threads.over)
            partial.replace(self._folder / shard.name)
            sync_folder(self._folder)
            self._add(shard.name, sums)
        self._done_bytes += shard.nbytes
        self._tell(shard.name, 0)

    def add_small_files(self, source: ModelFiles, shards: list[Shard], settings: QuantizeSettings, targets: Targets) -> None:
        """Write the index, copy tokenizer and generation config, and write config.json."""
        if len(shards) > 1:
            weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
            size = sum(item.nbytes for shard in shards for item in shard.items)
            self._add_file(INDEX_FILE, _json({"metadata": {"total_size": size}, "weight_map": weight_map}))
        for name, path in _copied(source).items():
            (self._folder / name).parent.mkdir(exist_ok=True)
            self._add_file(name, followed(path).read_bytes())
        self._add_file("config.json", _json(written_config(source.config, settings, targets)))

    def finish(self) -> Record:
        """Record that all files are there."""
        self._record = dataclasses.replace(self._record, complete=True)
        self._record.write(self._folder)
        return self._record

    def _add_file(self, name: str, data: bytes) -> None:
        if name not in self._record.files:
            replace_file(self._folder / name, data)
            self._add(name, sums_of(self._folder / name))

    def _add(self, name: str, sums: FileSums) -> None:
        self._record = dataclasses.replace(self._record, files={**self._record.files, name: sums})
        self._record.write(self._folder)

    def _tell(self, file: str, done_bytes: int) -> None:
        total = self._record.total_bytes
        self._on_progress(ConversionProgress(done_bytes=self._done_bytes + done_bytes, total_bytes=total, file=file))


def _copied(source: ModelFiles) -> dict[str, Path]:
    """Return the small files that are copied, by name."""
    generation = source.folder / "generation_config.json"
    return tokenizer_files(source.folder) | ({generation.name: generation} if generation.is_file() else {})


def _json(values: dict[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
