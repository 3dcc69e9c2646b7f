"""The folder that the workers of a job share: the names of its files, and how files appear in it whole, also for other hosts.

Each run with workers has a subfolder of its own, so that a worker of an earlier run finds nothing that it could mistake for its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.failpoints import failpoint
from flexgen.base.files import open_private, sync_folder
from flexgen.errors import JobError, StorageError

_CURRENT = "current"  # the file that names the subfolder of the present run


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFolder:
    """The folder of one run with workers.

    Attributes:
        root: The folder of the job's workers.
        run: The name of the run's subfolder.
    """

    root: Path
    run: str

    @property
    def path(self) -> Path:
        return self.root / self.run

    @property
    def task(self) -> Path:
        """What is to be answered, and how."""
        return self.path / "task.json"

    @property
    def lines(self) -> Path:
        """The numbers and digests of the lines to answer."""
        return self.path / "lines"

    @property
    def begun(self) -> Path:
        """The tokens that earlier runs have generated for these lines, as a shard."""
        return self.path / "begun"

    @property
    def leases(self) -> Path:
        return self.path / "leases"

    @property
    def members(self) -> Path:
        return self.path / "members"

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def logs(self) -> Path:
        """What the workers that the run has started have said."""
        return self.path / "logs"

    @property
    def is_current(self) -> bool:
        """Whether the run is neither over nor replaced by another one."""
        found = current_run(self.root)
        return found is not None and found.run == self.run


def make_folder(root: Path) -> SharedFolder:
    """Make the folder of a new run, which workers find once it is published.

    Raises:
        StorageError: It cannot be made.
        JobError: Something else than a folder of this user lies there.
    """
    folder = SharedFolder(root=root, run=secrets.token_hex(8))
    with translated(root):
        for path in (root.parent, root):
            path.mkdir(mode=0o700, exist_ok=True)
        check_folder(root)
        for path in (folder.path, folder.leases, folder.members, folder.shards, folder.logs):
            path.mkdir(mode=0o700)
    return folder


def publish(folder: SharedFolder) -> None:
    """Let workers find the folder, in place of that of an earlier run."""
    with translated(folder.root):
        sync_folder(folder.path)
        failpoint("workers.publish")
        replace_json(folder.root / _CURRENT, {"run": folder.run}, durable=True)
        sync_folder(folder.root)


def current_run(root: Path) -> SharedFolder | None:
    """Return the folder of the run that was published last; None if there is none.

    Raises:
        JobError: The folder does not belong to this user.
        StorageError: The folder cannot be read.
    """
    with translated(root):
        try:
            check_folder(root)
            found = read_json(root / _CURRENT)
        except FileNotFoundError:
            return None
    run = found.get("run") if isinstance(found, dict) else None
    if not isinstance(run, str) or not run.isalnum():
        raise StorageError(f"{root / _CURRENT} is damaged")
    return SharedFolder(root=root, run=run)


def remove_folder(root: Path) -> None:
    """Remove what the workers of a job share, if there is anything; workers that still run find that the job is over."""
    with translated(root):
        if not os.path.lexists(root):
            return
        check_folder(root)
        (root / _CURRENT).unlink(missing_ok=True)
        failpoint("workers.remove")
        for _ in range(3):  # a worker that runs on may write while the folder is being removed
            with suppress(OSError):
                shutil.rmtree(root)
                return


def check_folder(path: Path) -> None:
    """Check that a folder is this user's own, because whoever can write into it can write answers.

    Raises:
        JobError: It is not.
        FileNotFoundError: There is none.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or os.geteuid() not in (found.st_uid, 0):
        raise JobError(f"{path} is not a folder of yours")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise JobError(f"{path} can be written by other users, who could put answers into it: chmod 700")


def link_new(path: Path, content: str) -> bool:
    """Make a file that appears with its whole content, and return whether this call has made it: False if the name exists.

    Of several hosts that try at once, one succeeds, also on NFS.

    Raises:
        OSError: The file system refuses, or has no hard links.
    """
    temporary = _write_temporary(path, content)
    try:
        failpoint("workers.link")
        os.link(temporary, path)
    except FileExistsError:
        return temporary.stat().st_nlink == 2  # on NFS the answer to a link that was made may be lost, and the second try fails
    finally:
        temporary.unlink(missing_ok=True)
    failpoint("workers.linked")
    return True


def replace_json(path: Path, value: object, *, durable: bool = False) -> None:
    """Make or replace a file with a JSON value; readers see the old content or the new one."""
    temporary = _write_temporary(path, json.dumps(value), durable=durable)
    try:
        failpoint("workers.replace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return the JSON value of a file.

    Raises:
        StorageError: It is not JSON.
        OSError: It cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}") from error


def _write_temporary(path: Path, content: str, *, durable: bool = False) -> Path:
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    with os.fdopen(open_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return temporary


def names_in(path: Path) -> list[str]:
    """Return the names of the files of a folder, without those that are being written."""
    return sorted(each.name for each in path.iterdir() if not each.name.startswith("."))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
