"""Workers over a fake engine: the records of a run without workers, whoever answers, dies, wakes up, or is asked to stop."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, open_fakes
from jobs.places import paths_of

from flexgen import LLM, EngineError, JobError, OutOfMemoryError, SamplingParams, StorageError
from flexgen.base import failpoints
from flexgen.jobs.begin import begin_job
from flexgen.jobs.export import export
from flexgen.jobs.folder import JobFolder
from flexgen.jobs.identity import identity_of
from flexgen.jobs.interrupt import Stopped, StopRequest
from flexgen.jobs.reading import line_and_choice
from flexgen.jobs.runner import Job
from flexgen.jobs.status import read_status
from flexgen.jobs.store import Store
from flexgen.jobs.workers import members as members_module
from flexgen.jobs.workers.collect import take_in, take_in_if_idle
from flexgen.jobs.workers.members import Process
from flexgen.jobs.workers.place import remove_folder
from flexgen.jobs.workers.run import SharedRun
from flexgen.jobs.workers.shard import Result, ShardWriter
from flexgen.jobs.workers.task import SharedTask
from flexgen.jobs.workers.worker import reports, work
from flexgen.request import Generated, PartialAnswer, TokenRequest, TokenResult

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=None)
QUICK_SECONDS = 0.08  # of silence, after which a worker of these tests is dead


class Crash(BaseException):
    """The end of a process, as far as a thread can have one."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [{"id": n, "prompt": "ab" * (1 + n % 9), "max_tokens": 1 + n % 5, "n": 1 + (n % 6 == 0)} for n in range(40)]
    lines[7:7] = ["bad line", ""]  # type: ignore[list-item]
    path = tmp_path / "in.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine]) -> None:
    """Every process here is this one, so that who is dead shows in silence only."""
    monkeypatch.setattr(Process, "is_gone", lambda self: False)
    monkeypatch.setattr(Process, "is_here", lambda self: False)
    monkeypatch.setattr(members_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr("flexgen.jobs.workers.worker._POLL_SECONDS", 0.01)
    monkeypatch.setattr("flexgen.jobs.workers.supply._PAUSE_SECONDS", 0.0)


@pytest.fixture
def whole(model_folder: Path, source: Path, tmp_path: Path) -> bytes:
    """What a run without workers writes."""
    output = tmp_path / "whole.jsonl"
    llm = LLM(model_folder)
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        begin_job(store, llm.model, DEFAULTS)
        job = Job(llm.model, source, store, defaults=DEFAULTS)
        workload = job.scan()
        store.start_run(job.num_lines)
        job.run(workload)
        export(store.paths, output)
    return output.read_bytes()


@contextmanager
def begun(model_folder: Path, source: Path, output: Path, **fields: Any) -> Iterator[SharedRun]:
    """A run with workers, as the command makes it; the output is written in the end."""
    llm = LLM(model_folder)
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        take_in(store)
        begin_job(store, llm.model, DEFAULTS)
        job = Job(llm.model, source, store, defaults=DEFAULTS)
        job.match()
        workload = job.scan()
        store.start_run(job.num_lines)
        remove_folder(store.paths.workers)
        if not len(workload):
            export(store.paths, output)
            pytest.fail("nothing was left to do")
        task = SharedTask(
            name="job", model=str(model_folder), source=str(source), options=llm.options, defaults=DEFAULTS, input_format="jsonl",
            keywords={"tokenizer": None, "chat_template": None, "chat_template_kwargs": {}}, output_form=None,
            identity=identity_of(llm.model, DEFAULTS), created=store.created, model_name=store.model, num_workers=2, **fields,
        )  # fmt: skip
        try:
            with SharedRun(job, store, task) as run:
                yield run
        finally:
            store.end_run("over")
            export(store.paths, output)


def join(run: SharedRun, model_folder: Path, **how: Any) -> int:
    """What a worker does: the number of its lines."""
    llm = LLM(model_folder)
    return work(llm.model, run.folder, SharedTask.read(run.folder), report=llm.report, **how)


def test_a_task_comes_back(model_folder: Path, source: Path, output: Path) -> None:
    with begun(model_folder, source, output, attempts=5, lease_seconds=7.0, reports=True) as run:
        task = SharedTask.read(run.folder)
        assert (task.attempts, task.lease_seconds, task.reports, task.defaults, task.options.seed) == (5, 7.0, True, DEFAULTS, 0)
        text = run.folder.task.read_text()
        for other in (text.replace('"format": 1', '"format": 2'), text.replace('"attempts"', '"tries"')):
            run.folder.task.write_text(other)
            with pytest.raises(JobError, match="another version of flexgen"):
                SharedTask.read(run.folder)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_answer_what_one_run_answers(
    model_folder: Path, source: Path, output: Path, whole: bytes, num_workers: int, engines: list[FakeEngine]
) -> None:
    counts: list[int] = []
    with begun(model_folder, source, output, reports=True) as run:
        joined = [threading.Thread(target=lambda: counts.append(join(run, model_folder))) for _ in range(num_workers)]
        for thread in joined:
            thread.start()
        while run.num_left:
            progress = run.collect()
        for thread in joined:
            thread.join()
        assert (progress.num_requests, progress.num_requests_done) == (40, 40)
        assert sum(counts) == 40  # nobody was taken for dead, so nobody has answered a line of another
        assert {each.state for each in run.members()} == {"finished"}
        assert len(reports(run.folder)) == len([count for count in counts if count])
        assert sum(each.lines for each in run.members()) == 40
        assert run.totals()["output_tokens"] == sum(len(result.token_ids) for engine in engines[1:] for result in engine.results)
    assert output.read_bytes() == whole
    assert not paths_of(output).workers.exists()


def test_the_plan_of_a_worker_is_for_its_part(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    with begun(model_folder, source, output) as run:
        before = len(engines)
        join(run, model_folder)
    assert len(engines[before].workload) == 24  # of 47 answers, a half


def test_leases_shrink_towards_the_end(model_folder: Path, source: Path, output: Path) -> None:
    """A worker takes no line that it has no place for, or the other workers would have nothing to do."""
    with begun(model_folder, source, output) as run:
        join(run, model_folder)
        starts = sorted(int(path.name.partition("-")[2].partition(".")[0]) for path in run.folder.leases.glob("*.1"))
    sizes = [stop - start for start, stop in itertools.pairwise([*starts, 40])]
    assert sizes[0] == 8  # what an engine of four sequences computes, and as much ahead
    assert sizes[-1] == 1
    assert max(sizes) == 8


def test_a_resumed_job_goes_on_with_other_workers_and_without(
    model_folder: Path, source: Path, output: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle: what is stored is not answered again, by however many."""
    stop = StopRequest()
    answered: list[int] = []
    answer = FakeEngine._answer

    def stopping(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        answered.append(request.index)
        if len(answered) == 10:
            stop.ask()
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", stopping)
    with pytest.raises(Stopped), begun(model_folder, source, output) as run:
        join(run, model_folder, stop=stop)
    assert paths_of(output).workers.exists()
    first = len(output.read_bytes().splitlines())
    assert 1 < first < 41
    with begun(model_folder, source, output) as run:
        join(run, model_folder)
    assert output.read_bytes() == whole
    assert len(answered) == len(set(answered))


def partial(request: TokenRequest, count: int) -> PartialAnswer:
    tokens = tuple(range(64, 64 + count))
    return PartialAnswer(index=request.index, generated=Generated(token_ids=tokens))


class SlowEngine(FakeEngine):
    """Answers nothing: it is asked to stop while its first block has two tokens each."""

    stop: StopRequest

    def generate(self, requests: Any, **how: Any) -> Iterator[TokenResult]:
        block = [request for _, request in zip(range(4), requests, strict=False)]
        self.stop.ask()
        how["on_pass"]([partial(request, 2) for request in block if request.max_tokens > 2])
        yield from ()


def test_tokens_of_a_worker_that_was_stopped_are_kept(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the next run, and for a worker that takes the lines over at once."""
    with begun(model_folder, source, output) as run, pytest.MonkeyPatch.context() as patch:
        stop = StopRequest()
        engines = open_fakes(patch, SlowEngine)
        monkeypatch.setattr(SlowEngine, "stop", stop, raising=False)
        with pytest.raises(Stopped):
            join(run, model_folder, stop=stop)
        assert len(engines) == 1
        assert [(each.state, each.lines) for each in run.members()] == [("stopped", 0)]
        resumed: list[tuple[int, ...]] = []
        answer = FakeEngine._answer

        def watched(engine: FakeEngine, request: TokenRequest) -> TokenResult:
            resumed.append(request.generated.token_ids)
            return answer(engine, request)

        patch.setattr(FakeEngine, "_answer", watched)
        open_fakes(patch, FakeEngine)
        join(run, model_folder)
        run.collect()
        assert run.totals()["answers_resumed"] == sum(bool(each) for each in resumed) > 0
    assert {each for each in resumed if each} == {(64, 65)}


def abandon(model_folder: Path, source: Path, output: Path) -> None:
    """A run that dies while workers answer its lines."""
    with begun(model_folder, source, output) as run:
        run._collector.collect = lambda: 0  # type: ignore[method-assign]
        run._collector.keep_progress = lambda: None  # type: ignore[method-assign]
        join(run, model_folder)
        raise Crash


def test_a_run_that_dies_leaves_what_workers_have_stored(model_folder: Path, source: Path, output: Path, whole: bytes) -> None:
    """Workers go on without it; whoever looks next takes it in: the next run, or an export."""
    with pytest.raises(Crash):
        abandon(model_folder, source, output)
    assert len(output.read_bytes().splitlines()) == 1  # the bad line
    for _ in range(2):
        take_in_if_idle(paths_of(output))
        export(paths_of(output), output)
        assert output.read_bytes() == whole
    assert read_status(paths_of(output)).answered == 40


def test_what_workers_of_another_job_left_is_not_taken_in(model_folder: Path, source: Path, output: Path) -> None:
    """The state of the job was removed, and what its workers share was not."""
    with pytest.raises(Crash):
        abandon(model_folder, source, output)
    for path in paths_of(output).folder.glob("job.sqlite*"):
        path.unlink()
    output.unlink()
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        assert not take_in(store)
        assert store.num_answered == 0


def crash_after(hits: int) -> Callable[[], int]:
    """Have everything that a thread does fail after so many failpoints; the function returns how many there were."""
    count, mine = 0, threading.get_ident()

    def hook(name: str) -> None:
        nonlocal count
        if threading.get_ident() == mine:
            count += 1
        if count > hits:
            raise Crash

    failpoints.switch_on(hook)
    return lambda: count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the death of a thread is wanted
def test_a_worker_may_die_between_any_two_steps(
    model_folder: Path, source: Path, output: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, nothing is there twice, and no line is blamed, wherever one worker has died."""
    monkeypatch.setattr(FakeEngine, "__init__", _with_fewer_seqs(FakeEngine.__init__))
    hits, struck = 0, True
    while struck:
        with begun(model_folder, source, output, lease_seconds=QUICK_SECONDS) as run:
            reached = crash_after(hits)
            try:
                join(run, model_folder)
            except Crash:
                pass
            finally:
                failpoints._hook = None
            struck = reached() > hits
            join(run, model_folder)
            while run.num_left:
                run.collect()
        assert output.read_bytes() == whole, hits
        with JobFolder(paths_of(output)) as folder:
            folder.remove_state()
        output.unlink()
        hits += 1 + hits // 3
    assert hits > 30


def _with_fewer_seqs(init: Callable[..., None]) -> Callable[..., None]:
    """Engines of 12 sequences: fewer leases, and fewer steps to die at."""

    def __init__(self: FakeEngine, workload: Any, max_num_seqs: int = 12, **more: Any) -> None:
        init(self, workload, max_num_seqs, **more)

    return __init__


def test_a_worker_that_wakes_up_after_its_lines_were_taken_over(
    model_folder: Path, source: Path, output: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes its answers all the same, and they are dropped."""
    asleep, wake = threading.Event(), threading.Event()
    stopped: set[str] = set()
    answer, write = FakeEngine._answer, members_module.Member._write

    def sleeping(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        if threading.current_thread().name == "sleeper" and not wake.is_set():
            asleep.set()
            wake.wait()
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", sleeping)
    monkeypatch.setattr(members_module.Member, "_write", lambda self: None if self.id in stopped else write(self))
    with begun(model_folder, source, output, lease_seconds=QUICK_SECONDS) as run:
        counts: list[int] = []
        sleeper = threading.Thread(target=lambda: counts.append(join(run, model_folder)), name="sleeper")
        sleeper.start()
        asleep.wait()
        stopped.update(each.worker for each in run.members())
        others = join(run, model_folder)
        stopped.clear()
        wake.set()
        sleeper.join()
        assert others == 40
        assert counts[0] > 0  # so many records are there twice
        run.collect()
    assert output.read_bytes() == whole


def test_a_line_that_kills_workers_ends_in_an_error(
    model_folder: Path, source: Path, output: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of its own record, and the other lines have their answers."""
    answer, deaths = FakeEngine._answer, 0

    def deadly(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        if line_and_choice(request.index)[0] == 25:
            raise EngineError("the engine cannot go on")
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", deadly)
    with begun(model_folder, source, output) as run:
        while run.num_left:
            try:
                join(run, model_folder)
            except EngineError:
                deaths += 1
                assert deaths < 10
            run.collect()
    assert 3 <= deaths <= 5
    found = [json.loads(line) for line in output.read_bytes().splitlines()]
    wanted = [json.loads(line) for line in whole.splitlines()]
    assert [each for each in found if each["index"] != 25] == [each for each in wanted if each["index"] != 25]
    (error,) = [each["error"] for each in found if each["index"] == 25]
    assert error["code"] == "worker_died"
    assert "workers died while they answered this line, the last one with no other line" in error["message"]


def test_memory_that_runs_out_halves_the_sequences_of_one_worker(
    model_folder: Path, source: Path, output: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, failures = FakeEngine._answer, 0

    def short(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        nonlocal failures
        if failures < 2 and request.max_tokens == 5:
            failures += 1
            raise MemoryError
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", short)
    with begun(model_folder, source, output) as run:
        assert join(run, model_folder) == 40
        assert len(list(run.folder.members.iterdir())) == 1
    assert failures == 2
    assert output.read_bytes() == whole


def test_a_single_sequence_for_which_memory_runs_out_counts_as_a_death(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        raise MemoryError

    monkeypatch.setattr(FakeEngine, "_answer", short)
    open_fakes(monkeypatch, lambda workload: FakeEngine(workload, max_num_seqs=1))
    with begun(model_folder, source, output) as run:
        with pytest.raises(OutOfMemoryError):
            join(run, model_folder)
        assert [each.state for each in run.members()] == ["failed"]


def test_a_disk_that_fails_is_no_fault_of_the_lines(model_folder: Path, source: Path, output: Path, whole: bytes) -> None:
    def full(name: str) -> None:
        if name == "shard.write":
            raise OSError(28, "No space left on device")

    with begun(model_folder, source, output) as run:
        failpoints.switch_on(full)
        try:
            with pytest.raises(StorageError):
                join(run, model_folder)
        finally:
            failpoints._hook = None
        assert [each.state for each in run.members()] == ["refused"]
        join(run, model_folder)
    assert output.read_bytes() == whole


@pytest.mark.parametrize("successor", [None, {"run": "another"}])
def test_a_worker_whose_run_is_over(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, successor: dict[str, str] | None
) -> None:
    """It ends, and says so where another run has taken the place of the one that it belongs to."""
    answer = FakeEngine._answer
    with begun(model_folder, source, output) as run:
        folder, current = run.folder, run.folder.root / "current"

        def ending(engine: FakeEngine, request: TokenRequest) -> TokenResult:
            if folder.leases.exists():
                folder.leases.rename(folder.path / "away")
                current.unlink()
                if successor is not None:
                    current.write_text(json.dumps(successor))
            return answer(engine, request)

        monkeypatch.setattr(FakeEngine, "_answer", ending)
        if successor is None:
            assert 0 < join(run, model_folder) < 40
        else:
            with pytest.raises(JobError, match="begun anew by another run"):
                join(run, model_folder)
        assert {each.state for each in run.members()} == {"finished" if successor is None else "refused"}


def test_records_that_are_lost_stop_the_run_instead_of_waiting_for_ever(model_folder: Path, source: Path, output: Path) -> None:
    """A host may have taken its unsynced writes with it, after others have seen them."""

    def lose() -> None:
        with begun(model_folder, source, output) as run:
            join(run, model_folder)
            for shard in run.folder.shards.iterdir():
                shard.write_bytes(b"")
            run.collect()

    with pytest.raises(StorageError, match="records of 40 are lost"):
        lose()


def test_a_shard_with_answers_to_other_lines_is_not_believed(model_folder: Path, source: Path, output: Path, whole: bytes) -> None:
    with begun(model_folder, source, output) as run:
        shard = ShardWriter(run.folder.shards / "0000")
        for number in (1, 8, 9999):  # another digest, a line that is done, one that does not exist
            shard.add(Result(line_number=number, digest=5, record=b"{}\n"))
        shard.commit()
        shard.close()
        run.collect()
        assert run.num_left == 40
        join(run, model_folder)
    assert output.read_bytes() == whole


def test_status_shows_workers(model_folder: Path, source: Path, output: Path) -> None:
    seen: list[Any] = []
    with begun(model_folder, source, output) as run:
        join(run, model_folder, on_progress=lambda progress: (time.sleep(0.01), seen.append(read_status(paths_of(output)).workers)))
        (worker,) = read_status(paths_of(output)).workers
        assert (worker.state, worker.lines, worker.in_progress) == ("finished", 40, 0)
    assert {each[0].state for each in seen} == {"answering"}
    assert read_status(paths_of(output)).workers == ()
