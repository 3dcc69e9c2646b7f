"""Whether the policy that the planner chooses is as good as those that a user might have chosen.

    flexgen profile DIR
    python benchmarks/policies.py --scratch DIR [--case NAME ...]

Four jobs of benchmarks/predict.py, each in its memory cgroup.  The explicit policies below were fixed beforehand: shares of the weights in
memory, live sequences, prompt tokens per pass, schedules.  The automatic policy runs, then nine of them, then the automatic one again: each
is compared with the automatic run before it, since machines are now faster and now slower, and stopped if it takes 1.1 times as long, or
would take 1.05 times as long even if what it expects of the rest were a quarter too much: it cannot be the best.  Then the two best meet
the automatic one in three interleaved rounds.  A JSON line per run; runs that are in the results file already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capped import NoCgroup
from predict import CASES, Case, checkpoint, run, write_requests
from record import Results
from shapes import SHAPES

DEFAULT_RESULTS = Path(__file__).parent / "results" / "policies.jsonl"
GIVEN_UP, TOLD_SLOW = 1.1, 1.05  # of the time of the automatic run before, its start included
DOUBT = 0.25  # by which estimates of the rest may be too long
FIRST_TOLD = 0.2  # of the automatic run's time, before which no estimate counts
BLOCK = 9  # explicit policies between automatic runs
FINALISTS, ROUNDS = 2, 3
AUTOMATIC = "automatic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Explicit policies for one case: every combination.

    At least 30 of a case fit: for one, a row of shares was added (last) after 9 of 36 had not.

    Attributes:
        host: shares of the weights in memory; the rest streams. prompts: prompt tokens that a pass admits; None is a zigzag block.
    """

    case: str
    host: tuple[float, ...]
    seqs: tuple[int, ...]
    prompts: tuple[int | None, ...]

    def policies(self) -> Iterator[tuple[str, ...]]:
        """The options of each."""
        for host, seqs, prompts in itertools.product(self.host, self.seqs, self.prompts):
            admits = ("--schedule", "zigzag") if prompts is None else ("--schedule", "diagonal", "--prefill-tokens", str(prompts))
            yield ("--weights", f"host={host:g},disk={1 - host:g}", "--max-num-seqs", str(seqs), *admits)


GRIDS = (
    Grid(case="llama-1b half", host=(0.1, 0.2, 0.3, 0.4), seqs=(24, 48, 96), prompts=(512, 2048, None)),
    Grid(case="llama-3b from disk", host=(0.0, 0.05, 0.1, 0.15), seqs=(8, 16, 32), prompts=(512, 2048, None)),
    Grid(case="opt-1.3b from disk", host=(0.0, 0.1, 0.2, 0.3, 0.05), seqs=(12, 24, 48), prompts=(512, 2048, None)),
    Grid(case="opt-1.3b resident", host=(0.4, 0.6, 0.8, 1.0), seqs=(32, 64, 96), prompts=(1024, 4096, None)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints and answers")
    parser.add_argument("--case", action="append", choices=[grid.case for grid in GRIDS])
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    for grid in GRIDS:
        if args.case is None or grid.case in args.case:
            case = next(case for case in CASES if case.name == grid.case)
            try:
                print(compare(grid, Runs(case, args.scratch.resolve(), Results(args.results))), flush=True)
            except NoCgroup as error:
                print(f"skipped: {error}")
                return 0
    return 0


class Runs:
    """Runs of one case, each measured once."""

    def __init__(self, case: Case, scratch: Path, results: Results) -> None:
        self._case, self._scratch, self._results = case, scratch, results
        self._folder = checkpoint(SHAPES[case.shape], scratch)

    def row(self, name: str, options: tuple[str, ...], number: int, rival: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The row of a run, done now or before; "tokens_per_s" is None where it did not fit or was much slower than the rival's."""
        key = {"benchmark": "policies", "case": self._case.name, "policy": name, "round": number}
        for row in self._results.read():
            if all(row[field] == value for field, value in key.items()):
                return row
        requests = write_requests(self._case, self._scratch)
        if rival is None:
            limits: dict[str, Any] = {}
        else:
            limits = {"timeout_seconds": GIVEN_UP * rival["run_seconds"], "hopeless": lambda log: told_slow(log, rival["elapsed_seconds"])}
        outcome, report, log = run(self._folder, requests, self._case.memory, self._scratch, *options, progress="json", **limits)
        row = key | {"run_seconds": outcome.elapsed_seconds, "tokens_per_s": None, "why": None}
        if report is not None:
            row |= {"tokens_per_s": report["output_tokens_per_s"], "elapsed_seconds": report["elapsed_seconds"]}
            row["policy_ran"] = report["policy"]
        elif outcome.timed_out:
            row["why"] = "slower"
        else:
            row["why"] = log.strip().splitlines()[-1].replace(str(self._folder), self._folder.name)
        row = self._results.append(row)
        print(f"  {self._case.name}, {number}, {name}: {row['tokens_per_s'] or row['why']}", flush=True)
        return row


def told_slow(log: Path, rival_seconds: float) -> bool:
    """Whether a run will be slower than its rival was, by what it expects itself."""
    text = log.read_text()
    lines = [line for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith('{"event": "progress"')]
    progress = json.loads(lines[-1]) if lines else {"elapsed_seconds": 0.0}
    if progress["elapsed_seconds"] < FIRST_TOLD * rival_seconds or progress["eta_seconds"] is None:
        return False
    return progress["elapsed_seconds"] + (1 - DOUBT) * progress["eta_seconds"] > TOLD_SLOW * rival_seconds


def compare(grid: Grid, runs: Runs) -> str:
    """All runs of a case; what they say."""
    by_name = {" ".join(options): options for options in grid.policies()}
    screened: dict[str, float] = {}  # tokens/s over those of the automatic policy
    refused = 0
    for place, (name, options) in enumerate(by_name.items()):
        number = place // BLOCK
        automatic = runs.row(AUTOMATIC, (), number)
        row = runs.row(name, options, number, automatic)
        if row["tokens_per_s"] is not None:
            screened[name] = row["tokens_per_s"] / automatic["tokens_per_s"]
        refused += row["why"] not in (None, "slower")
    told = f"{len(by_name) - refused} explicit policies, {refused} did not fit"
    finalists = sorted(screened, key=lambda name: -screened[name])[:FINALISTS]
    if not finalists:
        return f"{grid.case}: {told}; none was within {GIVEN_UP} of the automatic one"
    rates: dict[str, list[float]] = {AUTOMATIC: [], **{name: [] for name in finalists}}
    first = -(-len(by_name) // BLOCK)
    for number in range(first, first + ROUNDS):
        for name, measured in rates.items():
            measured.append(runs.row(name, by_name.get(name, ()), number)["tokens_per_s"])
    best = max(finalists, key=lambda name: statistics.median(rates[name]))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates[AUTOMATIC], rates[best], strict=True))
    return (
        f"{grid.case}: {told}; automatic {statistics.median(rates[AUTOMATIC]):.2f} tokens/s, the best "
        f"{statistics.median(rates[best]):.2f} ({best}); ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
