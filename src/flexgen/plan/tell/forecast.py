"""Plans: the best policy for a job, and its forecast of seconds, rates, memory, and the time of each resource."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen.errors import CapacityError
from flexgen.options import EngineOptions
from flexgen.plan.formats import FormatChoice
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.answer_lengths import expected
from flexgen.plan.play.sampling import Samples, play_sample
from flexgen.plan.play.simulate import Simulation
from flexgen.plan.policy import Policy
from flexgen.plan.price.memory import footprint
from flexgen.plan.price.pass_time import RESOURCES, Expectation
from flexgen.plan.price.weights import unit_homes, weights_work
from flexgen.plan.search.optimise import Solution
from flexgen.plan.search.solve import solve, space_of
from flexgen.plan.tell.spill import LEAST_SPILL_GAIN, Spill
from flexgen.plan.workload import Workload

# A block counts as full if it has at least this share of its maximum number of sequences.
FULL_BLOCK = 0.9
# The gain of a faster rate is computed for a rate that is this many times as fast.
TIMES_AS_FAST = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The expected course of a job.

    Attributes:
        seconds: The time from the first pass to the last.
        num_passes: The number of passes.
        num_requests: The number of requests.
        num_refused: The number of requests that can never fit.
        prompt_tokens: The tokens of all prompts.
        output_tokens: The tokens of all answers.
        scored_tokens: The positions at which known tokens are scored.
        output_tokens_per_s: The output tokens per second, from end to end.
        full_block_tokens_per_s: The output tokens per second in passes with a full block.
        live_mean: The mean number of sequences in a pass.
        request_seconds: The time of the request that takes longest, from its first pass to its last.
        pass_seconds: The mean time of a pass.
        resource_seconds: Per resource, the mean seconds in a pass if it worked alone.
        bottleneck: The resource that decides most of the time.
        memory_bytes: The bytes reserved, by tier and part.
        budget_bytes: The budget of each tier.
        weights_bytes_per_pass: Per link, the bytes of weights in each pass.
        disk_written_bytes: The bytes that the whole job writes to disk.
        gain_per_gib: Per tier, the relative gain of output tokens/s by 1 GiB more of it; empty where unknown.
        gain_per_rate: Per resource, the relative gain of output tokens/s per relative gain of its rate, with the same policy.
        spill: The gain of KV on disk, where it would write more than the weights' bytes; None where it would not, or was not compared.
        sparse_over_dense: The time of next tokens' attention as a share of that without sparse attention; None without it, and where the
            machine has no rates for it: then it counts as dense.
    """

    seconds: float
    num_passes: int
    num_requests: int
    num_refused: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    full_block_tokens_per_s: float
    live_mean: float
    request_seconds: float
    pass_seconds: float
    resource_seconds: dict[str, float]
    bottleneck: str
    memory_bytes: dict[str, dict[str, int]]
    budget_bytes: dict[str, int]
    weights_bytes_per_pass: dict[str, int]
    disk_written_bytes: float
    gain_per_gib: dict[str, float]
    gain_per_rate: dict[str, float]
    spill: Spill | None = None
    scored_tokens: int = 0
    sparse_over_dense: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A policy for a job, with its forecast.

    Attributes:
        spec: The model.
        machine: The machine.
        policy: The policy.
        forecast: What is expected of it.
        formats: The choice of the formats of weights and KV; None where there was none.
        told: The plan in words where it is that of one stage of several, and the words are about all; None otherwise.
    """

    spec: ModelSpec
    machine: Machine
    policy: Policy
    forecast: Forecast
    formats: FormatChoice | None = None
    told: str | None = None


def make_plan(options: EngineOptions, spec: ModelSpec, machine: Machine, limits: Limits, workload: Workload, *, process_bytes: int) -> Plan:
    """Return the best policy for a job, and its forecast; arguments and errors are those of `space_of` and `solve`.

    Unless the options place KV, a policy that writes more bytes of KV to disk than the weights have is chosen only if it gains at least
    LEAST_SPILL_GAIN, or if the options give a budget on disk.
    """

    def best(limits: Limits) -> Plan:
        solution = solve(space_of(options, spec, machine, limits, workload, process_bytes=process_bytes))
        expectation = forecast(solution, spec, machine, limits, workload, process_bytes=process_bytes)
        return Plan(spec=spec, machine=machine, policy=solution.policy, forecast=expectation)

    plan = best(limits)
    if options.kv is not None or plan.forecast.disk_written_bytes <= spec.checkpoint_bytes:
        return plan
    try:
        without = best(dataclasses.replace(limits, disk_bytes=0))
    except CapacityError:
        return plan
    return _weighed(plan, without, asked=options.disk is not None)


def _weighed(plan: Plan, without: Plan, *, asked: bool) -> Plan:
    """Return one of two plans, the first of which writes KV to disk; that one stays where writing was `asked` for."""
    spill = Spill(
        chosen=True, written_bytes=plan.forecast.disk_written_bytes, seconds=plan.forecast.seconds, seconds_without=without.forecast.seconds
    )
    if asked or spill.gain >= LEAST_SPILL_GAIN or without.forecast.num_refused > plan.forecast.num_refused:
        chosen = plan
    else:
        chosen, spill = without, dataclasses.replace(spill, chosen=False)
    weighed = dataclasses.replace(chosen.forecast, spill=spill, budget_bytes=plan.forecast.budget_bytes)
    return dataclasses.replace(chosen, forecast=weighed)


def forecast(solution: Solution, spec: ModelSpec, machine: Machine, limits: Limits, workload: Workload, *, process_bytes: int) -> Forecast:
    """Return the forecast of `solution`'s policy."""
    policy = solution.policy
    homes = weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    return Forecast(
        **_played(policy, Expectation(spec, machine, policy.dtype), workload),
        memory_bytes=footprint(policy, spec, limits, process_bytes=process_bytes),
        budget_bytes={"host": limits.host_bytes, "device": limits.device_bytes, "disk": limits.disk_bytes},
        weights_bytes_per_pass={"disk_read": int(homes.disk_read_bytes), "host_to_device": int(homes.host_to_device_bytes)},
        gain_per_gib=solution.gain_per_gib,
    )


