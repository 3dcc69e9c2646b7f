"""Decides which symbolic links in a model's folder are followed.

Weights often lie elsewhere (a hub cache whose blobs are on another disk, a folder of links), so an owner's own links are
followed.  What must not happen is that another user's link makes you read a file of yours that they could not read themselves.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from flexgen.errors import CheckpointError

_MOST_LINKS = 40  # Linux's own limit


def followed(path: Path) -> Path:
    """Return the file that `path` leads to: `path` itself, or the target of links that may be followed.

    A link may stay within its folder, or within its repository of the Hugging Face cache.  One that leads out must belong to
    you, to root, or to the owner of the file that it leads to.

    Raises:
        CheckpointError: There is no regular file, or a link on the way to it belongs to another user.
    """
    try:
        folder, real = path.parent.resolve(strict=True), path.resolve(strict=True)
        status = real.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if real == folder / path.name or any(real.is_relative_to(home) for home in _homes(folder)):
            return real
        strangers = [link for link in _links(folder / path.name) if link.lstat().st_uid not in (os.geteuid(), 0, status.st_uid)]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link to itself; ValueError: a NUL in the name
        raise CheckpointError(f"{path}: cannot be opened ({error})") from error
    if strangers:
        raise CheckpointError(
            f"{path}: {strangers[0]} is a link of another user to {real}, outside of the model's folder, and is not followed: "
            "make the link yourself, or copy the file"
        )
    return real


def _homes(folder: Path) -> Iterator[Path]:
    """Yield the folders that a link may lead into, whoever made it."""
    yield folder
    # models--owner--name/snapshots/<commit>/file -> ../../blobs/<digest>
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        yield folder.parent.parent


def _links(path: Path) -> Iterator[Path]:
    """Yield the links on the way from `path`, which lies in a folder without links, to its target."""
    current, rest, count = path.parent, [path.name], 0
    while rest:
        part = rest.pop()
        current = current.parent if part == ".." else current / part
        if not current.is_symlink():
            continue
        if (count := count + 1) > _MOST_LINKS:
            raise RuntimeError("too many links")
        yield current
        target = current.readlink()
        rest += reversed([part for part in target.parts if part != target.anchor])
        current = Path(target.anchor) if target.is_absolute() else current.parent
