"""The results of one worker: a file that it alone writes, by appending, and that all others read.

A frame is a line: a digest, a blank, and a JSON object.  What follows the first frame that is not whole does not count.  A worker writes
and syncs many frames at a time, so what lies behind a torn frame was not durable either; and a reader that meets one which is only being
written reads it again later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.failpoints import failpoint
from flexgen.base.files import open_private, sync_folder
from flexgen.errors import StorageError
from flexgen.jobs import saved_progress
from flexgen.jobs.saved_progress import ProgressRow, SavedProgress

_DIGEST_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a line, as `Store.add` takes it."""

    line_number: int
    digest: int
    record: bytes
    failed: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0


class ShardWriter:
    """Appends to a new shard.

    Args:
        path: The file, which must not exist.

    Raises:
        StorageError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frames: list[bytes] = []
        self._failed = False
        try:
            self._file = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            sync_folder(path.parent)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}") from error

    def add(self, item: Result | ProgressRow) -> None:
        """Take a result or some progress for the next commit."""
        self._frames.append(_framed(_encoded(item)))

    def commit(self) -> None:
        """Make durable what was added.

        Raises:
            StorageError: It is not durable.  Nothing can be added any more, because it might follow half a frame.
        """
        frames, self._frames = self._frames, []
        if not frames:
            return
        try:
            if self._failed:
                raise StorageError(f"{self._path} could not be written before")
            failpoint("shard.write")
            _write_all(self._file, b"".join(frames))
            failpoint("shard.fsync")
            os.fsync(self._file)
            failpoint("shard.synced")
        except BaseException as error:
            self._failed = True
            if isinstance(error, OSError):
                raise StorageError(f"{self._path}: {error.strerror or error}") from error
            raise

    def close(self) -> None:
        """Close the file; what is not committed is lost."""
        os.close(self._file)


class ShardReader:
    """Reads a shard as it grows.

    Args:
        path: The file, which may not exist yet.

    Attributes:
        begun: The digest and the progress, by choice, of each line that has tokens and no result here.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.begun: dict[int, tuple[int, dict[int, SavedProgress]]] = {}

    def read(self) -> Iterator[Result]:
        """Yield the results that were added since the last call.

        Raises:
            StorageError: The file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                for frame in file:
                    content = _checked(frame)
                    if content is None:
                        return
                    self._offset += len(frame)
                    result = self._take(content)
                    if result is not None:
                        yield result
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror or error}") from error

    def _take(self, content: dict[str, Any]) -> Result | None:
        if "begun" in content:
            line_number, digest, *row = content["begun"]
            known, choices = self.begun.get(line_number, (digest, {}))
            choices = choices if known == digest else {}
            saved_progress.follow(choices, *row)
            self.begun[line_number] = digest, choices
            return None
        line_number, digest, failed, prompt_tokens, output_tokens, record = content["result"]
        self.begun.pop(line_number, None)
        return Result(
            line_number=line_number, digest=digest, failed=failed, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
            record=record.encode(),
        )  # fmt: skip


def rows_of(line_number: int, digest: int, choices: dict[int, SavedProgress]) -> list[ProgressRow]:
    """Return the progress of a line as rows that need no earlier ones."""
    return [
        ProgressRow(line_number=line_number, digest=digest, choice=choice, start=0, generated=saved.generated, result=saved.result(index=0))
        for choice, saved in choices.items()
    ]


def _encoded(item: Result | ProgressRow) -> dict[str, Any]:
    if isinstance(item, ProgressRow):
        return {"begun": [item.line_number, item.digest, item.choice, item.start, *saved_progress.texts(item)]}
    return {
        "result": [item.line_number, item.digest, item.failed, item.prompt_tokens, item.output_tokens, item.record.decode()],
    }


def _framed(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return _digest(text) + b" " + text + b"\n"


def _checked(frame: bytes) -> dict[str, Any] | None:
    """Return the content of a frame; None if it is not whole."""
    digest, text = frame[:_DIGEST_CHARS], frame[_DIGEST_CHARS + 1 : -1]
    if not frame.endswith(b"\n") or _digest(text) != digest:
        return None
    return json.loads(text)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST_CHARS // 2).hexdigest().encode()


def _write_all(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
