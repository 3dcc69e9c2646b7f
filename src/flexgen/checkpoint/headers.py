"""The header of a safetensors file, parsed and validated from bytes that may come from a disk or from a network.

Every rule of the format is checked here, because other modules use the payload offsets as plain numbers to read from.  This module
knows no models or folders, and never sees a weight.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexgen.base.strict_json import strict_json
from flexgen.errors import CheckpointError
from flexgen.formats.base import StoredTensor
from flexgen.hub.diagnose import check_fetched

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 50_000_000  # half of what the format allows; the largest published headers have a tenth of that
MAX_TENSORS = 1 << 18  # per model; each tensor takes a kilobyte here
_MAX_NAME_LENGTH = 1024  # names are matched by regular expressions later
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 60

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the file, from its header alone.

    Raises:
        CheckpointError: The file is not a regular file, cannot be read, or its header breaks a rule of the format.
    """
    check_fetched(path)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            header_bytes = header_length(file.read(PREFIX_BYTES), file_bytes=status.st_size, path=path)
            return parse_header(file.read(header_bytes), file_bytes=status.st_size, path=path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking: a pipe under a weight file's name must not block the program."""
    return os.open(path, flags | os.O_NONBLOCK)


def header_length(prefix: bytes, *, file_bytes: int, path: Path) -> int:
    """Return the length of the JSON header that follows the first 8 bytes, `prefix`, of a file of `file_bytes`."""
    if len(prefix) < PREFIX_BYTES:
        raise _broken(path, f"{file_bytes} bytes are too few for a header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(path, f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > file_bytes - PREFIX_BYTES:
        raise _broken(path, f"a header of {length} bytes in a file of {file_bytes}: was the download cut short?")
    return length


def parse_header(header: bytes, *, file_bytes: int, path: Path) -> dict[str, StoredTensor]:
    """Return the tensors that `header`, the JSON after the first 8 bytes of the file, describes.

    Args:
        header: The header, exactly `header_length` bytes.
        file_bytes: The size of the whole file, which the tensors must fill without holes.
        path: The path that is recorded in the result and named in errors; nothing is opened.

    Raises:
        CheckpointError: A rule of the format is broken.
    """
    if not header.startswith(b"{"):
        raise _broken(path, "the header does not begin with '{'")
    if header.count(b"{") > MAX_TENSORS + 2:
        raise _broken(path, f"the header lists more than {MAX_TENSORS:,} tensors")
    try:
        entries = strict_json(header, max_values=16 * MAX_TENSORS)
    except ValueError as error:
        raise _broken(path, f"the header is not valid JSON: {error}") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ is not a map of strings")
    payload = PREFIX_BYTES + len(header)
    tensors = {name: _stored_tensor(name, entry, payload, path) for name, entry in entries.items()}
    _check_layout(tensors, start=payload, end=file_bytes, path=path)
    return tensors


def _stored_tensor(name: str, entry: Any, payload: int, path: Path) -> StoredTensor:
    if not name or len(name) > _MAX_NAME_LENGTH or not (name.isascii() and name.isprintable()):
        raise _broken(path, f"{name[:80]!r} is not a name for a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{name} is not described by exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise _broken(path, f"{name} has the unknown dtype {str(dtype_name)[:40]!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise _broken(path, f"{name} has the impossible shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"{name} has the impossible data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _broken(path, f"{name}: {dtype_name} {tuple(shape)} takes {nbytes} bytes, data_offsets span {end - begin}")
    return StoredTensor(name=name, path=path, offset=payload + begin, nbytes=nbytes, dtype=dtype, shape=tuple(shape))


def _are_sizes(value: Any) -> bool:
    # `type` and not isinstance: True is an int.  The bound keeps products of thousands of digits out.
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in value)


def _check_layout(tensors: Mapping[str, StoredTensor], *, start: int, end: int, path: Path) -> None:
    """Check that the tensors fill [start, end) of the file without overlaps or gaps."""
    position, previous = start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            fault = "overlaps" if tensor.offset < position else "leaves a hole after"
            raise _broken(path, f"{tensor.name} {fault} {previous}")
        position, previous = tensor.offset + tensor.nbytes, tensor.name
    if position != end:
        raise _broken(path, f"the tensors end at byte {position}, the file at {end}: was the download cut short?")


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a sound safetensors file: {reason}")
