"""Jobs that are made to fail, and what is left of them afterwards.  tests/faults/ runs a few, benchmarks/faults.py thousands.

A trial is one run of the command `flexgen run` that something happens to; a job is some such runs one after another, and then runs
that are left in peace until the job is done.  Every run is a child forked from a process that has imported everything and computed
nothing (a thread would not survive the fork), so that it starts in milliseconds.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from flexgen import cli, failpoints
from flexgen.failpoints import FAILPOINTS

# How a run may end that something happens to: done, refused, to be resumed, or by a signal that came before it was looked for.
_ENDINGS = frozenset((1, 3, 75, 129, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP))
PATIENCE_SECONDS = 60.0  # a run that takes longer hangs
NOW = 1_700_000_000.0  # the clock of all runs: answers carry the time at which their job began
MODEL, REQUESTS = "model", "requests.jsonl"


# -- what happens to a run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one run.

    Attributes:
        name: of the kind, for people.
        point, hit, action: at the `hit`-th pass of a failpoint do what ACTIONS says; no point, no action.
        seconds, signals: after that time send these, one after the other.
        file_bytes: no file may grow beyond this.
    """

    name: str
    point: str = ""
    hit: int = 0
    action: str = ""
    seconds: float = 0.0
    signals: tuple[int, ...] = ()
    file_bytes: int = 0


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def _run_out_of_memory() -> NoReturn:
    raise MemoryError("a test says so")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _die,
    "EIO": lambda: _fail(errno.EIO),
    "ENOSPC": lambda: _fail(errno.ENOSPC),
    "memory": _run_out_of_memory,
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
    def open(cls, folder: Path) -> Workshop:
        """Make the model, import what runs need, and let one run in peace (twice: the first compiles kernels)."""
        folder.mkdir(parents=True, exist_ok=True)
        _import_everything()
        workshop = cls(folder)
        workshop._in_child(lambda: write_model(folder / MODEL) or 0)
        write_requests(folder / REQUESTS)
        for _ in range(2):
            job = workshop.new_folder()
            start = time.monotonic()
            code = workshop.run(job)
            workshop.seconds = time.monotonic() - start
            assert code == 1, (job / "log").read_text()  # two lines are bad on purpose
            workshop.reference = (job / "out.jsonl").read_bytes()
            shutil.rmtree(job)
        return workshop

    def new_folder(self) -> Path:
        """For one job."""
        self.num_jobs += 1
        job = self.folder / f"job-{self.num_jobs}"
        job.mkdir()
        return job

    def run(self, job: Path, fault: Fault | None = None) -> int:
        """The exit code of one run; negative for the signal that ended it."""
        return self.wait(self.start(job, fault), fault)

    def start(self, job: Path, fault: Fault | None = None) -> _Run:
        """Begin a run."""
        self.witness.forget()
        return _Run(pid=self._fork(lambda: self._child(job, fault)), started=time.monotonic())

    def wait(self, run: _Run, fault: Fault | None = None) -> int:
        """Send the fault's signals, and return the exit code."""
        descriptor = os.pidfd_open(run.pid)
        try:
            for number in fault.signals if fault is not None else ():
                assert fault is not None
                select.select([descriptor], [], [], max(run.started + fault.seconds - time.monotonic(), 0))
                with suppress(ProcessLookupError):  # it ended before
                    signal.pidfd_send_signal(descriptor, number)
            if not select.select([descriptor], [], [], PATIENCE_SECONDS)[0]:
                run.hung = True
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1])

    def _child(self, job: Path, fault: Fault | None) -> int:
        log = os.open(job / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a process whose Python has not begun
        time.time = lambda: NOW
        failpoints.switch_on(_hook(self.witness, fault, job / "struck"))
        if fault is not None and fault.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))
        sys.argv = ["flexgen", *command(self.folder, job)]
        try:
            cli.main()
        except SystemExit as exit:
            return int(exit.code or 0)
        return 0

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
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # -- jobs -------------------------------------------------------------------------------------------------------------------------

    def try_job(self, faults: list[Fault]) -> JobOutcome:
        """Let each fault happen to one run of a job, then let the job end, and look at what there is."""
        job = self.new_folder()
        trials: list[Trial] = []
        hangs = bugs = 0
        for fault in faults:
            (job / "struck").unlink(missing_ok=True)
            run = self.start(job, fault)
            code = self.wait(run, fault)
            hangs += run.hung
            bugs += code not in _ENDINGS
            duplicated, wrong, _ = self._faults_of(job / "out.jsonl")
            struck = (job / "struck").exists() or code not in (0, 1)
            trials.append(
                Trial(
                    fault=fault.name, code=code, struck=struck, place=self.witness.place, commits=self.witness.commits,
                    duplicated=duplicated, wrong=wrong,
                )
            )  # fmt: skip
        code = self.run(job)
        bugs += code != 1
        duplicated, wrong, lost = self._faults_of(job / "out.jsonl")
        same = (job / "out.jsonl").exists() and (job / "out.jsonl").read_bytes() == self.reference
        outcome = JobOutcome(
            trials=trials, lost=lost, duplicated=duplicated + sum(t.duplicated for t in trials), wrong=wrong + sum(t.wrong for t in trials),
            same_bytes=same, bugs=bugs, hangs=hangs,
        )  # fmt: skip
        if outcome.good:
            shutil.rmtree(job)
            return outcome
        return replace(outcome, log=(job / "log").read_text())

    def race(self, num_runs: int) -> JobOutcome:
        """Several runs of one job at once: one works, the others are refused (or come so late that all is done)."""
        job = self.new_folder()
        runs = [self.start(job) for _ in range(num_runs)]
        codes = [self.wait(run) for run in runs]
        trials = [
            Trial(fault="two runs, one output", code=code, struck=code == 3, place="", commits=0, duplicated=0, wrong=0) for code in codes
        ]
        duplicated, wrong, lost = self._faults_of(job / "out.jsonl")
        same = (job / "out.jsonl").read_bytes() == self.reference
        bugs = sum(code not in (1, 3) for code in codes) + (1 not in codes)
        log = "" if same and not bugs else (job / "log").read_text()
        shutil.rmtree(job)
        return JobOutcome(
            trials=trials, lost=lost, duplicated=duplicated, wrong=wrong, same_bytes=same, bugs=bugs,
            hangs=sum(run.hung for run in runs), log=log,
        )  # fmt: skip

    def _faults_of(self, output: Path) -> tuple[int, int, int]:
        """(records that are there twice, records that are not the reference's, the reference's that are missing)."""
        wanted = {_key(line): line for line in self.reference.splitlines(keepends=True)}
        found = output.read_bytes().splitlines(keepends=True) if output.exists() else []
        keys = [_key(line) for line in found]
        wrong = sum(wanted.get(key) != line for key, line in zip(keys, found, strict=True))
        return len(keys) - len(set(keys)), wrong, len(wanted.keys() - set(keys))


