"""What a job should take on a machine: passes at realistic rates, and the plan told to people."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexgen.options import TIERS
from flexgen.plan.cost import best_rate, busiest, unit_homes, weights_work
from flexgen.plan.footprint import footprint
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.search import PLAYED_REQUESTS, extrapolated, sampled
from flexgen.plan.simulate import Simulation, simulate
from flexgen.plan.workload import Workload
from flexgen.sizes import format_size

# What runs reach of the best rates.
REAL_DISK_READ, REAL_SPILL, REAL_LINK, REAL_DENSE, REAL_ATTENTION, REAL_HOST_KV, REAL_MEMORY = 0.9, 0.5, 0.9, 0.9, 0.7, 0.3, 0.8
SECONDS_PER_PASS, SECONDS_PER_UNIT_AND_MICRO_BATCH, SECONDS_PER_STREAMED_UNIT = 5e-3, 1e-4, 3e-4
SECONDS_PER_GATHERED_ROW, CORE_SECONDS_PER_DISK_BYTE = 2e-5, 7e-12


def expected_seconds(played: Simulation, spec: ModelSpec, policy: Policy, machine: Machine) -> npt.NDArray[np.float64]:
    """Seconds of each pass at realistic rates: measured rows, overheads, and on a CPU one compute for everything."""
    work = played.work
    tokens = np.broadcast_to(np.asarray(work.num_tokens, dtype=np.float64), (played.num_passes,))
    sampled_rows = np.broadcast_to(np.asarray(work.num_sampled, dtype=np.float64), (played.num_passes,))
    micro_batches = np.ceil(tokens / policy.micro_batch_tokens)
    compute = tokens * spec.flops_per_token() / _rate_at(machine, policy.dtype, tokens / np.maximum(micro_batches, 1))
    compute = compute + sampled_rows * spec.head_flops_per_token() / _rate_at(machine, policy.dtype, sampled_rows)
    attention = machine.attention_flops.get(policy.dtype, best_rate(machine.dense_flops, policy.dtype, "dense", machine))
    compute = compute / REAL_DENSE + work.attention_flops / attention / REAL_ATTENTION
    compute = compute + micro_batches * len(spec.units) * SECONDS_PER_UNIT_AND_MICRO_BATCH
    compute = compute + tokens * SECONDS_PER_GATHERED_ROW * (not policy.embedding_resident)
    homes = unit_homes(spec, policy.weights)
    weights = weights_work(spec, homes, policy.device)
    decoded = weights.host_memory_bytes - weights.disk_read_bytes - weights.host_to_device_bytes
    decoding = decoded / machine.host_memory_bytes_per_s / REAL_MEMORY + homes.count("disk") * SECONDS_PER_STREAMED_UNIT
    host_kv = (work.host_memory_bytes - weights.host_memory_bytes) / machine.host_memory_bytes_per_s / REAL_HOST_KV
    if policy.device == "cpu":
        compute = compute + host_kv + decoding + work.disk_read_bytes * CORE_SECONDS_PER_DISK_BYTE / machine.cores
    spilled = (work.disk_read_bytes - weights.disk_read_bytes) / machine.disk_read_bytes_per_s
    disk = weights.disk_read_bytes / machine.disk_read_bytes_per_s / REAL_DISK_READ
    disk = disk + (spilled + work.disk_write_bytes / machine.disk_write_bytes_per_s) / REAL_SPILL
    memory = machine.host_memory_bytes_per_s
    to_device = work.host_to_device_bytes / (machine.host_to_device_bytes_per_s or memory) / REAL_LINK
    to_host = work.device_to_host_bytes / (machine.device_to_host_bytes_per_s or memory) / REAL_LINK
    bus = work.host_memory_bytes / memory / REAL_MEMORY
    resources = [compute, host_kv, decoding, disk, to_device, to_host, bus]
    return np.maximum.reduce([np.broadcast_to(each, (played.num_passes,)) for each in resources]) + SECONDS_PER_PASS


def _rate_at(machine: Machine, dtype: str, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The measured rate of a linear layer at these row counts; below the fewest measured, time does not fall further."""
    points = machine.dense_rows.get(dtype) or [(1, best_rate(machine.dense_flops, dtype, "dense", machine))]
    known = np.array(points, dtype=np.float64)
    rates = np.interp(rows, known[:, 0], known[:, 1])
    return rates * np.minimum(np.maximum(rows, 1.0) / known[0, 0], 1.0)


def explain(policy: Policy, spec: ModelSpec, machine: Machine, limits: Limits, workload: Workload, *, process_bytes: int) -> str:
    """The plan in a few lines, with what it should take at realistic rates."""
    lines = [f"{spec.name}: {policy.dtype} on {policy.device}, {policy.schedule} schedule"]
    budgets = {"host": limits.host_bytes, "device": limits.device_bytes, "disk": limits.disk_bytes}
    for tier, parts in footprint(policy, spec, limits, process_bytes=process_bytes).items():
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        lines.append(f"{tier:<7} {format_size(sum(parts.values()))} of {format_size(budgets[tier])}: {listed}")
    work = weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    streamed = f"{format_size(work.disk_read_bytes)} from disk"
    if policy.device != "cpu":
        streamed += f" and {format_size(work.host_to_device_bytes)} to the device"
    lines.append(f"weights {_shares(policy.weights)}; a pass reads {streamed}")
    lines.append(
        f"block   up to {policy.max_num_seqs} sequences (KV {_shares(policy.kv)}), {policy.prefill_tokens} prompt tokens admitted "
        f"per pass, micro-batches of {policy.micro_batch_tokens} tokens"
    )
    if len(workload):
        lines.append(_expectation(policy, spec, machine, workload))
    return "\n".join(lines)


def _shares(fractions: Fractions) -> str:
    return ", ".join(f"{getattr(fractions, tier):.0%} {tier}" for tier in TIERS if getattr(fractions, tier) >= 0.005)


def _expectation(policy: Policy, spec: ModelSpec, machine: Machine, workload: Workload) -> str:
    lengths, scale = (workload, 1.0) if len(workload) <= PLAYED_REQUESTS else sampled(workload)
    refused, seconds = extrapolated(spec, policy, lengths, scale, lambda job: float(expected_seconds(job, spec, policy, machine).sum()))
    played = simulate(spec, policy, lengths)
    ideal = {resource: float(each.sum()) for resource, each in played.ideal_seconds(machine, policy.dtype).items()}
    text = (
        f"expect  {round(played.num_passes * scale)} passes, {seconds:.0f} s, {workload.output_tokens / max(seconds, 1e-9):.1f} "
        f"output tokens/s, about {played.live.mean():.0f} sequences alive; busiest: {busiest(ideal)[0].replace('_', ' ')}"
    )
    return text + (f"; {round(refused * len(workload))} requests can never fit" if refused else "")
