"""Throughput of flexgen and its peers on a model that does not fit, each in a memory cgroup of the same size and at its best batch.

    python benchmarks/compare.py all --scratch DIR --llama-batched-bench PATH
    python benchmarks/compare.py make|flexgen|accelerate|llama --scratch DIR --shape llama-3b     # one part
    python benchmarks/compare.py table                                                             # what the results say

The method stands in docs/benchmarks.md.  Results are JSON lines; what the file already holds is not measured again, so an interrupted
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capped import NoCgroup
from measure import Deadline, Setup
from record import DEFAULT_TOKENS, Results
from shapes import SHAPES
from systems import run_accelerate, run_flexgen, run_llama

from flexgen.base.quantities import format_size, parse_size

DEFAULT_RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
DEFAULT_SHAPES = ["llama-3b", "opt-6.7b"]
OURS = ("flexgen", "diagonal")


def main() -> int:
    args = _parser().parse_args()
    results = Results(args.results)
    if args.part == "table":
        print_table(results.read())
        return 0
    args.scratch.mkdir(parents=True, exist_ok=True)
    for name in args.shape or DEFAULT_SHAPES:
        shape = SHAPES[name]
        setup = Setup(
            shape=shape,
            memory_bytes=args.memory or shape.memory_bytes,
            num_requests=args.num_requests or shape.num_requests,
            threads=args.threads,
            scratch=args.scratch.resolve(),
            results=results,
            again=args.again,
            tokens=args.tokens,
        )
        for part in ("make", "flexgen", "accelerate", "llama") if args.part == "all" else (args.part,):
            _run_part(part, setup, args)
    print_table(results.read())
    return 0


def _run_part(part: str, setup: Setup, args: argparse.Namespace) -> None:
    deadline = Deadline(args.time_limit)
    try:
        if part == "make":
            make(setup)
        elif part == "flexgen":
            run_flexgen(setup, deadline, args.schedules, args.options)
        elif part == "accelerate":
            run_accelerate(setup, deadline)
        elif setup.shape.model_type != "llama":
            print(f"llama.cpp: skipped, it has no {setup.shape.model_type} models")
        elif args.llama_batched_bench is None:
            print("llama.cpp: skipped, give its program with --llama-batched-bench PATH")
        else:
            run_llama(setup, deadline, args.llama_batched_bench)
    except NoCgroup as error:
        print(f"{part}: skipped, {error}")


def make(setup: Setup) -> None:
    """Write the checkpoint and, where llama.cpp knows the model type, the GGUF; what is there stays."""
    if not (setup.model / "config.json").exists():
        import torch

        from flexgen.checkpoint.dummy import write_random_checkpoint

        partial = setup.model.with_name(f"{setup.shape.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_random_checkpoint(setup.shape.hf_config(), partial, torch.bfloat16, seed=0)
        partial.rename(setup.model)
    if setup.shape.model_type == "llama" and not setup.gguf.exists():
        from make_gguf import write_gguf

        write_gguf(setup.shape, setup.gguf)
    for file in (*sorted(setup.model.glob("*.safetensors")), *setup.scratch.glob(setup.gguf.name)):
        print(f"{file.relative_to(setup.scratch)}: {format_size(file.stat().st_size)}", flush=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The median of the results of one system and setting."""

    label: str
    is_ours: bool
    setting: str
    tokens_per_s: float
    median: dict[str, Any]
    count: int


def print_table(lines: list[dict[str, Any]]) -> None:
    """Markdown: of every shape and cap the median tokens/s of each system, and how many times slower than ours it is."""
    lines = [line for line in lines if line["role"] == "result" and line["survived"]]
    jobs = sorted({_job(line) for line in lines})
    for job in jobs:
        shape, memory_bytes, num_requests, prompt_tokens, output_tokens = job
        print(f"\n{shape}, {format_size(memory_bytes)}, {num_requests} x ({prompt_tokens} + {output_tokens}) tokens\n")
        print("| system | setting | output tokens/s | ours / it | peak | overlap | plan | efficiency | timed |")
        print("|---|---|---|---|---|---|---|---|---|")
        rows = sorted(_rows([line for line in lines if _job(line) == job]), key=lambda row: -row.tokens_per_s)
        ours = max((row.tokens_per_s for row in rows if row.is_ours), default=None)
        for row in rows:
            metrics = row.median.get("metrics", {})
            shares = (f"{metrics[name]:.2f}" if name in metrics else "" for name in ("overlap", "plan", "efficiency"))
            ratio = f"{ours / row.tokens_per_s:.2f}" if ours else ""
            peak = row.median["cgroup"]["peak_bytes"]
            timed = f"{row.median.get('timed_requests', num_requests)} requests" + (f", median of {row.count}" if row.count > 1 else "")
            cells = (row.label, row.setting, f"{row.tokens_per_s:.2f}", ratio, format_size(peak) if peak else "", *shares, timed)
            print("| " + " | ".join(cells) + " |")


def _job(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["shape"], line["memory_bytes"], line["num_requests"], *line["tokens"]


def _tokens(text: str) -> tuple[int, int]:
    prompt, output = text.split("+")
    return int(prompt), int(output)


def _rows(lines: list[dict[str, Any]]) -> Iterator[Row]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        setting = ", ".join(f"{name} {value}" for name, value in line["setting"].items() if value not in ("", False))
        groups.setdefault((line["system"], setting), []).append(line)
    for (system, setting), group in groups.items():
        if system == OURS[0]:  # only the newest commit counts; runs of changed files where there is nothing else
            group = [line for line in group if line["commit"] == group[-1]["commit"] and not line["dirty"]] or group[-1:]
        middle = statistics.median_low(line["output_tokens_per_s"] for line in group)
        median = next(line for line in group if line["output_tokens_per_s"] == middle)
        is_ours = (system, median["setting"].get("schedule")) == OURS
        yield Row(system, is_ours, setting, middle, median, len(group))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", "make", "flexgen", "accelerate", "llama", "table"])
    parser.add_argument(
        "--scratch", type=Path, default=Path("bench-scratch"), help="checkpoints and logs, on the disk to measure (tens of GB)"
    )
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="JSON lines, appended to")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help=f"may be repeated; default {' and '.join(DEFAULT_SHAPES)}")
    parser.add_argument("--memory", type=parse_size, help="of the cgroup; default the shape's")
    parser.add_argument("--num-requests", type=int, help="default the shape's")
    parser.add_argument("--tokens", type=_tokens, default=DEFAULT_TOKENS, metavar="PROMPT+OUTPUT", help="of each request, as in 256+128")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peers")
    parser.add_argument("--time-limit", type=float, default=3600, metavar="SECONDS", help="of each part and shape")
    parser.add_argument("--again", action="store_true", help="repeat results; the table takes the median")
    parser.add_argument("--schedules", nargs="+", default=["diagonal", "zigzag"], help="of flexgen")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of flexgen run; must come last")
    parser.add_argument("--llama-batched-bench", type=Path, metavar="PATH", help="the program, from a build of llama.cpp")
    return parser


if __name__ == "__main__":
    sys.exit(main())
