"""Models divided among machines, on paper: tables of what plans say.

    python benchmarks/stages_model.py [paper|scaling]

Nothing runs but the planner: no model, no device, some twenty minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

from paper.published import MEASURED_DECODE_TOKENS_PER_S, MEASURED_TOKENS_PER_S, WORKLOAD

from flexgen.base.quantities import format_seconds, parse_link
from flexgen.errors import FlexGenError
from flexgen.options import EngineOptions
from flexgen.plan.known.box import box_of
from flexgen.plan.known.machines import PROCESS_BYTES, beside_checkpoint, find_machine, limits_of
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.stages.divide import divide
from flexgen.plan.stages.job import StagedJob, StageMachine
from flexgen.plan.stages.pipeline import LinkRate
from flexgen.plan.stages.plans import StagesPlan, again
from flexgen.plan.tell.formats import converted
from flexgen.plan.workload import Workload

# Table 3 of the paper: four machines with a T4 each, generated tokens per second.
MEASURED_ON_FOUR = {"opt-6.7b": 201.12, "opt-30b": 23.61, "opt-175b": 2.33}
MEASURED_DECODE_ON_FOUR = {"opt-6.7b": 764.65, "opt-30b": 48.94, "opt-175b": 3.86}
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


def job_of(number: int, *, output_len: int = WORKLOAD.output_len) -> Workload:
    return Workload(prompt_lens=(WORKLOAD.prompt_len,) * number, output_lens=(output_len,) * number)


def planned(
    spec: ModelSpec, box: Machine, number: int, job: Workload, link: str, *, schedule: str = "auto", hasty: bool = False
) -> StagesPlan:
    """The plan of a model on so many equal machines, each of which has the files of its own layers."""
    options = EngineOptions(dtype=spec.dtype, schedule=schedule)
    limits = beside_checkpoint(limits_of(box, options), spec.checkpoint_bytes // number, options)
    machine = StageMachine(machine=box, limits=limits, process_bytes=PROCESS_BYTES[box.device])
    asked = StagedJob(options=options, spec=spec, machines=(machine,) * number, workload=job, link=link_of(link))
    return divide(asked, hasty=hasty)


def bound_of(plan: StagesPlan) -> str:
    """What decides the time of most rounds."""
    kind, _, place = plan.bound_by.partition(" ")
    return plan.stages[int(place)].bound_by.replace("_", " ") if kind == "stage" else kind if kind == "link" else plan.bound_by


def paper_rows() -> Iterator[str]:
    """One and four of the paper's machines, measured and planned."""
    box, job = find_machine("t4-gcp"), job_of(PAPER_REQUESTS)
    for name in MEASURED_ON_FOUR:
        plans = [planned(catalogue_spec(name), box, number, job, PAPER_LINK) for number in (1, 4)]
        waves = [planned(catalogue_spec(name), box, number, job, PAPER_LINK, schedule="zigzag") for number in (1, 4)]
        yield row(
            name,
            *compared(MEASURED_TOKENS_PER_S[name], MEASURED_ON_FOUR[name]),
            *compared(*(plan.forecast.output_tokens_per_s for plan in plans)),
            *(bound_of(plan) for plan in plans),
            f"{plans[1].bubble_share:.1%}",
            *compared(MEASURED_DECODE_TOKENS_PER_S[name], MEASURED_DECODE_ON_FOUR[name]),
            *compared(*map(decode_rate, waves)),
        )


def compared(one: float, four: float) -> tuple[str, str, str]:
    return f"{one:.2f}", f"{four:.2f}", f"{four / one:.1f}"


def decode_rate(plan: StagesPlan) -> float:
    """Tokens per second of all passes but the first, as the paper counts them: the time of prompts is left out."""
    whole, prompts = again(plan, job_of(PAPER_REQUESTS)), again(plan, job_of(PAPER_REQUESTS, output_len=1))
    return (whole.forecast.output_tokens - prompts.forecast.output_tokens) / (whole.forecast.seconds - prompts.forecast.seconds)


@functools.cache
def in_four_bits(name: str, dtype: str) -> ModelSpec:
    spec = dataclasses.replace(catalogue_spec(name), dtype=dtype)
    return converted(spec, "int4")


def scaling_rows(name: str, box: Machine) -> Iterator[str]:
    """The model in 4 bits on ever more machines, with a plan for each link."""
    spec, job = in_four_bits(name, "bfloat16" if box.device == "cpu" else "float16"), job_of(REQUESTS)
    alone: float | None = None  # tokens/s of one machine's part, where they first fit
    for number in NUMBERS:
        try:
            plans = [planned(spec, box, number, job, link, hasty=True) for link in (LINKS[:1] if number == 1 else LINKS)]
        except FlexGenError as error:
            yield row(number, f"does not fit: {error}")
            continue
        rates = [plan.forecast.output_tokens_per_s for plan in plans]
        alone = alone or rates[0] / number
        policy, middle = plans[0].stages[0].plan.policy, plans[0].stages[number // 2].plan.policy
        links = [f"{rate:.2f} ({rate / alone / number:.2f}, {bound_of(plan)})" for rate, plan in zip(rates, plans, strict=True)]
        yield row(
            number,
            *links,
            *[""] * (len(LINKS) - len(links)),
            policy.max_num_seqs,
            homes_of(middle.weights),
            homes_of(middle.kv),
            f"{plans[0].bubble_share:.1%}",
            format_seconds(plans[0].round_trip_seconds),
        )


def homes_of(shares: object) -> str:
    """Percent on the device, in host memory (decoded or as stored), and on disk."""
    device, host, encoded, disk = (round(100 * getattr(shares, home)) for home in ("device", "host", "encoded", "disk"))
    return f"{device} {host + encoded} {disk}"


def main(asked: Sequence[str]) -> None:
    if not asked or "paper" in asked:
        rates = ("measured on 1", "on 4", "times", "planned on 1", "on 4", "times")
        header = ("model", *rates, "1 is bound by", "4 are bound by", "bubbles", *(f"next tokens: {each}" for each in rates))
        print(table(header, paper_rows()), flush=True)
    if not asked or "scaling" in asked:
        links = (f"{link} (efficiency, bound by)" for link in LINKS)
        header = ("machines", *links, "sequences of a block", "weights", "KV", "bubbles", "round trip")
        for name in MODELS:
            for box in BOXES:
                print(f"\n{name} on {box.name}\n")
                print(table(header, scaling_rows(name, box)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