def forecast_again(before: Forecast, policy: Policy, expectation: Expectation, workload: Workload) -> Forecast:
    """Return the forecast of the same policy for another job."""
    return dataclasses.replace(before, spill=None, **_played(policy, expectation, workload))


def _played(policy: Policy, expectation: Expectation, workload: Workload) -> dict[str, Any]:
    """Return the fields of Forecast that follow from playing the job; large jobs are played on a sample and extrapolated."""
    spec, workload = expectation.spec, expected(workload)
    sample = Samples.played_once(workload).of(policy.max_num_seqs)
    jobs = play_sample(spec, policy, sample)
    total = jobs.extrapolated([float(job.seconds(expectation, policy).sum()) for job in jobs.jobs])
    played = jobs.jobs[0]
    passes = played.num_passes
    seconds = played.seconds(expectation, policy)
    resources = {name: np.broadcast_to(each, (passes,)) for name, each in expectation.apart(played.work, policy).items()}
    busiest = np.argmax(np.stack(list(resources.values())), axis=0)
    decided = {name: float(seconds[busiest == number].sum()) for number, name in enumerate(resources)}
    outputs = workload.output_tokens
    return {
        "seconds": total,
        "num_passes": round(passes * sample.scale),
        "num_requests": len(workload),
        "num_refused": round(played.num_refused * sample.scale),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": outputs,
        "scored_tokens": workload.scored_tokens,
        "output_tokens_per_s": outputs / max(total, 1e-9),
        "full_block_tokens_per_s": _full_block_rate(played, seconds),
        "live_mean": float(played.live.mean()) if passes else 0.0,
        "request_seconds": played.longest_request_seconds(seconds),
        "pass_seconds": float(seconds.mean()) if passes else 0.0,
        "resource_seconds": {name: float(each.mean()) if passes else 0.0 for name, each in resources.items()},
        "bottleneck": max(decided, key=decided.__getitem__),
        "gain_per_rate": rate_gains(played, policy, expectation),
        "sparse_over_dense": expectation.sparse_over_dense(played.work),
        "disk_written_bytes": float(np.broadcast_to(played.work.disk_write_bytes, (passes,)).sum()) * sample.scale,
    }


def _full_block_rate(played: Simulation, seconds: npt.NDArray[np.float64]) -> float:
    """Return the output tokens/s of the passes in which nearly the maximum number of sequences is alive."""
    full = played.live >= FULL_BLOCK * played.live.max(initial=0)
    sampled = np.broadcast_to(played.work.num_sampled, played.live.shape)
    return float(sampled[full].sum() / max(seconds[full].sum(), 1e-9)) if full.any() else 0.0


def rate_gains(played: Simulation, policy: Policy, expectation: Expectation) -> dict[str, float]:
    """Return, per resource, the relative gain per relative gain of its rate while the policy stays the same.

    It is computed from a rate `TIMES_AS_FAST` times as high, which shortens the passes that the resource decides.
    """
    seconds = float(played.seconds(expectation, policy).sum())
    faster = {name: float(played.seconds(expectation, policy, times={name: TIMES_AS_FAST}).sum()) for name in RESOURCES}
    return {name: (seconds / max(less, 1e-12) - 1) / (TIMES_AS_FAST - 1) for name, less in faster.items()}
