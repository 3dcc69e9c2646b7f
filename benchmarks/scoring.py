"""How fast known tokens are scored: contexts with choices after them, against the same as echoed prompts.

    python benchmarks/scoring.py --scratch DIR                                           # both ways, then the table
    python benchmarks/scoring.py --scratch DIR --shape llama-tiny --num-contexts 24      # a trial; its figures mean nothing
    python benchmarks/scoring.py table                                                   # what the results say

One way has a line per context with its "choices".  The other asks what an evaluation asks of an endpoint that only generates: a line per
choice, with context and choice as its prompt, echoed with log probabilities, and nothing shared between lines.  Both run cold in a memory
cgroup of the same size.  Weights and tokens are random: only the shape costs time.  That both say the same of every choice is checked.
Echoes of all contexts take four times as long; --echo-contexts asks for the first ones only, and choices per second are compared.
The method stands in docs/benchmarks.md; results are JSON lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from capped import NoCgroup, Outcome, run_capped
from record import Results
from shapes import SHAPES, Shape

from flexgen.base.quantities import format_size, parse_size
from flexgen.checkpoint.dummy import write_random_checkpoint

CONTEXT_TOKENS, NUM_CHOICES, MOST_CHOICE_TOKENS = 256, 4, 3
CHOICES, ECHO = "choices", "echo"
DEFAULT_RESULTS = Path(__file__).parent / "results" / "scoring.jsonl"
# Log probabilities of one choice in both ways, computed in bfloat16 in different micro-batches.
TOLERANCE_PER_TOKEN = 0.25
FIGURES = (
    "elapsed_seconds", "load_seconds", "num_requests", "num_passes", "prompt_tokens", "shared_prompt_tokens", "scored_tokens",
    "num_preemptions", "overlap", "plan", "efficiency", "efficiency_at_check", "ideal_seconds", "busiest_seconds", "bytes_moved",
    "wait_seconds", "check_rates", "rate_ratios", "peak_host_bytes", "host_budget_bytes", "policy", "forecast",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model shape, the size of the job, and where files lie."""

    shape: Shape
    memory_bytes: int
    num_contexts: int
    echo_contexts: int
    scratch: Path

    @property
    def model(self) -> Path:
        return self.scratch / self.shape.name


@dataclass(frozen=True, slots=True)
class Question:
    """A context and the choices after it, as token ids."""

    context: list[int]
    choices: list[list[int]]


def main() -> int:
    args = _parser().parse_args()
    results = Results(args.results)
    if args.part == "run":
        shape = SHAPES[args.shape]
        args.scratch.mkdir(parents=True, exist_ok=True)
        setup = Setup(
            shape=shape,
            memory_bytes=args.memory or shape.memory_bytes,
            num_contexts=args.num_contexts,
            echo_contexts=min(args.echo_contexts or args.num_contexts, args.num_contexts),
            scratch=args.scratch.resolve(),
        )
        try:
            results.append(run_both(setup, args.options))
        except NoCgroup as error:
            print(f"skipped: {error}")
            return 0
    print_table(results.read())
    return 0


