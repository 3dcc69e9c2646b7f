"""Files that are something else are told by their first bytes; files of requests with bad lines are not refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flexgen.errors import JobError, StorageError
from flexgen.jobs.mistaken import check_input

GOOD = [{"id": n, "prompt": f"Once {n}", "max_tokens": 2} for n in range(3)]
LINES = "".join(json.dumps(each) + "\n" for each in GOOD)
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, LINES)
    return buffer.getvalue()


def write(tmp_path: Path, content: str | bytes, name: str = "in") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BYTES = [
    (lzma.compress(LINES.encode()), "xz -dc"),
    (bz2.compress(LINES.encode()), "bzip2 -dc"),
    (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd -dc"),
    (zipped("a.jsonl"), "a zip archive"),
    (zipped("xl/workbook.xml"), "read_excel"),
    (b"PAR1" + bytes(20) + b"PAR1", "read_parquet"),
    (b"SQLite format 3\0" + bytes(100), "SQLite"),
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "PDF"),
    (b"\x0b\0\0\0\0\0\0\0" + b'{"a":{}}   ', "safetensors"),
    (b"GGUF\x03\0\0\0", "GGUF"),
    (LINES.encode("utf-32"), "iconv -f UTF-32"),
    (LINES.replace("\n", "\r"), "tr '\\r' '\\n'"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    (bytes(5000), "NUL bytes"),
    (bytes(range(256)), "binary data"),
    (random.Random(0).randbytes(100_000), "binary data (it begins with cd 07 2c d8"),
    (random.Random(1).randbytes(300), "binary data"),
    (b"\x7fELF\x02\x01\x01" + bytes(60), "a program"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
    (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
]
TEXTS = [
    (json.dumps(GOOD), "one JSON array"),
    (json.dumps(GOOD, indent=2), "one JSON array"),
    (json.dumps([GOOD[0] for _ in range(9000)], indent=1), "one JSON array"),
    ("[\n" + ",\n".join(map(json.dumps, GOOD)) + "\n]\n", "jq -c '.[]'"),
    ('[\n{"prompt": "a"}\n]\n', "one JSON array"),
    (json.dumps(GOOD[0], indent=2), "jq -c ."),
    (json.dumps(CHAT, indent=2), "jq -c ."),
    ("\n".join(json.dumps(each, indent=4) for each in GOOD), "over several lines"),
    ('{\n  "messages": [\n    {"role": "user", "content": "Hi"}\n  ]\n}\n', "over several lines"),
    (json.dumps({"data": GOOD}, indent=2), "the list 'data'"),
    (json.dumps({"data": GOOD * 9000}, indent=2), "the list 'data'"),
    ("id,text\n1,Hello\n2,there\n", "comma-separated"),
    ("\ufeffid,text\r\n1,Hello\r\n2,there\r\n", "comma-separated"),
    ('id,text\n1,"over\ntwo lines, with a comma"\n2,there\n', "comma-separated"),
    ("id\ttext\n1\tHello, you\n2\tthere\n", "tab-separated"),
    ("id;text\n1;Hello\n2;there\n", "semicolons"),
    ("<!DOCTYPE html>\n<html><body>Not found</body></html>\n", "a web page"),
    ("\n  <html>\n</html>", "a web page"),
    ('<?xml version="1.0"?>\n<a/>\n', "XML"),
]


@pytest.mark.parametrize(("content", "said"), BYTES + TEXTS, ids=lambda value: repr(value)[:24])
def test_what_is_something_else_is_named(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(JobError) as caught:
        check_input(write(tmp_path, content))
    assert said in str(caught.value)
    assert "is not a file of requests" in str(caught.value)


@pytest.mark.parametrize(("content", "said"), BYTES, ids=lambda value: repr(value)[:24])
def test_bytes_are_no_text_either(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(JobError):
        check_input(write(tmp_path, content), input_format="text")


@pytest.mark.parametrize(("content", "said"), TEXTS, ids=lambda value: repr(value)[:24])
def test_any_text_is_lines_of_text(tmp_path: Path, content: str, said: str) -> None:
    check_input(write(tmp_path, content), input_format="text")


@pytest.mark.parametrize(
    "content",
    [
        "", "\n\n", LINES, "\ufeff" + LINES, LINES.replace("\n", "\r\n"),
        "not json, really\n" + LINES, "[\n" + LINES, "[1, 2]\n" + LINES, "{\n" + LINES, "<html>\n" + LINES, "id,text\n1,a\n" + LINES,
        "\0\0\0\n" + LINES, "\x01\x02\x03\x04" * 200 + "\n" + LINES, "foo\nbar\n", "only, one line\n", "Hello, you.\nNo comma here.\n",
        '{"prompt": "a"', '{"prompt": "' + "x" * 200_000 + '"}\n' + LINES, '{"prompt": "a"}', '{"a": 1}\r', b"caf\xe9\n" * 3,
        '{"prompt": ' + "1" * 5000 + "}\n" + LINES, '{"prompt": ' * 5000 + "\n" + LINES, "1" * 5000 + "\n" + LINES,
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_bad_lines_make_no_other_file(tmp_path: Path, content: str | bytes) -> None:
    check_input(write(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        b"one\ntwo\n" + random.Random(2).randbytes(50).replace(b"\n", b"") + b"\nthree\n",
        b"\0\0\0\0\nFirst\nSecond\n",
        "Zwölf Boxkämpfer\njagen Viktor\n".encode("latin-1") * 5,
        "\u0441\u044a\u0435\u0448\u044c \u0435\u0449\u0451\n".encode("cp1251") * 9,
        b"\x1b[1mbold\x1b[0m\n" * 3,
    ],
    ids=["one line", "its first line", "Latin-1", "Windows-1251", "colours"],
)
def test_a_bad_line_or_another_encoding_makes_no_binary_file(tmp_path: Path, content: bytes) -> None:
    check_input(write(tmp_path, content), input_format="text")


def requests_made(path: Path) -> list[dict[str, object]]:
    """What the command in the message makes of a file, in a locale that is not Unicode."""
    with pytest.raises(JobError) as caught:
        check_input(path)
    command = str(caught.value).partition("python3 ")[2].partition(" > requests.jsonl")[0]
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    made = subprocess.run(["bash", "-c", f"{sys.executable} {command}"], check=True, capture_output=True, text=True, env=env).stdout
    return [json.loads(line) for line in made.splitlines()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_command_reads_what_spreadsheets_write(tmp_path: Path, encoding: str, compressed: bool) -> None:
    table = "id,text\r\n1,schön – ja\r\n2,gut\r\n".encode(encoding)
    path = write(tmp_path, gzip.compress(table) if compressed else table, "in.csv")
    assert requests_made(path) == [{"id": "1", "prompt": "schön – ja"}, {"id": "2", "prompt": "gut"}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_command_reads_arrays_in_any_form(tmp_path: Path, encoding: str, compressed: bool) -> None:
    array = json.dumps([{"prompt": "schön"}], ensure_ascii=False).encode(encoding)
    assert requests_made(write(tmp_path, gzip.compress(array) if compressed else array)) == [{"prompt": "schön"}]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_the_command_for_a_table_makes_requests_of_it(tmp_path: Path, delimiter: str) -> None:
    rows = [
        {"ID": "1", "label": "x", "review's text": 'He said "no",\nand left\tnow; yes'},
        {"ID": "2", "label": "y", "review's text": "fine"},
    ]
    path = tmp_path / "it's a table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    path.write_text(path.read_text().replace('"review\'s text"', "review text").replace('"ID"', "ID").replace('"label"', "label"))
    assert requests_made(path) == [{"id": row["ID"], "prompt": row["review's text"]} for row in rows]


def test_a_table_of_one_column_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the column 'text' is the prompt"):
        check_input(write(tmp_path, "text\nHello\nthere\n", "in.csv"))


def test_another_name_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^standard input is not a file of requests but one JSON array"):
        check_input(write(tmp_path, "[1]"), name="standard input")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        check_input(tmp_path / "missing")
