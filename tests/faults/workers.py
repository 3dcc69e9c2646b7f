"""Jobs with several workers that are killed, stopped and woken, and the runs that have started them.

    PYTHONPATH=src:tests python -m faults.workers FOLDER [--rounds 200] [--only KIND] [--seed 0] [--results FILE]

A round is a job: some runs that something happens to, each with another number of workers (also none), and a last run in peace, after which
the output is compared with that of an undisturbed job.  Workers are forked from the run, which has imported everything and computed
nothing, so that they begin in milliseconds.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from faults.trials import ACTIONS, MODEL, NOW, PATIENCE_SECONDS, Fault, JobOutcome, Trial, Workshop, command, same_answer
from flexgen.base import failpoints
from flexgen.cli import workers as started
from flexgen.jobs.serving import Serving
from flexgen.session import prepare as opening

LEASE_SECONDS = 1.0
_POISONED = 7  # the number of a line, which is answered only where nothing kills
_POINTS = ("shard.write", "shard.fsync", "shard.synced", "workers.link", "workers.linked", "workers.replace", "engine.pass", "input.read")
_POINTS_OF_RUN = ("workers.publish", "workers.remove", "workers.collect", "workers.replace", "store.commit", "store.committed")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFault(Fault):
    """What happens to one run with workers.

    Attributes:
        workers: The value of `--workers`; empty for a run without.
        by_hand: So many workers are started with `flexgen work`.
        in_run: Whether a failpoint is struck in the run itself, and not in a worker.
        hits: The times, after the start of the run, at which a signal is sent to some worker.
        wakes: Whether a worker that was stopped is woken soon after its lines were taken over, and not long after.
        kills_line: A line that kills its worker at the next pass; 0 for none.
    """

    workers: str = "2"
    by_hand: int = 0
    in_run: bool = False
    hits: tuple[float, ...] = ()
    number: int = signal.SIGKILL
    wakes: bool = False
    kills_line: int = 0

    @property
    def endings(self) -> set[int]:
        """A run whose workers die in a row before they answer anything gives up."""
        ends = {1, 3, 75}
        if self.signals or (self.in_run and self.action == "kill"):
            ends |= {code for each in self.signals or (signal.SIGKILL,) for code in (-each, 128 + each)}
        return ends


class Once:
    """Strikes at a hit of a failpoint, in one process of a run only."""

    def __init__(self, fault: WorkerFault, job: Path) -> None:
        self._fault, self._job, self._process, self._hits = fault, job, os.getpid(), 0
        self.armed = False  # a line that kills is being answered

    def __call__(self, point: str) -> None:
        if self.armed and point == "engine.pass":
            os.kill(os.getpid(), signal.SIGKILL)
        if point != self._fault.point or (os.getpid() == self._process) != self._fault.in_run:
            return
        self._hits += 1
        if self._hits == self._fault.hit:
            with suppress(FileExistsError):
                os.close(os.open(self._job / "struck", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
                ACTIONS[self._fault.action]()


class Forked:
    """A worker that was forked, as `subprocess.Popen` shows it."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@dataclass(slots=True)
