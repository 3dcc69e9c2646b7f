"""The copy of an input that a job keeps in its folder, because it reads its input several times, and a later run needs the same input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from flexgen.base.files import open_private, sync_folder
from flexgen.base.quantities import MIB
from flexgen.errors import StorageError
from flexgen.jobs.database import translated
from flexgen.jobs.folder import JobFolder


def keep_input(folder: JobFolder, stream: BinaryIO) -> Path:
    """Copy a stream into the job's folder and return the file; return the copy of an earlier run if the stream is empty or a terminal.

    A new copy stays beside that of an earlier run until `settle_input`, because a run that is refused leaves the job as it was.

    Raises:
        StorageError: The stream cannot be read, or the copy cannot be written.
    """
    copy, new = folder.paths.input_copy, folder.paths.new_input
    with translated(copy):
        if copy.exists() and stream.isatty():
            return copy
        source = copy_input(folder, _pieces(stream))
        if source == new and new.stat().st_size == 0:
            new.unlink()
            return copy
    return source


def copy_input(folder: JobFolder, pieces: Iterable[bytes]) -> Path:
    """Write the input into the job's folder and return the file, which stays beside that of an earlier run until `settle_input`.

    Raises:
        StorageError: The file cannot be written.
    """
    copy, new = folder.paths.input_copy, folder.paths.new_input
    with translated(copy):
        new.unlink(missing_ok=True)
        with os.fdopen(open_private(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    return new if copy.exists() else settle_input(folder, new)


def settle_input(folder: JobFolder, source: Path) -> Path:
    """Let a new copy of the input replace that of an earlier run, and return the file to read from here on."""
    copy = folder.paths.input_copy
    if source != folder.paths.new_input:
        return source
    with translated(copy):
        source.replace(copy)
        sync_folder(copy.parent)
    return copy


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    try:
        while piece := stream.read(MIB):
            yield piece
    except OSError as error:
        raise StorageError(f"standard input cannot be read: {error.strerror or error}") from error
