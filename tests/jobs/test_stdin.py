"""Standard input is kept, so that a later run has it."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
from jobs.places import paths_of

from flexgen.errors import JobError
from flexgen.jobs.folder import JobFolder
from flexgen.jobs.stdin import keep_input


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def keep(output: Path, content: bytes, **more: bool) -> bytes:
    with JobFolder(paths_of(output)) as folder:
        return keep_input(folder, io.BytesIO(content), **more).read_bytes()


def test_what_comes_is_kept_privately(output: Path) -> None:
    assert keep(output, b"a\nb\n") == b"a\nb\n"
    assert stat.S_IMODE(paths_of(output).input_copy.stat().st_mode) == 0o600


@pytest.mark.parametrize("again", [b"", b"a\nb\n"])
def test_the_same_or_nothing_is_what_there_was(output: Path, again: bytes) -> None:
    keep(output, b"a\nb\n")
    assert keep(output, again) == b"a\nb\n"
    assert sorted(path.name for path in paths_of(output).folder.iterdir()) == ["input", "lock"]


def test_more_lines_may_come(output: Path) -> None:
    keep(output, b"a\nb\n")
    assert keep(output, b"a\nb\nc\n") == b"a\nb\nc\n"


@pytest.mark.parametrize("other", [b"a\n", b"a\nc\n", b"x\na\nb\n"])
def test_another_input_is_refused_or_accepted(output: Path, other: bytes) -> None:
    keep(output, b"a\nb\n")
    with pytest.raises(JobError, match="another standard input"):
        keep(output, other)
    assert keep(output, b"") == b"a\nb\n"
    assert keep(output, other, accept_changes=True) == other