class WorkerWorkshop(Workshop):
    """A workshop for jobs with workers."""

    numbers: random.Random | None = None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Measure this machine also with the cores that a worker has."""
        # zero-argument super() does not work in a class with slots
        workshop = super(WorkerWorkshop, cls).open(folder)
        for count in ("1", "2", "3"):
            job = workshop.new_folder()
            begun = time.monotonic()
            code = workshop.run(job, WorkerFault(name="none", workers=count))
            workshop.seconds = time.monotonic() - begun
            assert code == 1, (job / "log").read_text() + workshop.said(job)
            assert workshop._is_whole(job / "out.jsonl"), (job / "log").read_text()
            shutil.rmtree(job)
        return workshop

    def said(self, job: Path) -> str:
        """What workers have said."""
        return "\n".join(path.read_text() for path in (job / "out.jsonl.flexgen").glob("workers/*/logs/*.log"))

    def _child(self, job: Path, fault: Fault | None) -> int:
        if not isinstance(fault, WorkerFault):
            return super(WorkerWorkshop, self)._child(job, fault)
        self._log_to(job)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.time = lambda: NOW
        opening._PROCESS = os.getpid()
        once = Once(fault, job)
        failpoints.switch_on(once)
        started.start_process = _forked
        if fault.kills_line:
            requests = Serving.requests

            def deadly(self: Serving, request: object, token_requests: object) -> object:
                once.armed = once.armed or request.line_number == fault.kills_line
                return requests(self, request, token_requests)

            Serving.requests = deadly
        flags = ("--workers", fault.workers, "--lease-seconds", str(LEASE_SECONDS), *fault.flags) if fault.workers else ()
        return _flexgen(*command(self.folder / MODEL, self._requests(job), job), *flags)

    def wait(self, job: Path, run: object, fault: Fault | None = None) -> int:
        """Have things happen to workers while the run goes on."""
        if not isinstance(fault, WorkerFault) or not (fault.hits or fault.by_hand):
            code = super(WorkerWorkshop, self).wait(job, run, fault)
        else:
            code = self._disturb(job, run, fault)
        self._let_orphans_end(job)
        return code

    def _disturb(self, job: Path, run: object, fault: WorkerFault) -> int:
        by_hand = [self._fork(lambda: self._by_hand(job)) for _ in range(fault.by_hand)]
        numbers, stopped, due, code = random.Random(fault.seed), [], sorted(fault.hits), None
        while code is None:
            pid, status = os.waitpid(run.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
            now = time.monotonic() - run.started
            if due and now >= due[0]:
                due.pop(0)
                target = self._strike(job, numbers, fault.number)
                stopped += [(now, target)] if fault.number == signal.SIGSTOP and target else []
            # In the end even those that are to sleep longer are woken: all may have been stopped, and a run waits for its workers.
            for each in [each for each in stopped if now - each[0] > (1.5 if fault.wakes else 6) * LEASE_SECONDS]:
                stopped.remove(each)
                _send(each[1], signal.SIGCONT)
            if now > PATIENCE_SECONDS:
                run.hung = True
                os.kill(run.pid, signal.SIGKILL)
            time.sleep(0.01)
        for _, pid in stopped:
            _send(pid, signal.SIGCONT)
        for pid in by_hand:
            os.waitpid(pid, 0)
        return code

    def _strike(self, job: Path, numbers: random.Random, number: int) -> int:
        """Send a signal to some worker that lives, and return its process id."""
        pids = sorted(pid for pid in _workers(job) if _runs(pid))
        if not pids:
            return 0
        pid = numbers.choice(pids)
        with suppress(FileExistsError):
            os.close(os.open(job / "struck", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        _send(pid, number)
        return pid

    def _by_hand(self, job: Path) -> int:
        """What `flexgen work` does on another host, as soon as there is something to join."""
        self._log_to(job)
        time.time = lambda: NOW
        opening._PROCESS = os.getpid()
        while not (job / "out.jsonl.flexgen" / "workers" / "current").exists():
            time.sleep(0.02)
            if (job / "out.jsonl").exists():
                return 0  # all was done before
        return _flexgen("work", str(job / "out.jsonl"), "--progress", "none")

    def _let_orphans_end(self, job: Path) -> None:
        """Workers of a run that was killed stop after their pass."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(_runs(pid) for pid in _workers(job)):
            for pid in _workers(job):
                _send(pid, signal.SIGCONT)
            assert time.monotonic() < deadline, "a worker does not end"
            time.sleep(0.02)

    def try_poison(self, workers: str) -> JobOutcome:
        """A line that kills every worker that has it: it ends in an error, and all others in their answers."""
        job = self.new_folder()
        fault = WorkerFault(name=POISON, workers=workers, kills_line=_POISONED)
        code = self.run(job, fault)
        wanted, found = (path.splitlines(keepends=True) for path in (self.reference, (job / "out.jsonl").read_bytes()))
        differing = [line for one, line in zip(wanted, found, strict=False) if not same_answer(one, line)]
        good = code == 1 and len(wanted) == len(found) and len(differing) == 1 and b"worker_died" in differing[0]
        outcome = JobOutcome(
            trials=[Trial(fault=POISON, code=code, struck=True, place="", commits=0, duplicated=0, wrong=0)], lost=len(wanted) - len(found),
            duplicated=0, wrong=max(len(differing) - 1, 0), same_bytes=good, bugs=int(code != 1),
        )  # fmt: skip
        if good:
            shutil.rmtree(job)
            return outcome
        return replace(outcome, log=(job / "log").read_text() + self.said(job))


def _forked(command: Sequence[str], stdin: int, log: Path, cores: Sequence[int], environment: object) -> Forked:
    """`start_process`, but forked from this process."""
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 99
    try:
        os.setsid()
        os.dup2(stdin, 0)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.closerange(3, 4096)  # the lock of the job and the pipes of others, which would stay open otherwise
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if cores:
            os.sched_setaffinity(0, cores)
        opening._PROCESS = os.getpid()
        code = _flexgen(*command)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _flexgen(*arguments: str) -> int:
    from flexgen import cli

    sys.argv = ["flexgen", *arguments]
    try:
        cli.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def _workers(job: Path) -> set[int]:
    """The process ids of all workers that a job had."""
    found: set[int] = set()
    for path in (job / "out.jsonl.flexgen").glob("workers/*/members/[0-9a-f]*"):
        with suppress(OSError, ValueError):
            found.add(json.loads(path.read_text())["process"]["pid"])
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# -- kinds of faults --------------------------------------------------------------------------------------------------------------------

POISON = "a line that kills"
_PATIENT = ("--attempts", "1000")  # a line that is killed by chance is not to blame


