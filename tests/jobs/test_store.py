"""The state of a job: nothing lost, nothing twice, whatever fails; what changed is refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sqlite3
import stat
import subprocess
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs.places import IDENTITY, fill, opened, paths_of, result

from flexgen.base import failpoints
from flexgen.errors import JobError, StorageError, is_disk_failure, is_disk_full
from flexgen.jobs import store as store_module
from flexgen.jobs.database import translated
from flexgen.jobs.export import check_output
from flexgen.jobs.folder import JobFolder
from flexgen.jobs.identity import Identity
from flexgen.jobs.saved_progress import ProgressRow, SavedProgress
from flexgen.jobs.store import Store
from flexgen.request import Generated, TokenLogprobs, TokenResult


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def done(store: Store, most: int = 50) -> list[int]:
    return [number for number in range(most) if store.is_done(number)]


def count_results(output: Path) -> int:
    """As another process sees it."""
    with closing(sqlite3.connect(paths_of(output).database)) as other:
        return other.execute("SELECT count(*) FROM results").fetchone()[0]


def test_results_are_remembered(output: Path) -> None:
    fill(output, range(1, 6))
    fill(output, range(6, 8))
    with opened(output) as store:
        assert (store.num_answered, store.num_failed, store.num_found) == (5, 2, 7)
        assert done(store) == list(range(1, 8))
        assert not store.is_done(10**9)


def test_lines_may_finish_in_any_order(output: Path) -> None:
    with opened(output) as store:
        for number in (500, 3, 77):
            store.add(**result(number))
        store.commit()
    with opened(output) as store:
        assert done(store, 600) == [3, 77, 500]


def test_done_means_durable(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line counts when its commit has returned, not before."""
    monkeypatch.setattr(store_module, "COMMIT_SECONDS", 1e9)
    with opened(output) as store:
        store.add(**result(1))
        assert (store.num_answered, store.is_done(1)) == (0, False)
        assert count_results(output) == 0
        store.commit()
        assert (store.num_answered, store.is_done(1)) == (1, True)
        assert count_results(output) == 1
        store.add(**result(2))
    with opened(output) as store:
        assert done(store) == [1]


def test_much_or_old_is_committed_by_itself(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "COMMIT_SECONDS", 1e9)
    monkeypatch.setattr(store_module, "_COMMIT_RESULTS", 3)
    with opened(output) as store:
        for number in range(1, 8):
            store.add(**result(number))
        assert done(store) == [1, 2, 3, 4, 5, 6]
        monkeypatch.setattr(store_module, "COMMIT_SECONDS", 0.0)
        store.commit_if_due()
        assert done(store) == [1, 2, 3, 4, 5, 6, 7]


def fill_in_pairs(output: Path) -> None:
    with opened(output) as store:
        for first in (1, 3, 5):
            store.add(**result(first))
            store.add(**result(first + 1))
            store.commit()


@pytest.mark.parametrize("point", ["store.commit", "store.committed"])
@pytest.mark.parametrize("hit", [1, 2, 3, 4])
def test_a_commit_that_fails_is_whole_or_not_at_all(output: Path, monkeypatch: pytest.MonkeyPatch, point: str, hit: int) -> None:
    """The next run answers what is missing, and nothing is there twice."""
    monkeypatch.setattr(store_module, "COMMIT_SECONDS", 1e9)
    hits = itertools.count(1)

    def fail(name: str) -> None:
        if name == point and next(hits) == hit:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(failpoints, "_hook", fail)
    with pytest.raises(StorageError, match="No space left"):
        fill_in_pairs(output)
    monkeypatch.setattr(failpoints, "_hook", None)
    with opened(output) as store:
        whole = hit - 1 - (point == "store.commit")  # commits of results that took place; the first one is of `begin`
        assert done(store) == list(range(1, 1 + 2 * max(whole, 0)))
        for number in range(1, 7):
            if not store.is_done(number):
                store.add(**result(number))
        store.commit()
        assert done(store) == [1, 2, 3, 4, 5, 6]


def add_all(store: Store, numbers: range) -> None:
    for number in numbers:
        store.add(**result(number))
    store.commit()


def test_a_full_database_is_a_storage_error_and_keeps_what_was_committed(output: Path) -> None:
    with opened(output) as store:
        store.add(**result(1))
        store.commit()
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageError, match="full"):
            add_all(store, range(2, 2000))
        assert done(store) == [1]
    with opened(output) as store:
        assert done(store, 3000) == [1]


