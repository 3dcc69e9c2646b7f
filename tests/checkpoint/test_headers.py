"""Headers of safetensors files: what is sound is read, what is not is refused, and nothing else happens."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

from flexgen.checkpoint.headers import DTYPES, MAX_HEADER_BYTES, header_length, parse_header, read_header
from flexgen.checkpoint.sources import read_bytes
from flexgen.errors import CheckpointError

HERE = Path("model.safetensors")
FLOATS = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def packed(header: object, payload: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def parse(data: bytes) -> dict[str, Any]:
    length = header_length(data[:8], file_bytes=len(data), path=HERE)
    return parse_header(data[8 : 8 + length], file_bytes=len(data), path=HERE)


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d not in (torch.float8_e8m0fnu,)], ids=str)
def test_every_dtype_is_found_where_safetensors_wrote_it(dtype: torch.dtype, tmp_path: Path) -> None:
    written = {"a": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.empty(0, 4, dtype=dtype), "scalar": torch.tensor(1).to(dtype)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(written, metadata={"format": "pt"}))
    stored = read_header(path)
    assert stored.keys() == written.keys()
    for name, tensor in written.items():
        assert (stored[name].name, stored[name].path) == (name, path)
        assert (stored[name].shape, stored[name].dtype, stored[name].nbytes) == (tuple(tensor.shape), dtype, tensor.nbytes)
        read = read_bytes(path, stored[name].offset, stored[name].nbytes).view(dtype).view(tensor.shape)
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else read.item() == tensor.item()


def broken(**changes: object) -> bytes:
    return packed({"a": FLOATS | changes})


HOSTILE = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header beyond the limit": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
    "header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "truncated payload": packed({"a": FLOATS})[:-1],
    "trailing bytes": packed({"a": FLOATS}) + b"x",
    "no JSON": packed(b"{"),
    "JSON list": packed(b"[]", b""),
    "leading space": packed(b" " + json.dumps({"a": FLOATS}).encode()),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "deep": packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "many digits": packed(b'{"a":' + b"1" * 5000 + b"}"),
    "NaN": packed(b'{"a": NaN}'),
    "name twice": packed(b'{"a": %b, "a": %b}' % ((json.dumps(FLOATS).encode(),) * 2)),
    "key twice": packed(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'),
    "metadata of numbers": packed({"__metadata__": {"a": 1}}, b""),
    "metadata list": packed({"__metadata__": []}, b""),
    "empty name": packed({"": FLOATS}),
    "control character": packed({"a\nb": FLOATS}),
    "lone surrogate": packed(b'{"\\ud800": %b}' % json.dumps(FLOATS).encode()),
    "superscript digit": packed({"layers.\u00b2": FLOATS}),
    "long name": packed({"a" * 2000: FLOATS}),
    "entry is a list": packed({"a": []}),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "more keys": broken(pickle="gASV"),
    "unknown dtype": broken(dtype="F6_E2M3"),
    "dtype is a list": broken(dtype=["F32"]),
    "shape too small": broken(shape=[2]),
    "negative shape": broken(shape=[-2, -2]),
    "float shape": broken(shape=[2.0, 2]),
    "bool shape": broken(shape=[True, 4]),
    "string shape": broken(shape="22"),
    "overflow": broken(shape=[1 << 32, 1 << 32]),
    "overflow times nothing": broken(shape=[0, 1 << 50, 1 << 50], data_offsets=[0, 0]),
    "huge dimension": broken(shape=[0, 10**30], data_offsets=[0, 0]),
    "many dimensions": broken(shape=[1] * 1000 + [4]),
    "one offset": broken(data_offsets=[16]),
    "negative offsets": broken(data_offsets=[-16, 0]),
    "reversed offsets": broken(data_offsets=[16, 0]),
    "beyond the file": broken(data_offsets=[16, 32]),
    "hole": packed({"a": FLOATS, "b": FLOATS | {"data_offsets": [32, 48]}}, bytes(48)),
    "hole before": packed({"a": FLOATS | {"data_offsets": [8, 24]}}, bytes(24)),
    "overlap": packed({"a": FLOATS, "b": FLOATS | {"data_offsets": [8, 24]}}, bytes(24)),
    "same place": packed({"a": FLOATS, "b": FLOATS}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(CheckpointError):
            read_header(path)


SOUND = save({"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.arange(4), "c": torch.zeros(3, dtype=torch.bfloat16)})
HEADER_BYTES = 8 + int.from_bytes(SOUND[:8], "little")


EDITS = st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 3), st.binary(max_size=6)), min_size=1, max_size=4)


@given(EDITS, st.booleans())
def test_mutated_headers_are_refused_or_agree_with_safetensors(edits: list[tuple[int, int, bytes]], corrected: bool) -> None:
    data = bytearray(SOUND)
    for at, removed, inserted in edits:
        data[at : at + removed] = inserted
    if corrected:  # so that the mutations reach the JSON
        data[:8] = struct.pack("<Q", max(0, HEADER_BYTES - 8 + len(data) - len(SOUND)))
    agree_with_safetensors(bytes(data))


def test_ten_thousand_mutants() -> None:
    numbers, accepted = random.Random(0), 0
    for _ in range(10_000):
        data = bytearray(SOUND)
        for _ in range(numbers.randrange(1, 4)):
            at = numbers.randrange(HEADER_BYTES)
            data[at : at + numbers.randrange(3)] = numbers.choice([numbers.randbytes(numbers.randrange(3)), data[at:HEADER_BYTES][:9]])
        if numbers.random() < 0.7:
            data[:8] = struct.pack("<Q", max(0, HEADER_BYTES - 8 + len(data) - len(SOUND)))
        accepted += agree_with_safetensors(bytes(data))
    assert 10 < accepted < 9_000, "mutations must neither all be harmless nor all be caught by the first check"


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", 1]),
        "shape": st.lists(st.integers(-1, 3), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 20), min_size=1, max_size=3),
    }
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY), st.integers(0, 24))
def test_invented_headers_are_refused_or_agree_with_safetensors(header: dict[str, object], payload_bytes: int) -> None:
    agree_with_safetensors(packed(header, bytes(payload_bytes)))


@given(st.lists(st.tuples(st.sampled_from(["I8", "F32", "F64"]), st.lists(st.integers(0, 3), max_size=3)), max_size=4), st.data())
def test_sound_headers_are_accepted(entries: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    header, offset = {}, 0
    for number, (dtype, shape) in enumerate(entries):
        end = offset + DTYPES[dtype].itemsize * math.prod(shape)
        header[str(number)] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    shuffled = {name: header[name] for name in data.draw(st.permutations(list(header)))}
    assert agree_with_safetensors(packed(shuffled, bytes(range(offset))))


def agree_with_safetensors(data: bytes) -> bool:
    """Whether the file is accepted; then safetensors must accept it too, and find the same."""
    try:
        tensors = parse(data)
    except CheckpointError:
        return False
    others = dict(deserialize(data))
    assert others.keys() == tensors.keys()
    for name, stored in tensors.items():
        assert (others[name]["shape"], DTYPES[others[name]["dtype"]]) == (list(stored.shape), stored.dtype)
        assert bytes(others[name]["data"]) == data[stored.offset : stored.offset + stored.nbytes]
    return True
