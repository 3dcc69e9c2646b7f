"""The output file: whole or as it was, in either order, never over a file that is not ours."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs.places import IDENTITY, fill, opened, paths_of, record, records, result

from flexgen.base import failpoints
from flexgen.errors import JobError, OptionError, StorageError
from flexgen.jobs.database import connect
from flexgen.jobs.export import _ORDERS, check_output, export, export_to_stream, remove_job
from flexgen.jobs.folder import JobFolder, find_job, job_paths
from flexgen.jobs.store import Store

POINTS = ["export.write", "export.fsync", "store.commit", "store.committed", "export.rename"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_both_orders(output: Path) -> None:
    with opened(output) as store:
        for number in (5, 2, 9, 1):
            store.add(**result(number))
        store.commit()
        assert export(store.paths, output) == 4  # while the job runs
    paths = paths_of(output)
    assert output.read_bytes() == b"".join(record(number) for number in (1, 2, 5, 9))
    export(paths, output, "done")
    assert output.read_bytes() == b"".join(record(number) for number in (5, 2, 9, 1))
    with pytest.raises(OptionError, match="known: input, done"):
        export(paths, output, "random")


@pytest.mark.parametrize("query", _ORDERS.values())
def test_no_order_sorts(output: Path, query: str) -> None:
    """Sorting would copy all answers to a temporary file."""
    fill(output, range(1, 3))
    connection = connect(paths_of(output))
    plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))
    connection.close()
    assert "TEMP B-TREE" not in plan


def test_a_run_s_uncommitted_results_are_not_there(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.jobs.store.COMMIT_SECONDS", 3600.0)
    with opened(output) as store:
        store.add(**result(1))
        store.commit()
        store.add(**result(2))
        export(store.paths, output)
    assert output.read_bytes() == record(1)


def test_a_job_without_lines_gives_an_empty_file(output: Path) -> None:
    with opened(output) as store:
        assert export(store.paths, output) == 0
    assert output.read_bytes() == b""


def test_it_is_replaced_again_and_again(output: Path) -> None:
    paths = paths_of(output)
    for last in (3, 6, 9):
        fill(output, range(last - 2, last + 1))
        export(paths, output)
        assert output.read_bytes() == records(range(1, last + 1))
    assert [path.name for path in output.parent.iterdir() if path.is_file()] == ["out.jsonl"]


@pytest.mark.parametrize("point", POINTS)
def test_whatever_fails_the_old_output_stays(output: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    paths = paths_of(output)
    fill(output, range(1, 4))
    export(paths, output)
    fill(output, range(4, 6))

    def fail(name: str) -> None:
        if name == point:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(failpoints, "_hook", fail)
    with pytest.raises(StorageError, match="No space left"):
        export(paths, output)
    assert output.read_bytes() == records(range(1, 4))
    assert [path.name for path in output.parent.iterdir() if path.is_file()] == ["out.jsonl"]
    monkeypatch.setattr(failpoints, "_hook", None)
    export(paths, output)
    assert output.read_bytes() == records(range(1, 6))


KILLED = """
import os, sys
from pathlib import Path
from flexgen.base import failpoints
from flexgen.jobs.export import export
from flexgen.jobs.folder import find_job
failpoints.switch_on(lambda name: os._exit(9) if name == "export.rename" else None)
export(find_job(Path(sys.argv[1])), Path(sys.argv[1]))
"""


@pytest.fixture
def left(output: Path) -> Path:
    """What an export of three records left that was killed."""
    fill(output, range(1, 4))
    assert subprocess.run([sys.executable, "-c", KILLED, output], check=False).returncode == 9
    assert not output.exists()
    (left,) = (path for path in output.parent.iterdir() if path.is_file())
    return left


@pytest.mark.parametrize("again", ["export", "fresh"])
def test_what_a_killed_export_left_goes(output: Path, left: Path, again: str) -> None:
    if again == "export":
        export(paths_of(output), output)
    else:
        with JobFolder(paths_of(output)) as folder:
            remove_job(folder)
    assert not left.exists()


def test_what_lies_there_instead_stays(output: Path, left: Path) -> None:
    left.unlink()
    left.mkdir()
    export(paths_of(output), output)
    assert left.is_dir()
    assert output.read_bytes() == records(range(1, 4))


@pytest.mark.parametrize("length", [1, 242, 243, 247, 248, 255])
def test_every_name_that_a_file_may_have(tmp_path: Path, length: int) -> None:
    output = tmp_path / ("ä" * (length // 2) + "n" * (length % 2))
    paths = job_paths(None, output, None)
    with JobFolder(paths) as folder, Store(folder) as store:
        store.begin(IDENTITY, "m")
        store.add(**result(1))
        store.commit()
        export(paths, output)
    assert output.read_bytes() == record(1)
    assert find_job(output) == paths


@pytest.mark.parametrize("name", [".out.jsonl.flexgen-new", ".flexgen-0123456789abcdef.new"])
@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.hardlink_to(path.with_name("precious"))])
def test_planted_temporaries_are_let_alone(output: Path, monkeypatch: pytest.MonkeyPatch, name: str, plant: Callable[[Path], None]) -> None:
    precious = output.with_name("precious")
    precious.write_text("precious")
    fill(output, range(1, 4))
    plant(output.with_name(name))
    monkeypatch.setattr("secrets.token_hex", lambda size: "0123456789abcdef")  # as if it could be guessed
    if "0123" in name:
        with pytest.raises(StorageError, match="File exists"):
            export(paths_of(output), output)
        assert not output.exists()
    else:
        export(paths_of(output), output)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("planted", ["export.lock", "job.sqlite-wal"])
@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.hardlink_to(path.parent.with_name("precious"))])
def test_files_planted_in_a_job_s_folder_are_refused(output: Path, planted: str, plant: Callable[[Path], None]) -> None:
    precious = output.with_name("precious")
    precious.write_text("precious")
    fill(output, range(1, 4))
    path = paths_of(output).folder / planted
    path.unlink(missing_ok=True)
    plant(path)
    with pytest.raises(StorageError, match=r"not a regular file|second name"):
        export(paths_of(output), output)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("content", [b"precious\n", record(1)])
def test_a_foreign_file_is_refused_and_kept(output: Path, content: bytes) -> None:
    fill(output, range(1, 4))
    paths = paths_of(output)
    for target in (output, output.with_name("other")):
        target.write_bytes(content)
        with pytest.raises(JobError, match="not written by this job"):
            export(paths, target)
        assert target.read_bytes() == content
    with pytest.raises(JobError, match="not written by this job"):
        check_output(paths)


def test_an_edited_output_is_refused(output: Path) -> None:
    fill(output, range(1, 4))
    paths = paths_of(output)
    export(paths, output)
    check_output(paths)
    output.write_bytes(output.read_bytes()[:-1] + b" ")
    with pytest.raises(JobError, match="changed since"):
        check_output(paths)


def test_an_empty_file_is_nobody_s(output: Path) -> None:
    output.touch()
    fill(output, range(1, 4))
    export(paths_of(output), output)
    assert output.read_bytes() == records(range(1, 4))


def test_a_link_stays_a_link(output: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "answers"
    output.symlink_to(target)
    fill(output, range(1, 4))
    export(paths_of(output), output)
    assert output.is_symlink()
    assert target.read_bytes() == records(range(1, 4))


def test_the_output_has_the_usual_mode(output: Path) -> None:
    previous = os.umask(0o027)
    try:
        fill(output, range(1, 4))
        export(paths_of(output), output)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(output.stat().st_mode) == 0o640


def test_to_a_stream(output: Path) -> None:
    fill(output, range(1, 4))
    stream = io.BytesIO()
    assert export_to_stream(paths_of(output), stream) == 3
    assert stream.getvalue() == records(range(1, 4))
    assert not output.exists()


def test_a_reader_who_leaves(output: Path) -> None:
    fill(output, range(1, 2000))
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stream, pytest.raises(StorageError, match="reader has left"):
        export_to_stream(paths_of(output), stream)


def test_removing_a_job_removes_what_is_its_own(output: Path) -> None:
    fill(output, range(1, 4))
    export(paths_of(output), output)
    with JobFolder(paths_of(output)) as folder:
        remove_job(folder)
    assert not output.exists()
    with opened(output) as store:
        assert store.num_found == 0


def test_removing_a_job_does_not_remove_an_output_of_others(output: Path) -> None:
    fill(output, range(1, 4))
    output.write_text("precious\n")
    with JobFolder(paths_of(output)) as folder, pytest.raises(JobError, match="not written by this job"):
        remove_job(folder)
    assert output.read_text() == "precious\n"
    output.unlink()
    with opened(output) as store:
        assert store.num_found == 3