# -- answers in progress ------------------------------------------------------------------------------------


def logprobs(*token_ids: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_ids=(i, 7), logprobs=(-0.1 * i, -1 / 3), rank=i) for i in token_ids)


def begun(choice: int, start: int, token_ids: tuple[int, ...], **more: Any) -> ProgressRow:
    return ProgressRow(line_number=4, digest=2**63 + 4, choice=choice, start=start, generated=Generated(token_ids=token_ids, **more))


def test_tokens_of_answers_in_progress_add_up(output: Path) -> None:
    with opened(output) as store:
        store.commit([begun(0, 0, (5, 6)), begun(2, 0, (1,), logprobs=logprobs(1))])
        store.commit([begun(0, 2, (7,)), begun(2, 1, (2, 3), logprobs=logprobs(2, 3))])
    with opened(output) as store:
        assert store.kept(4, 2**63 + 4) == {
            0: SavedProgress(generated=Generated(token_ids=(5, 6, 7))),
            2: SavedProgress(generated=Generated(token_ids=(1, 2, 3), logprobs=logprobs(1, 2, 3))),
        }
        assert store.kept(4, 5) == {}  # another line
        assert store.kept(5, 5) == {}


def test_a_choice_that_is_finished_before_its_line(output: Path) -> None:
    with opened(output) as store:
        store.keep(begun(1, 0, (5,)))
        end = TokenResult(index=7, token_ids=(5,), finish_reason="stop", stop_string="\n")
        store.keep(ProgressRow(line_number=4, digest=9, choice=1, start=0, generated=Generated(token_ids=(5,)), result=end))
        store.commit()
    with opened(output) as store:
        found = store.kept(4, 9)[1].result(77)
        assert found is not None
        assert (found.index, found.token_ids, found.finish_reason, found.stop_string) == (77, (5,), "stop", "\n")
        assert found.error is None


@pytest.mark.parametrize("scores", [None, (), logprobs(3, 4), (TokenLogprobs(token_ids=(9, 7), logprobs=(-2.5, -1 / 7), rank=None),)])
def test_the_scores_of_a_choice_are_kept_with_its_end(output: Path, scores: tuple[TokenLogprobs, ...] | None) -> None:
    """Also where an earlier row has the tokens, and where there are no tokens."""
    with opened(output) as store:
        store.commit([begun(1, 0, (5, 6))])
        for choice, start in ((1, 2), (3, 0)):
            end = TokenResult(index=7, token_ids=(5, 6)[:start], prompt_logprobs=scores)
            store.keep(dataclasses.replace(begun(choice, start, ()), result=end))
        store.commit()
    with opened(output) as store:
        for choice, token_ids in ((1, (5, 6)), (3, ())):
            found = store.kept(4, 2**63 + 4)[choice].result(77)
            assert found == TokenResult(index=77, token_ids=token_ids, prompt_logprobs=scores)


def test_a_result_ends_the_progress_of_its_line_also_within_one_commit(output: Path) -> None:
    with opened(output) as store:
        store.commit([begun(0, 0, (5, 6))])
        store.keep(begun(1, 0, (5,)))
        store.add(**result(4))
        store.commit([begun(0, 2, (7,))])
        assert store._connection.execute("SELECT count(*) FROM begun").fetchone() == (0,)


def test_rows_that_do_not_follow_are_left_out(output: Path) -> None:
    with opened(output) as store:
        store.commit([begun(0, 0, (5, 6)), begun(0, 3, (8,))])
        assert store.kept(4, 2**63 + 4)[0].generated.token_ids == (5, 6)


# -- what must not change ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"model": "other", "seed": 0}, 'model "m", now it is "other"'), ({"model": "m", "seed": 1}, "seed=0, now it is 1")],
)
def test_what_changes_answers_is_refused_by_name(output: Path, changed: dict[str, Any], said: str) -> None:
    fill(output, range(1, 3))
    with (
        pytest.raises(
            JobError, match=f"begun with {said}: the earlier value goes on, accept_changes=True goes on with the new one, another"
        ),
        opened(output, Identity(answers=changed, versions={})),
    ):
        pass
    with opened(output) as store:
        assert store.num_found == 2


