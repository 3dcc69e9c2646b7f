"""Standard input, kept: a job reads its input several times, and a later run must find the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexgen.base.files import open_private, sync_folder
from flexgen.base.quantities import MIB
from flexgen.errors import StorageError
from flexgen.jobs.database import translated
from flexgen.jobs.folder import JobFolder


def keep_input(folder: JobFolder, stream: BinaryIO) -> Path:
    """The file that holds what `stream` gives, or gave an earlier run if it gives nothing now (a terminal is not asked again).

    What comes stays beside what an earlier run was given until `settle_input`, because a run that is refused leaves the job as it was.

    Raises:
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
    return new if copy.exists() else settle_input(folder, new)


def settle_input(folder: JobFolder, source: Path) -> Path:
    """Have what came take the place of what an earlier run was given; the file to read from here on."""
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
