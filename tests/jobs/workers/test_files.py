"""The files of workers: they appear whole and once, shards are read as far as they are whole, lines are found by their numbers."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.base import failpoints
from flexgen.errors import JobError, StorageError, is_disk_full
from flexgen.jobs.lines import read_lines
from flexgen.jobs.saved_progress import ProgressRow, SavedProgress
from flexgen.jobs.workers.board import Board
from flexgen.jobs.workers.leases import Lease, Ledger
from flexgen.jobs.workers.place import (
    current_run,
    link_new,
    make_folder,
    names_in,
    publish,
    read_json,
    remove_folder,
    replace_json,
)
from flexgen.jobs.workers.shard import Result, ShardReader, ShardWriter, rows_of
from flexgen.jobs.workers.task import LineReader, OpenLines
from flexgen.request import Generated, TokenLogprobs, TokenResult


class Crash(BaseException):
    pass


@pytest.fixture
def crash_at() -> Iterator[Any]:
    """Have everything fail from a hit of a point on, as if the process had ended there."""

    def switch_on(point: str, hit: int = 1) -> None:
        hits = 0

        def hook(name: str) -> None:
            nonlocal hits
            hits += name == point
            if hits >= hit:
                raise Crash

        failpoints.switch_on(hook)

    yield switch_on
    failpoints._hook = None


# -- files that appear ------------------------------------------------------------------------------------------------------------------


def test_one_of_many_links_succeeds(tmp_path: Path) -> None:
    made: list[int] = []
    gate = threading.Barrier(8)

    def claim(number: int) -> None:
        gate.wait()
        if link_new(tmp_path / "claim", f"worker {number}"):
            made.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "claim").read_text() == f"worker {made[0]}"
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_a_link_whose_answer_was_lost_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where the request is sent again and finds what the first one has made."""
    link = os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", lossy)
    assert link_new(tmp_path / "claim", "mine")
    monkeypatch.setattr(os, "link", link)
    assert not link_new(tmp_path / "claim", "others")
    assert (tmp_path / "claim").read_text() == "mine"


@pytest.mark.parametrize("point", ["workers.link", "workers.linked"])
def test_a_crash_around_a_link_leaves_a_whole_claim_or_none(tmp_path: Path, crash_at: Any, point: str) -> None:
    crash_at(point)
    with pytest.raises(Crash):
        link_new(tmp_path / "claim", "whole")
    failpoints._hook = None
    assert names_in(tmp_path) == ([] if point == "workers.link" else ["claim"])
    assert link_new(tmp_path / "claim", "next") == (point == "workers.link")


def test_a_crash_while_a_file_is_replaced_leaves_the_old_one(tmp_path: Path, crash_at: Any) -> None:
    replace_json(tmp_path / "file", {"old": 1})
    crash_at("workers.replace")
    with pytest.raises(Crash):
        replace_json(tmp_path / "file", {"new": 1})
    assert read_json(tmp_path / "file") == {"old": 1}


def test_a_run_is_found_when_it_is_published_and_not_when_it_is_over(tmp_path: Path, crash_at: Any) -> None:
    root = tmp_path / "job" / "workers"
    assert current_run(root) is None
    first = make_folder(root)
    assert current_run(root) is None
    publish(first)
    assert current_run(root) == first
    assert first.is_current
    second = make_folder(root)
    crash_at("workers.publish")
    with pytest.raises(Crash):
        publish(second)
    failpoints._hook = None
    assert current_run(root) == first
    publish(second)
    assert (first.is_current, second.is_current) == (False, True)
    crash_at("workers.remove")
    with pytest.raises(Crash):
        remove_folder(root)
    failpoints._hook = None
    assert current_run(root) is None
    remove_folder(root)
    assert not root.exists()
    remove_folder(root)


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """Whoever can write into it could put answers into it."""
    root = tmp_path / "workers"
    publish(make_folder(root))
    root.chmod(0o770)
    for call in (current_run, make_folder, remove_folder):
        with pytest.raises(JobError, match="chmod 700"):
            call(root)
    root.chmod(0o700)
    other = tmp_path / "other"
    other.symlink_to(root)
    with pytest.raises(JobError, match="not a folder of yours"):
        current_run(other)
    assert root.exists()


