"""Seconds that finding a plan takes, and policies played for it, as a JSON line per case.

python benchmarks/planner.py [CASE ...]
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from flexgen.options import EngineOptions
from flexgen.plan.catalogue import catalogue_spec
from flexgen.plan.default import solve
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.machines import find_machine, limits_of
from flexgen.plan.model import ModelSpec
from flexgen.plan.workload import Workload

PROCESS_BYTES = int(1.5e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan to find."""

    name: str
    spec: ModelSpec
    machine: Machine
    limits: Limits
    workload: Workload


def cases() -> Iterator[Case]:
    """Large models with equal requests, and a small one with ragged requests whose KV may go to disk."""
    equal = Workload(prompt_lens=(512,) * 1000, output_lens=(32,) * 1000)
    for machine_name in ("t4-gcp", "rtx4090-64gb"):
        machine = find_machine(machine_name)
        for model in ("opt-175b", "deepseek-v3", "mixtral-8x22b"):
            yield _case(f"{model}@{machine_name}", model, machine, EngineOptions(), equal)
    draw = random.Random(1)
    ragged = Workload(
        prompt_lens=tuple(draw.randrange(20, 2000) for _ in range(5000)), output_lens=tuple(draw.randrange(4, 400) for _ in range(5000))
    )
    small = EngineOptions(device_mem="6GiB", host_mem="10GiB")
    yield _case("ragged llama-3-8b@rtx4090-64gb", "llama-3-8b", find_machine("rtx4090-64gb"), small, ragged)


def _case(name: str, model: str, machine: Machine, options: EngineOptions, workload: Workload) -> Case:
    return Case(name=name, spec=catalogue_spec(model), machine=machine, limits=limits_of(machine, options), workload=workload)


def main() -> None:
    for case in cases():
        if sys.argv[1:] and case.name not in sys.argv[1:]:
            continue
        options = EngineOptions(dtype=case.spec.dtype)
        wall, processor = time.perf_counter(), time.process_time()
        found = solve(options, case.spec, case.machine, case.limits, case.workload, process_bytes=PROCESS_BYTES)
        line = {
            "case": case.name,
            "seconds": round(time.perf_counter() - wall, 3),
            "processor_seconds": round(time.process_time() - processor, 3),
            "policies_played": found.num_played,
            "planned_seconds": round(found.seconds, 1),
            "tokens_per_s": round(case.workload.output_tokens / found.seconds, 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
