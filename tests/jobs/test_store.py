"""The output and its journal: nothing lost, nothing twice, whatever was torn off; foreign and changed files are refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen.errors import StorageError
from flexgen.jobs.store import Store

IDENTITY = {"model": "m", "seed": 0}


def record(number: int) -> bytes:
    return json.dumps({"id": None, "index": number, "text": "x" * (number * 7 % 50)}).encode() + b"\n"


def fill(output: Path, numbers: range) -> None:
    with Store(output, IDENTITY) as store:
        for number in numbers:
            store.append(number, number + 1000, record(number), failed=number % 3 == 0)


def test_records_are_appended_and_remembered(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 6))
    fill(output, range(6, 8))
    assert output.read_bytes() == b"".join(record(number) for number in range(1, 8))
    with Store(output, IDENTITY) as store:
        assert (store.num_answered, store.num_failed, store.num_found) == (5, 2, 7)
        assert all(store.is_done(number, number + 1000) for number in range(1, 8))
        assert not store.is_done(8, 1008)
        assert not store.is_done(10**9, 1)


def test_lines_may_finish_in_any_order(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Store(output, IDENTITY) as store:
        for number in (500, 3, 77):
            store.append(number, number + 1000, record(number), failed=False)
    with Store(output, IDENTITY) as store:
        assert [number for number in range(600) if store.is_done(number, number + 1000)] == [3, 77, 500]


@pytest.mark.parametrize("torn", ["output", "journal"])
def test_whatever_was_torn_off_is_done_again(tmp_path: Path, torn: str) -> None:
    """Cut a file at every length: the output ends with a whole record, and what is lost is not done.

    A note is written before its record, so where the journal is cut the output ends with the last whole note.
    """
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 4))
    journal = tmp_path / "out.jsonl.flexgen" / "done"
    whole = {"output": output.read_bytes(), "journal": journal.read_bytes()}
    ends = [0, *(len(b"".join(record(n) for n in range(1, last + 1))) for last in range(1, 4))]
    for length in range(0, len(whole[torn]), 3):
        output.write_bytes(whole["output"])
        journal.write_bytes(whole["journal"])
        os.truncate(output if torn == "output" else journal, length)
        left = sum(end <= length for end in ends) - 1 if torn == "output" else length // (len(whole["journal"]) // 3)
        if torn == "journal":
            os.truncate(output, ends[left])
        with Store(output, IDENTITY) as store:
            assert [number for number in range(1, 5) if store.is_done(number, number + 1000)] == list(range(1, left + 1))
            assert output.stat().st_size == ends[left]
            for number in range(left + 1, 4):
                store.append(number, number + 1000, record(number), failed=False)
        assert output.read_bytes() == whole["output"]


@pytest.mark.parametrize("place", [0, 50, 100, -1])
def test_records_that_a_damaged_journal_does_not_know_are_moved_aside(tmp_path: Path, place: int) -> None:
    """A power failure can lose notes and keep their records, too."""
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 6))
    before = output.read_bytes()
    journal = tmp_path / "out.jsonl.flexgen" / "done"
    content = bytearray(journal.read_bytes())
    content[place] ^= 0x40
    journal.write_bytes(content)
    with Store(output, IDENTITY) as store:
        assert store.num_found == place % len(content) // (len(content) // 5)
    assert output.read_bytes() + (tmp_path / "out.jsonl.flexgen" / "cut").read_bytes() == before
    fill(output, range(1 + store.num_found, 6))
    assert output.read_bytes() == before


def test_a_record_that_never_reached_the_disk_is_done_again(tmp_path: Path) -> None:
    """After a power failure the end of a file may be zeros."""
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 4))
    content = output.read_bytes()
    output.write_bytes(content[:-5] + b"\0" * 5)
    with Store(output, IDENTITY) as store:
        assert store.num_found == 2


def test_a_removed_output_starts_afresh(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 4))
    output.unlink()
    with Store(output, {"model": "another"}) as store:
        assert store.num_found == 0


def test_an_edited_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 4))
    output.write_bytes(output.read_bytes().replace(b"x", b"y", 1))
    with pytest.raises(StorageError, match="changed since"):
        Store(output, IDENTITY)


def test_a_foreign_output_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(StorageError, match="not written by flexgen"):
        Store(output, IDENTITY)
    assert output.read_text() == "precious\n"
    output.write_text("")
    Store(output, IDENTITY).close()
    output.write_text("precious\n")  # now beside a journal without entries
    with pytest.raises(StorageError, match="not written by flexgen"):
        Store(output, IDENTITY)
    assert output.read_text() == "precious\n"


@pytest.mark.parametrize("content", [b"x", b"precious", b"precious\n" * 100])
@pytest.mark.parametrize("beside", ["instead", "after"])
def test_bytes_that_the_journal_does_not_explain_are_kept(tmp_path: Path, content: bytes, beside: str) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 4))
    output.write_bytes(content if beside == "instead" else output.read_bytes() + content)
    before = output.read_bytes()
    with pytest.raises(StorageError, match="changed since"):
        Store(output, IDENTITY)
    assert output.read_bytes() == before


def test_another_input_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 4))
    with Store(output, IDENTITY) as store:
        with pytest.raises(StorageError, match=r"another input.*line 2"):
            store.is_done(2, 5)
        with pytest.raises(StorageError, match=r"another input.*3 lines; this one has 2"):
            store.check_last_line(2)
        store.check_last_line(3)


@pytest.mark.parametrize("identity", [{"model": "other", "seed": 0}, {"model": "m", "seed": 1}, {"model": "m"}, IDENTITY | {"dtype": "x"}])
def test_what_changes_answers_is_refused_by_name(tmp_path: Path, identity: dict) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, range(1, 3))
    (changed,) = (name for name in {**IDENTITY, **identity} if IDENTITY.get(name) != identity.get(name))
    with pytest.raises(StorageError, match=f"begun with {changed}"):
        Store(output, identity)


def test_a_job_of_which_nothing_is_done_may_change(tmp_path: Path) -> None:
    Store(tmp_path / "out.jsonl", IDENTITY).close()
    Store(tmp_path / "out.jsonl", {"model": "other"}).close()


def test_the_start_of_the_job_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.5)
    fill(tmp_path / "out.jsonl", range(1, 3))
    monkeypatch.setattr("time.time", lambda: 2000.5)
    with Store(tmp_path / "out.jsonl", IDENTITY) as store:
        assert store.created == 1000


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Store(output, IDENTITY), pytest.raises(StorageError, match="another flexgen"):
        Store(output, IDENTITY)
    Store(output, IDENTITY).close()


@pytest.mark.parametrize("name", [".", "missing/out.jsonl"])
def test_an_output_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match=r"folder|cannot be written"):
        Store(tmp_path / name, IDENTITY)


def test_what_is_beside_the_output_is_private(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        Store(tmp_path / "out.jsonl", IDENTITY).close()
    finally:
        os.umask(previous)
    folder = tmp_path / "out.jsonl.flexgen"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "done").stat().st_mode) == 0o600


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_full_disk_is_a_storage_error_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The Nth write fails after half of its bytes."""
    output = tmp_path / "out.jsonl"
    write = os.pwrite
    calls = 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing:
            return write(fd, data[: len(data) // 2], offset)
        if calls == failing + 1:
            raise OSError(28, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr("os.pwrite", pwrite)
    with pytest.raises(StorageError, match="No space left"):
        fill(output, range(1, 4))
    monkeypatch.undo()
    with Store(output, IDENTITY) as store:
        done = store.num_found
    assert done == (failing - 1) // 2
    fill(output, range(1 + done, 4))
    assert output.read_bytes() == b"".join(record(number) for number in range(1, 4))


def test_kill(tmp_path: Path) -> None:
    """A process killed while it appends leaves a prefix that the next run continues."""
    output = tmp_path / "out.jsonl"
    script = f"""
from pathlib import Path
from flexgen.jobs.store import Store
with Store(Path({str(output)!r}), {{"model": "m", "seed": 0}}) as store:
    print("ready", flush=True)
    for number in range(1, 10**9):
        store.append(number, number + 1000, b'{{"id": null, "index": %d}}' % number + b"\\n", failed=False)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not output.exists() or output.stat().st_size < 20_000:
            pass
        process.kill()
    with Store(output, IDENTITY) as store:
        assert store.num_found > 500
        assert not store.is_done(store.num_found + 1, store.num_found + 1001)
    assert [json.loads(line)["index"] for line in output.read_bytes().splitlines()] == list(range(1, store.num_found + 1))
