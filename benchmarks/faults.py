"""Thousands of runs that are killed, starved or refused their disk, and the table of docs/faults.md: what was lost, what was there twice.

    python benchmarks/faults.py --scratch DIR [--trials 5000] [--workers 2]
    python benchmarks/faults.py --scratch DIR --only KIND [--only KIND ...] --jobs 57
    python benchmarks/faults.py --page

Every failpoint is struck at each of its hits in turn; then every kind of fault strikes jobs at random.  A worker is a process of this
script that runs one job after the other and writes an outcome per line.  With --only the rows of other kinds stay what they are.  --page
writes the page anew, with what `python -m faults.stage_trials` and `python -m faults.workers --results` found on several machines.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))

from faults.kinds import ALL_KINDS, Workshops  # noqa: E402
from faults.trials import JobOutcome, Trial, sweep  # noqa: E402
from record import commit, machine, versions  # noqa: E402

from flexgen.base.failpoints import FAILPOINTS  # noqa: E402

SWEEPS = {
    "kill": FAILPOINTS,
    "EIO": ("input.read", "store.commit", "store.committed", "export.write", "export.fsync", "export.rename", "export.renamed",
            "disk.read", "disk.write"),
    "ENOSPC": ("store.commit", "export.write", "export.fsync", "disk.write"),
    "power": ("store.committed",),
    "memory": ("input.read", "store.commit", "engine.pass", "export.write"),
}  # fmt: skip
JOBS_AT_ONCE = {"kill -9, twenty in a row": 10}  # many trials in little time


@dataclass(slots=True)
class Row:
    """What became of all jobs of one kind."""

    jobs: int = 0
    trials: int = 0
    struck: int = 0
    after_commit: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    different_outputs: int = 0
    bugs: int = 0
    hangs: int = 0
    places: collections.Counter[str] = field(default_factory=collections.Counter)
    codes: collections.Counter[int] = field(default_factory=collections.Counter)
    commit: str = ""

    def add(self, outcome: JobOutcome) -> None:
        self.jobs += 1
        self.lost += outcome.lost
        self.duplicated += outcome.duplicated
        self.wrong += outcome.wrong
        self.different_outputs += not outcome.same_bytes
        self.bugs += outcome.bugs
        self.hangs += outcome.hangs
        for trial in outcome.trials:
            self.trials += 1
            self.struck += trial.struck
            self.after_commit += trial.struck and trial.commits > 0
            self.codes[trial.code] += 1
            if trial.struck:
                self.places[trial.place] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="a folder on a real disk; default: the system's temporary one")
    parser.add_argument("--trials", type=int, default=5000, help="about so many runs are disturbed")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # the number of one; then --json is where it writes
    parser.add_argument("--most-hits", type=int, default=60, help="of one failpoint that are struck in turn")
    parser.add_argument("--only", action="append", choices=ALL_KINDS, default=[], help="a kind; no sweeps, and no other kinds")
    parser.add_argument("--jobs", type=int, default=57, help="of each kind of --only, and of all workers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "faults.md")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page from the results that there are")
    asked = parser.parse_args()
    if asked.page:
        asked.markdown.write_text(format_document(kept_rows(asked.json)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="flexgen-faults-", dir=asked.scratch))
    try:
        if asked.worker is not None:
            return work(folder, asked)
        rows = share(folder, asked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_results({**(kept_rows(asked.json) if asked.only else {}), **rows}, asked.json, asked.markdown)
    return 1 if any(bad(row) for row in rows.values()) else 0


def share(folder: Path, asked: argparse.Namespace) -> dict[str, Row]:
    """The rows of all workers."""
    found_at = commit()["commit"]  # now: work may go on beside
    outcomes = [folder / f"outcomes-{number}.jsonl" for number in range(asked.workers)]
    command = [sys.executable, __file__, "--scratch", str(folder), "--workers", str(asked.workers), "--trials", str(asked.trials)]
    command += ["--most-hits", str(asked.most_hits), "--seed", str(asked.seed), "--jobs", str(asked.jobs)]
    command += [part for kind in asked.only for part in ("--only", kind)]
    workers = [subprocess.Popen([*command, "--worker", str(number), "--json", str(path)]) for number, path in enumerate(outcomes)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")
    rows: dict[str, Row] = {}
    for line in (line for path in outcomes for line in path.read_text().splitlines()):
        fields = json.loads(line)
        name, trials = fields.pop("row"), [Trial(**each) for each in fields.pop("trials")]
        rows.setdefault(name, Row(commit=found_at)).add(JobOutcome(trials=trials, **fields))
    return {name: rows[name] for name in [*sorted(set(rows) - set(ALL_KINDS)), *ALL_KINDS] if name in rows}


def kept_rows(results: Path) -> dict[str, Row]:
    """What an earlier run of this script has found."""
    if not results.exists():
        return {}
    found = json.loads(results.read_text())
    return {
        name: Row(**{
            "commit": found["commit"], **fields, "places": collections.Counter(fields["places"]),
            "codes": collections.Counter({int(code): count for code, count in fields["codes"].items()}),
        })
        for name, fields in found["rows"].items()
    }  # fmt: skip


def work(folder: Path, asked: argparse.Namespace) -> int:
    """One worker's share: every so-many-th sweep, then random faults until that makes enough trials."""
    workshops, struck = Workshops(folder), 0
    with asked.json.open("w") as file:
        for name, outcome in chosen_jobs(workshops, asked) if asked.only else jobs(workshops, asked):
            struck += sum(trial.struck for trial in outcome.trials)
            file.write(json.dumps({"row": name, **asdict(outcome)}) + "\n")
            file.flush()
            if not outcome.good:
                print(f"{name}: {outcome}\n{outcome.log}", file=sys.stderr)
            if not asked.only and struck * asked.workers >= asked.trials:
                break
    return 0