def test_accepted_changes_are_the_job_s_from_then_on(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(output, range(1, 3))
    with opened(output) as store:
        store.commit([begun(0, 0, (5,))])
    other = Identity(answers={"model": "m", "seed": 1}, versions={"torch": "2.0"})
    with opened(output, other, accept_changes=True) as store:
        assert store.num_found == 2
        assert store.kept(4, 2**63 + 4) == {}  # not continued by another model
    assert "begun with seed=0, now it is 1" in caplog.text
    with opened(output) as store:  # that run never started
        assert store.kept(4, 2**63 + 4) != {}
    with opened(output, other, accept_changes=True) as store:
        store.match_input([(1, 5), (2, 1002)], accept_changes=True)
        assert done(store) == [2]
        store.start_run(num_lines=2)
    with opened(output, other):
        pass
    with pytest.raises(JobError, match="seed=1, now it is 0"), opened(output):
        pass


def test_answers_carry_the_name_of_the_model_that_gave_them(output: Path) -> None:
    fill(output, range(1, 3))
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        store.begin(IDENTITY, "another name of it")
        assert store.model == "m"
        store.begin(Identity(answers={"model": "n", "seed": 0}, versions={}), "n", accept_changes=True)
        assert store.model == "n"


LOOK = """
import sys
from pathlib import Path
from flexgen.jobs.folder import find_job
from flexgen.jobs.status import read_status
print(read_status(find_job(Path(sys.argv[1]))).answered)
"""


def look(output: Path) -> int:
    """`flexgen status`, from another process."""
    return int(subprocess.run([sys.executable, "-c", LOOK, str(output)], check=True, capture_output=True, text=True).stdout)


def test_who_looks_at_a_running_job_leaves_its_log_alone(output: Path) -> None:
    """The first to close a descriptor of a database drops its process's locks: then the next to look takes itself for the last."""
    with opened(output) as store:
        check_output(store.paths)
        for number in (1, 2, 4):
            store.add(**result(number))
            store.commit()
            assert look(output) == store.num_answered
        log = store.paths.database.with_name("job.sqlite-wal")
        assert log.stat().st_size > 0
    assert look(output) == 3


def test_versions_warn(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(output, range(1, 3))
    with opened(output, Identity(answers=IDENTITY.answers, versions={"torch": "3.0"})):
        pass
    assert 'torch "2.0", now it is "3.0"' in caplog.text


def test_a_job_of_which_nothing_is_kept_may_change(output: Path) -> None:
    with opened(output):
        pass
    with opened(output, Identity(answers={"model": "other"}, versions={})) as store:
        store.commit([begun(0, 0, (5,))])
    with pytest.raises(JobError, match='model "other"'), opened(output):
        pass


def test_a_job_that_has_answered_nothing_may_change(output: Path) -> None:
    """Its errors may come from what was wrong then."""
    with opened(output) as store:
        store.add(**result(1, failed=True))
        store.commit()
    with opened(output) as store:  # the same as before
        assert store.num_failed == 1
    other = Identity(answers={"model": "m", "seed": 1}, versions={})
    with opened(output, other) as store:
        assert store.num_found == 0
    with opened(output) as store:  # that run never started
        assert store.num_failed == 1
    with opened(output, other) as store:
        store.start_run(num_lines=1)
        store.add(**result(1))
        store.commit()
    with pytest.raises(JobError, match="seed=1, now it is 0"), opened(output):
        pass


def test_the_start_of_the_job_and_its_name_are_remembered(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.5)
    fill(output, range(1, 3))
    monkeypatch.setattr("time.time", lambda: 2000.5)
    from flexgen.jobs.folder import JobFolder

    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        store.begin(IDENTITY, "./m")
        assert (store.created, store.model) == (1000, "m")


# -- another input ------------------------------------------------------------------------------------


def lines(numbers: range, **digests: int) -> list[tuple[int, int]]:
    return [(number, digests.get(f"line{number}", number + 1000)) for number in numbers]


@pytest.mark.parametrize(
    ("given_lines", "first", "count"),
    [
        (lines(range(1, 10), line2=5), 2, 1),
        (lines(range(1, 10), line1=5, line6=5, line9=7), 1, 1),
        (lines(range(1, 4)), 4, 3),
        (lines(range(3, 10)), 1, 2),
        ([(1, 1001), (5, 1005), (6, 1006), (7, 1007), (12, 5)], 2, 2),
        ([], 1, 5),
    ],
)
def test_another_input_is_refused_or_its_lines_forgotten(output: Path, given_lines: list[tuple[int, int]], first: int, count: int) -> None:
    """Lines 3 and 6 are errors, which may change."""
    fill(output, range(1, 8))
    with opened(output) as store:
        differ = "line that was answered differs" if count == 1 else "lines that were answered differ"
        with pytest.raises(JobError, match=rf"another input \({count} {differ}, the first is line {first}\)"):
            store.match_input(given_lines)
        assert store.num_found == 7
        store.match_input(given_lines, accept_changes=True)
        same = {number for number, digest in given_lines if number < 8 and digest == number + 1000}
        assert store.num_found == store.num_answered + store.num_failed == len(same)
        assert set(done(store)) == same
        for number in range(1, 8):
            if number not in same:
                store.add(**result(number, digest=5))
        store.commit()
    with opened(output) as store:
        assert store.num_found == 7


@pytest.mark.parametrize("given_lines", [lines(range(1, 10), line3=5), lines(range(1, 3)) + lines(range(4, 8))])
def test_a_line_that_failed_may_change_or_go(output: Path, given_lines: list[tuple[int, int]]) -> None:
    fill(output, range(1, 8))
    with opened(output) as store:
        store.match_input(given_lines)
        assert done(store) == [1, 2, 4, 5, 6, 7]
    with opened(output) as store:  # that run never started: nothing is lost
        assert (store.num_answered, store.num_failed) == (5, 2)
        store.match_input(given_lines)
        store.start_run(num_lines=7)
    with opened(output) as store:
        assert (store.num_answered, store.num_failed) == (5, 1)


@pytest.mark.parametrize(
    ("numbers", "was", "now"),
    [([1, 2, 5, 6, 8], 5, 3), ([1, 99, 2, 3, 5, 7, 8], 2, 3), ([99, 98, 1, 2, 4], 1, 3)],
    ids=["removed", "inserted", "two in front"],
)
def test_lines_that_moved_are_told_apart(output: Path, numbers: list[int], was: int, now: int) -> None:
    with opened(output) as store:
        for number in range(1, 9):
            store.add(**result(number))
        store.commit()
        with pytest.raises(JobError, match=f"what was line {was} is line {now} now"):
            store.match_input([(place, number + 1000) for place, number in enumerate(numbers, 1)])


def test_what_is_kept_of_a_line_that_is_another_now_goes(output: Path) -> None:
    with opened(output) as store:
        store.commit([begun(0, 0, (5,))])
        store.match_input([(4, 2**63 + 4)])
        assert store.kept(4, 2**63 + 4) != {}
        store.match_input([(4, 77)])
        store.start_run(num_lines=1)
        assert store._tokens_in_progress() == 0
        assert store.kept(4, 2**63 + 4) == {}


@pytest.mark.parametrize("more", [0, 3])
def test_the_same_input_or_a_longer_one_is_fine(output: Path, more: int) -> None:
    fill(output, range(1, 8))
    with opened(output) as store:
        store.match_input(lines(range(1, 8 + more)))
        assert store.num_found == 7


def test_failed_lines_can_be_answered_again(output: Path) -> None:
    fill(output, range(1, 8))
    with opened(output) as store:
        assert store.forget_failed() == 2
        assert (store.num_answered, store.num_failed, store.num_found) == (5, 0, 5)
        assert done(store) == [1, 2, 4, 5, 7]
        store.add(**result(3))
        store.commit()
        assert (store.num_answered, store.num_failed) == (6, 0)


# -- files ------------------------------------------------------------------------------------


def test_two_runs_on_one_output(output: Path) -> None:
    with opened(output), pytest.raises(JobError, match=f"another flexgen .process {os.getpid()}"), opened(output):
        pass
    with opened(output):
        pass


def test_what_is_kept_is_private(output: Path) -> None:
    previous = os.umask(0)
    try:
        fill(output, range(1, 3))
        with opened(output):
            folder = paths_of(output).folder
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {"job.sqlite", "job.sqlite-wal", "lock"} <= set(modes)
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("content", [b"precious", b"precious" * 1000])
def test_a_file_that_is_no_database_is_kept(output: Path, content: bytes) -> None:
    database = paths_of(output).database
    database.parent.mkdir()
    database.write_bytes(content)
    with pytest.raises(StorageError, match=r"job\.sqlite"), opened(output):
        pass
    assert database.read_bytes() == content


def test_a_database_of_another_program_is_kept(output: Path) -> None:
    database = paths_of(output).database
    database.parent.mkdir()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = database.read_bytes()
    with pytest.raises(StorageError, match="not a flexgen job"), opened(output):
        pass
    assert database.read_bytes() == before


def test_a_later_format_is_refused(output: Path) -> None:
    fill(output, range(1, 3))
    connection = sqlite3.connect(paths_of(output).database)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="format 99"), opened(output):
        pass


# -- anything at all ------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 9)),
    st.tuples(st.just("commit"), st.none()),
    st.tuples(st.just("close"), st.none()),
    st.tuples(st.just("progress"), st.integers(1, 9)),
)


