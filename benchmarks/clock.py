"""The steady state of large models on machines with a GPU, simulated in slow motion, and what each part of the copies' design is worth.

    python benchmarks/clock.py run [--model opt-30b] [--box rtx4090-64gb] [--ablation all] [--passes 3] [--slow-motion 10]
    python benchmarks/clock.py table

The engine is the real one, on a simulated device whose copies and kernels take the time that they should take (docs/cuda.md).  Every
ablation executes the same plan without one thing.  One JSON line each, a few minutes; what stands in the file is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Results

from flexgen.base.quantities import GIB, parse_size
from flexgen.bench.simulated import SimulatedReport, simulate_steady
from flexgen.bench.throughput import uniform_job
from flexgen.devices.timed import CopyRules
from flexgen.options import EngineOptions
from flexgen.plan.known.machines import find_machine
from flexgen.plan.machine import Machine
from flexgen.plan.policy import Policy
from flexgen.plan.price.memory import RING_UNITS
from flexgen.plan.price.weights import unit_homes
from flexgen.session.lookup import files_of
from flexgen.session.prepare import Prepared
from flexgen.session.simulated import prepare_simulated

DEFAULT_RESULTS = Path(__file__).parent / "results" / "clock.jsonl"
BOXES = ("rtx4090-64gb", "t4-64gb")
HOST_MEM, HOST_BYTES = "128GiB", 160 * GIB  # the boxes' own memory would hold hardly more than the weights
PROMPT_LEN, OUTPUT_LEN = 512, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model, the budget of device memory (of a card that has as much), and the requests of the job that is planned."""

    device_mem: str
    num_prompts: int