def chosen_jobs(workshops: Workshops, asked: argparse.Namespace) -> Iterator[tuple[str, JobOutcome]]:
    """(row, outcome) of this worker's jobs of the chosen kinds."""
    num_jobs = len(range(asked.worker, asked.jobs, asked.workers))
    for kind in asked.only:
        for outcome in workshops.run_kind(kind, num_jobs, (asked.seed * asked.workers + asked.worker) * 10_000):
            yield kind, outcome


def jobs(workshops: Workshops, asked: argparse.Namespace) -> Iterator[tuple[str, JobOutcome]]:
    """(row, outcome) of all sweeps of this worker, then of all kinds again and again."""
    worker, workers = asked.worker, asked.workers
    sweeps = [(action, point) for action, points in SWEEPS.items() for point in points]
    for action, point in sweeps[worker::workers]:
        for outcome in first(until_missed(map(workshops.plain.try_job, sweep(point, action))), asked.most_hits):
            yield f"{action} at every {point}", outcome
    for number in itertools.count():
        for kind in ALL_KINDS:
            for outcome in workshops.run_kind(kind, JOBS_AT_ONCE.get(kind, 3), (asked.seed * workers + worker) * 10_000 + number):
                yield kind, outcome


def until_missed(outcomes: Iterable[JobOutcome]) -> Iterator[JobOutcome]:
    """Until a run ends without being struck: it passes the point less often than that."""
    for outcome in outcomes:
        if not outcome.trials[0].struck:
            return
        yield outcome


def first(outcomes: Iterable[JobOutcome], count: int) -> Iterator[JobOutcome]:
    for _, outcome in zip(range(count), outcomes, strict=False):
        yield outcome


def bad(row: Row) -> bool:
    return bool(row.lost or row.duplicated or row.wrong or row.different_outputs or row.bugs or row.hangs)