def _crew(numbers: random.Random) -> str:
    return numbers.choice(["1", "2", "2", "3"])


def _at_points(points: Sequence[str], *, in_run: bool) -> Callable[[WorkerWorkshop, random.Random], list[Fault]]:
    def draw(workshop: WorkerWorkshop, numbers: random.Random) -> list[Fault]:
        return [
            WorkerFault(
                name="kill -9 at a failpoint", point=numbers.choice(points), hit=numbers.randint(1, 12), action="kill", in_run=in_run,
                workers=_crew(numbers), flags=_PATIENT,
            )
            for _ in range(2)
        ]  # fmt: skip

    return draw


def _workers_struck(name: str, number: int, *, wakes: bool = False) -> Callable[[WorkerWorkshop, random.Random], list[Fault]]:
    def draw(workshop: WorkerWorkshop, numbers: random.Random) -> list[Fault]:
        hits = tuple(numbers.uniform(0.1, 1.2) * workshop.seconds for _ in range(numbers.randint(1, 4)))
        return [
            WorkerFault(
                name=name, hits=hits, number=number, wakes=wakes, seed=numbers.randrange(1 << 30), workers=_crew(numbers), flags=_PATIENT
            )
        ]

    return draw


def _run_struck(name: str, *signals: int) -> Callable[[WorkerWorkshop, random.Random], list[Fault]]:
    def draw(workshop: WorkerWorkshop, numbers: random.Random) -> list[Fault]:
        return [
            WorkerFault(
                name=name, seconds=numbers.uniform(0, 1) * workshop.seconds, signals=(numbers.choice(signals),),
                workers=numbers.choice(["", "1", "2", "3"]),
            )
            for _ in range(3)
        ]  # fmt: skip

    return draw


def _by_hand(workshop: WorkerWorkshop, numbers: random.Random) -> list[Fault]:
    hits = tuple(numbers.uniform(0.2, 1.0) * workshop.seconds for _ in range(numbers.randint(0, 1)))
    return [WorkerFault(name="started by hand", workers="0", by_hand=3, hits=hits, seed=numbers.randrange(1 << 30), flags=_PATIENT)]


KINDS: dict[str, Callable[[WorkerWorkshop, random.Random], list[Fault]]] = {
    "kill -9 of a worker at a failpoint": _at_points(_POINTS, in_run=False),
    "kill -9 of a run at a failpoint": _at_points(_POINTS_OF_RUN, in_run=True),
    "kill -9 of workers": _workers_struck("kill -9 of workers", signal.SIGKILL),
    "SIGSTOP of workers": _workers_struck("SIGSTOP of workers", signal.SIGSTOP),
    "SIGSTOP and SIGCONT of workers": _workers_struck("SIGSTOP and SIGCONT of workers", signal.SIGSTOP, wakes=True),
    "kill -9 of a run": _run_struck("kill -9 of a run", signal.SIGKILL),
    "SIGINT, SIGTERM or SIGHUP of a run": _run_struck("stop", signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    "workers started by hand": _by_hand,
}
ALL_KINDS = (*KINDS, POISON)


def run_kind(workshop: WorkerWorkshop, kind: str, numbers: random.Random) -> JobOutcome:
    """One job of a kind."""
    return workshop.try_poison(_crew(numbers)) if kind == POISON else workshop.try_job(KINDS[kind](workshop, numbers))


def main() -> int:
    """Run rounds of all kinds in turn; a JSON line for each that is not good, and a summary at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=len(ALL_KINDS))
    parser.add_argument("--only", action="append", choices=ALL_KINDS, default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="to which a JSON line is added for each round")
    asked = parser.parse_args()
    workshop = WorkerWorkshop.open(asked.folder)
    kinds, begun = asked.only or ALL_KINDS, time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    for number in range(asked.rounds):
        kind = kinds[number % len(kinds)]
        outcome = run_kind(workshop, kind, random.Random(f"{kind} {asked.seed} {number}"))
        counts["rounds"] += 1
        counts["runs"] += len(outcome.trials)
        counts["struck"] += sum(trial.struck for trial in outcome.trials)
        counts[f"struck: {kind}"] += sum(trial.struck for trial in outcome.trials)
        faults = {name: getattr(outcome, name) for name in ("lost", "duplicated", "wrong", "bugs", "hangs")}
        counts.update(faults)
        if asked.results is not None:
            struck = sum(trial.struck for trial in outcome.trials)
            row = {"kind": kind, "runs": len(outcome.trials), "struck": struck, "same_bytes": outcome.same_bytes, **faults}
            with asked.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if not outcome.good:
            counts["not good"] += 1
            print(json.dumps({"kind": kind, "round": number, **asdict(outcome)}), flush=True)
    seconds = time.monotonic() - begun
    print(json.dumps({"rounds_per_minute": round(60 * asked.rounds / seconds, 1), **counts}))
    return int(counts["not good"] > 0)


if __name__ == "__main__":
    sys.exit(main())
