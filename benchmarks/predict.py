"""What `flexgen run` expects before its first pass, against what it then does: a dozen jobs that were fixed beforehand.

    python benchmarks/predict.py --scratch DIR [--case NAME ...]

Before each the machine is measured again, since other tenants of the host make it faster or slower from hour to hour; then the job runs in
a memory cgroup of exactly its budget, with everything chosen by the planner.  In four of them answers end by an
end-of-sequence token, at lengths drawn from a trace of conversations (benchmarks/conversation_lengths.json) of which the planner knows
only the bound.  A JSON line per run: predicted and measured output tokens/s, and predicted again at the run's own rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from capped import NoCgroup, Outcome, run_capped
from record import Results
from shapes import SHAPES, Shape

from flexgen.base.from_json import dataclass_from_json
from flexgen.base.quantities import parse_size
from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.options import EngineOptions
from flexgen.plan.machine import DiskRequest, Machine, Rate, read_machine
from flexgen.plan.play.answer_lengths import expected
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation, rate_at
from flexgen.plan.workload import Workload
from flexgen.session.lookup import spec_of

LENGTHS = Path(__file__).parent / "conversation_lengths.json"
DEFAULT_RESULTS = Path(__file__).parent / "results" / "predict.jsonl"
EOS = 2
PROFILED_ROWS = 512  # of the products whose rate is kept with a run
FLEXGEN = str(Path(sys.executable).parent / "flexgen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One job.

    Attributes:
        num_requests: of `prompt` and `answer` tokens each; where they come from the trace, these are bounds, and `first` is the first line.
    """

    name: str
    shape: str
    memory: str
    num_requests: int
    prompt: int
    answer: int
    first: int | None = None

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, answer) of each request."""
        if self.first is None:
            return [(self.prompt, self.answer)] * self.num_requests
        drawn = json.loads(LENGTHS.read_text())["context_and_generated_tokens"][self.first : self.first + self.num_requests]
        return [(min(prompt, self.prompt), max(min(answer, self.answer), 1)) for prompt, answer in drawn]

    def lines(self) -> list[dict[str, Any]]:
        """The input: random ids; an answer that ends by itself does so because nothing else may follow its least tokens."""
        rng = random.Random(self.name)
        lines: list[dict[str, Any]] = []
        for number, (prompt, answer) in enumerate(self.lengths()):
            line: dict[str, Any] = {"id": str(number), "prompt": [rng.randint(10, 30000) for _ in range(prompt)], "temperature": 0}
            if self.first is None:
                line |= {"max_tokens": answer, "ignore_eos": True}
            else:
                line |= {"max_tokens": self.answer, "min_tokens": answer - 1, "logit_bias": {str(EOS): 100.0}}
            lines.append(line)
        return lines


CASES = (
    Case(name="llama-1b resident", shape="llama-1b", memory="6GiB", num_requests=96, prompt=256, answer=32),
    Case(name="llama-1b half", shape="llama-1b", memory="2GiB", num_requests=96, prompt=128, answer=64),
    Case(name="llama-3b a third", shape="llama-3b", memory="4GiB", num_requests=48, prompt=256, answer=32),
    Case(name="llama-3b from disk", shape="llama-3b", memory="2560MiB", num_requests=32, prompt=128, answer=24),
    Case(name="llama-3b resident", shape="llama-3b", memory="10GiB", num_requests=40, prompt=256, answer=32),
    Case(name="opt-1.3b resident", shape="opt-1.3b", memory="6GiB", num_requests=96, prompt=128, answer=48),
    Case(name="opt-1.3b from disk", shape="opt-1.3b", memory="1536MiB", num_requests=48, prompt=256, answer=32),
    Case(name="opt-2.7b half", shape="opt-2.7b", memory="5GiB", num_requests=48, prompt=192, answer=32),
    Case(name="llama-1b conversations", shape="llama-1b", memory="2560MiB", num_requests=64, prompt=384, answer=160, first=0),
    Case(name="llama-3b conversations", shape="llama-3b", memory="4GiB", num_requests=24, prompt=256, answer=96, first=64),
    Case(name="opt-1.3b conversations", shape="opt-1.3b", memory="2GiB", num_requests=48, prompt=384, answer=128, first=96),
    Case(name="opt-2.7b conversations", shape="opt-2.7b", memory="9GiB", num_requests=32, prompt=256, answer=128, first=160),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints and answers")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    results, rows = Results(args.results), list[dict[str, Any]]()
    for case in CASES:
        if args.case is None or case.name in args.case:
            try:
                rows.append(results.append(run_case(case, args.scratch.resolve())))
            except NoCgroup as error:
                print(f"skipped: {error}")
                return 0
            print(format_row(rows[-1]), flush=True)
    for name in ("error", "error_at_own_rates"):
        errors = [abs(row[name]) for row in rows]
        print(f"{name}: median {statistics.median(errors):.1%}, worst {max(errors):.1%} of {len(errors)} runs")
    return 0


def run_case(case: Case, scratch: Path) -> dict[str, Any]:
    """One run under its cap; the row for the results."""
    folder = checkpoint(SHAPES[case.shape], scratch)
    subprocess.run([FLEXGEN, "profile", folder, "--dtype", "bfloat16"], check=True, capture_output=True)
    outcome, report, log = run(folder, write_requests(case, scratch), case.memory, scratch)
    if report is None:
        raise SystemExit(f"the run failed: {outcome}\n{log[-3000:]}")
    policy, told = report["policy"], report["forecast"]
    measured = report["output_tokens_per_s"]
    machine = read_machine(json.dumps(report["machine"]))
    own = at_own_rates(case, folder, report, machine)
    return {
        "benchmark": "predict", "case": case.name, "shape": case.shape, "memory": case.memory, "num_requests": case.num_requests,
        "predicted_tokens_per_s": told["output_tokens_per_s"], "measured_tokens_per_s": measured,
        "error": told["output_tokens_per_s"] / measured - 1, "at_own_rates_tokens_per_s": own, "error_at_own_rates": own / measured - 1,
        "predicted_seconds": told["seconds"], "measured_seconds": report["elapsed_seconds"],
        "seconds_of_these_passes": told["seconds_of_these_passes"], "predicted_passes": told["num_passes"],
        "num_passes": report["num_passes"],
        "output_tokens": report["output_tokens"], "rate_ratios": report["rate_ratios"], "resource_seconds": told["resource_seconds"],
        "wait_seconds": report["wait_seconds"], "overlap": report["overlap"], "plan": report["plan"], "efficiency": report["efficiency"],
        "profiled_disk_bytes_per_s": machine.disk_read.typical,
        "profiled_flops": float(rate_at(machine.dense[policy["dtype"]], PROFILED_ROWS)),
        "schedule": policy["schedule"], "weights": policy["weights"], "max_num_seqs": policy["max_num_seqs"],
        "prefill_tokens": policy["prefill_tokens"], "peak_host_bytes": report["peak_host_bytes"],
    }  # fmt: skip


def checkpoint(shape: Shape, scratch: Path) -> Path:
    """The shape with random weights, written if it is not there yet; an end-of-sequence token is named."""
    folder = scratch / f"{shape.name}-eos"
    if not (folder / "config.json").exists():
        config = shape.hf_config()
        config.eos_token_id = EOS
        write_random_checkpoint(config, folder, torch.bfloat16)
    return folder


def write_requests(case: Case, scratch: Path) -> Path:
    path = scratch / "predict.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in case.lines()))
    return path


def run(
    folder: Path,
    requests: Path,
    memory: str,
    scratch: Path,
    *options: str,
    progress: str = "none",
    timeout_seconds: float | None = None,
    hopeless: Callable[[Path], bool] | None = None,
) -> tuple[Outcome, dict[str, Any] | None, str]:
    """`flexgen run` in a cgroup of its budget: how it ended, its metrics if it was well, what it said.

    Args:
        progress: what it tells of itself meanwhile. hopeless: whether to stop it, by what it said so far.
    """
    output, metrics, log = (scratch / f"predict-out.{suffix}" for suffix in ("jsonl", "json", "log"))
    command = [
        FLEXGEN, "run", str(folder), str(requests), "-o", str(output),
        "--host-mem", memory, "--metrics", str(metrics), "--progress", progress, "--fresh", *options,
    ]  # fmt: skip
    metrics.unlink(missing_ok=True)
    with log.open("w") as file:
        stop = None if hopeless is None else lambda: hopeless(log)
        outcome = run_capped(parse_size(memory), command, timeout_seconds=timeout_seconds, hopeless=stop, stdout=file, stderr=file)
    report = json.loads(metrics.read_text()) if outcome.survived and metrics.exists() else None
    return outcome, report, log.read_text()


def at_own_rates(case: Case, folder: Path, report: dict[str, Any], machine: Machine) -> float:
    """Output tokens/s that the same plan and lengths give with the rates that the run had."""
    ratios = report["rate_ratios"]
    machine = scaled(machine, disk=ratios.get("disk", 1.0), compute=ratios.get("compute", 1.0))
    policy = dataclass_from_json(Policy, report["policy"], "policy")
    spec = spec_of(str(folder), EngineOptions(dtype=policy.dtype), device="cpu")
    lengths = case.lengths()
    bound = case.answer
    workload = Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=(bound,) * len(lengths), may_end_early=case.first is not None)
    workload = expected(workload)
    if case.first is not None:
        workload = dataclasses.replace(workload, expected_lens=tuple(n for _, n in lengths))
    played = simulate(spec, policy, workload)
    return workload.output_tokens / float(played.seconds(Expectation(spec, machine, policy.dtype), policy).sum())


def scaled(machine: Machine, *, disk: float, compute: float) -> Machine:
    """With typical rates times these factors."""

    def faster(rate: Rate, factor: float) -> Rate:
        return Rate(rate.best, rate.typical * factor, rate.spread)

    def curves(fields: dict[str, Any]) -> dict[str, Any]:
        return {dtype: tuple((size, faster(rate, compute)) for size, rate in curve) for dtype, curve in fields.items()}

    overheads = machine.overheads
    return dataclasses.replace(
        machine,
        disk_read=faster(machine.disk_read, disk),
        disk_write=faster(machine.disk_write, disk),
        disk_core_seconds_per_byte=machine.disk_core_seconds_per_byte / compute,
        disk_request=DiskRequest(machine.disk_request.seconds / disk, machine.disk_request.core_seconds / compute),
        dense=curves(machine.dense),
        attention={dtype: faster(rate, compute) for dtype, rate in machine.attention.items()},
        decode_attention={place: curves(fields) for place, fields in machine.decode_attention.items()},
        elementwise={dtype: faster(rate, compute) for dtype, rate in machine.elementwise.items()},
        casts={name: faster(rate, compute) for name, rate in machine.casts.items()},
        overheads=type(overheads)(**{name: value / compute for name, value in dataclasses.asdict(overheads).items()}),
    )


def format_row(row: dict[str, Any]) -> str:
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["rate_ratios"].items())
    return (
        f"{row['case']:<24} predicted {row['predicted_tokens_per_s']:7.2f} measured {row['measured_tokens_per_s']:7.2f} tokens/s "
        f"{row['error']:+6.1%}, at own rates {row['error_at_own_rates']:+6.1%}; {row['measured_seconds']:.0f} s "
        f"(these passes: {row['seconds_of_these_passes']:.0f}), passes {row['num_passes']} ({row['predicted_passes']}), {ratios}"
    )


if __name__ == "__main__":
    sys.exit(main())