def test_a_damaged_name_of_a_run_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "workers"
    publish(make_folder(root))
    for content in ('{"run": "../elsewhere"}', "{", "[]"):
        (root / "current").write_text(content)
        with pytest.raises(StorageError, match="damaged"):
            current_run(root)


# -- leases -----------------------------------------------------------------------------------------------------------------------------


def test_two_boards_of_one_folder(tmp_path: Path) -> None:
    """A claim that another worker has made first is refused, and learned of, without a look at the folder."""
    one, other = (Board(tmp_path, Ledger(100)) for _ in range(2))
    lease = Lease(depth=0, start=0, stop=10)
    assert one.claim(lease, 1, "a")
    assert not other.claim(Lease(depth=0, start=0, stop=40), 1, "b")
    assert other.ledger.frontier == 10
    one.finish(lease)
    one.finish(lease)
    assert not other.ledger.is_done(lease)
    other.refresh()
    assert other.ledger.is_done(lease)
    (tmp_path / "a note").write_text("of somebody")
    other.refresh()


def test_a_board_whose_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Board(tmp_path / "gone", Ledger(1)).refresh()


# -- shards -----------------------------------------------------------------------------------------------------------------------------

LOGPROBS = (TokenLogprobs(token_ids=(5, 6), logprobs=(-0.5, -1.5), rank=1),)
ENDED = TokenResult(index=0, token_ids=(5,), finish_reason="stop", stop_string="x", logprobs=LOGPROBS, prompt_logprobs=LOGPROBS)


def results(count: int) -> list[Result]:
    return [
        Result(line_number=n, digest=n + (1 << 63), record=b'{"index": %d}\n' % n, failed=n % 3 == 0, prompt_tokens=n, output_tokens=2 * n)
        for n in range(1, count + 1)
    ]


def row(line: int, start: int, tokens: tuple[int, ...], choice: int = 0, result: TokenResult | None = None) -> ProgressRow:
    logprobs = result.logprobs if result is not None else None
    generated = Generated(token_ids=tokens, logprobs=logprobs)
    return ProgressRow(line_number=line, digest=7, choice=choice, start=start, generated=generated, result=result)


def write(path: Path, *items: Result | ProgressRow) -> None:
    shard = ShardWriter(path)
    for item in items:
        shard.add(item)
    shard.commit()
    shard.close()


def test_a_shard_has_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "shard", *results(5), row(9, 0, (1, 2)), row(9, 2, (3,)), row(9, 0, (5,), choice=1, result=ENDED), row(3, 0, (1,)))
    reader = ShardReader(tmp_path / "shard")
    assert list(reader.read()) == results(5)
    assert list(reader.read()) == []
    ended = SavedProgress(
        generated=Generated(token_ids=(5,), logprobs=LOGPROBS),
        ending={"finish_reason": "stop", "stop_string": "x", "prompt_logprobs": [[[5, 6], [-0.5, -1.5], 1]]},
    )
    assert reader.begun[9] == (7, {0: SavedProgress(generated=Generated(token_ids=(1, 2, 3))), 1: ended})
    again = [each for each in rows_of(9, *reader.begun[9]) if each.choice == 1]
    assert again == [row(9, 0, (5,), choice=1, result=ENDED)]


