"""Standard input, kept: a job reads its input several times, and a later run must find the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexgen.errors import JobError, StorageError
from flexgen.files import open_private, sync_folder
from flexgen.jobs.database import translated
from flexgen.jobs.folder import JobFolder
from flexgen.sizes import MIB


def keep_input(folder: JobFolder, stream: BinaryIO, *, accept_changes: bool = False) -> Path:
    """The file that holds what `stream` gives, or gave an earlier run if it gives nothing now (a terminal is not asked again).

    Raises:
        JobError: it is neither what an earlier run was given nor a continuation of that, and this is not accepted.
        StorageError: it cannot be read or kept.
    """
    copy = folder.paths.input_copy
    new = folder.paths.new_input
    with translated(copy):
        if copy.exists() and stream.isatty():
            return copy
        new.unlink(missing_ok=True)
        with os.fdopen(open_private(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            for piece in _pieces(stream):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if copy.exists() and new.stat().st_size == 0:
            new.unlink()
            return copy
        if copy.exists() and not accept_changes and not _continues(new, copy):
            new.unlink()
            raise JobError(
                f"{folder.paths.name} was begun with another standard input: --accept-changes answers the lines that differ again, "
                "--fresh all lines; an empty one goes on with what was given then"
            )
        new.replace(copy)
        sync_folder(copy.parent)
    return copy


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    try:
        while piece := stream.read(MIB):
            yield piece
    except OSError as error:
        raise StorageError(f"standard input cannot be read: {error.strerror or error}") from error


def _continues(new: Path, old: Path) -> bool:
    """Whether `new` begins with all of `old`."""
    with new.open("rb") as longer, old.open("rb") as shorter:
        while piece := shorter.read(MIB):
            if longer.read(len(piece)) != piece:
                return False
    return True
