"""Private folders for what a run writes.  A run removes its folder when it ends; what a killed run left, a later run removes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

from flexgen.errors import StorageError

logger = logging.getLogger(__name__)

_LOCK = "in-use"


class OffloadFolder:
    """A fresh folder below another one that only its owner can read.  What killed runs left there is removed first.

    Args:
        parent: The folder in which to make it; it is created if necessary.
        prefix: The beginning of its name, which tells whose folders are removed.

    The run holds a lock on a file in the folder.  The kernel releases it however the run ends, so other runs can tell an abandoned folder.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, parent: Path, prefix: str = "flexgen-offload-") -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent, prefix)
            self.path, self._lock = _make(parent, prefix)
        except OSError as error:
            raise StorageError(f"the offload folder {parent} cannot be used: {error}") from error

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder and lock it; try again if another run's sweep came between the two."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: nobody can take it for abandoned either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove folders of this user that no run holds."""
    for folder in parent.glob(prefix + "*"):
        with contextlib.suppress(OSError):  # held, just being made, or gone
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                logger.warning("removed %s, which a run that was killed had left", folder)
            finally:
                os.close(lock)
