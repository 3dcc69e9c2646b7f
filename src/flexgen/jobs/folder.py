"""The folder of a job: private, beside the job's output, and used by one run at a time.  Knows nothing of the contents of its files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.files import check_target, open_private, sync_folder
from flexgen.errors import JobError, OptionError, StorageError
from flexgen.jobs.spelling import PYTHON, Spelling

_SUFFIX = ".flexgen"
_WORKERS = "workers"
_USUAL_NAME_BYTES = 255
_DATABASE_BYTES = 504  # SQLite allows 512 for the longest of its file paths
_LOCK_TRIES = 4  # `flexgen status` holds the lock for a moment
_LOCK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPaths:
    """The paths of a job.

    Attributes:
        folder: The folder that holds all state of the job.
        output: The file of answers; None for standard output.
        spelling: How messages write what the caller can change.
    """

    folder: Path
    output: Path | None
    spelling: Spelling = PYTHON

    @property
    def database(self) -> Path:
        return self.folder / "job.sqlite"

    @property
    def input_copy(self) -> Path:
        """The copy of the input of a job that reads standard input."""
        return self.folder / "input"

    @property
    def new_input(self) -> Path:
        """The file in which a new copy of the input is written before it replaces `input_copy`."""
        return self.folder / "input.new"

    @property
    def workers(self) -> Path:
        """The folder that workers share: beside the output, where other hosts can find it even if the state lies elsewhere."""
        return (self.folder if self.output is None else _beside(self.output)) / _WORKERS

    @property
    def name(self) -> str:
        """The name of the job in messages."""
        return str(self.output if self.output is not None else self.folder)


def job_paths(source: Path | None, output: Path | None, state: Path | None, spelling: Spelling = PYTHON) -> JobPaths:
    """Return the paths of the job of these files: its folder is `state`, else beside its output, else beside its input.

    Args:
        source: The input file; None for standard input.
        output: The output file; None for standard output.
        state: The folder that the user named, if any.
        spelling: How messages write what the caller can change.

    Raises:
        OptionError: All three are None, so that a rerun could not find the job.
    """
    if state is not None:
        return JobPaths(folder=state, output=output, spelling=spelling)
    named = output if output is not None else source
    if named is None:
        raise OptionError(f"from standard input to standard output: name a folder for the job's state{spelling.folder}")
    return JobPaths(folder=_beside(named), output=output, spelling=spelling)


def _beside(named: Path) -> Path:
    """Return the folder beside a file, named after it; a name too long for the suffix is cut and gets a digest."""
    whole = named.name + _SUFFIX
    most = _longest_name(named.parent)
    if len(os.fsencode(whole)) <= most:
        return named.parent / whole
    ending = "." + hashlib.blake2b(os.fsencode(named.name), digest_size=8).hexdigest() + _SUFFIX
    stem = named.name
    while stem and len(os.fsencode(stem)) + len(ending) > most:
        stem = stem[:-1]
    return named.parent / (stem + ending)


def _longest_name(folder: Path) -> int:
    """Return the most bytes that a file name may have on the folder's file system."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except OSError:  # the folder does not exist, which is reported elsewhere
        return _USUAL_NAME_BYTES


def find_job(named: Path) -> JobPaths:
    """Return the paths of the job that writes the file `named`, or whose folder is `named`.

    Raises:
        JobError: There is no such job.
        StorageError: The folder cannot be read.
    """
    named = named.absolute()
    beside = JobPaths(folder=_beside(named), output=named)
    inside = JobPaths(folder=named, output=None)
    for paths in (beside, inside):
        with _translated(paths):
            if paths.database.is_file():
                return paths
    raise JobError(f"there is no job of {named} (neither {beside.database} nor {inside.database} exists)")


def find_workers(named: Path) -> Path:
    """Return the folder that the workers of a job share, whose output or folder is `named`; it may not exist."""
    named = named.absolute()
    beside = _beside(named) / _WORKERS
    return beside if beside.is_dir() or not (named / _WORKERS).is_dir() else named / _WORKERS


