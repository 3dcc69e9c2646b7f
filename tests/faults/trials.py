"""Jobs that are made to fail, and what is left of them afterwards.  tests/faults/ runs a few, benchmarks/faults.py thousands.

A trial is one run of the command `flexgen run` that something happens to; a job is some such runs one after another, and then runs
that are left in peace until the job is done.  Every run is a child forked from a process that has imported everything and computed
nothing (a thread would not survive the fork), so that it starts in milliseconds.
"""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Self

from flexgen import cli
from flexgen.base import failpoints
from flexgen.base.failpoints import FAILPOINTS
from flexgen.session import prepare as opening

PATIENCE_SECONDS = 300.0  # a run that takes longer hangs: on a quiet machine it takes one or two
NOW = 1_700_000_000.0  # the clock of all runs: answers carry the time at which their job began
MODEL, REQUESTS = "model", "requests.jsonl"
_LOGPROB_TOLERANCE = 1e-4


# -- what happens to a run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one run.

    Attributes:
        name: of the kind, for people.
        point, hit, action: at the `hit`-th pass of a failpoint do what ACTIONS says; no point, no action.
        seconds, signals: after that time send these, one after the other.
        file_bytes: no file may grow beyond this.
        removes: what is deleted from the job's folder after that time, as a pattern.
        short: so many of a hundred transfers are cut short.
        flips: not 0 has one bit read wrong; a seed.
        looks: so often `flexgen status` and `flexgen export` look at the job before the signals come.
        condition, seed: what holds during the whole run, one of those of hostile.py; it is drawn from the seed.
        flags: more of the command's. codes: exit codes of a run that nothing ends early.
    """

    name: str
    point: str = ""
    hit: int = 0
    action: str = ""
    seconds: float = 0.0
    signals: tuple[int, ...] = ()
    file_bytes: int = 0
    removes: str = ""
    short: int = 0
    flips: int = 0
    looks: int = 0
    condition: str = ""
    seed: int = 0
    flags: tuple[str, ...] = ()
    codes: frozenset[int] = frozenset({1})

    @property
    def endings(self) -> set[int]:
        """Exit codes that a run may have: a job whose lines are all done ends with 1, because two of them are bad."""
        if self.signals or self.action in ("kill", "power", "SIGTERM"):
            stops = {signal.SIGTERM} if self.action == "SIGTERM" else set(self.signals)
            return {*self.codes} | (
                {-signal.SIGKILL} if signal.SIGKILL in stops or not stops else {code for s in stops for code in (-s, 128 + s)}
            )
        if self.short or self.action == "device memory" or self.condition:
            return {*self.codes}
        return {1, 75} if self.flips else {1, 3, 75}


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def _run_out_of_memory() -> NoReturn:
    raise MemoryError("a test says so")


def _run_out_of_device_memory() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory, a test says so")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _die,
    "EIO": lambda: _fail(errno.EIO),
    "ENOSPC": lambda: _fail(errno.ENOSPC),
    "memory": _run_out_of_memory,
    "device memory": _run_out_of_device_memory,
    "power": _die,
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


class Witness:
    """What a run got to, told through memory that outlives it."""

    _LAYOUT = struct.Struct("<qq")  # index of the last failpoint, commits

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, self._LAYOUT.size)

    def forget(self) -> None:
        self._LAYOUT.pack_into(self._shared, 0, -1, 0)

    def note(self, point: str) -> None:
        _, commits = self._LAYOUT.unpack_from(self._shared)
        self._LAYOUT.pack_into(self._shared, 0, FAILPOINTS.index(point), commits + (point == "store.committed"))

    @property
    def place(self) -> str:
        """The last failpoint that the run passed."""
        index, _ = self._LAYOUT.unpack_from(self._shared)
        return FAILPOINTS[index] if index >= 0 else "before the first"

    @property
    def commits(self) -> int:
        return self._LAYOUT.unpack_from(self._shared)[1]


# -- runs -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of a run that something happened to.

    Attributes:
        code: exit code, negative for the signal that ended it.
        struck: whether it got as far as the fault.
        place: the last failpoint it passed. commits: how many it had made.
        duplicated, wrong: records of its output that are there twice, or are not those of an undisturbed run.
    """

    fault: str
    code: int
    struck: bool
    place: str
    commits: int
    duplicated: int
    wrong: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """A job after all its trials and a last run in peace.

    Attributes:
        bugs: runs that ended as none should. hangs: runs that did not end.
        log: of all runs, where something went wrong.
    """

    trials: list[Trial]
    lost: int
    duplicated: int
    wrong: int
    same_bytes: bool
    bugs: int = 0
    hangs: int = 0
    log: str = ""

    @property
    def good(self) -> bool:
        return self.same_bytes and not (self.lost or self.duplicated or self.wrong or self.bugs or self.hangs)


