"""The files of an evaluation: whole texts, JSON lines, and what is neither."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from flexgen.errors import JobError, StorageError
from flexgen.evaluation.documents import read_documents, read_lines


def test_a_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo é.\n")
    assert read_documents(tmp_path / "a.txt", limit=5) == ["One.\n\nTwo é.\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = b'{"text": "one"}\n\n{"text": "", "id": 4}\n{"text": "three\\n"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert read_documents(tmp_path / name) == ["one", "three\n"]
    assert read_lines(tmp_path / name, limit=1) == ["one"]


NO_LINES = {
    b'{"text": "one"}\n{"prompt": 3}\n': r'line 2: there is no "text"',
    b"one\n": "line 1: not JSON",
    b"[1]\n": 'no "text"',
    b"": "no lines",
}


@pytest.mark.parametrize(("lines", "said"), NO_LINES.items(), ids=NO_LINES.values())
def test_what_is_no_line(tmp_path: Path, lines: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(JobError, match=said):
        read_lines(tmp_path / "a.jsonl")


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(JobError, match="byte 3 is 0xff"):
        read_documents(tmp_path / "a.txt")
    for content in (b"", b"\xef\xbb\xbf\n \n"):
        (tmp_path / "empty.txt").write_bytes(content)
        with pytest.raises(JobError, match="has no text"):
            read_documents(tmp_path / "empty.txt")
    with pytest.raises(StorageError, match="cannot be read"):
        read_documents(tmp_path / "missing.txt")
