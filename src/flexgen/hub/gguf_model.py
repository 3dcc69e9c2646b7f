"""The GGUF files of a model: one, or the numbered parts of one, with their headers.  Reads headers only."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.errors import CheckpointError, ModelError, UnsupportedModelError
from flexgen.hub.diagnose import check_fetched, some
from flexgen.hub.gguf_file import MAGIC, MOST_HEADER_BYTES, MOST_TENSORS, GGUFHeader, GGUFTensor, HeaderCutShort, parse_gguf
from flexgen.hub.symlinks import followed

ENDING = ".gguf"
_FIRST_BYTES = 1 << 20
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST_PARTS = 1 << 12

ReadStart = Callable[[int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFModel:
    """A model in GGUF.

    Attributes:
        parts: The headers of its files, in their order.
    """

    parts: tuple[GGUFHeader, ...]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The values of the first file, which describe the model."""
        return self.parts[0].metadata

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def tensors(self) -> list[tuple[Path, GGUFTensor]]:
        """All tensors, each with its file."""
        return [(part.path, tensor) for part in self.parts for tensor in part.tensors]


def is_gguf(path: Path) -> bool:
    """Return whether a path is that of a GGUF file, by its name or by its first bytes."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return path.name.endswith(ENDING) or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return path.name.endswith(ENDING)


def part_names(name: str) -> list[str]:
    """Return the names of all parts of the file that `name` is a part of; of a file in one part, its own name."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MOST_PARTS:
        raise ModelError(f"{name} is not the name of a part: there are no parts {match['number']} of {match['count']}")
    return [f"{match['stem']}-{number:05}-of-{count:05}{ENDING}" for number in range(1, count + 1)]


def read_gguf(path: Path) -> GGUFModel:
    """Read the headers of a file and, if it is one of several parts, of all of them.

    Raises:
        CheckpointError: A part is missing, cannot be read, is behind a link that is not followed, or breaks a rule of the format.
        UnsupportedModelError: The file holds something else than a model, or tensors of an unsupported type.
    """
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [each.name for each in paths if not os.path.lexists(each)]
    if missing:
        raise CheckpointError(f"{path} is one of {len(paths)} parts, and not all lie beside it: {some(missing)} missing")
    return gguf_model([_read_header(each) for each in paths])


def gguf_model(parts: list[GGUFHeader]) -> GGUFModel:
    """Check that headers belong together, in this order, and describe a model.

    Raises:
        CheckpointError: They are not all parts of one model.
        UnsupportedModelError: The file holds something else than a model.
    """
    first = parts[0]
    kind = first.metadata.get("general.type", "model")
    architecture = first.metadata.get("general.architecture")
    if kind != "model":
        raise UnsupportedModelError(f"{first.path} holds {str(kind)[:40]!r}, not a model: give the file of the language model itself")
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w.\-]{1,64}", architecture):
        raise CheckpointError(f"{first.path}: not a sound GGUF file: it names no architecture (general.architecture)")
    stated = first.metadata.get("split.count") or 1
    if stated != len(parts):
        raise CheckpointError(
            f"{first.path} says that it is one of {str(stated)[:20]} parts, its name says {len(parts)}: parts are found by names such as "
            f"model-00001-of-00003{ENDING}"
        )
    seen: dict[str, str] = {}
    for number, part in enumerate(parts):
        if len(parts) > 1 and (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, len(parts)):
            raise CheckpointError(f"{part.path} does not say that it is part {number + 1} of {len(parts)}: it is of another model")
        for tensor in part.tensors:
            if tensor.name in seen:
                raise CheckpointError(f"{tensor.name} is stored twice: in {seen[tensor.name]} and in {part.path.name}")
            seen[tensor.name] = part.path.name
    wanted = first.metadata.get("split.tensors.count", len(seen)) if len(parts) > 1 else len(seen)
    if wanted != len(seen) or not 0 < len(seen) <= MOST_TENSORS:
        raise CheckpointError(f"{first.path}: there should be {str(wanted)[:20]} tensors in all parts together, and there are {len(seen)}")
    return GGUFModel(parts=tuple(parts))


def header_from(read_start: ReadStart, *, file_bytes: int, path: Path) -> GGUFHeader:
    """Parse the header of a file that can be read from its start, taking more of it until the header is whole.

    Args:
        read_start: Returns the first bytes of the file, as many as asked for or all.
        file_bytes: The size of the whole file.
        path: The path for messages and for the result.

    Raises:
        CheckpointError: The header breaks a rule of the format.
        UnsupportedModelError: A tensor is of a type that is not supported.
    """
    size = _FIRST_BYTES
    while True:
        try:
            return parse_gguf(read_start(min(size, file_bytes)), file_bytes=file_bytes, path=path)
        except HeaderCutShort:
            if size >= min(file_bytes, MOST_HEADER_BYTES):
                raise
            size *= 4


def _read_header(path: Path) -> GGUFHeader:
    followed(path)
    check_fetched(path)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")

            def start(size: int) -> bytes:
                file.seek(0)
                return file.read(size)

            return header_from(start, file_bytes=status.st_size, path=path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking: a pipe under a file's name must not block the program."""
    return os.open(path, flags | os.O_NONBLOCK)
