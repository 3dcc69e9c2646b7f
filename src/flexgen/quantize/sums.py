"""Digests of files, block by block, so that a damaged file is found, and with it the tensors that the damage can be in."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import MIB
from flexgen.checkpoint.headers import read_header
from flexgen.errors import FlexGenError, StorageError
from flexgen.hub.diagnose import some
from flexgen.quantize.record import FileSums, Record

BLOCK_BYTES = 32 * MIB
_PIECE_BYTES = MIB


def sums_of(path: Path, parallel: Parallel = serially) -> FileSums:
    """Return the size and the digests of a file; a piece of it is in memory at a time, for each thread.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            nbytes = os.fstat(file.fileno()).st_size
            blocks = [""] * -(-nbytes // BLOCK_BYTES)

            def digest(begin: int, end: int) -> None:
                for block in range(begin, end):
                    blocks[block] = _digest(file.fileno(), block * BLOCK_BYTES, min(BLOCK_BYTES, nbytes - block * BLOCK_BYTES))

            parallel(digest, len(blocks))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    return FileSums(nbytes=nbytes, blocks=tuple(blocks))


def _digest(descriptor: int, offset: int, nbytes: int) -> str:
    hasher, end = hashlib.blake2b(digest_size=16), offset + nbytes
    while offset < end:
        piece = os.pread(descriptor, min(_PIECE_BYTES, end - offset), offset)
        if not piece:
            raise OSError("it became shorter")
        hasher.update(piece)
        offset += len(piece)
    return hasher.hexdigest()


def damages(folder: Path, record: Record, parallel: Parallel = serially) -> list[str]:
    """Read all files of a conversion, and return what is wrong with them, a sentence for each damage."""
    found = [] if record.complete else [f"{folder}: the conversion is not complete; the same command goes on"]
    for name, expected in record.files.items():
        path = folder / name
        try:
            actual = sums_of(path, parallel)
        except StorageError as error:
            found.append(str(error))
            continue
        if actual.nbytes != expected.nbytes:
            found.append(f"{path} has {actual.nbytes:,} bytes; {expected.nbytes:,} were written")
            continue
        wrong = [index for index, (one, other) in enumerate(zip(actual.blocks, expected.blocks, strict=True)) if one != other]
        found += [f"{path} is damaged: {_place(path, index)} is not what was written" for index in wrong]
    return found


def _place(path: Path, block: int) -> str:
    """Say what lies in a block of a file."""
    first, last = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
    if path.suffix != ".safetensors":
        return "what it holds"
    try:
        tensors = read_header(path)
    except FlexGenError as error:
        return f"its header or what follows ({error})"
    inside = [name for name, tensor in tensors.items() if tensor.offset < last and first < tensor.offset + tensor.nbytes]
    return f"something in bytes {first:,} to {last:,} ({some(inside)})"