def _key(line: bytes) -> str:
    try:
        record = json.loads(line)
        return str(record.get("custom_id") or record.get("index"))
    except ValueError:
        return f"no record: {line[:40]!r}"


def _hook(witness: Witness, fault: Fault | None, struck: Path) -> Callable[[str], None]:
    hits = 0

    def hook(point: str) -> None:
        nonlocal hits
        witness.note(point)
        if fault is None or point != fault.point:
            return
        hits += 1
        if hits == fault.hit:
            os.close(os.open(struck, os.O_WRONLY | os.O_CREAT))
            ACTIONS[fault.action]()

    return hook


def command(folder: Path, job: Path) -> list[str]:
    """The arguments of a run: weights stream from disk, half of the KV cache is spilled, every pass is stored."""
    flags = {
        "-o": job / "out.jsonl", "--device": "cpu", "--dtype": "float32", "--weights": "disk=1", "--kv": "host=.5,disk=.5",
        "--disk": "64MiB", "--offload-dir": job, "--max-num-seqs": 4, "--checkpoint-seconds": 0, "--progress": "none",
    }  # fmt: skip
    return ["run", str(folder / MODEL), str(folder / REQUESTS), *(str(part) for pair in flags.items() for part in pair)]


# -- the model and the requests -----------------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """Two layers with random weights.  This computes: call it in a child."""
    import torch
    import transformers

    from flexgen.models.dummy import write_random_checkpoint

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    write_random_checkpoint(config, folder, torch.float32)