def run_both(setup: Setup, options: list[str]) -> dict[str, Any]:
    """Score the same choices in both ways, one after the other; return the row for the results.

    Raises:
        SystemExit: A run failed, or the two ways disagree about a choice.
    """
    if not (setup.model / "config.json").exists():
        partial = setup.model.with_name(f"{setup.shape.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_random_checkpoint(setup.shape.hf_config(), partial, torch.bfloat16, seed=0)
        partial.rename(setup.model)
    questions = drawn(setup)
    echoed = questions[: setup.echo_contexts]
    ways = {
        CHOICES: run(setup, CHOICES, _lines_of_choices(questions), options),
        ECHO: run(setup, ECHO, _lines_of_echoes(echoed), ["--no-prefix-sharing", *options]),
    }
    scores = {CHOICES: _scores_of_choices(ways[CHOICES].pop("records")), ECHO: _scores_of_echoes(ways[ECHO].pop("records"), echoed)}
    differences = _differences(scores, echoed)
    contexts_per_s = {CHOICES: len(questions) / ways[CHOICES]["elapsed_seconds"], ECHO: len(echoed) / ways[ECHO]["elapsed_seconds"]}
    if max(differences) > TOLERANCE_PER_TOKEN:
        raise SystemExit(f"the two ways differ by {max(differences):.3f} in a log probability per token")
    return {
        "benchmark": "scoring",
        "shape": setup.shape.name,
        "memory_bytes": setup.memory_bytes,
        "num_contexts": setup.num_contexts,
        "context_tokens": CONTEXT_TOKENS,
        "num_choices": NUM_CHOICES,
        "choice_tokens": [1, MOST_CHOICE_TOKENS],
        "options": " ".join(options),
        "echo_contexts": setup.echo_contexts,
        "times_as_fast": contexts_per_s[CHOICES] / contexts_per_s[ECHO],
        "contexts_per_s": contexts_per_s[CHOICES],
        "largest_difference": max(differences),
        "mean_difference": statistics.mean(differences),
        **ways,
    }


def drawn(setup: Setup) -> list[Question]:
    """Return random contexts, each with choices of 1 to MOST_CHOICE_TOKENS tokens."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(10, setup.shape.config["vocab_size"]) for _ in range(length)]

    return [
        Question(ids(CONTEXT_TOKENS), [ids(draw.randint(1, MOST_CHOICE_TOKENS)) for _ in range(NUM_CHOICES)])
        for _ in range(setup.num_contexts)
    ]


def _lines_of_choices(questions: list[Question]) -> list[dict[str, Any]]:
    return [{"id": str(place), "prompt": each.context, "choices": each.choices} for place, each in enumerate(questions)]


def _lines_of_echoes(questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {"id": f"{place}-{number}", "prompt": each.context + choice, "max_tokens": 0, "echo": True, "logprobs": 1}
        for place, each in enumerate(questions)
        for number, choice in enumerate(each.choices)
    ]


def run(setup: Setup, way: str, lines: list[dict[str, Any]], options: list[str]) -> dict[str, Any]:
    """Run one way in its cgroup; return its figures, and the records of its answers."""
    stem = setup.scratch / f"scoring-{setup.shape.name}-{way}"
    requests, output, metrics, log = (stem.with_suffix(f".{suffix}") for suffix in ("requests.jsonl", "jsonl", "json", "log"))
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    offload = setup.scratch / "offload"
    offload.mkdir(exist_ok=True)
    for stale in (output, metrics):
        stale.unlink(missing_ok=True)
    command = [
        str(Path(sys.executable).with_name("flexgen")), "run", str(setup.model), str(requests), "-o", str(output), "--fresh",
        "--host-mem", str(setup.memory_bytes), "--offload-dir", str(offload), "--device", "cpu", "--metrics", str(metrics),
        "--progress", "plain", *options,
    ]  # fmt: skip
    with log.open("w") as file:
        outcome = run_capped(setup.memory_bytes, command, stdout=file, stderr=file)
    if not outcome.survived:
        raise SystemExit(f"{way}: {_ending(outcome)}; see {log}")
    report = json.loads(metrics.read_text())
    records = [json.loads(line) for line in output.read_text().splitlines()]
    if report["num_errors"] or len(records) != len(lines):
        raise SystemExit(f"{way}: {report['num_errors']} errors, {len(records)} answers to {len(lines)} lines")
    cgroup = {name: value for name, value in dataclasses.asdict(outcome).items() if name in ("limit_bytes", "peak_bytes", "failcnt")}
    figures = {"num_lines": len(lines), **{name: report[name] for name in FIGURES}, "cgroup": cgroup}
    print(f"{way}: {report['elapsed_seconds']:.1f} s, efficiency {report['efficiency']:.2f}", flush=True)
    return {**figures, "records": records}


def _ending(outcome: Outcome) -> str:
    return "killed for memory" if outcome.oom_kills else f"failed with status {outcome.returncode}"


def _scores_of_choices(records: list[dict[str, Any]]) -> list[list[float]]:
    """Return the log probability of each choice of each context, in order."""
    by_id = {int(record["id"]): [label["logprob"] for label in record["labels"]] for record in records}
    return [by_id[place] for place in range(len(by_id))]


def _scores_of_echoes(records: list[dict[str, Any]], questions: list[Question]) -> list[list[float]]:
    """Return the same from the log probabilities of echoed prompts: the sum over the last tokens."""
    by_id = {record["id"]: record["prompt_logprobs"] for record in records}
    return [
        [sum(token["logprob"] for token in by_id[f"{place}-{number}"][-len(choice) :]) for number, choice in enumerate(each.choices)]
        for place, each in enumerate(questions)
    ]


def _differences(scores: dict[str, list[list[float]]], questions: list[Question]) -> list[float]:
    """Return by how much the two ways differ per token, for each choice."""
    return [
        abs(one - other) / len(choice)
        for ones, others, each in zip(scores[CHOICES][: len(questions)], scores[ECHO], questions, strict=True)
        for one, other, choice in zip(ones, others, each.choices, strict=True)
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table of all results."""
    titles = (
        "shape, memory, job",
        "commit",
        "way",
        "seconds",
        "prompt tokens, not shared",
        "scored",
        "peak",
        "overlap",
        "plan",
        "efficiency",
    )
    print("| " + " | ".join([*titles, "times as fast"]) + " |\n" + "|---" * (len(titles) + 1) + "|")
    for row in rows:
        for way, num_contexts in ((CHOICES, row["num_contexts"]), (ECHO, row["echo_contexts"])):
            job = f"{row['shape']}, {format_size(row['memory_bytes'])}, {num_contexts} x {row['num_choices']}"
            run_of, times = row[way], f"{row['times_as_fast']:.2f}" if way == CHOICES else ""
            computed = run_of["prompt_tokens"] - run_of["shared_prompt_tokens"]
            shares = (f"{run_of[name]:.2f}" for name in ("overlap", "plan", "efficiency"))
            cells = (
                job,
                (row["commit"] or "")[:7],
                way,
                f"{run_of['elapsed_seconds']:.1f}",
                f"{computed:,}",
                f"{run_of['scored_tokens']:,}",
            )
            print("| " + " | ".join([*cells, format_size(run_of["peak_host_bytes"]), *shares, times]) + " |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--scratch", type=Path, default=Path("bench-scratch"), help="checkpoint, requests, logs; on the disk to measure")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="JSON lines, appended to")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3b")
    parser.add_argument("--memory", type=parse_size, help="of the cgroup; default the shape's")
    parser.add_argument("--num-contexts", type=int, default=400)
    parser.add_argument("--echo-contexts", type=int, help="how many of them are echoed too; default all")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of flexgen run; must come last")
    return parser


if __name__ == "__main__":
    sys.exit(main())
