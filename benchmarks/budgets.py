"""A run in a memory cgroup of exactly its `--host-mem`: is it killed, and what was its peak?

    python benchmarks/budgets.py --scratch DIR

Five pairs of shape and budget, random weights, from nearly resident to nearly all on disk.  One JSON line each on stdout and in the
results file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from capped import NoCgroup, run_capped
from record import Results
from shapes import SHAPES, Shape

from flexgen.base.quantities import MIB, format_size, parse_size
from flexgen.checkpoint.dummy import write_random_checkpoint

CASES = (("opt-125m", "768MiB"), ("opt-125m", "1GiB"), ("llama-tiny", "900MiB"), ("llama-3b", "2GiB"), ("opt-6.7b", "3GiB"))
PROMPT_TOKENS, OUTPUT_TOKENS, NUM_REQUESTS = 200, 6, 24
DEFAULT_RESULTS = Path(__file__).parent / "results" / "budgets.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints and answers")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    results, failures = Results(args.results), 0
    for name, budget in CASES:
        try:
            row = run_case(SHAPES[name], budget, args.scratch.resolve())
        except NoCgroup as error:
            print(f"skipped: {error}")
            return 0
        failures += not row["survived"]
        print(json.dumps(results.append(row)))
    return 1 if failures else 0


def run_case(shape: Shape, budget: str, scratch: Path) -> dict[str, Any]:
    """One run under its cap; the row for the results."""
    model, requests = scratch / shape.name, scratch / f"budget-{shape.name}.jsonl"
    if not (model / "config.json").exists():
        write_random_checkpoint(shape.hf_config(), model, torch.bfloat16)
    rng = random.Random(0)
    lines = [
        {"id": str(i), "prompt": [rng.randint(10, 30000) for _ in range(rng.randint(20, PROMPT_TOKENS))], "max_tokens": OUTPUT_TOKENS}
        for i in range(NUM_REQUESTS)
    ]
    requests.write_text("".join(json.dumps(line | {"temperature": 0, "ignore_eos": True}) + "\n" for line in lines))
    output, metrics, log = (scratch / f"budget.{suffix}" for suffix in ("jsonl", "json", "log"))
    command = [
        str(Path(sys.executable).parent / "flexgen"), "run", str(model), str(requests), "-o", str(output),
        "--host-mem", budget, "--metrics", str(metrics), "--progress", "none",
    ]  # fmt: skip
    for old in (output, metrics):
        old.unlink(missing_ok=True)
    with log.open("w") as file:
        outcome = run_capped(parse_size(budget), command, stdout=file, stderr=file)
    report = json.loads(metrics.read_text()) if metrics.exists() else {}
    return {
        "benchmark": "budgets",
        "shape": shape.name,
        "budget_bytes": parse_size(budget),
        "survived": outcome.survived and output.exists() and len(output.read_text().splitlines()) == NUM_REQUESTS,
        "cgroup_peak_bytes": outcome.peak_bytes,
        "peak_host_bytes": report.get("peak_host_bytes"),
        "output_tokens_per_s": report.get("output_tokens_per_s"),
        "peak": f"{format_size(report.get('peak_host_bytes', 0))} of {format_size(parse_size(budget))}",
        "mebibytes_left": None if outcome.peak_bytes is None else (parse_size(budget) - outcome.peak_bytes) // MIB,
    }


if __name__ == "__main__":
    sys.exit(main())