def test_progress_ends_with_the_result_and_begins_anew_at_0(tmp_path: Path) -> None:
    result = results(1)[0]
    write(tmp_path / "shard", row(1, 0, (1, 2)), row(2, 0, (1, 2)), row(2, 0, (8,)), row(2, 5, (9,)), result)
    reader = ShardReader(tmp_path / "shard")
    assert list(reader.read()) == [result]
    assert reader.begun == {2: (7, {0: SavedProgress(generated=Generated(token_ids=(8,)))})}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_shard_has_a_beginning_of_what_was_written(tmp_path: Path, data: st.DataObject) -> None:
    """Cut, with a hole of zeros, or with a byte that was never written: never another result, and never an error."""
    path = tmp_path / "shard"
    path.unlink(missing_ok=True)
    write(path, *results(6))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "hole", "byte"]))
    if kind == "cut":
        del content[place:]
    elif kind == "hole":
        content[place : place + 40] = bytes(len(content[place : place + 40]))
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = list(ShardReader(path).read())
    whole = path.read_bytes()[:place].count(b"\n")
    assert found == results(6)[: len(found)]
    assert len(found) >= whole


def test_a_reader_goes_on_where_a_frame_was_not_whole(tmp_path: Path) -> None:
    write(tmp_path / "whole", *results(3))
    content, path, reader = (tmp_path / "whole").read_bytes(), tmp_path / "growing", ShardReader(tmp_path / "growing")
    assert list(reader.read()) == []  # it is not there yet
    found: list[Result] = []
    for size in range(0, len(content) + 1, 7):
        path.write_bytes(content[:size])
        found += reader.read()
    path.write_bytes(content)
    assert [*found, *reader.read()] == results(3)


@pytest.mark.parametrize("point", ["shard.write", "shard.fsync"])
def test_a_shard_that_failed_takes_nothing_more(tmp_path: Path, point: str) -> None:
    """Because a frame might follow half a frame, and would be lost."""
    shard = ShardWriter(tmp_path / "shard")

    def hook(name: str) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, "no room")

    shard.add(results(1)[0])
    failpoints.switch_on(hook)
    try:
        with pytest.raises(StorageError) as failure:
            shard.commit()
    finally:
        failpoints._hook = None
    assert is_disk_full(failure.value)
    shard.add(results(2)[1])
    with pytest.raises(StorageError, match="could not be written before"):
        shard.commit()
    shard.close()


def test_a_shard_is_nobody_elses(tmp_path: Path) -> None:
    write(tmp_path / "shard", *results(1))
    with pytest.raises(StorageError):
        ShardWriter(tmp_path / "shard")
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o600


# -- lines ------------------------------------------------------------------------------------------------------------------------------


def open_lines(source: Path, every: int = 1) -> OpenLines:
    with source.open("rb") as file:
        lines = list(read_lines(file))[::every]
    return OpenLines(numbers=[line.number for line in lines], digests=[line.digest for line in lines])


def test_lines_are_read_by_index_in_any_order(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text("".join(f"line {n}\n" if n % 4 else "\n" for n in range(1, 60)))
    lines = open_lines(source, every=2)
    reader = LineReader(source, lines)
    for indices in ([3, 4, 9], [10], [0, 1], [21], [5]):
        assert [line.content for line in reader.read(indices)] == [b"line %d" % lines.numbers[index] for index in indices]
    one, other = reader.read([2, 7]), reader.read([4])
    assert [next(one).number, next(other).number, next(one).number] == [lines.numbers[index] for index in (2, 4, 7)]
    assert [lines.index_of(number) for number in (lines.numbers[5], 4, 1000)] == [5, None, None]


def test_open_lines_come_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "workers")
    OpenLines(numbers=[1, 5, 2**40], digests=[2**64 - 1, 7, 9]).write(folder)
    found = OpenLines.read(folder)
    assert (list(found.numbers), list(found.digests)) == ([1, 5, 2**40], [2**64 - 1, 7, 9])


@pytest.mark.parametrize("content", ["line 1\nline x\nline 3\n", "line 1\n", ""])
def test_an_input_that_changed_is_noticed(tmp_path: Path, content: str) -> None:
    source = tmp_path / "in"
    source.write_text("line 1\nline 2\nline 3\n")
    lines = open_lines(source)
    source.write_text(content)
    with pytest.raises(StorageError, match="changed while it was being answered"):
        list(LineReader(source, lines).read([1, 2]))