@dataclass(slots=True)
class _Run:
    """A child."""

    pid: int
    started: float
    hung: bool = False


@dataclass(slots=True)
class Workshop:
    """A tiny model, a file of requests, and the answers of an undisturbed run.

    Call `open` before anything of this process computes.
    """

    folder: Path
    witness: Witness = field(default_factory=Witness)
    reference: bytes = b""
    seconds: float = 0.0
    num_jobs: int = 0

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Make the model, import what runs need, and let one run in peace (twice: the first compiles kernels)."""
        folder.mkdir(parents=True, exist_ok=True)
        _import_everything()
        workshop = cls(folder)
        workshop._in_child(lambda: workshop._write_model() or 0)
        workshop._write_requests()
        for _ in range(2):
            job = workshop.new_folder()
            start = time.monotonic()
            code = workshop.run(job)
            workshop.seconds = time.monotonic() - start
            assert code == 1, (job / "log").read_text()  # two lines are bad on purpose
            workshop.reference = (job / "out.jsonl").read_bytes()
            shutil.rmtree(job)
        return workshop

    def _write_model(self) -> None:
        write_model(self.folder / MODEL)

    def _write_requests(self) -> None:
        write_requests(self.folder / REQUESTS)

    def new_folder(self) -> Path:
        """For one job."""
        self.num_jobs += 1
        job = self.folder / f"job-{self.num_jobs}"
        job.mkdir()
        return job

    def run(self, job: Path, fault: Fault | None = None) -> int:
        """The exit code of one run; negative for the signal that ended it."""
        return self.wait(job, self.start(job, fault), fault)

    def start(self, job: Path, fault: Fault | None = None) -> _Run:
        """Begin a run."""
        self.witness.forget()
        return _Run(pid=self._fork(lambda: self._child(job, fault)), started=time.monotonic())

    def wait(self, job: Path, run: _Run, fault: Fault | None = None) -> int:
        """Send the fault's signals, remove what it removes, and return the exit code."""
        descriptor = os.pidfd_open(run.pid)
        fault = fault or Fault(name="none")

        def let_pass(seconds: float) -> None:
            """Until so long after the start, or the end of the run."""
            select.select([descriptor], [], [], max(run.started + seconds - time.monotonic(), 0))

        try:
            for part in range(fault.looks):
                let_pass(fault.seconds * part / fault.looks)
                self._look(job)
            for number in fault.signals:
                let_pass(fault.seconds)
                with suppress(ProcessLookupError):  # it ended before
                    signal.pidfd_send_signal(descriptor, number)
            if fault.removes:
                let_pass(fault.seconds)
                for path in job.glob(fault.removes):
                    shutil.rmtree(path, ignore_errors=True)
            if not select.select([descriptor], [], [], PATIENCE_SECONDS)[0]:
                run.hung = True
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1])

    def _child(self, job: Path, fault: Fault | None) -> int:
        self._log_to(job)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a process whose Python has not begun
        time.time = lambda: NOW
        opening._PROCESS = os.getpid()  # the process before the fork had one thread, so that none is missing here
        failpoints.switch_on(Saboteur(self.witness, fault, job))
        if fault is not None and fault.condition:
            return self._under_condition(job, fault)
        if fault is not None and fault.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))
        return self._flexgen(job)

    def _flexgen(self, job: Path, *flags: str) -> int:
        return run_flexgen(*command(self.folder / MODEL, self._requests(job), job), *flags)

    def _under_condition(self, job: Path, fault: Fault) -> int:
        raise NotImplementedError

    def _requests(self, job: Path) -> Path:
        """The input of a job."""
        return self.folder / REQUESTS

    def _look(self, job: Path) -> None:
        """What another terminal may do to a job, whether it has begun or not."""
        for command in ("status", "export"):
            code = os.waitstatus_to_exitcode(os.waitpid(self._fork(lambda: self._looking(job, command)), 0)[1])  # noqa: B023
            assert code in (0, 3), (command, code, (job / "log").read_text())

    def _looking(self, job: Path, command: str) -> int:
        self._log_to(job)
        return run_flexgen(command, str(job / "out.jsonl"))

    def _log_to(self, job: Path) -> None:
        log = os.open(job / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)

    def _in_child(self, work: Callable[[], int]) -> None:
        assert os.waitstatus_to_exitcode(os.waitpid(self._fork(work), 0)[1]) == 0

    def _fork(self, work: Callable[[], int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            code = work()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(code)

    # -- jobs -------------------------------------------------------------------------------------------------------------------------

    def try_job(self, faults: list[Fault]) -> JobOutcome:
        """Let each fault happen to one run of a job, then let the job end, and look at what there is."""
        job = self.new_folder()
        trials: list[Trial] = []
        hangs = bugs = 0
        for fault in faults:
            (job / "struck").unlink(missing_ok=True)
            with self._around(job, fault) as found:
                run = self.start(job, fault)
                code = self.wait(job, run, fault)
                found.append(code)
            hangs += run.hung
            bugs += code not in fault.endings or len(found) > 1
            if fault.action == "power" and (job / "struck").exists():
                bugs += not lose_power(job, random.Random(fault.hit))
            duplicated, wrong, _ = self._faults_of(job / "out.jsonl")
            struck = (job / "struck").exists() or code not in (0, 1) or bool(fault.removes)
            trials.append(
                Trial(
                    fault=fault.name, code=code, struck=struck, place=self.witness.place, commits=self.witness.commits,
                    duplicated=duplicated, wrong=wrong,
                )
            )  # fmt: skip
            if code == 1 and not struck:
                break  # the job is done, and later runs would find nothing to do
        code = self.run(job)
        bugs += code != 1
        # Empty folders are removed by the next run that spills; spilled data is gone at once.
        bugs += sum(path.stat().st_size > 0 for path in job.glob("flexgen-offload-*/*"))
        duplicated, wrong, lost = self._faults_of(job / "out.jsonl")
        same = self._is_whole(job / "out.jsonl")
        outcome = JobOutcome(
            trials=trials, lost=lost, duplicated=duplicated + sum(t.duplicated for t in trials), wrong=wrong + sum(t.wrong for t in trials),
            same_bytes=same, bugs=bugs, hangs=hangs,
        )  # fmt: skip
        if outcome.good:
            shutil.rmtree(job)
            return outcome
        return replace(outcome, log=(job / "log").read_text())

    @contextmanager
    def _around(self, job: Path, fault: Fault) -> Iterator[list[object]]:
        """What is made before a run and looked at after it: the list holds its exit code then, and gets what is wrong besides."""
        yield []

    def race(self, num_runs: int) -> JobOutcome:
        """Several runs of one job at once: one works, the others are refused (or come so late that all is done)."""
        job = self.new_folder()
        runs = [self.start(job) for _ in range(num_runs)]
        codes = [self.wait(job, run) for run in runs]
        trials = [
            Trial(fault="two runs, one output", code=code, struck=code == 3, place="", commits=0, duplicated=0, wrong=0) for code in codes
        ]
        duplicated, wrong, lost = self._faults_of(job / "out.jsonl")
        same = same_answers(self.reference, (job / "out.jsonl").read_bytes())
        bugs = sum(code not in (1, 3) for code in codes) + (1 not in codes)
        log = "" if same and not bugs else (job / "log").read_text()
        shutil.rmtree(job)
        return JobOutcome(
            trials=trials, lost=lost, duplicated=duplicated, wrong=wrong, same_bytes=same, bugs=bugs,
            hangs=sum(run.hung for run in runs), log=log,
        )  # fmt: skip

    def _is_whole(self, output: Path) -> bool:
        return output.exists() and same_answers(self.reference, output.read_bytes())

    def _faults_of(self, output: Path) -> tuple[int, int, int]:
        """(records that are there twice, records that are not the reference's, the reference's that are missing)."""
        wanted = {key_of(line): line for line in self.reference.splitlines(keepends=True)}
        found = output.read_bytes().splitlines(keepends=True) if output.exists() else []
        keys = [key_of(line) for line in found]
        wrong = sum(not same_answer(wanted.get(key, b""), line) for key, line in zip(keys, found, strict=True))
        return len(keys) - len(set(keys)), wrong, len(wanted.keys() - set(keys))


def run_flexgen(*arguments: str) -> int:
    """The exit code of the command."""
    sys.argv = ["flexgen", *arguments]
    try:
        cli.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def same_answers(wanted: bytes, found: bytes) -> bool:
    """Whether two outputs are equal, byte for byte but for the last digits of log probabilities.

    These depend on how many rows a matrix product has, and after a resume what was generated before is one prompt.
    """
    wanted_lines, found_lines = wanted.splitlines(keepends=True), found.splitlines(keepends=True)
    return len(wanted_lines) == len(found_lines) and all(map(same_answer, wanted_lines, found_lines))


def same_answer(wanted: bytes, found: bytes) -> bool:
    """The same of two lines."""
    if wanted == found:
        return True
    try:
        one, other = json.loads(wanted), json.loads(found)
    except ValueError:
        return False
    logprobs = list(zip(_taken_out(one), _taken_out(other), strict=False))
    close = all(len(a) == len(b) and all(abs(x - y) < _LOGPROB_TOLERANCE for x, y in zip(a, b, strict=True)) for a, b in logprobs)
    return bool(logprobs) and close and json.dumps(one) == json.dumps(other)


def _taken_out(value: object) -> list[list[float]]:
    """The numbers of all log probabilities and scores, each replaced by None."""
    found: list[list[float]] = []
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += _taken_out(each)
    for name in ("logprobs", "prompt_logprobs", "labels") if isinstance(value, dict) else ():
        if value.get(name) is not None:
            found.append(_numbers(value[name]))
            value[name] = _without_numbers(value[name])
    return found


def _numbers(value: object) -> list[float]:
    if isinstance(value, float):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for each in inner for number in _numbers(each)]


def _without_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_numbers(each) for each in value]
    return None if isinstance(value, float) else value


