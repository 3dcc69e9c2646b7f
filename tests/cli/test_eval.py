"""`flexgen eval`: figures on standard output, state that goes on, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from flexgen.cli import app, evaluating
from flexgen.errors import FlexGenError, StorageError
from flexgen.jobs.folder import find_job
from flexgen.jobs.status import read_status

ROOT = Path(__file__).parents[2]
HANGS_SECONDS = 120
TEXT = "The old house stood upon the hill, and the wind blew about it.\n" * 3


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": f"Chapter {number}. The old house stood"}) + "\n" for number in range(5)))
    return path


def flexgen(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_perplexity(novels_opt: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    done = flexgen("perplexity", novels_opt, tmp_path / "text.txt", "--dtype", "float32", "--metrics", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["num_bytes"] == len(TEXT)
    assert f"word perplexity   {figures['word_perplexity']:,.4f}\n" in done.stdout
    assert f"num tokens        {figures['num_tokens']:,}\n" in done.stdout
    assert "done in" in done.stderr


def test_lambada_goes_on(novels_opt: Path, tmp_path: Path, passages: Path) -> None:
    how = ("lambada", novels_opt, passages, "--dtype", "float32", "--json", "--state", tmp_path / "state", "--progress", "none")
    first, second, fewer = flexgen(*how), flexgen(*how), flexgen(*how, "--limit", 2)
    assert (first.exit_code, second.exit_code, fewer.exit_code) == (0, 0, 0), first.output
    assert json.loads(first.stdout)["num_passages"] == 5
    assert second.stdout == first.stdout
    assert ("done in" in first.stderr, "done in" in second.stderr) == (True, False), "nothing was left to do"
    assert json.loads(fewer.stdout)["num_passages"] == 2
    assert len(list((tmp_path / "state").iterdir())) == 2


@pytest.mark.parametrize(("words", "code", "said"), [
    (("perplexity", "MODEL", "missing.txt"), 2, "FILE missing.txt: there is no such file"),
    (("perplexity", "MODEL", "."), 2, "FILE .: this is a folder"),
    (("lambada", "MODEL", "PASSAGES", "--state", "no/such/folder"), 2, "--state no/such/folder: there is no folder no/such"),
    (("lambada", "MODEL", "PASSAGES", "--limit", "0"), 2, "Invalid value for '--limit'"),
    (("lambada", "MODEL", "PASSAGES", "--sparse-attention", "0.1"), 2, "--sparse-attention changes how generated tokens attend"),
    (("lambada", "MODEL", "MODEL/config.json"), 3, "line 1: not JSON"),
    (("lambada", "NONE", "MODEL/config.json"), 3, "line 1: not JSON"),
])  # fmt: skip
def test_what_is_refused(novels_opt: Path, passages: Path, words: tuple[str, ...], code: int, said: str) -> None:
    places = {"MODEL": str(novels_opt), "PASSAGES": str(passages), "MODEL/config.json": str(novels_opt / "config.json")}
    done = flexgen(*(places.get(word, word) for word in words))
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "the same command goes on" not in done.stderr


@pytest.mark.parametrize(("kind", "content", "said"), [
    ("perplexity", b"", "in.txt has no text: it is empty, or white space only"),
    ("perplexity", b" \n\t\n", "in.txt has no text: it is empty, or white space only"),
    ("perplexity", b"ab\0cd", "in.txt is not text but binary data: byte 2 is 0x00"),
    ("perplexity", b"ab\xff\xfe", "in.txt is not text in UTF-8: byte 2 is 0xff"),
    ("perplexity", b"\x1f\x8bno archive", "in.txt cannot be read: "),
    ("lambada", b"", "in.txt has no lines"),
    ("lambada", b'{"text": "a b"}\n{"texts": "a b"}\n', 'in.txt, line 2: there is no "text"'),
    ("lambada", b'{"text": "a b"}\n{"text": ', "in.txt, line 2: not JSON"),
    ("lambada", b'{"text": "a b"}\n\n{"text": "alone"}\n', "in.txt: passage 2 has a single word, 'alone'"),
    ("lambada", b'{"text": "ends in a space "}\n', "in.txt: passage 1 ends in a space"),
    ("lambada", b'{"text": "a b"}\n{"text": "a \\ud800"}\n', "in.txt, line 2: the text has a lone surrogate at character 2"),
])  # fmt: skip
def test_files_that_are_no_texts_are_refused_before_the_model_is_opened(tmp_path: Path, kind: str, content: bytes, said: str) -> None:
    (tmp_path / "in.txt").write_bytes(content)
    done = flexgen(kind, tmp_path / "no model", tmp_path / "in.txt")
    assert (done.exit_code, said in done.stderr) == (3, True), done.output
    assert "goes on" not in done.stderr


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("a b")

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("flexgen.evaluation.documents.open_input", forbidden)
    done = flexgen("perplexity", tmp_path / "no model", tmp_path / "in.txt")
    assert (done.exit_code, "in.txt cannot be read: Permission denied\n" in done.stderr) == (3, True), done.output


@pytest.mark.parametrize(("number", "code"), [(13, 3), (5, 75), (28, 75)])
def test_what_the_model_s_files_fail_with_ends_as_it_does_elsewhere(
    novels_opt: Path, passages: Path, tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3 where something is forbidden, and with 75 where a disk is full or does not work."""

    def fail(path: Path) -> None:
        raise StorageError("the cache cannot be made") from OSError(number, os.strerror(number))

    monkeypatch.setattr("flexgen.hub.resolve.check_regular", fail)
    done = flexgen("lambada", novels_opt, passages, "--state", tmp_path / "state")
    assert (done.exit_code, "the cache cannot be made" in done.stderr) == (code, True), done.output


