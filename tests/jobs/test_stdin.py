"""Standard input is kept, so that a later run has it."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
from jobs.places import paths_of

from flexgen.jobs.folder import JobFolder
from flexgen.jobs.input_file import keep_input, settle_input


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def keep(output: Path, content: bytes, *, settle: bool = True) -> bytes:
    """What a run reads that gets `content`, and then starts or is refused."""
    with JobFolder(paths_of(output)) as folder:
        found = keep_input(folder, io.BytesIO(content))
        if settle:
            folder.keep()
            found = settle_input(folder, found)
        read = found.read_bytes()
        folder.undo()
        return read


def test_what_comes_is_kept_privately(output: Path) -> None:
    assert keep(output, b"a\nb\n") == b"a\nb\n"
    assert stat.S_IMODE(paths_of(output).input_copy.stat().st_mode) == 0o600


@pytest.mark.parametrize("again", [b"", b"a\nb\n"])
def test_the_same_or_nothing_is_what_there_was(output: Path, again: bytes) -> None:
    keep(output, b"a\nb\n")
    assert keep(output, again) == b"a\nb\n"
    assert sorted(path.name for path in paths_of(output).folder.iterdir()) == ["export.lock", "input", "lock"]


def test_more_lines_may_come(output: Path) -> None:
    keep(output, b"a\nb\n")
    assert keep(output, b"a\nb\nc\n") == b"a\nb\nc\n"


@pytest.mark.parametrize("other", [b"a\n", b"a\nc\n", b"x\na\nb\n"])
def test_another_input_counts_when_the_run_starts(output: Path, other: bytes) -> None:
    """Whether its lines may differ is found out by comparing them with those that were answered."""
    keep(output, b"a\nb\n")
    assert keep(output, other, settle=False) == other
    assert not paths_of(output).new_input.exists()
    assert keep(output, b"") == b"a\nb\n"
    assert keep(output, other) == other
    assert keep(output, b"") == other


def test_a_refused_first_run_leaves_nothing(output: Path) -> None:
    keep(output, b"a\n", settle=False)
    assert not paths_of(output).folder.exists()
