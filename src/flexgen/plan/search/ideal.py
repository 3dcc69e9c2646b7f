"""T*: the least ideal time of a job within budgets, which no choice and no engine can beat (the measure of both)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.sampling import JobSizes, Samples, extrapolated
from flexgen.plan.policy import Policy
from flexgen.plan.price.pools import kv_pools, placed_weights, pool_fractions
from flexgen.plan.price.work import memory_bytes, unit_homes, weight_bytes
from flexgen.plan.search.moves import climb
from flexgen.plan.search.space import Point
from flexgen.plan.search.starts import varied
from flexgen.plan.workload import Workload

MICRO_BATCH_TOKENS = 1 << 20
QUOTAS = (0.0, 0.15, 0.4, 0.7, 1.0)
# Of the best of a coarse grid, how many are moved, beside the best of each kind.
MOVED_STARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that weights and KV may take, per tier; what the process itself needs is already taken off.

    Attributes:
        device: "cpu" (then there is no device tier), "cuda" or "sim".
        disk_bytes: for KV; 0 forbids KV on disk.
    """

    device: str
    host_bytes: int
    device_bytes: int = 0
    disk_bytes: int = 0


def budgets_of(limits: Limits, spec: ModelSpec, process_bytes: int) -> Budgets:
    """What T* may use: everything but the process itself and the tensors that never move."""
    on_cpu = limits.device == "cpu"
    return Budgets(
        device=limits.device,
        host_bytes=max(limits.host_bytes - process_bytes - (spec.resident_bytes if on_cpu else 0), 0),
        device_bytes=0 if on_cpu else max(limits.device_bytes - spec.resident_bytes, 0),
        disk_bytes=0 if limits.offload_in_memory else limits.disk_bytes,
    )


def least_ideal_seconds(
    spec: ModelSpec, machine: Machine, workload: Workload, budgets: Budgets, dtype: str, *, also: Sequence[Policy] = ()
) -> float:
    """T*: the least sum over the passes of the busiest resource's ideal time, within `budgets`, without overheads.

    Searched over the shares of resident weights, the homes of KV and the prefill quota, under the diagonal and the zigzag
    schedule.  `also` are policies known to be allowed (the one that ran): T* is at most theirs.

    Raises:
        OptionError: when the machine was not measured in `dtype`.
    """
    if not len(workload):
        return 0.0
    space = _IdealSpace(spec, budgets, workload, dtype)
    samples, wholes = Samples(workload), Samples.played_once(workload)
    policy_of = functools.cache(space.policy)

    def seconds(policy: Policy, lengths: Samples) -> tuple[float, float]:
        return extrapolated(spec, policy, lengths.of(space.sizes.num_seqs(policy)), lambda played: played.busiest_seconds(machine, dtype))

    @functools.cache
    def sampled(policy: Policy) -> tuple[float, float]:
        return seconds(policy, samples)

    def score(point: Point) -> tuple[float, float]:
        policy = policy_of(point)
        return (math.inf, math.inf) if policy is None else sampled(policy)

    starts = varied(sorted(space.starts(), key=score), MOVED_STARTS)
    found = [policy_of(point) for point in climb(starts, space, score, lambda: True)]
    candidates = [*also, *dict.fromkeys(policy for policy in found if policy is not None)]
    return min((seconds(policy, wholes) for policy in candidates), default=(0.0, math.inf))[1]


class _IdealSpace:
    """Points of the unit cube as policies that use every byte of the budgets for weights and KV."""

    def __init__(self, spec: ModelSpec, budgets: Budgets, workload: Workload, dtype: str) -> None:
        self.spec, self.budgets, self.dtype = spec, budgets, dtype
        self.workload = workload
        self.computing = "host" if budgets.device == "cpu" else "device"
        self.sizes = JobSizes(spec, workload, page_tokens=1)
        self.memory_bytes = sum(memory_bytes(unit) for unit in spec.units)

    def free_axes(self, schedule: str) -> tuple[str, ...]:
        """All that the tiers leave to choose."""
        axes = ["on_host"] if self.budgets.device == "cpu" else ["on_device", "on_host", "kv_homes"]
        axes += ["kv_disk"] * (self.budgets.disk_bytes > 0) + ["quota"] * (schedule == "diagonal")
        return tuple(axes)

    def schedules(self) -> tuple[str, ...]:
        """Those that a job may choose from."""
        return ("diagonal", "zigzag")

    def micro_batches(self) -> list[int]:
        """All at once: without overheads, more rows are never slower."""
        return [MICRO_BATCH_TOKENS]

    def starts(self) -> Iterator[Point]:
        """A coarse grid."""
        values = {
            "on_device": (0.0, 0.5, 1.0),
            "on_host": (0.0, 0.5, 1.0),
            "kv_homes": (0.0, 0.5, 1.0),
            "kv_disk": (0.0, 1.0),
            "quota": QUOTAS,
        }
        for schedule in self.schedules():
            free = self.free_axes(schedule)
            for chosen in product(*(values[axis] for axis in free)):
                shares = dict(zip(free, chosen, strict=True))
                yield Point(**shares, embedding=False, schedule=schedule, micro_batch_tokens=MICRO_BATCH_TOKENS)

    def policy(self, point: Point) -> Policy | None:
        """The policy of a point, or None where it does not fit."""
        weights = placed_weights(
            self.memory_bytes, self.budgets.device, self.budgets.device_bytes, self.budgets.host_bytes, point.on_device, point.on_host
        )
        held = weight_bytes(self.spec, unit_homes(self.spec, weights))
        free = {"device": self.budgets.device_bytes - held["device"], "host": self.budgets.host_bytes - held["host"]}
        # A tied embedding costs nothing: its rows are the head's.
        resident = (point.embedding or weights.disk == 0) and free[self.computing] >= self.spec.embedding_bytes
        free[self.computing] -= self.spec.embedding_bytes * resident
        if min(free.values()) < 0:
            return None
        pools = kv_pools(free, self.budgets.disk_bytes, point.kv_homes, point.kv_disk)
        if not any(pools.values()):
            return None
        return Policy(
            device=self.budgets.device,
            dtype=self.dtype,
            weights=weights,
            kv=pool_fractions(pools),
            kv_device_bytes=pools["device"],
            kv_host_bytes=pools["host"],
            kv_disk_bytes=pools["disk"],
            host_ring_bytes=0,
            device_ring_bytes=0,
            workspace_bytes=0,
            embedding_resident=resident,
            schedule=point.schedule,
            max_num_seqs=len(self.workload),
            prefill_tokens=self.sizes.quota(sum(pools.values()), point.quota),
            micro_batch_tokens=point.micro_batch_tokens,
            page_tokens=1,
            compute_threads=1,
            io_threads=1,
        )
