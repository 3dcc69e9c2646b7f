"""The job layer by itself: lines per second, and memory and open files as lines go by.

    python benchmarks/jobs.py [--lines 100000] [--engine] [--scratch DIR]

Answers come at once, without a model, unless --engine asks for the real one on a tiny random model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from faults.trials import write_model  # noqa: E402
from record import Results  # noqa: E402

from flexgen import LLM, SamplingParams  # noqa: E402
from flexgen.hub.resolve import resolve_model  # noqa: E402
from flexgen.jobs.export import export  # noqa: E402
from flexgen.jobs.folder import JobFolder, job_paths  # noqa: E402
from flexgen.jobs.identity import identity_of  # noqa: E402
from flexgen.jobs.runner import Job  # noqa: E402
from flexgen.jobs.store import Store  # noqa: E402
from flexgen.options import EngineOptions  # noqa: E402
from flexgen.plan.workload import Workload  # noqa: E402
from flexgen.request import TokenRequest, TokenResult  # noqa: E402
from flexgen.session.model import ResolvedModel  # noqa: E402
from flexgen.session.served import ServedModel  # noqa: E402

OUTPUT_TOKENS = 4
SAMPLES = 20


class Instant(ServedModel):
    """A model that knows every answer."""

    def stream(self, requests: Iterable[TokenRequest], workload: Workload, **_: Any) -> Iterator[TokenResult]:
        """Some tokens for each request, as it comes."""
        for request in requests:
            yield TokenResult(index=request.index, token_ids=(5,) * request.max_tokens, finish_reason="length")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--engine", action="store_true", help="the real engine, on a tiny random model")
    parser.add_argument("--scratch", type=Path, help="a folder on a real disk; default: the system's temporary one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "jobs.jsonl")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="flexgen-jobs-", dir=asked.scratch))
    try:
        source = folder / "in.jsonl"
        write_lines(source, asked.lines, as_text=not asked.engine)
        with contextlib.closing(open_model(folder, asked.engine)) as model:
            figures = measure(model, source, folder / "out.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    row = Results(asked.results).append({"lines": asked.lines, "engine": asked.engine, **figures})
    print(json.dumps({name: row[name] for name in ("lines", "engine", *figures)}, indent=2))
    return 0


def write_lines(path: Path, count: int, *, as_text: bool) -> None:
    """Requests of some hundred characters, or of a few token ids."""
    prompt: object = "It was a dark and stormy night; the rain fell in torrents, " * 4 if as_text else [5, 6, 7, 8]
    with path.open("w") as file:
        for number in range(count):
            line = {"id": f"line-{number}", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")


def open_model(folder: Path, engine: bool) -> ServedModel:
    if not engine:
        resolved = ResolvedModel(resolve_model(ROOT / "models" / "novels-opt-7m"), EngineOptions(dtype="float32"))
        return Instant(resolved, resolved.load_tokenizer())
    write_model(folder / "model")
    return LLM(folder / "model", dtype="float32", device="cpu", max_num_seqs=256).model


def measure(model: ServedModel, source: Path, output: Path) -> dict[str, Any]:
    """Lines per second of every step of a job, and memory and files at moments spread over the run."""
    defaults = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS)
    with JobFolder(job_paths(source, output, None)) as folder, WatchedStore(folder) as store:
        store.begin(identity_of(model, defaults), model.name)
        job = Job(model, source, store, defaults=defaults)
        workload, scan_seconds = timed(job.scan)
        store.start_run(job.num_lines)
        samples = store.samples = Samples(job.num_lines)
        _, run_seconds = timed(lambda: job.run(workload))
        _, export_seconds = timed(lambda: export(store.paths, output))
    again, resume_seconds = timed(lambda: rescan(model, source, output, defaults))
    assert again == 0
    count = job.num_lines
    return {
        "scan_lines_per_s": count / scan_seconds,
        "run_lines_per_s": count / run_seconds,
        "export_lines_per_s": count / export_seconds,
        "resume_lines_per_s": count / resume_seconds,
        "resident_bytes": samples.resident_bytes,
        "open_files": samples.open_files,
    }


def rescan(model: ServedModel, source: Path, output: Path, defaults: SamplingParams) -> int:
    """What a rerun of a finished job does; how many requests it finds to do."""
    with JobFolder(job_paths(source, output, None)) as folder, WatchedStore(folder) as store:
        store.begin(identity_of(model, defaults), model.name)
        job = Job(model, source, store, defaults=defaults)
        job.match()
        return len(job.scan())


class Samples:
    """Memory and open files of this process, at equal distances in lines."""

    def __init__(self, num_lines: int) -> None:
        self._step = max(num_lines // SAMPLES, 1)
        self._count = 0
        self._process = psutil.Process()
        self.resident_bytes: list[int] = []
        self.open_files: list[int] = []

    def line_done(self) -> None:
        """A sample now and then."""
        self._count += 1
        if self._count % self._step == 0:
            self.resident_bytes.append(self._process.memory_info().rss)
            self.open_files.append(self._process.num_fds())


class WatchedStore(Store):
    """Tells its samples of every line."""

    samples: Samples | None = None

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Take the result of a line."""
        super().add(*args, **kwargs)
        if self.samples is not None:
            self.samples.line_done()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
