"""Models divided among machines, on paper: tables of what plans say.

    python benchmarks/stages_model.py [paper|scaling]

Nothing runs but the planner: no model, no device, a few minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

from paper.published import MEASURED_TOKENS_PER_S, WORKLOAD

from flexgen.base.quantities import format_link, format_seconds, parse_link
from flexgen.errors import FlexGenError
from flexgen.options import EngineOptions
from flexgen.plan.known.box import box_of
from flexgen.plan.known.machines import PROCESS_BYTES, beside_checkpoint, find_machine, limits_of
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.stages.divide import StagesPlan, again, divide
from flexgen.plan.stages.job import StagedJob, StageMachine
from flexgen.plan.stages.pipeline import LinkRate
from flexgen.plan.tell.formats import converted
from flexgen.plan.workload import Workload

# Table 3 of the paper: four machines with a T4 each, generated tokens per second.
MEASURED_ON_FOUR = {"opt-6.7b": 201.12, "opt-30b": 23.61, "opt-175b": 2.33}
PAPER_REQUESTS, PAPER_LINK = 1000, "10Gbit,0.1ms"

CPU_BOX = box_of(
    {"host_bytes": "128GB", "host_memory": 100e9, "disk_read": "7GB/s", "disk_bytes": "2TB", "flops": 3e12, "cores": 32}, "cpu-128gb"
)
BOXES = (find_machine("t4-gcp"), find_machine("rtx4090-64gb"), CPU_BOX)
MODELS = ("opt-175b", "llama-3.1-405b")
NUMBERS = (1, 2, 4, 8, 16, 32, 64)
LINKS = ("10Gbit,0.1ms", "1Gbit,10ms", "100Mbit,100ms")
REQUESTS = 20_000


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(header: tuple[str, ...], rows: Iterator[str]) -> str:
    return "\n".join([row(*header), row(*["---"] * len(header)), *rows])


def link_of(text: str) -> LinkRate:
    rate, latency = parse_link(text, name="link")
    return LinkRate(bytes_per_s=rate, latency_s=latency)


def job_of(number: int) -> Workload:
    return Workload(prompt_lens=(WORKLOAD.prompt_len,) * number, output_lens=(WORKLOAD.output_len,) * number)


def planned(spec: ModelSpec, box: Machine, number: int, job: Workload, link: str, *, hasty: bool) -> StagesPlan:
    """The plan of a model on so many equal machines, each of which has the files of its own layers."""
    options = EngineOptions(dtype=spec.dtype)
    limits = beside_checkpoint(limits_of(box, options), spec.checkpoint_bytes // number, options)
    machine = StageMachine(machine=box, limits=limits, process_bytes=PROCESS_BYTES[box.device])
    asked = StagedJob(options=options, spec=spec, machines=(machine,) * number, workload=job, link=link_of(link))
    return divide(asked, hasty=hasty)


def bound_of(plan: StagesPlan) -> str:
    """What decides the time of most rounds."""
    kind, _, place = plan.bound_by.partition(" ")
    return plan.stages[int(place)].bound_by.replace("_", " ") if kind == "stage" else kind if kind == "link" else plan.bound_by


def paper_rows() -> Iterator[str]:
    """One and four of the paper's machines, measured and planned, in tokens per second."""
    box, job = find_machine("t4-gcp"), job_of(PAPER_REQUESTS)
    for name in MEASURED_ON_FOUR:
        one, four = (planned(catalogue_spec(name), box, number, job, PAPER_LINK, hasty=True) for number in (1, 4))
        measured = MEASURED_TOKENS_PER_S[name], MEASURED_ON_FOUR[name]
        rates = one.forecast.output_tokens_per_s, four.forecast.output_tokens_per_s
        yield row(
            name,
            *(f"{rate:.2f}" for rate in measured),
            f"{measured[1] / measured[0]:.1f}",
            *(f"{rate:.2f}" for rate in rates),
            f"{rates[1] / rates[0]:.1f}",
            bound_of(one),
            bound_of(four),
            f"{four.bubble_share:.1%}",
        )


@functools.cache
def in_four_bits(name: str, dtype: str) -> ModelSpec:
    spec = dataclasses.replace(catalogue_spec(name), dtype=dtype)
    return converted(spec, "int4")


def scaling_rows(name: str, box: Machine) -> Iterator[str]:
    """The model in 4 bits on ever more machines: the plan for the first link, and its forecast over the others."""
    spec, job = in_four_bits(name, "bfloat16" if box.device == "cpu" else "float16"), job_of(REQUESTS)
    alone: float | None = None
    for number in NUMBERS:
        try:
            plan = planned(spec, box, number, job, LINKS[0], hasty=True)
        except FlexGenError as error:
            yield row(number, *["-"] * 9, str(error).partition(":")[2].partition("(")[0].strip()[:60])
            continue
        rates = [again(plan, job, link_of(link)).forecast.output_tokens_per_s for link in LINKS]
        alone = alone or rates[0] / number
        slow = again(plan, job, link_of(LINKS[-1]))
        policy, bytes_of = plan.stages[0].plan.policy, plan.stages[len(plan.stages) // 2].plan.policy
        yield row(
            number,
            *(f"{rate:.2f}" for rate in rates),
            f"{rates[0] / alone / number:.2f}",
            policy.max_num_seqs,
            homes_of(bytes_of.weights),
            homes_of(bytes_of.kv),
            f"{bound_of(plan)}; {bound_of(slow)}",
            f"{plan.bubble_share:.1%}; {slow.bubble_share:.1%}",
            format_seconds(plan.round_trip_seconds),
        )


def homes_of(shares: object) -> str:
    """Percent on the device, in host memory (decoded or as stored), and on disk."""
    device, host, encoded, disk = (round(100 * getattr(shares, home)) for home in ("device", "host", "encoded", "disk"))
    return f"{device} {host + encoded} {disk}"


def main(asked: Sequence[str]) -> None:
    if not asked or "paper" in asked:
        header = (
            "model", "measured on 1", "on 4", "times", "planned on 1", "on 4", "times", "1 is bound by", "4 are bound by", "bubbles",
        )  # fmt: skip
        print(table(header, paper_rows()))
    if not asked or "scaling" in asked:
        header = (
            "machines", *(format_link(link_of(link).bytes_per_s, link_of(link).latency_s) for link in LINKS), "efficiency",
            "sequences of a block", "weights", "KV", "bound by, first link; last", "bubbles", "round trip",
        )  # fmt: skip
        for name in MODELS:
            for box in BOXES:
                print(f"\n{name} on {box.name}\n")
                print(table(header, scaling_rows(name, box)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
