"""Writes GGUF files for tests: the layout by hand, so that tests need no other package, and blocks of random numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexgen.hub.gguf_file import TYPES

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
SIZES = {kind.name: (kind.block, kind.block_bytes) for kind in TYPES.values()}
BLOCK_TYPES = [name for name in SIZES if name not in ("F32", "F16", "BF16")]
# Where blocks hold float16 numbers, which random bytes would make huge.
HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
}  # fmt: skip

Stored = tuple[str, tuple[int, ...], bytes]  # type, shape, data


def plain(array: np.ndarray) -> Stored:
    """A tensor of float32 or float16 numbers."""
    return {"float32": "F32", "float16": "F16"}[array.dtype.name], array.shape, array.tobytes()


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0, scale: float = 0.01) -> Stored:
    """A tensor of random blocks, whose numbers are about as large as `scale` says."""
    block, block_bytes = SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (math.prod(shape) // block, block_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = generator.normal(0, scale, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = generator.integers(118, 124, len(blocks), dtype=np.uint8)
    return kind, shape, blocks.tobytes()


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], *, version: int = 3, alignment: int | None = None) -> bytes:
    """A file; dimensions are given row-major, as in NumPy."""
    alignment = alignment or 32
    pairs = b"".join(text(key) + value(each) for key, each in metadata.items())
    entries, payload = b"", b""
    for name, (kind, shape, data) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries += text(name) + dims + struct.pack("<IQ", NUMBERS[kind], len(payload))
        payload += data + bytes(-len(data) % alignment)
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + pairs + entries
    return header + bytes(-len(header) % alignment) + payload


def text(each: str) -> bytes:
    return struct.pack("<Q", len(each.encode())) + each.encode()


def value(each: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(each, list):
        return struct.pack("<I", 9) + struct.pack("<IQ", _kind(each[0]), len(each)) + b"".join(_bare(one) for one in each)
    return struct.pack("<I", _kind(each)) + _bare(each)


def _kind(each: Any) -> int:
    return {bool: 7, int: 4, float: 6, str: 8}[type(each)]


def _bare(each: Any) -> bytes:
    return text(each) if isinstance(each, str) else struct.pack({bool: "<?", int: "<I", float: "<f"}[type(each)], each)


def write_split(folder: Path, stem: str, metadata: Mapping[str, Any], tensors: Mapping[str, Stored], num_parts: int) -> list[Path]:
    """The parts of a model; the first holds the metadata."""
    names, paths = list(tensors), []
    for number in range(num_parts):
        own = {name: tensors[name] for name in names[number::num_parts]}
        about = {"split.no": number, "split.count": num_parts, "split.tensors.count": len(tensors)}
        paths.append(folder / f"{stem}-{number + 1:05}-of-{num_parts:05}.gguf")
        paths[-1].write_bytes(
            gguf_bytes(
                {**(metadata if number == 0 else {}), **about}, own, alignment=metadata.get("general.alignment") if number == 0 else None
            )
        )
    return paths
