"""The FlexGen paper's own cost model against what it measured: the tables of docs/paper_model.md.

    python benchmarks/paper_table.py

Nothing runs but equations and linear programs: no model, no device, about half a minute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from paper.case import PaperCase, PaperMachine, PaperPolicy, PaperVariant
from paper.memory import peak_bytes
from paper.price import decode_seconds, layer_seconds, prefill_seconds, throughput
from paper.published import (
    MEASURED_DECODE_TOKENS_PER_S,
    MEASURED_TOKENS_PER_S,
    OPT,
    POLICIES,
    T4_FITTED,
    T4_PRINTED,
    VARIANTS,
    WORKLOAD,
)
from paper.search import best_policy

from flexgen.base.quantities import GIB
from flexgen.options import TIERS, EngineOptions
from flexgen.plan.known.machines import find_machine, limits_of
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.search.solve import solve, space_of
from flexgen.plan.workload import Workload

PROCESS_BYTES, NUM_REQUESTS = int(1.5e9), 1000
MACHINES = (T4_PRINTED, T4_FITTED)
TERMS = ("host_to_device", "device_to_host", "disk_read", "disk_write", "compute")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def case_of(name: str, machine: PaperMachine, variant: PaperVariant) -> PaperCase:
    return PaperCase(machine=machine, model=OPT[name], workload=WORKLOAD, variant=variant)


def rates_of(machine: PaperMachine) -> str:
    """What the machine's name says behind the comma; all of them are one box."""
    return machine.name.rpartition(", ")[2]


def percent(shares: Fractions) -> str:
    return f"{shares.device:.0%} {shares.host:.0%} {shares.disk:.0%}".replace("%", "")


def described(policy: PaperPolicy) -> str:
    placed = ", ".join(percent(shares) for shares in (policy.weights, policy.kv, policy.activations))
    return f"{policy.gpu_batch_size} x {policy.num_gpu_batches} ({placed})"


def throughput_rows(name: str) -> Iterator[str]:
    """Tokens per second by each variant and set of rates: of the published policy, and of the best that the search finds."""
    for variant in VARIANTS.values():
        for machine in MACHINES:
            case = case_of(name, machine, variant)
            found = best_policy(case)
            searched = ("-", "nothing fits") if found is None else (f"{throughput(case, found):.2f}", described(found))
            published = POLICIES[name]
            device_gib = peak_bytes(case, published)["device"] / GIB
            yield row(
                name,
                f"{MEASURED_TOKENS_PER_S[name]:.2f}",
                variant.name,
                rates_of(machine),
                f"{throughput(case, published):.2f}",
                f"{device_gib:.1f}",
                *searched,
            )


def measured_seconds(name: str) -> dict[str, float]:
    """Phase -> seconds of a block with the published policy, from the two throughputs that the paper gives."""
    sequences, output_len = POLICIES[name].num_sequences, WORKLOAD.output_len
    decode = sequences * (output_len - 1) / MEASURED_DECODE_TOKENS_PER_S[name]
    return {"prefill": sequences * output_len / MEASURED_TOKENS_PER_S[name] - decode, "decode": decode}


def phase_rows(name: str) -> Iterator[str]:
    """Seconds of a block with the published policy: measured, by both variants, and each term, which the variants share."""
    policy, measured = POLICIES[name], measured_seconds(name)
    for machine in MACHINES:
        text, released = (case_of(name, machine, variant) for variant in VARIANTS.values())
        phases = (("prefill", prefill_seconds, 1), ("decode", decode_seconds, WORKLOAD.output_len - 1))
        for index, (phase, terms_of, steps) in enumerate(phases):
            layers = text.model.num_hidden_layers * steps
            variants = [layer_seconds(case, policy)[index] * layers for case in (text, released)]
            terms = terms_of(text, policy)
            seconds = [measured[phase], *variants, *(terms[term] * layers for term in TERMS)]
            yield row(name, rates_of(machine), phase, *(f"{each:.1f}" for each in seconds))


def our_rows(name: str) -> Iterator[str]:
    """Tokens per second by this project's model: of the published placement and block, and of the policy that it would choose."""
    machine, spec = find_machine("t4-gcp"), catalogue_spec(name)
    published = priced(name, machine, spec)
    options = EngineOptions(dtype=spec.dtype, device_mem="100%", host_mem="100%", disk="100%")
    limits = limits_of(machine, options)
    found = solve(space_of(options, spec, machine, limits, job(NUM_REQUESTS), process_bytes=PROCESS_BYTES))
    placed = ", ".join(percent(shares) for shares in (found.policy.weights, found.policy.kv))
    chosen = f"{found.policy.schedule}, {found.policy.max_num_seqs:,} sequences ({placed})"
    yield row(
        name, f"{MEASURED_TOKENS_PER_S[name]:.2f}", f"{published:.2f}", f"{job(NUM_REQUESTS).output_tokens / found.seconds:.2f}", chosen
    )


def priced(name: str, machine: Machine, spec: ModelSpec) -> float:
    """Of one block under the published policy, whether it would fit or not: hidden states, which ours keeps on the device, may not."""
    published = POLICIES[name]
    whole = published.num_sequences * spec.kv_bytes(WORKLOAD.prompt_len + WORKLOAD.output_len + 16)
    pools: dict[str, Any] = {
        f"kv_{tier}_bytes": int(share * whole) for tier, share in dataclasses.asdict(published.kv).items() if tier in TIERS
    }
    policy = Policy(
        device="cuda", dtype=spec.dtype, weights=published.weights, kv=published.kv, **pools, host_ring_bytes=0, device_ring_bytes=0,
        workspace_bytes=0, embedding_resident=True, schedule="zigzag", max_num_seqs=published.num_sequences,
        prefill_tokens=published.num_sequences * WORKLOAD.prompt_len, micro_batch_tokens=published.gpu_batch_size * WORKLOAD.prompt_len,
        page_tokens=16, compute_threads=1, io_threads=1,
    )  # fmt: skip
    block = job(published.num_sequences)
    return block.output_tokens / float(simulate(spec, policy, block).seconds(Expectation(spec, machine, spec.dtype), policy).sum())


def job(num_requests: int) -> Workload:
    return Workload(prompt_lens=(WORKLOAD.prompt_len,) * num_requests, output_lens=(WORKLOAD.output_len,) * num_requests)


def table(header: tuple[str, ...], rows: Iterator[str]) -> str:
    return "\n".join([row(*header), row(*["---"] * len(header)), *rows])


def main() -> None:
    throughput_header = ("model", "measured", "variant", "rates", "published policy", "its device GiB", "best policy", "which is")
    print(table(throughput_header, (line for name in OPT for line in throughput_rows(name))))
    print()
    phase_header = ("model", "rates", "phase", "measured", *VARIANTS, *TERMS)
    print(table(phase_header, (line for name in OPT for line in phase_rows(name))))
    print()
    our_header = ("model", "measured", "published policy", "our policy", "which is")
    print(table(our_header, (line for name in OPT for line in our_rows(name))))


if __name__ == "__main__":
    main()