JOBS = {"opt-30b": Job(device_mem="16GiB", num_prompts=1000), "gpt-oss-120b": Job(device_mem="24GiB", num_prompts=8000)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What is left out: how copies are made, and what becomes of the policy."""

    what: str
    rules: CopyRules | None = None
    policy: Callable[[Prepared], Policy] = lambda prepared: prepared.plan.policy


def _small_ring(prepared: Prepared) -> Policy:
    """The policy with a ring on the device of a few of the largest units that cross the link."""
    policy, spec = prepared.plan.policy, prepared.plan.spec
    crossing = [unit.carried_bytes for unit, home in zip(spec.units, unit_homes(spec, policy.weights), strict=True) if home != "device"]
    return dataclasses.replace(policy, device_ring_bytes=min(RING_UNITS * max(crossing), policy.device_ring_bytes))


ABLATIONS = {
    "all": Ablation(what="nothing"),
    "chunks": Ablation(what="chunks of bulk copies", rules=CopyRules(chunk_bytes=None)),
    "urgent": Ablation(what="the urgent stream", rules=CopyRules(urgent=False)),
    "stages": Ablation(what="the third stage of host attention", rules=CopyRules(waits=True)),
    "ring": Ablation(what="rings of two layers", policy=_small_ring),
    "none": Ablation(what="all four", rules=CopyRules(chunk_bytes=None, urgent=False, waits=True), policy=_small_ring),
}


def box_of(name: str, job: Job) -> Machine:
    """The machine with the host memory that these jobs need, and a card of the budget."""
    box = find_machine(name)
    return dataclasses.replace(
        box, host_bytes=max(box.host_bytes, HOST_BYTES), device_bytes=max(box.device_bytes, parse_size(job.device_mem))
    )


def simulated(model: str, box: str, ablation: str, passes: int, warmup: int, slow_motion: float, trace: str | None) -> dict[str, Any]:
    """Simulate one case; the figures of its line."""
    job, left_out = JOBS[model], ABLATIONS[ablation]
    options = EngineOptions(host_mem=HOST_MEM, device_mem=job.device_mem, load_format="dummy")
    workload = uniform_job(PROMPT_LEN + OUTPUT_LEN, job.num_prompts, PROMPT_LEN, OUTPUT_LEN)
    machine = box_of(box, job)
    prepared = prepare_simulated(files_of(model, options), options, machine, workload, slow_motion=slow_motion, rules=left_out.rules)
    prepared = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, policy=left_out.policy(prepared)))
    start = time.perf_counter()
    report = simulate_steady(prepared, warmup=warmup, passes=passes, trace=trace)
    return figures(report) | {
        "whole_seconds": time.perf_counter() - start,
        "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def figures(report: SimulatedReport) -> dict[str, Any]:
    """What a line has of a report."""
    run, steady = report.steady.run, report.steady.steady
    policy = run.policy
    kept = ("weights", "kv", "max_num_seqs", "micro_batch_tokens", "prefill_tokens", "device_ring_bytes", "schedule")
    return {
        "output_tokens": run.output_tokens, "prompt_tokens": run.prompt_tokens,
        "output_tokens_per_s": run.output_tokens_per_s, "expected_tokens_per_s": steady.expected_tokens_per_s["these_passes"],
        "overlap": run.overlap, "pass_seconds": [each.seconds for each in steady.passes],
        "expected_seconds": [each.expected_seconds for each in steady.passes],
        "ideal_seconds": run.busiest_seconds, "wait_seconds": run.wait_seconds, "live_mean": steady.live_mean,
        "busy_shares": {name: seconds / report.seconds for name, seconds in report.busy_seconds.items()},
        "bytes_moved": run.bytes_moved, "policy": {name: policy[name] for name in kept},
    }  # fmt: skip


def found(rows: Iterable[dict[str, Any]], **key: Any) -> dict[str, Any] | None:
    """The newest line of a case."""
    return next((row for row in reversed(list(rows)) if all(row[name] == value for name, value in key.items())), None)


def table(rows: list[dict[str, Any]]) -> str:
    """The lines as a table for docs/benchmarks.md; losses are of output tokens/s, against the same passes without ablation."""
    lines = [
        "| model, box | without | a pass | tokens/s | of the plan's | overlap | busiest, of the time | link busy | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, box, passes in itertools.product(JOBS, BOXES, sorted({row["passes"] for row in rows})):
        whole = found(rows, model=model, box=box, passes=passes, ablation="all")
        for name, ablation in ABLATIONS.items():
            row = found(rows, model=model, box=box, passes=passes, ablation=name)
            if row is None or whole is None:
                continue
            loss = 1 - row["output_tokens_per_s"] / whole["output_tokens_per_s"]
            busy = row["busy_shares"]
            busiest = max(busy, key=busy.__getitem__)
            lines.append(
                f"| {model}, {box}, {passes} passes | {ablation.what} | {sum(row['pass_seconds']) / passes:.2f} s | "
                f"{row['output_tokens_per_s']:.1f} | {row['output_tokens_per_s'] / row['expected_tokens_per_s']:.2f} | "
                f"{row['overlap']:.2f} | {busiest} {busy[busiest]:.2f} | {busy['host_to_device']:.2f} | "
                f"{'' if name == 'all' else f'{loss:.1%}'} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--model", choices=JOBS, action="append")
    parser.add_argument("--box", choices=BOXES, action="append")
    parser.add_argument("--ablation", choices=ABLATIONS, action="append")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--slow-motion", type=float, default=10.0)
    parser.add_argument("--trace", help="file for a trace of the last case")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    asked = parser.parse_args()
    results = Results(asked.results)
    if asked.command == "table":
        print(table(results.read()))
        return 0
    for model in asked.model or JOBS:
        for box in asked.box or BOXES:
            for ablation in asked.ablation or ABLATIONS:
                how = {"passes": asked.passes, "warmup": asked.warmup, "slow_motion": asked.slow_motion}
                key = {"benchmark": "clock", "model": model, "box": box, "ablation": ablation, "passes": asked.passes}
                if found(results.read(), **key) is None:
                    row = key | how | {"host_mem": HOST_MEM, "tokens": [PROMPT_LEN, OUTPUT_LEN]}
                    row |= simulated(model, box, ablation, **how, trace=asked.trace)
                    print(json.dumps(results.append(row)), flush=True)
    print(table(results.read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