def key_of(line: bytes) -> str:
    try:
        record = json.loads(line)
        return str(record.get("custom_id") or record.get("index"))
    except ValueError:
        return f"no record: {line[:40]!r}"


class Saboteur:
    """What a fault does within the run, told of every failpoint that is passed."""

    def __init__(self, witness: Witness, fault: Fault | None, job: Path) -> None:
        self._witness, self._job = witness, job
        self._fault = fault or Fault(name="none")
        self._hits = self._passes = 0
        if self._fault.short:
            self._cut_transfers(random.Random(self._fault.short), self._fault.short)
        if self._fault.flips:
            self._flip_bits(random.Random(self._fault.flips))

    def __call__(self, point: str) -> None:
        self._witness.note(point)
        self._passes += point == "engine.pass"
        if point != self._fault.point:
            return
        self._hits += 1
        if self._fault.action == "power" and self._hits == self._fault.hit - 1:
            keep_durable(self._job)
        if self._hits == self._fault.hit:
            self.strike()
            ACTIONS[self._fault.action]()

    def strike(self) -> None:
        os.close(os.open(self._job / "struck", os.O_WRONLY | os.O_CREAT))

    def _cut_transfers(self, numbers: random.Random, percent: int) -> None:
        """Have system calls on weights and spilled KV move less than they were asked to."""

        def cut(call: Callable[..., int]) -> Callable[..., int]:
            def transfer(descriptor: int, views: list[memoryview], offset: int) -> int:
                draw = numbers.randrange(100)
                if draw < percent:
                    self.strike()
                if draw < percent and len(views[0]) > 4096:
                    views = [views[0][: 4096 * numbers.randrange(1, len(views[0]) // 4096 + 1)]]
                return call(descriptor, views, offset)

            return transfer

        os.preadv, os.pwritev = cut(os.preadv), cut(os.pwritev)

    def _flip_bits(self, numbers: random.Random) -> None:
        """Once all weights have been read, one bit comes back wrong: once, or for good."""
        plain, wait, for_good = os.preadv, numbers.randrange(200), numbers.random() < 0.5
        flipped: list[tuple[int, int]] = []  # (offset, bit within what is read there)

        def flipping(descriptor: int, views: list[memoryview], offset: int) -> int:
            nonlocal wait
            count = plain(descriptor, views, offset)
            wait -= self._passes > 2
            if wait < 0 and not flipped:
                flipped.append((offset, numbers.randrange(count * 8)))
                self.strike()
            elif not (flipped and for_good and flipped[0][0] == offset):
                return count
            views[0][flipped[0][1] // 8] ^= 1 << flipped[0][1] % 8
            return count

        os.preadv = flipping


# -- power failures -----------------------------------------------------------------------------------------------------------------------

_DATABASE = ("job.sqlite", "job.sqlite-wal")
_BLOCK = 512


def keep_durable(job: Path) -> None:
    """Copy the database as it is right after a commit: this much, a disk has."""
    for name in _DATABASE:
        if (source := job / "out.jsonl.flexgen" / name).exists():
            shutil.copy(source, job / f"durable-{name}")


def lose_power(job: Path, numbers: random.Random) -> bool:
    """Of what was written since the commit before the last, leave any part: blocks lost, blocks torn, files cut.

    Returns:
        whether all that was durable before is still there.
    """
    folder = job / "out.jsonl.flexgen"
    (folder / "job.sqlite-shm").unlink(missing_ok=True)
    durable = {name: (job / f"durable-{name}").read_bytes() if (job / f"durable-{name}").exists() else b"" for name in _DATABASE}
    if not durable["job.sqlite"] or durable["job.sqlite"] != (folder / "job.sqlite").read_bytes():
        return True  # a checkpoint came between, which SQLite makes durable step by step
    before, after = durable["job.sqlite-wal"], (folder / "job.sqlite-wal").read_bytes()
    torn = bytearray(after)
    for start in range(0, len(after), _BLOCK):
        old = before[start : start + _BLOCK].ljust(len(after[start : start + _BLOCK]), b"\0")
        if old != after[start : start + _BLOCK] and numbers.random() < 0.5:
            torn[start : start + _BLOCK] = old
    end = numbers.randint(len(before), max(len(after), len(before))) if numbers.random() < 0.5 else len(torn)
    (folder / "job.sqlite-wal").write_bytes(torn[:end])
    wanted = _lines_done(job, {name: content for name, content in durable.items() if content})
    return wanted <= _lines_done(job, {name: (folder / name).read_bytes() for name in _DATABASE})


def _lines_done(job: Path, database: dict[str, bytes]) -> set[tuple[int, bytes]]:
    """The records of a database, looked at in a copy."""
    copy = job / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name, content in database.items():
        (copy / name).write_bytes(content)
    with closing(sqlite3.connect(copy / "job.sqlite")) as connection:
        return set(connection.execute("SELECT line, record FROM records"))


def command(model: Path, requests: Path, job: Path) -> list[str]:
    """The arguments of a run: weights stream from disk, half of the KV cache is spilled, every pass is stored."""
    flags = {
        "-o": job / "out.jsonl", "--device": "cpu", "--dtype": "float32", "--weights": "disk=1", "--kv": "host=.5,disk=.5",
        "--disk": "64MiB", "--offload-dir": job, "--max-num-seqs": 4, "--prefill-tokens": 64, "--micro-batch-tokens": 64,
        "--checkpoint-seconds": 0, "--progress": "none",
    }  # fmt: skip
    return ["run", str(model), str(requests), "--verify-reads", *(str(part) for pair in flags.items() for part in pair)]


# -- the model and the requests -----------------------------------------------------------------------------------------------------------


def write_model(folder: Path, num_layers: int = 2) -> None:
    """A few layers with random weights, pages of KV that are whole blocks.  This computes: call it in a child."""
    import torch
    import transformers

    from flexgen.checkpoint.dummy import write_random_checkpoint

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    write_random_checkpoint(config, folder, torch.float32)


def write_requests(path: Path) -> None:
    """Greedy and sampled, short and long, several answers to one prompt, scores, both forms, and two lines that cannot be served."""
    numbers = random.Random(0)
    lines: list[object] = []
    for n in range(8):
        prompt = [numbers.randrange(3, 96) for _ in range(numbers.randrange(2, 30))]
        lines.append({"id": f"greedy-{n}", "prompt": prompt, "max_tokens": 2 + 2 * n, "temperature": 0, "ignore_eos": True})
    for n in range(4):
        lines.append({"id": f"sampled-{n}", "prompt": [5, 6, 7 + n], "max_tokens": 3 + 3 * n, "temperature": 1.0, "ignore_eos": True})
    lines.insert(3, {"id": "several", "prompt": [9, 8, 7], "max_tokens": 6, "temperature": 1.0, "n": 3, "logprobs": 2})
    lines.insert(5, "no JSON")
    lines.insert(9, {"id": "bad", "prompt": [1000]})
    body = {"prompt": [11, 12, 13], "max_tokens": 9, "seed": 5}
    lines.append({"custom_id": "batch", "method": "POST", "url": "/v1/completions", "body": body})
    lines.append({"id": "choices", "prompt": [21, 22, 23], "choices": [[4, 5], [4, 6, 7], [8], [4, 5]]})
    lines.append({"id": "scored", "prompt": list(range(30, 60)), "max_tokens": 7, "prompt_logprobs": 1, "n": 2, "seed": 3})
    body = {"prompt": [[31, 32, 33], [34, 35]], "max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0}
    lines.append({"custom_id": "echo", "method": "POST", "url": "/v1/completions", "body": body})
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def _import_everything() -> None:
    """What a run imports, and compiled kernels; one torch thread, so that none is left when a child is forked."""
    import numba  # noqa: F401
    import torch
    import transformers

    import flexgen.jobs.export
    import flexgen.jobs.runner
    import flexgen.jobs.status
    import flexgen.report.report
    from flexgen.kernels.attention import attention_kernels, warm_up
    from flexgen.llm import LLM  # noqa: F401
    from flexgen.session.planned import PlannedEngine  # noqa: F401

    torch.set_num_threads(1)
    _ = transformers.LlamaForCausalLM, transformers.LlamaConfig, transformers.AutoConfig, transformers.AutoModelForCausalLM
    kernels = attention_kernels(torch.device("cpu"), 1)
    warm_up(kernels, torch.float32)
    kernels.close()
    # The measure of a run's speed takes as long as such a run, and changes nothing that is kept.
    flexgen.report.report.least_ideal_seconds = lambda *arguments, **keywords: 1.0
    gc.collect()
    gc.freeze()


# -- kinds of faults ----------------------------------------------------------------------------------------------------------------------

_FULL = ("store.commit", "export.write", "export.fsync", "export.rename", "disk.write")
_BROKEN = (*_FULL, "store.committed", "export.renamed", "input.read", "disk.read")
_MEMORY = ("engine.pass", "store.commit", "export.write", "input.read")
_ALONE = tuple(point for point in FAILPOINTS if not point.startswith(("shard.", "workers.")))  # what a run without workers passes
_MOST_HITS = {"disk.read": 150, "disk.write": 60, "input.read": 60, "engine.pass": 30}


def _at_points(name: str, points: tuple[str, ...], action: str) -> Callable[[Workshop, random.Random], list[Fault]]:
    """A few runs, each struck at a random hit of a random point."""

    def draw(workshop: Workshop, numbers: random.Random) -> list[Fault]:
        points_hit = [numbers.choice(points) for _ in range(3)]
        return [Fault(name=name, point=point, hit=numbers.randint(1, _MOST_HITS.get(point, 12)), action=action) for point in points_hit]

    return draw


def _at_times(name: str, count: int, *signals: int) -> Callable[[Workshop, random.Random], list[Fault]]:
    """Some runs, each struck at a random time."""

    def draw(workshop: Workshop, numbers: random.Random) -> list[Fault]:
        return [
            Fault(name=name, seconds=numbers.uniform(0, _share(count)) * workshop.seconds, signals=signals or (_any_stop(numbers),))
            for _ in range(count)
        ]

    return draw


def _folder_removed(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    seconds = [numbers.uniform(0, workshop.seconds) for _ in range(3)]
    return [Fault(name="offload folder removed", seconds=each, removes="flexgen-offload-*") for each in seconds]


def _short_transfers(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    return [Fault(name="short reads and writes", short=numbers.randint(2, 90))]


def _flipped_bits(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    return [Fault(name="a bit that flips on disk", flips=numbers.randint(1, 10**9)) for _ in range(2)]


def _power(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    return [Fault(name="power failure", point="store.committed", hit=numbers.randint(2, 30), action="power") for _ in range(2)]


def _share(count: int) -> float:
    """Of a run's time, within which `count` kills in a row come: not so late that the job is done before the last."""
    return 1.0 if count < 10 else 0.5


def _any_stop(numbers: random.Random) -> int:
    return numbers.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def _looked_at(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    seconds = [numbers.uniform(0.3, 2) * workshop.seconds for _ in range(2)]
    return [Fault(name="status, export, kill -9", seconds=each, signals=(signal.SIGKILL,), looks=3) for each in seconds]


def _small_files(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    return [Fault(name="no file may grow", file_bytes=int(2 ** numbers.uniform(15, 22))) for _ in range(3)]


KINDS: dict[str, Callable[[Workshop, random.Random], list[Fault]]] = {
    "kill -9 at a failpoint": _at_points("kill -9 at a failpoint", _ALONE, "kill"),
    "kill -9 at a random time": _at_times("kill -9 at a random time", 3, signal.SIGKILL),
    "kill -9, twenty in a row": _at_times("kill -9, twenty in a row", 20, signal.SIGKILL),
    "status, export, kill -9": _looked_at,
    "SIGINT, SIGTERM or SIGHUP": _at_times("SIGINT, SIGTERM or SIGHUP", 3),
    "a second signal": _at_times("a second signal", 3, signal.SIGTERM, signal.SIGTERM),
    "disk full": _at_points("disk full", _FULL, "ENOSPC"),
    "I/O error": _at_points("I/O error", _BROKEN, "EIO"),
    "out of memory": _at_points("out of memory", _MEMORY, "memory"),
    "device out of memory": _at_points("device out of memory", ("engine.pass",), "device memory"),
    "no file may grow": _small_files,
    "offload folder removed": _folder_removed,
    "short reads and writes": _short_transfers,
    "a bit that flips on disk": _flipped_bits,
    "power failure": _power,
}
RACE = "two runs, one output"


def sweep(point: str, action: str) -> Iterator[list[Fault]]:
    """A job for every hit of a point, one after the other; whoever asks stops when a run is no longer struck."""
    for hit in range(1, 1000):
        yield [Fault(name=f"{action} at every {point}", point=point, hit=hit, action=action)]


def run_kind(workshop: Workshop, kind: str, num_jobs: int, seed: int) -> Iterator[JobOutcome]:
    """Some jobs of one kind."""
    numbers = random.Random(f"{kind} {seed}")
    for _ in range(num_jobs):
        yield workshop.race(2) if kind == RACE else workshop.try_job(KINDS[kind](workshop, numbers))