def test_a_last_word_that_is_longer_than_the_context(novels_opt: Path, tmp_path: Path, passages: Path) -> None:
    """It is known when the model is open, and refused like what is known before: nothing is computed, and nothing goes on."""
    with passages.open("a") as file:
        file.write(json.dumps({"text": "It ends in " + "xyz" * 40}) + "\n")
    done = flexgen("lambada", novels_opt, passages, "--max-model-len", 16, "--dtype", "float32", "--state", tmp_path / "state")
    assert done.exit_code == 3, done.output
    assert re.search(r"\nflexgen: passage 6 has \d+ tokens to score, and the model's context is 16\n", done.stderr)
    assert "goes on" not in done.stderr
    assert not (tmp_path / "state").exists()


def test_a_text_that_is_shorter_than_a_window(novels_opt: Path, tmp_path: Path) -> None:
    """Its mark is no part of it."""
    (tmp_path / "in.txt").write_text("\ufeffThe")
    done = flexgen("perplexity", novels_opt, tmp_path / "in.txt", "--json", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert (figures["num_documents"], figures["num_words"], figures["num_bytes"]) == (1, 1, 3)


def test_a_missing_extra_is_named(novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexgen.evaluation.lm_eval", None)
    monkeypatch.delitem(sys.modules, "flexgen.evaluation.lm_eval")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = flexgen("lm-eval", novels_opt, "--tasks", "hellaswag")
    assert done.exit_code == 2
    assert "pip install 'flexgen-engine[eval]'" in done.stderr


def test_the_model_comes_first() -> None:
    done = flexgen("lm-eval", "--tasks", "hellaswag", "MODEL")
    assert done.exit_code == 2
    assert "the model comes first" in done.stderr


def test_the_command_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (line,) = re.findall(r"^flexgen eval (.*models/novels-opt-7m.*)$", page, flags=re.MULTILINE)
    done = flexgen(*line.split())
    assert done.exit_code == 0, done.output
    assert "bits per byte" in done.stdout


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(novels_opt: Path, tmp_path: Path) -> None:
    """SIGKILL in its middle; the second run scores what is not durable, and nothing else."""
    rows = [{"text": f"Chapter {number}. " + TEXT[: 40 + number % 100] + " house"} for number in range(600)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "lambada",
        novels_opt,
        tmp_path / "passages.jsonl",
        "--dtype",
        "float32",
        "--json",
        "--max-num-seqs",
        8,
        "--state",
        tmp_path / "s",
    ]
    command = [sys.executable, "-m", "flexgen.cli", "eval", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    start = time.monotonic()
    while not (done := num_done(tmp_path / "s")) and time.monotonic() - start < HANGS_SECONDS:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    done = num_done(tmp_path / "s")
    assert 0 < done < 600
    resumed = flexgen(*words, "--progress", "json")
    assert resumed.exit_code == 0, resumed.output
    events = [json.loads(line) for line in resumed.stderr.splitlines() if line.startswith('{"event": "report"')]
    whole = flexgen(*words[:6], "--limit", 600)
    found, wanted = json.loads(resumed.stdout), json.loads(whole.stdout)
    assert found.pop("perplexity") == pytest.approx(wanted.pop("perplexity"), rel=1e-6)  # sums in other batches
    assert found == wanted
    assert [event["num_errors"] for event in events] == [0]
    assert events[0]["num_requests"] <= 3 * (600 - done)
    assert num_done(tmp_path / "s") == 600


def num_done(state: Path) -> int:
    """The number of lines that are durable."""
    for folder in state.iterdir() if state.is_dir() else ():
        with contextlib.suppress(FlexGenError):  # its database is being made
            return read_status(find_job(folder)).answered
    return 0


def test_the_flag_that_goes_on_quotes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a tmp"))
    (tmp_path / "a tmp").mkdir()
    display: Any = SimpleNamespace(message=lambda text: None)
    with evaluating._state(None, display) as state:
        (state.folder / "answers").touch()
    assert f"goes on with --state '{state.folder}'\n" in capsys.readouterr().err
