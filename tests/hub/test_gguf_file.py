"""Headers of GGUF files: what sound ones say, and that broken ones are refused with a reason, whatever is broken."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_bytes, plain, random_blocks, write_split
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import CheckpointError, ModelError, UnsupportedModelError
from flexgen.hub.gguf_file import GGUFHeader, HeaderCutShort, Values, parse_gguf
from flexgen.hub.gguf_model import header_from, is_gguf, read_gguf

PATH = Path("model.gguf")
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": 64,
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "ü", ""],
    "llama.attention.head_count_kv": [2, 0],
    "tokenizer.ggml.scores": [0.5] * 20_000,
}
TENSORS = {
    "token_embd.weight": random_blocks("Q8_0", (4, 64)),
    "norm": plain(np.ones(5, np.float32)),
    "blk.0.ffn_up_exps.weight": random_blocks("Q4_K", (2, 3, 256)),
}
SOUND = gguf_bytes(METADATA, TENSORS, alignment=64)


def parsed(data: bytes) -> GGUFHeader:
    return parse_gguf(data, file_bytes=len(data), path=PATH)


def test_a_sound_header() -> None:
    header = parsed(SOUND)
    assert header.metadata == {
        **METADATA, "tokenizer.ggml.tokens": Values(3), "tokenizer.ggml.scores": Values(20_000),
    }  # fmt: skip
    assert [(tensor.name, tensor.type.name, tensor.shape) for tensor in header.tensors] == [
        (name, kind, shape) for name, (kind, shape, _) in TENSORS.items()
    ]
    for tensor in header.tensors:
        assert SOUND[tensor.offset : tensor.offset + tensor.nbytes] == TENSORS[tensor.name][2]
        assert tensor.offset % 64 == 0
    assert b"".join(header.pairs.values()) in SOUND


def test_only_the_beginning_of_a_file_is_read() -> None:
    """In growing pieces, because nothing says how long a header is."""
    asked: list[int] = []
    tokens = {"tokens": ["x" * 999] * 3000}
    data = gguf_bytes(METADATA | tokens, {"w": random_blocks("Q4_0", (9000, 1024))}, alignment=64)

    def start(size: int) -> bytes:
        asked.append(size)
        return data[:size]

    header = header_from(start, file_bytes=len(data), path=PATH)
    assert header.metadata["tokens"] == Values(3000)
    assert asked == [1 << 20, 4 << 20]
    assert len(data) > 5 << 20


def test_every_cut_is_noticed() -> None:
    """Anywhere in the header and in the numbers, other than in the padding behind the last."""
    last = parsed(SOUND).tensors[-1]
    for end in {*range(1500), last.offset - 1, last.offset, last.offset + last.nbytes - 1}:
        with pytest.raises(CheckpointError, match=r"cut short|does not begin"):
            parsed(SOUND[:end])
    parsed(SOUND[: last.offset + last.nbytes])


def replaced(old: bytes, new: bytes) -> bytes:
    assert SOUND.count(old) == 1
    return SOUND.replace(old, new)


def entry(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    encoded = name.encode()
    return struct.pack("<Q", len(encoded)) + encoded + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


NORM = entry("norm", (5,), 0, 320)
COUNTS = struct.pack("<IQQ", 3, len(TENSORS), len(METADATA))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + SOUND[4:], "does not begin with GGUF"),
        (replaced(COUNTS, struct.pack("<IQQ", 3, 1 << 40, 1)), "1,099,511,627,776 tensors"),
        (replaced(COUNTS, struct.pack("<IQQ", 3, 1, 1 << 40)), "values, more than any"),
        (replaced(NORM, entry("norm", (0,), 0, 320)), "impossible shape"),
        (replaced(NORM, entry("norm", (1 << 62,), 0, 320)), "impossible shape"),
        (replaced(NORM, entry("norm", (5,), 0, 321)), "not aligned"),
        (replaced(NORM, entry("norm", (5,), 0, 64)), "overlaps token_embd.weight"),
        (replaced(NORM, entry("norm", (5,), 0, 1 << 40)), "was the download cut short"),
        (replaced(NORM, entry("norm", (5,), 2, 320)), "no whole blocks of Q4_0"),
        (replaced(NORM, entry("n\0rm", (5,), 0, 320)), "not a name for a tensor"),
        (replaced(NORM, NORM[:12] + struct.pack("<I", 5) + NORM[16:]), "5 dimensions"),
        (gguf_bytes({"a": 1} | METADATA, TENSORS, alignment=64).replace(b"\x01\0\0\0\0\0\0\0a", b"\x01\0\0\0\0\0\0\0\xff"), "not UTF-8"),
        (gguf_bytes({"general.alignment": 48}, TENSORS), "not a power of two"),
        (gguf_bytes({"general.alignment": "32"}, TENSORS), "not a power of two"),
        (gguf_bytes({"key": 1, "kez": 1}, TENSORS).replace(b"kez", b"key"), "key is stated twice"),
        (gguf_bytes({}, {"aa": TENSORS["norm"], "ab": TENSORS["norm"]}).replace(b"ab", b"aa"), "two tensors aa"),
        (gguf_bytes({"key": 1}, {}).replace(b"key\x04", b"key\x0d"), "unknown type 13"),
        (gguf_bytes({"key": [1]}, {}).replace(b"key\x09\0\0\0\x04", b"key\x09\0\0\0\x09"), "unknown type 9"),
        (gguf_bytes({"key": [1]}, {}).replace(struct.pack("<IQ", 4, 1), struct.pack("<IQ", 4, 1 << 40)), "an array of 1,099"),
    ],
    ids=range(19),
)  # fmt: skip
def test_broken_headers(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.gguf: not a sound GGUF file: .*{message}"):
        parsed(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (replaced(COUNTS, struct.pack("<IQQ", 1, 3, 6)), "version 1"),
        (replaced(COUNTS, struct.pack(">IQQ", 3, 3, 6)), "big-endian"),
        (replaced(NORM, entry("norm", (5,), 23, 320)), "norm is stored as IQ4_XS.*Q4_K"),
        (replaced(NORM, entry("norm", (5,), 40, 320)), "NVFP4"),
        (replaced(NORM, entry("norm", (5,), 77, 320)), "type 77"),
    ],
    ids=range(5),
)
def test_unsupported_files_are_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parsed(data)


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, len(SOUND)))
def test_whatever_is_changed_is_read_or_refused(changes: list[tuple[int, int]], end: int) -> None:
    data = bytearray(SOUND)
    for at, new in changes:
        data[at] = new
    for each in (bytes(data), bytes(data[:end])):
        try:
            header = parsed(each)
        except ModelError:
            continue
        assert all(0 < tensor.offset <= tensor.offset + tensor.nbytes <= len(each) for tensor in header.tensors)


def test_a_header_longer_than_any_is_not_read_whole() -> None:
    with pytest.raises(CheckpointError, match=r"a text of 536870912 bytes"):
        parsed(gguf_bytes({"key": "x"}, {}).replace(struct.pack("<Q", 1) + b"x", struct.pack("<Q", 1 << 29)))
    with pytest.raises(HeaderCutShort):
        parsed(gguf_bytes({"key": "x"}, {}).replace(struct.pack("<Q", 1) + b"x", struct.pack("<Q", 1 << 20)))


# -- files


def test_parts_are_found_from_any_of_them(tmp_path: Path) -> None:
    paths = write_split(tmp_path, "model", METADATA, TENSORS, 3)
    for path in paths:
        model = read_gguf(path)
        assert [part.path for part in model.parts] == paths
        assert {tensor.name: holder for holder, tensor in model.tensors} == dict(zip(TENSORS, paths, strict=True))
        assert model.architecture == "llama"


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = write_split(tmp_path, "model", METADATA, TENSORS, 2)
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"one of 2 parts, and not all lie beside it: model-00002-of-00002\.gguf missing"):
        read_gguf(first)
    about = {"split.no": 1, "split.count": 2}
    for data, message in [
        (first.read_bytes(), "does not say that it is part 2 of 2"),
        (gguf_bytes(about, {"norm2": TENSORS["norm"], "norm3": TENSORS["norm"]}), "3 tensors in all parts.*there are 4"),
        (gguf_bytes(about, {"token_embd.weight": TENSORS["norm"]}), "token_embd.weight is stored twice"),
    ]:
        second.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(first)
    second.write_bytes(kept)
    read_gguf(second)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"says that it is one of 2 parts, its name says 1.*model-00001-of-00003\.gguf"):
        read_gguf(renamed)


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-99999.gguf"])
def test_names_of_no_part(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SOUND)
    with pytest.raises(ModelError, match="no parts"):
        read_gguf(tmp_path / name)


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    for metadata, error, message in [
        ({"general.architecture": "llama", "general.type": "adapter"}, UnsupportedModelError, "'adapter', not a model"),
        ({}, CheckpointError, "no architecture"),
        ({"general.architecture": "../etc"}, CheckpointError, "no architecture"),
    ]:
        path.write_bytes(gguf_bytes(metadata, TENSORS))
        with pytest.raises(error, match=message):
            read_gguf(path)
    path.write_bytes(gguf_bytes(METADATA, {}, alignment=64))
    with pytest.raises(CheckpointError, match="there are 0"):
        read_gguf(path)


def test_which_files_are_taken_for_gguf(tmp_path: Path) -> None:
    for name, data, wanted in [("a.gguf", b"", True), ("b", b"GGUF", True), ("c", b"{}", False)]:
        (tmp_path / name).write_bytes(data)
        assert is_gguf(tmp_path / name) is wanted
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "absent.gguf")
