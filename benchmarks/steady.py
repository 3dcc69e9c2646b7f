"""`flexgen bench steady` against a full run: the same passes of the same job under the same plan, one after the other.

    python benchmarks/steady.py --scratch DIR [--shape llama-tiny] [--weights host=.5,disk=.5]

One engine measures passes in the middle of a job of random prompts without those before them, then the whole job, then the passes again.
Of the full run those passes are taken that the others stand for.  One JSON line, without a memory cgroup.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import Results
from shapes import SHAPES

from flexgen import LLM
from flexgen.bench.steady import run_steady
from flexgen.bench.throughput import random_requests, uniform_workload
from flexgen.plan.workload import Workload

DEFAULT_RESULTS = Path(__file__).parent / "results" / "steady.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for random weights, on the disk to be measured")
    parser.add_argument("--shape", choices=SHAPES, default="llama-tiny")
    parser.add_argument("--host-mem", default="1GiB")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--tokens", default="256+32", help="of each prompt and answer")
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--weights", help="homes of the weights; default: planned")
    asked = parser.parse_args()
    folder = asked.scratch / f"{asked.shape}-config"
    SHAPES[asked.shape].hf_config().save_pretrained(folder)
    options: dict[str, Any] = {"load_format": "dummy", "host_mem": asked.host_mem, "offload_dir": str(asked.scratch), "device": "cpu"}
    prompt, answer = map(int, asked.tokens.split("+"))
    with LLM(folder, skip_tokenizer_init=True, weights=asked.weights, **options) as llm:
        workload = uniform_workload(llm, asked.num_prompts, prompt, answer)
        llm.open(workload)
        before = _steady(llm, workload, asked.warmup, asked.passes)
        first = before["skipped_passes"] + asked.warmup
        full = _full(llm, workload, first, asked.passes)
        full["output_tokens_per_s"] = sum(before["sequences"]) / sum(full["seconds"])  # the passes carry the same
        after = _steady(llm, workload, asked.warmup, asked.passes)
    row = {
        "benchmark": "steady", "shape": asked.shape, "host_mem": asked.host_mem, "num_prompts": asked.num_prompts, "tokens": asked.tokens,
        "passes": asked.passes, "before": before, "full": full, "after": after,
    }  # fmt: skip
    print(json.dumps(Results(asked.results).append(row), indent=2))
    return 0


def _steady(llm: LLM, workload: Workload, warmup: int, passes: int) -> dict[str, Any]:
    """The figures of passes in the middle, and the time that they took with all that came before them."""
    start = time.perf_counter()
    report = run_steady(llm, workload, warmup=warmup, passes=passes)
    of_passes = report.steady.passes
    return {
        "skipped_passes": report.steady.skipped_passes, "whole_seconds": time.perf_counter() - start,
        "seconds": [each.seconds for each in of_passes], "sequences": [each.num_sequences for each in of_passes],
        "prompt_tokens": [each.prompt_tokens for each in of_passes], "median_seconds": report.steady.pass_seconds["median"],
        "output_tokens_per_s": report.run.output_tokens_per_s, "prompt_tokens_per_s": report.run.prompt_tokens_per_s,
        "expected_tokens_per_s": report.steady.expected_tokens_per_s, "overlap": report.run.overlap, "plan": report.run.plan,
        "efficiency": report.run.efficiency,
    }  # fmt: skip


def _full(llm: LLM, workload: Workload, first: int, passes: int) -> dict[str, Any]:
    """The whole job, and the same figures of the passes that the others stand for, from the times at which passes ended."""
    ends: list[float] = []

    def ended(answers: Iterable[object]) -> None:
        ends.append(time.perf_counter())

    start = time.perf_counter()
    for _ in llm.stream(random_requests(llm, workload), workload, on_pass=ended):
        pass
    report = llm.report()
    seconds = [end - begin for begin, end in zip([start, *ends], ends, strict=False)]
    middle = seconds[first : first + passes]
    return {
        "whole_seconds": ends[-1] - start, "num_passes": report.num_passes, "seconds": middle,
        "median_seconds": statistics.median(middle),
        "job_tokens_per_s": report.output_tokens_per_s, "overlap": report.overlap, "plan": report.plan, "efficiency": report.efficiency,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
