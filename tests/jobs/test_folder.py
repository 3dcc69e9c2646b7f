"""Where a job lives: found by its output or its folder, private, and one run's at a time."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from jobs.places import fill, paths_of

from flexgen.cli.spelling import OF_JOBS
from flexgen.errors import JobError, OptionError, StorageError
from flexgen.jobs.folder import JobFolder, JobPaths, check_target, find_job, job_paths, running_process


@pytest.mark.parametrize(
    ("source", "output", "state", "folder"),
    [
        ("in", "out", None, "out.flexgen"),
        (None, "out", None, "out.flexgen"),
        ("in", None, None, "in.flexgen"),
        ("in", "out", "job", "job"),
        (None, None, "job", "job"),
    ],
)
def test_where_a_job_lives(source: str | None, output: str | None, state: str | None, folder: str) -> None:
    given = [None if name is None else Path(name) for name in (source, output, state)]
    assert job_paths(*given) == JobPaths(folder=Path(folder), output=given[1])


def test_from_stdin_to_stdout_the_folder_must_be_named() -> None:
    with pytest.raises(OptionError, match=r"name a folder for the job's state$"):
        job_paths(None, None, None)
    with pytest.raises(OptionError, match=r"name a folder for the job's state \(--state DIR\)$"):
        job_paths(None, None, None, OF_JOBS)


def test_a_job_is_found_by_its_output_and_by_its_folder(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobError, match="no job"):
        find_job(output)
    fill(output, range(1, 3))
    assert find_job(output) == paths_of(output)
    assert find_job(paths_of(output).folder) == JobPaths(folder=paths_of(output).folder, output=None)


def test_who_runs_a_job(tmp_path: Path) -> None:
    paths = paths_of(tmp_path / "out.jsonl")
    assert running_process(paths) is None
    with JobFolder(paths):
        assert running_process(paths) == os.getpid()
    assert running_process(paths) is None


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    paths = paths_of(tmp_path / "out.jsonl")
    paths.folder.mkdir(mode=0o755)
    with JobFolder(paths):
        assert stat.S_IMODE(paths.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("planted", ["folder", "lock", "job.sqlite"])
def test_planted_links_are_not_followed(tmp_path: Path, planted: str) -> None:
    paths = paths_of(tmp_path / "out.jsonl")
    target = tmp_path / "target"
    if planted == "folder":
        target.mkdir()
        paths.folder.symlink_to(target)
    else:
        paths.folder.mkdir()
        (paths.folder / planted).symlink_to(target)
    with pytest.raises((JobError, StorageError)):
        fill(paths.output or Path(), range(1, 3))
    assert not target.is_file()
    assert not target.is_dir() or not any(target.iterdir())


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, word in ((".", "folder"), ("fifo", "regular"), ("missing/out.jsonl", "missing")):
        with pytest.raises(StorageError, match=word):
            JobFolder(paths_of(tmp_path / name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_output_is_refused(tmp_path: Path, what: str) -> None:
    output = tmp_path / "out.jsonl"
    output.touch(mode=0o444)
    if what == "folder":
        output.unlink()
        tmp_path.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="read-only"):
            JobFolder(paths_of(output))
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_of_other_things_is_not_taken_for_a_job_s(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o755)
    (folder / "input").write_text("thesis")
    with pytest.raises(JobError, match=r"holds other files than a job's; name a folder of its own$"):
        JobFolder(JobPaths(folder=folder, output=None))
    with pytest.raises(JobError, match=r"; name a folder of its own \(--state DIR\)$"):
        JobFolder(job_paths(None, None, folder, OF_JOBS))
    assert (folder / "input").read_text() == "thesis"
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        check_target(tmp_path / "pipe")


@pytest.mark.parametrize("planted", ["lock", "job.sqlite"])
@pytest.mark.parametrize("kind", ["pipe", "hard link"])
def test_what_was_planted_in_the_folder_is_neither_waited_for_nor_written_to(tmp_path: Path, planted: str, kind: str) -> None:
    paths = paths_of(tmp_path / "out.jsonl")
    paths.folder.mkdir()
    (tmp_path / "precious").write_text("precious")
    if kind == "pipe":
        os.mkfifo(paths.folder / planted)
    else:
        (paths.folder / planted).hardlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match=r"not a regular file|second name"):
        fill(tmp_path / "out.jsonl", range(1, 3))
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_the_export_needs_is_looked_at_before_the_work(tmp_path: Path) -> None:
    paths = paths_of(tmp_path / "out.jsonl")
    fill(tmp_path / "out.jsonl", range(1, 3))
    (paths.folder / "export.lock").unlink(missing_ok=True)
    (tmp_path / "precious").write_text("precious")
    (paths.folder / "export.lock").hardlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="second name"):
        JobFolder(paths)


def test_a_folder_too_deep_for_the_database_is_refused(tmp_path: Path) -> None:
    deep = tmp_path
    while len(str(deep)) < 480:
        deep /= "d" * 50
    deep.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"name a folder with a shorter path$"):
        JobFolder(paths_of(deep / "out.jsonl"))
    with pytest.raises(StorageError, match=r"name a folder with a shorter path \(--state DIR\)$"):
        JobFolder(job_paths(None, deep / "out.jsonl", None, OF_JOBS))
    with JobFolder(JobPaths(folder=tmp_path / "state", output=deep / "out.jsonl")):
        pass


@pytest.mark.parametrize("name", ["n" * 256, "ä" * 128, "/".join("d" * 200 for _ in range(25))])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="File name too long"):
        check_target(tmp_path / name)


def test_what_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    check_target(tmp_path / "out.jsonl")
    assert not any(tmp_path.iterdir())


def test_links_in_circles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StorageError, match="links"):
        check_target(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_others_planted_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    os.chown(tmp_path / "out", 12345, 12345, follow_symlinks=False)
    with pytest.raises(StorageError, match="another user"):
        check_target(tmp_path / "out")
