"""`flexgen bench steady` against a full run: the same passes of the same job under the same plan, one after the other.

    python benchmarks/steady.py --scratch DIR [--shape llama-tiny] [--weights host=.5,disk=.5]      # measures, then prints the table
    python benchmarks/steady.py --table                                                             # the table of the last result

One engine measures passes in the middle of a job of random prompts without those before them, then the whole job, then the passes again.
Of the full run those passes are taken that the others stand for.  One JSON line, without a memory cgroup.  It says how many cores other
programs used meanwhile: a result with more than a few hundredths is one of a busy machine.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--scratch", type=Path, help="folder for random weights, on the disk to be measured")
    parser.add_argument("--table", action="store_true", help="only print the table of the last result")
    parser.add_argument("--shape", choices=SHAPES, default="llama-tiny")
    parser.add_argument("--host-mem", default="1GiB")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--tokens", default="256+32", help="of each prompt and answer")
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--weights", help="homes of the weights; default: planned")
    asked = parser.parse_args()
    results = Results(asked.results)
    if asked.table:
        print(format_table(results.read()[-1]))
        return 0
    if asked.scratch is None:
        parser.error("--scratch DIR says where weights are written")
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
        full |= {"output_tokens_per_s": sum(before["sequences"]) / sum(full["seconds"]), "warmup": asked.warmup}  # they carry the same
        after = _steady(llm, workload, asked.warmup, asked.passes)
    row = {
        "benchmark": "steady", "shape": asked.shape, "host_mem": asked.host_mem, "num_prompts": asked.num_prompts, "tokens": asked.tokens,
        "passes": asked.passes, "before": before, "full": full, "after": after,
    }  # fmt: skip
    print(format_table(results.append(row)))
    return 0


def format_table(row: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md, in Markdown."""
    full, first = row["full"], row["before"]["skipped_passes"] + row["full"]["warmup"]
    seen = f"passes {first + 1} to {first + row['passes']} of the full run of {full['num_passes']}"
    lines = [("`bench steady` before", row["before"], ""), (seen, full, f"{full['whole_seconds']:.0f}")]
    lines += [("`bench steady` after", row["after"], f"{row['after']['whole_seconds']:.0f}")]
    busy = "unknown" if full["busy_cores"] is None else f"{full['busy_cores']:.2f}"
    return "\n".join(
        [
            f"{row['shape']}, {row['host_mem']}, {row['num_prompts']} x ({row['tokens']}) tokens, {row['date']}, cores that other programs "
            f"used: {busy}; over the whole full run {full['job_tokens_per_s']:.1f} output tokens/s",
            "",
            "| what | output tokens/s in these passes | median of a pass | seconds in all | overlap | plan | efficiency |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {what} | {each['output_tokens_per_s']:.1f} | {each['median_seconds']:.2f} s | {seconds} | "
                f"{each['overlap']:.2f} | {each['plan']:.2f} | {each['efficiency']:.2f} |"
                for what, each, seconds in lines
            ),
        ]
    )


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
        "busy_cores": report.busy_cores, "check_rates": report.check_rates,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