@given(st.lists(steps, max_size=25))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_whatever_happens_what_was_committed_is_there(tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, Any]]) -> None:
    """Against a model: two sets, of what is added and of what is committed."""
    output = tmp_path_factory.mktemp("any") / "out.jsonl"
    added: set[int] = set()
    durable: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "COMMIT_SECONDS", 1e9)
        for _, run in itertools.groupby(actions, key=lambda step: step[0] == "close"):
            with opened(output) as store:
                assert set(done(store)) == durable
                added.clear()
                for action, number in run:
                    if action == "add" and number not in added | durable:
                        store.add(**result(number))
                        added.add(number)
                    elif action == "progress" and number not in added | durable:
                        store.commit([ProgressRow(line_number=number, digest=1, choice=0, start=0, generated=Generated(token_ids=(1,)))])
                        durable |= added
                    elif action == "commit":
                        store.commit()
                        durable |= added
        with opened(output) as store:
            assert set(done(store)) == durable
            assert not store._begun_lines & durable


def test_a_hundred_thousand_lines(output: Path) -> None:
    """Memory does not grow with lines, but for eight bytes each; it takes a second or two."""
    count = 100_000
    with opened(output) as store:
        store.add(**result(1))
        store.commit()
        tracemalloc.start()
        try:
            for number in range(2, count + 1):
                store.add(**result(number))
            store.commit()
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert store.num_answered == count
        assert grown < 24 * count
    with opened(output) as store:
        assert store.num_found == count
        store.match_input((number, number + 1000) for number in range(1, count + 1))


