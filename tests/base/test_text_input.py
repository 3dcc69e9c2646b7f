"""What reads as UTF-8 lines, whatever the file is written in."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from flexgen.base.text_input import READ_ERRORS, open_input
from flexgen.jobs.lines import read_lines

TEXT = '{"prompt": "Grüße, 你好 🌊"}\n\n{"prompt": "second"}\r\n{"prompt": "last"}'


def contents(path: Path) -> list[tuple[int, bytes | None]]:
    with open_input(path) as file:
        return [(line.number, line.content) for line in read_lines(file)]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(TEXT.encode()),
        gzip.compress(TEXT.encode()[:20]) + gzip.compress(TEXT.encode()[20:]),
        b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        b"\xef\xbb\xbf" + TEXT.encode(),
        gzip.compress(TEXT.encode("utf-16")),
    ],
    ids=["gzip", "gzip members", "UTF-16 LE", "UTF-16 BE", "LE without mark", "BE without mark", "UTF-8 with mark", "both"],
)
def test_a_file_reads_as_the_text_that_it_holds(tmp_path: Path, content: bytes) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.write_bytes(TEXT.encode())
    other.write_bytes(content)
    assert contents(other) == contents(plain)
    assert len(contents(plain)) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"ab\0\0", b"\xff\xfe\0\0{\0\0\0", bytes(range(256))])
def test_what_is_neither_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(content)
    with open_input(path) as file:
        assert file.read() == content


def test_text_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.base.text_input.MIB", 7)  # cuts characters and surrogate pairs
    path = tmp_path / "in"
    path.write_bytes((TEXT * 5).encode("utf-16"))
    with open_input(path) as file:
        assert file.read() == ("\ufeff" + TEXT * 5).encode()


@pytest.mark.parametrize(
    "damaged", ['{"prompt": "a"}\n'.encode("utf-16-le") + b"\x00\xd8\n\0", '{"prompt": "a"}\n'.encode("utf-16-le") + b"x"]
)
def test_only_the_line_suffers_that_is_no_utf_16(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(damaged)
    assert contents(path)[0] == (1, b'{"prompt": "a"}')
    assert len(contents(path)) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:20] + b"\xff" * 20 + data[40:], lambda data: data + b"x"])
def test_a_damaged_archive(tmp_path: Path, damage) -> None:
    path = tmp_path / "in.gz"
    path.write_bytes(damage(gzip.compress(bytes(range(256)) * 40)))
    with pytest.raises(READ_ERRORS), open_input(path) as file:
        file.read()