class JobFolder:
    """The folder of a job, created if it does not exist, and the exclusive right to run the job until `close`.

    Args:
        paths: The paths of the job.

    Raises:
        JobError: Another process runs the job, or the folder belongs to another user or holds other files than a job's.
        StorageError: The folder or the output cannot be written.
    """

    def __init__(self, paths: JobPaths) -> None:
        self.paths = paths
        self._lock = -1
        self._kept = False
        with _translated(paths):
            check_target(paths.output)
            _check_length(paths)
            self._is_new = _make_private(paths)
            is_held = False
            try:
                self._lock = open_private(paths.folder / "lock", os.O_RDWR | os.O_CREAT)
                self._take_lock()
                is_held = True
                # The output needs this lock at the end of the run: fail now rather than then.
                os.close(open_private(paths.folder / "export.lock", os.O_RDWR | os.O_CREAT))
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
                if is_held:
                    self.undo()
                elif self._is_new:
                    with suppress(OSError):  # another run is in it
                        paths.folder.rmdir()
                self.close()
                raise

    def _take_lock(self) -> None:
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt + 1 < _LOCK_TRIES:
                    time.sleep(_LOCK_SECONDS)
                continue
            if os.fstat(self._lock).st_nlink == 0:
                raise JobError(f"{self.paths.folder} was removed a moment ago by another run, which was refused: try again")
            return
        holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
        raise JobError(f"{self.paths.name} is being written by another flexgen (process {holder or 'unknown'})")

    def remove_state(self) -> None:
        """Delete the database and the copy of the input; the lock stays."""
        with _translated(self.paths):
            database = self.paths.database
            for path in (
                self.paths.input_copy,
                self.paths.new_input,
                *(database.with_name(database.name + end) for end in ("-wal", "-shm", "")),
            ):
                path.unlink(missing_ok=True)

    def keep(self) -> None:
        """Make `undo` do nothing from here on, because the run starts."""
        self._kept = True

    def undo(self) -> None:
        """Clean up after a run that was refused before its start, unless `keep` was called.

        Removes a new copy of the input, and the folder if this run created it.
        """
        if self._kept:
            return
        with _translated(self.paths):
            self.paths.new_input.unlink(missing_ok=True)
            if not self._is_new:
                return
            self.remove_state()
            for name in ("export.lock", "lock"):
                (self.paths.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # another program has put a file into it
                self.paths.folder.rmdir()

    def close(self) -> None:
        """Release the right to run the job."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def running_process(paths: JobPaths) -> int | None:
    """Return the id of the process that runs the job now; 0 if the id is unknown, None if no process runs the job."""
    try:
        fd = open_private(paths.folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        digits = os.read(fd, 32).strip()
        return int(digits) if digits.isdigit() else 0
    finally:
        os.close(fd)
    return None


def _check_length(paths: JobPaths) -> None:
    length = len(os.fsencode(os.path.realpath(paths.database)))
    if length > _DATABASE_BYTES:
        raise StorageError(
            f"{paths.folder} lies too deep: the path of its database has {length} bytes, and SQLite takes {_DATABASE_BYTES}; "
            f"name a folder with a shorter path{paths.spelling.folder}"
        )


def _make_private(paths: JobPaths) -> bool:
    """Create the folder if it does not exist, make it private, and return whether it is new."""
    folder = paths.folder
    is_new = True
    try:
        folder.mkdir(mode=0o700)
        sync_folder(folder.absolute().parent)
    except FileExistsError:
        is_new = False
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise JobError(f"{folder} is not a folder of yours, and the job would keep private data in it")
    if any(folder.iterdir()) and not ((folder / "lock").exists() or paths.database.exists()):
        raise JobError(f"{folder} holds other files than a job's; name a folder of its own{paths.spelling.folder}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return is_new


@contextmanager
def _translated(paths: JobPaths) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{paths.folder} cannot be used: {error}") from error
