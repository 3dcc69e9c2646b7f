"""Where a job lives: a private folder beside its output, used by one run at a time.  Knows nothing of what is kept in it."""

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

_SUFFIX = ".flexgen"
_USUAL_NAME_BYTES = 255
_DATABASE_BYTES = 504  # SQLite takes 512 for the path of the longest of its files
_LOCK_TRIES = 4  # `flexgen status` holds the lock for the moment of a look
_LOCK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPaths:
    """The places of a job.

    Attributes:
        folder: Holds everything that is kept about the job.
        output: The file of answers; None is standard output.
    """

    folder: Path
    output: Path | None

    @property
    def database(self) -> Path:
        return self.folder / "job.sqlite"

    @property
    def input_copy(self) -> Path:
        """The input of a job that reads standard input."""
        return self.folder / "input"

    @property
    def new_input(self) -> Path:
        """Where that is written before it counts."""
        return self.folder / "input.new"

    @property
    def name(self) -> str:
        """What messages call the job."""
        return str(self.output if self.output is not None else self.folder)


def job_paths(source: Path | None, output: Path | None, state: Path | None) -> JobPaths:
    """Where the job of these files lives: in `state`, else beside its output, else beside its input.

    Raises:
        OptionError: Standard input to standard output leaves no place that a rerun would find.
    """
    if state is not None:
        return JobPaths(folder=state, output=output)
    named = output if output is not None else source
    if named is None:
        raise OptionError("from standard input to standard output: name a folder for the job's state (--state DIR)")
    return JobPaths(folder=_beside(named), output=output)


def _beside(named: Path) -> Path:
    """The folder beside a file, named after it; names of files that leave no room for the ending are cut, and get a digest."""
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
    """In bytes, on the folder's file system."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except OSError:  # a folder that is not there, which others complain of
        return _USUAL_NAME_BYTES


def find_job(named: Path) -> JobPaths:
    """The job that writes the file `named`, or that lives in the folder `named`.

    Raises:
        JobError: There is none.
    """
    named = named.absolute()
    beside = JobPaths(folder=_beside(named), output=named)
    inside = JobPaths(folder=named, output=None)
    for paths in (beside, inside):
        with _translated(paths):
            if paths.database.is_file():
                return paths
    raise JobError(f"there is no job of {named} (neither {beside.database} nor {inside.database} exists)")


class JobFolder:
    """The folder of a job, created if need be, and the right to run the job until `close`.

    Raises:
        JobError: Another run has it, or it is not ours.
        StorageError: It or the output cannot be written.
    """

    def __init__(self, paths: JobPaths) -> None:
        self.paths = paths
        self._lock = -1
        self._kept = False
        with _translated(paths):
            check_target(paths.output)
            _check_length(paths)
            self._is_new = _make_private(paths)
            self._lock = open_private(paths.folder / "lock", os.O_RDWR | os.O_CREAT)
            try:
                self._take_lock()
                os.close(open_private(paths.folder / "export.lock", os.O_RDWR | os.O_CREAT))  # needed at the end: refused now
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
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
        """Delete what earlier runs kept; the lock stays."""
        with _translated(self.paths):
            database = self.paths.database
            for path in (
                self.paths.input_copy,
                self.paths.new_input,
                *(database.with_name(database.name + end) for end in ("-wal", "-shm", "")),
            ):
                path.unlink(missing_ok=True)

    def keep(self) -> None:
        """From here on `undo` does nothing: the run starts."""
        self._kept = True

    def undo(self) -> None:
        """After a run that was refused before the start: remove the folder, if this run has made it, and an input that does not count."""
        if self._kept:
            return
        with _translated(self.paths):
            self.paths.new_input.unlink(missing_ok=True)
            if not self._is_new:
                return
            self.remove_state()
            for name in ("export.lock", "lock"):
                (self.paths.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody has put something into it
                self.paths.folder.rmdir()

    def close(self) -> None:
        """Let others run the job."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def running_process(paths: JobPaths) -> int | None:
    """The id of the process that runs the job now."""
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
            "name a folder with a shorter path (--state DIR)"
        )


def _make_private(paths: JobPaths) -> bool:
    """Whether the folder is new."""
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
        raise JobError(f"{folder} holds other files than a job's; name a folder of its own with --state")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return is_new


@contextmanager
def _translated(paths: JobPaths) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{paths.folder} cannot be used: {error}") from error
