"""The header of a GGUF file, parsed and validated from bytes that may come from anywhere.

Layout: magic, version, counts, key-value pairs, one entry for each tensor (name, dimensions, type, offset), padding, and the tensors.
The source is the description of the format in the repository of ggml (docs/gguf.md).  Every rule is checked here, because other modules
use the offsets as plain numbers to read from.  Knows no models, and never sees a weight.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.quantities import align_up, format_size
from flexgen.errors import CheckpointError, UnsupportedModelError

MAGIC = b"GGUF"
MOST_HEADER_BYTES = 256 << 20  # vocabularies of half a million tokens take 30 MiB
MOST_TENSORS = 1 << 18
DEFAULT_ALIGNMENT = 32
_VERSIONS = (2, 3)
_MOST_PAIRS = 1 << 14
_MOST_VALUES = 1 << 22  # of an array
_KEPT_VALUES = 1 << 14  # longer arrays of numbers (scores, kinds of tokens) are kept as their length
_MOST_NAME_BYTES = 1024
_MOST_ALIGNMENT = 1 << 16
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 1 << 48

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GGMLType:
    """A type of tensors: `block` numbers of a row take `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int


# By their numbers in files (ggml_type in ggml.h).
TYPES: Mapping[int, GGMLType] = {
    number: GGMLType(*each)
    for number, each in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17),
    }.items()
}  # fmt: skip
BY_NAME: Mapping[str, GGMLType] = {each.name: each for each in TYPES.values()}
# Types that are refused by name.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Values:
    """An array that is kept as its length: strings, or many numbers."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        name: The name.
        type: The type of its numbers.
        shape: The shape, row-major: the file states the dimensions in the opposite order.
        offset: The offset of the first byte from the start of the file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFHeader:
    """The header of one file.

    Attributes:
        path: The file.
        metadata: The values by key: numbers, texts, short arrays of numbers as lists, and other arrays as `Values`.
        pairs: The bytes of each key-value pair, as in the file.
        tensors: The tensors.
    """

    path: Path
    metadata: Mapping[str, Any]
    pairs: Mapping[str, bytes]
    tensors: tuple[GGUFTensor, ...]


class HeaderCutShort(CheckpointError):
    """The bytes end within the header; with more of them it may be sound."""


def parse_gguf(data: bytes, *, file_bytes: int, path: Path) -> GGUFHeader:
    """Return the header that `data`, the first bytes of a file, begins with.

    Args:
        data: The beginning of the file, or all of it.
        file_bytes: The size of the whole file.
        path: The path that is recorded in the result and named in errors; nothing is opened.

    Raises:
        HeaderCutShort: The header is longer than `data`.
        CheckpointError: A rule of the format is broken.
        UnsupportedModelError: A tensor is of a type that is not supported.
    """
    cursor = _Cursor(data, path)
    if data[:4] != MAGIC:
        raise _broken(path, "it does not begin with GGUF")
    cursor.at = len(MAGIC)
    (version,) = cursor.numbers("I")
    if version not in _VERSIONS:
        big_endian = version != 0 and version & 0xFFFF == 0
        raise UnsupportedModelError(
            f"{path}: GGUF {'of a big-endian machine' if big_endian else f'of version {version}'} is not supported; "
            f"versions {' and '.join(map(str, _VERSIONS))} are"
        )
    num_tensors, num_pairs = cursor.numbers("QQ")
    if num_tensors > MOST_TENSORS or num_pairs > _MOST_PAIRS:
        raise _broken(path, f"it states {num_tensors:,} tensors and {num_pairs:,} values, more than any known model has")
    metadata, pairs = _read_pairs(cursor, num_pairs)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise _broken(path, f"general.alignment is {str(alignment)[:40]}, not a power of two")
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    tensors = _placed(entries, align_up(cursor.at, alignment), alignment, file_bytes, path)
    return GGUFHeader(path=path, metadata=metadata, pairs=pairs, tensors=tensors)


class _Cursor:
    """A position in the bytes of a header."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            if end > MOST_HEADER_BYTES:
                raise _broken(self.path, f"its header is longer than {format_size(MOST_HEADER_BYTES)}, which no honest one is")
            raise HeaderCutShort(f"{self.path}: not a sound GGUF file: it ends within its header: was the download cut short?")
        found = self.data[self.at : end]
        self.at = end
        return found

    def numbers(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}")))

    def text(self, most: int = MOST_HEADER_BYTES) -> str:
        (size,) = self.numbers("Q")
        if size > most:
            raise _broken(self.path, f"a text of {size} bytes at byte {self.at}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"a text at byte {self.at - size} is not UTF-8") from error

    def skip_texts(self, count: int) -> None:
        """Skip `count` texts; their bytes are taken as they are."""
        at, length = self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(self.data):
                break
            at += 8 + length(self.data, at)[0]
        else:
            self.at = at
            self.take(0)
            return
        self.at = at
        self.take(8)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(self._code(kind))[0]
        element, count = self.numbers("IQ")
        if count > _MOST_VALUES:
            raise _broken(self.path, f"an array of {count:,} values at byte {self.at}")
        if element == _STRING:
            self.skip_texts(count)
            return Values(count)
        code = self._code(element)
        raw = self.take(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", raw)) if count <= _KEPT_VALUES else Values(count)

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise _broken(self.path, f"a value of the unknown type {kind} at byte {self.at}")
        return _NUMBERS[kind]


def _read_pairs(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    metadata: dict[str, Any] = {}
    pairs: dict[str, bytes] = {}
    for _ in range(count):
        start = cursor.at
        key = _name(cursor, "a key")
        if key in metadata:
            raise _broken(cursor.path, f"the value {key} is stated twice")
        metadata[key] = cursor.value(cursor.numbers("I")[0])
        pairs[key] = cursor.data[start : cursor.at]
    return metadata, pairs


def _name(cursor: _Cursor, what: str) -> str:
    name = cursor.text(_MOST_NAME_BYTES)
    if not name or not (name.isascii() and name.isprintable()):
        raise _broken(cursor.path, f"{name[:80]!r} is not a name for {what}")
    return name


def _read_tensor(cursor: _Cursor) -> GGUFTensor:
    """Read the entry of a tensor; its offset is still from the end of the header."""
    name = _name(cursor, "a tensor")
    (num_dimensions,) = cursor.numbers("I")
    if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
        raise _broken(cursor.path, f"{name} has {num_dimensions} dimensions")
    shape = tuple(reversed(cursor.numbers("Q" * num_dimensions)))
    number, offset = cursor.numbers("IQ")
    if min(shape) < 1 or math.prod(shape) > _MOST_ELEMENTS:
        raise _broken(cursor.path, f"{name} has the impossible shape {str(shape)[:80]}")
    if number not in TYPES:
        known = ", ".join(each.name for each in TYPES.values())
        raise UnsupportedModelError(
            f"{cursor.path}: {name} is stored as {_OTHER_TYPES.get(number, f'type {number}')}, which is not supported: "
            f"take a file whose tensors are of the types {known}"
        )
    if shape[-1] % TYPES[number].block:
        raise _broken(cursor.path, f"{name} has rows of {shape[-1]} numbers, which are no whole blocks of {TYPES[number].name}")
    return GGUFTensor(name=name, type=TYPES[number], shape=shape, offset=offset)


def _placed(entries: list[GGUFTensor], start: int, alignment: int, file_bytes: int, path: Path) -> tuple[GGUFTensor, ...]:
    """Return the tensors with their offsets in the file, checked: aligned, within the file, and without overlaps."""
    names: set[str] = set()
    position, previous = 0, "the header"
    for tensor in sorted(entries, key=lambda each: (each.offset, each.nbytes)):
        if tensor.name in names:
            raise _broken(path, f"there are two tensors {tensor.name}")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise _broken(path, f"{tensor.name} is not aligned to {alignment} bytes")
        if tensor.offset < position:
            raise _broken(path, f"{tensor.name} overlaps {previous}")
        position, previous = tensor.offset + tensor.nbytes, tensor.name
        if start + position > file_bytes:
            raise _broken(path, f"{tensor.name} ends at byte {start + position}, the file at {file_bytes}: was the download cut short?")
    return tuple(GGUFTensor(name=each.name, type=each.type, shape=each.shape, offset=start + each.offset) for each in entries)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a sound GGUF file: {reason}")
