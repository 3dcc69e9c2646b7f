"""How long a plan takes to find, and how much better one would be that nobody waits for: a JSON line per case.

python benchmarks/planner.py [--freedom] [CASE ...]

With --freedom each case is planned again with eight times the patience, and with weights or KV pinned in fixed ways: freedom that costs
more than it gains is a fault of the search.  `free_over_best` compares the usual plan's tokens/s with the best of all of these.  The lines
are added to results/planner.jsonl; some twenty seconds per case.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Results

from flexgen.errors import CapacityError
from flexgen.options import EngineOptions
from flexgen.plan.known.machines import beside_checkpoint, find_machine, limits_of
from flexgen.plan.search.evaluate import Bounds
from flexgen.plan.search.optimise import Search, Solution
from flexgen.plan.search.solve import space_of
from flexgen.plan.workload import Workload
from flexgen.session.lookup import spec_of

PROCESS_BYTES = int(1.5e9)
PATIENT = 8.0
PINS = (
    *({"weights": f"device={share},host={1 - share}"} for share in (0, 0.25, 0.5, 0.75, 1)),
    *({"weights": f"host={share},disk={1 - share}"} for share in (0, 0.25, 0.5)),
    {"weights": "device=.1,disk=.9"},
    {"kv": "device=1"},
    {"kv": "host=1"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan to find."""

    model: str
    box: str
    workload: Workload
    options: dict[str, Any]

    @property
    def name(self) -> str:
        told = [f"{len(self.workload)} requests", *(f"{name} {value}" for name, value in self.options.items())]
        return f"{self.model}@{self.box} ({', '.join(told)})"

    def find(self, patience: float = 1.0, pins: Mapping[str, Any] | None = None) -> Solution:
        """The plan.

        Raises:
            CapacityError: none fits.
        """
        machine = find_machine(self.box)
        spec = spec_of(self.model, device=machine.device, bfloat16="bfloat16" in machine.dense)
        options = EngineOptions(dtype=spec.dtype, **self.options, **(pins or {}))
        limits = beside_checkpoint(limits_of(machine, options), spec.checkpoint_bytes, options)
        space = space_of(options, spec, machine, limits, self.workload, process_bytes=PROCESS_BYTES)
        return Search(space, patience=patience).best(Bounds(request_seconds=options.max_request_seconds))

    def rate(self, found: Solution) -> float:
        """Output tokens/s."""
        return self.workload.output_tokens / found.seconds


def cases() -> Iterator[Case]:
    """Models beyond the device, about as large as it and smaller; equal requests and ragged ones; bounds on requests."""
    for model, box, number, prompt_len, output_len in (
        ("opt-175b", "t4-gcp", 1000, 512, 32),
        ("deepseek-v3", "t4-gcp", 1000, 512, 32),
        ("mixtral-8x22b", "rtx4090-64gb", 1000, 512, 32),
        ("opt-30b", "t4-gcp", 2000, 512, 32),
        ("opt-6.7b", "t4-gcp", 5000, 512, 32),
        ("opt-6.7b", "a100-80gb-512gb", 5000, 512, 128),
        ("opt-13b", "rtx4090-64gb", 5000, 512, 128),
        ("opt-30b", "h100-80gb-512gb", 5000, 512, 128),
        ("llama-3-8b", "rtx3090-64gb", 5000, 512, 128),
        ("llama-3-8b", "rtx3090-64gb", 100_000, 512, 128),
        ("llama-3-70b", "16gb-gpu-64gb", 2000, 512, 128),
        ("mixtral-8x7b", "a100-80gb-512gb", 10_000, 1024, 256),
        ("qwen3-30b-a3b", "rtx4090-64gb", 5000, 512, 128),
        ("qwen3-235b-a22b", "h100-80gb-512gb", 3000, 512, 512),
        ("gpt-oss-20b", "16gb-gpu-64gb", 2000, 512, 128),
        ("gpt-oss-120b", "rtx5090-128gb", 5000, 300, 100),
    ):
        workload = Workload(prompt_lens=(prompt_len,) * number, output_lens=(output_len,) * number)
        yield Case(model=model, box=box, workload=workload, options={})
    draw = random.Random(1)
    ragged = Workload(
        prompt_lens=tuple(draw.randrange(20, 2000) for _ in range(5000)), output_lens=tuple(draw.randrange(4, 400) for _ in range(5000))
    )
    yield Case(model="llama-3-8b", box="rtx4090-64gb", workload=ragged, options={"device_mem": "6GiB", "host_mem": "10GiB"})
    for model, box, number, seconds in (
        ("llama-3-8b", "rtx3090-64gb", 100_000, 45.0),
        ("llama-3-70b", "16gb-gpu-64gb", 2000, 4000.0),
        ("llama-3-70b", "16gb-gpu-64gb", 2000, 10_000.0),
        ("opt-30b", "h100-80gb-512gb", 5000, 30.0),
    ):
        workload = Workload(prompt_lens=(512,) * number, output_lens=(128,) * number)
        yield Case(model=model, box=box, workload=workload, options={"max_request_seconds": seconds})


def measured(case: Case, *, freedom: bool) -> dict[str, Any]:
    """The usual plan, and what others reach."""
    wall, processor = time.perf_counter(), time.process_time()
    found = case.find()
    line: dict[str, Any] = {
        "case": case.name,
        "seconds": round(time.perf_counter() - wall, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
        "policies_played": found.num_played,
        "planned_seconds": round(found.seconds, 1),
        "tokens_per_s": round(case.rate(found), 3),
    }
    if freedom:
        others = {"patient": case.rate(case.find(PATIENT))}
        for pin in PINS:
            try:
                others[" ".join(f"--{name} {shares}" for name, shares in pin.items())] = case.rate(case.find(pins=pin))
            except CapacityError:
                continue
        best = max(others, key=others.__getitem__)
        best_pin = max((name for name in others if name != "patient"), key=others.__getitem__)
        line |= {
            "best": best,
            "best_tokens_per_s": round(others[best], 3),
            "free_over_best": round(case.rate(found) / others[best], 4),
            "free_over_best_pin": round(case.rate(found) / others[best_pin], 4),
        }
    return line


def main() -> None:
    asked = sys.argv[1:]
    freedom = "--freedom" in asked
    names = [name for name in asked if name != "--freedom"]
    results = Results(Path(__file__).parent / "results" / "planner.jsonl")
    next(cases()).find()  # compiles
    for case in cases():
        if not names or any(name in case.name for name in names):
            line = measured(case, freedom=freedom)
            print(json.dumps(line), flush=True)
            if freedom:
                results.append(line)


if __name__ == "__main__":
    main()