def test_kill(output: Path) -> None:
    """A process killed while it commits leaves whole commits, and the next run goes on."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from jobs.places import opened, result
with opened(Path({str(output)!r})) as store:
    for number in range(1, 10**9):
        store.add(**result(number))
        if number % 10 == 0:
            store.commit()
            print(number, flush=True)
"""
    last = 0
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = int(line)
            if last >= 500:
                process.kill()
                break
        last = max([last, *map(int, filter(str.strip, process.stdout))])
    with opened(output) as store:
        assert store.num_found >= last
        assert store.num_found % 10 == 0
        assert done(store, store.num_found + 5) == list(range(1, store.num_found + 1))


# -- a disk that is full ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "full", "fails"),
    [
        (sqlite3.SQLITE_FULL, True, True),
        (sqlite3.SQLITE_IOERR_WRITE, True, True),  # where a file may not grow
        (sqlite3.SQLITE_IOERR_SHMSIZE, True, True),  # where the database is opened with less room than its shared memory takes
        (sqlite3.SQLITE_IOERR, False, True),
        (sqlite3.SQLITE_IOERR_READ, False, True),
        (sqlite3.SQLITE_IOERR_FSYNC, False, True),
        (sqlite3.SQLITE_CORRUPT, False, False),
        (sqlite3.SQLITE_READONLY, False, False),
        (sqlite3.SQLITE_CANTOPEN, False, False),
    ],
)
def test_what_sqlite_says_of_a_disk(tmp_path: Path, code: int, full: bool, fails: bool) -> None:
    error = sqlite3.OperationalError("as SQLite says it")
    error.sqlite_errorcode = code
    with pytest.raises(StorageError, match="as SQLite says it") as caught, translated(tmp_path / "job.sqlite"):
        raise error
    assert (is_disk_full(caught.value), is_disk_failure(caught.value)) == (full, fails)


@pytest.mark.parametrize(("num_free", "full"), [(0, True), (2, True), (3, False)])
def test_a_disk_that_takes_no_more_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_free: int, full: bool) -> None:
    room = type("Room", (), {"f_bavail": 9, "f_files": 100, "f_favail": num_free})()
    monkeypatch.setattr("flexgen.jobs.database.os.statvfs", lambda folder: room)
    test_what_sqlite_says_of_a_disk(tmp_path, sqlite3.SQLITE_CANTOPEN, full, full)