def write_results(rows: dict[str, Row], results: Path, document: Path) -> None:
    """The table, and all that it was made from."""
    fields = {
        name: {key: getattr(row, key) for key in Row.__slots__ if key not in ("places", "codes")}
        | {"places": dict(row.places), "codes": {str(code): count for code, count in sorted(row.codes.items())}}
        for name, row in rows.items()
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    found = {**commit(), "machine": machine(), "versions": versions(), "rows": fields}
    results.write_text(json.dumps(found, indent=2) + "\n")
    document.write_text(format_document(rows))


def format_document(rows: dict[str, Row]) -> str:
    lines = [
        "# Faults",
        "",
        "What becomes of a job whose runs are disturbed: every row counts runs of `flexgen run` on a tiny random model in float32, with",
        "weights streaming from disk, KV cache spilled, and answers in progress stored after every pass. After its disturbed runs each job",
        "is run again in peace, and its output is compared with that of an undisturbed job: byte for byte, but for the last digits of log",
        "probabilities (see [jobs](jobs.md)). *Struck* are the runs that got as far as the fault. *Lost* are lines without a record,",
        "*duplicated* lines with two, *wrong* records that differ; outputs left by disturbed runs and final ones are counted.",
        "",
        "A power failure is a kill after a commit, after which of all blocks written since the commit before any part is lost, torn or",
        "cut off. A bit flips once or for good in what a read brings, after all weights have been read once, under `--verify-reads`.",
        "",
        "In the last five kinds hostile lines stand among good ones, and the records of the good lines are compared; every hostile line",
        "ends in one record. *Hostile lines* have sampling values at their limits and beyond, or code that works for one line raises what",
        "nobody foresaw. *Tokenizer panics*: when it encodes or decodes what some lines hold. *Closed and full descriptors*: standard",
        "streams are closed, full, read-only, without a reader or without their terminal. *Planted temporaries*: a hard link, link, pipe,",
        "folder or foreign file lies where a job writes; what lies outside must not change, and such a run may be refused. *Memory before",
        "the plan*: lines of up to 12 MB, and chat templates that expand a few characters to millions, in a process that may take 1 GiB",
        "more than it has when it begins. Most of these jobs are killed on their way, too.",
        "",
        "`python benchmarks/faults.py` makes this page and [its data](../benchmarks/results/faults.json).",
        "",
        "| fault | jobs | runs | struck | after the first commit | lost | duplicated | wrong | outputs that differ | wrong exits | hangs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    total = Row()
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{value:,}' for value in figures(row))} |")
        for key in set(Row.__slots__) - {"commit"}:
            setattr(total, key, getattr(total, key) + getattr(row, key))
    lines += [
        f"| **all** | {' | '.join(f'{value:,}' for value in figures(total))} |",
        "",
        *histogram(rows),
        "",
        *commits(rows),
        "",
        *several_machines(),
    ]
    return "\n".join(lines) + "\n"


def several_machines() -> list[str]:
    """What became of jobs on several ranks and with several workers."""
    ranks: dict[str, list[dict[str, Any]]] = {}
    for line in (RESULTS / "stage_faults.jsonl").read_text().splitlines():
        row = json.loads(line)
        ranks.setdefault(f"{row['kind']}, {len(row['codes'])} ranks", []).append(row)
    workers: dict[str, list[dict[str, Any]]] = {}
    for line in (RESULTS / "worker_faults.jsonl").read_text().splitlines():
        row = json.loads(line)
        workers.setdefault(row["kind"], []).append(row)
    lines = [
        "## Several machines",
        "",
        "Jobs on pipeline stages ([distributed](distributed.md)), one rank of which is struck at a random time after all have joined:",
        "every other rank must end with 75 within 30 seconds and name it, and one process then finishes the job. *In the middle* were",
        "those whose job was not over yet. Where a link is cut, each rank is in a network namespace of its own, and nothing arrives",
        "any more.",
        "`python -m faults.stage_trials`, with `src` and `tests` on the path.",
        "",
        "| fault | jobs | in the middle | ended (median) | at the latest | lost | duplicated | wrong | outputs that differ | wrong exits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in sorted(ranks.items()):
        seconds = sorted(row["seconds"] for row in rows if 75 in row["codes"])
        ended = [f"{seconds[len(seconds) // 2]:.1f} s", f"{seconds[-1]:.1f} s"]
        sums = [sum(row[key] for row in rows) for key in ("lost", "duplicated", "wrong")]
        cells = [len(rows), len(seconds), *ended, *sums, sum(not row["same_bytes"] for row in rows), sum(not row["good"] for row in rows)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Jobs with `--workers` and `flexgen work` ([workers](workers.md)). `python -m faults.workers`.",
        "",
        "| fault | jobs | runs | struck | lost | duplicated | wrong | outputs that differ | wrong exits | hangs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in workers.items():
        sums = [sum(row[key] for row in rows) for key in ("runs", "struck", "lost", "duplicated", "wrong")]
        cells = [
            len(rows),
            *sums,
            sum(not row["same_bytes"] for row in rows),
            *(sum(row[key] for row in rows) for key in ("bugs", "hangs")),
        ]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return lines


def commits(rows: dict[str, Row]) -> list[str]:
    """What was tried, where that differs."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        found.setdefault(row.commit, []).append(name)
    if len(found) < 2:
        return []
    most = max(found, key=lambda commit: len(found[commit]))
    others = (f"{', '.join(names)}: of commit {commit[:7]}." for commit, names in found.items() if commit != most)
    return [f"Rows are of commit {most[:7]}, but for these:", "", *(f"- {other}" for other in others)]


def figures(row: Row) -> tuple[int, ...]:
    return (
        row.jobs,
        row.trials,
        row.struck,
        row.after_commit,
        row.lost,
        row.duplicated,
        row.wrong,
        row.different_outputs,
        row.bugs,
        row.hangs,
    )


def histogram(rows: dict[str, Row]) -> list[str]:
    """Where `kill -9` hit."""
    places: collections.Counter[str] = collections.Counter()
    for name, row in rows.items():
        if name.startswith("kill"):
            places += row.places
    ordered = [place for place in ("before the first", *FAILPOINTS) if places[place]]
    table = [f"| {place} | {places[place]:,} |" for place in ordered]
    return ["Where the kills hit, by the last failpoint that was passed:", "", "| failpoint | kills |", "|---|---|", *table]


if __name__ == "__main__":
    sys.exit(main())