def write_requests(path: Path) -> None:
    """Greedy and sampled, short and long, several answers to one prompt, both forms, and two lines that cannot be served."""
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
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def _import_everything() -> None:
    """What a run imports, and compiled kernels; one torch thread, so that none is left when a child is forked."""
    import numba  # noqa: F401
    import torch
    import transformers

    import flexgen.jobs.export
    import flexgen.jobs.runner
    import flexgen.jobs.status  # noqa: F401
    from flexgen.kernels.attention import attention_kernels, warm_up
    from flexgen.llm import LLM  # noqa: F401
    from flexgen.opening import prepare  # noqa: F401

    torch.set_num_threads(1)
    _ = transformers.LlamaForCausalLM, transformers.LlamaConfig, transformers.AutoConfig, transformers.AutoModelForCausalLM
    kernels = attention_kernels(torch.device("cpu"), 1)
    warm_up(kernels, torch.float32)
    kernels.close()


# -- kinds of faults ----------------------------------------------------------------------------------------------------------------------

_FULL = ("store.commit", "export.write", "export.fsync", "export.rename", "disk.write")
_BROKEN = (*_FULL, "store.committed", "export.renamed", "input.read", "disk.read")
_MEMORY = ("engine.pass", "store.commit", "export.write", "input.read")
_MOST_HITS = {"disk.read": 150, "disk.write": 60, "input.read": 60, "engine.pass": 40}


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
            Fault(name=name, seconds=numbers.uniform(0, workshop.seconds), signals=signals or (_any_stop(numbers),)) for _ in range(count)
        ]

    return draw


def _any_stop(numbers: random.Random) -> int:
    return numbers.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def _small_files(workshop: Workshop, numbers: random.Random) -> list[Fault]:
    return [Fault(name="no file may grow", file_bytes=numbers.randint(1, 200_000)) for _ in range(3)]


KINDS: dict[str, Callable[[Workshop, random.Random], list[Fault]]] = {
    "kill -9 at a failpoint": _at_points("kill -9 at a failpoint", FAILPOINTS, "kill"),
    "kill -9 at a random time": _at_times("kill -9 at a random time", 3, signal.SIGKILL),
    "kill -9, twenty in a row": _at_times("kill -9, twenty in a row", 20, signal.SIGKILL),
    "SIGINT, SIGTERM or SIGHUP": _at_times("SIGINT, SIGTERM or SIGHUP", 3),
    "a second signal": _at_times("a second signal", 3, signal.SIGTERM, signal.SIGTERM),
    "disk full": _at_points("disk full", _FULL, "ENOSPC"),
    "I/O error": _at_points("I/O error", _BROKEN, "EIO"),
    "out of memory": _at_points("out of memory", _MEMORY, "memory"),
    "no file may grow": _small_files,
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


def main() -> None:
    """`trials.py FOLDER NUM_JOBS KIND...`, a kind being one of KINDS or ACTION@POINT: an outcome per line."""
    folder, num_jobs, *kinds = sys.argv[1:]
    workshop = Workshop.open(Path(folder))
    for kind in kinds:
        action, _, point = kind.partition("@")
        outcomes = run_kind(workshop, kind, int(num_jobs), 0) if not point else map(workshop.try_job, sweep(point, action))
        for place, outcome in enumerate(outcomes, 1):
            print(json.dumps(asdict(outcome)), flush=True)
            if point and (not outcome.trials[0].struck or place == int(num_jobs)):
                break


if __name__ == "__main__":
    main()
