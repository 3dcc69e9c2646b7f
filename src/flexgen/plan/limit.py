"""T*: the least ideal time of a job within budgets, which no choice and no engine can beat (the measure of both)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.plan.cost import memory_bytes, unit_homes, weight_bytes
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Policy
from flexgen.plan.search import (
    PLAYED_REQUESTS,
    JobSizes,
    descend,
    extrapolated,
    kv_pools,
    placed_weights,
    pool_fractions,
    sampled,
    search_axes,
)
from flexgen.plan.workload import Workload


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

    Searched over the shares of resident weights, the homes of KV, the prefill quota and max_num_seqs, under the
    diagonal and the zigzag schedule; a grid first, then refined where it was best.  `also` are policies known to be
    allowed (the one that ran): T* is at most theirs.

    Raises:
        OptionError: when the machine was not measured in `dtype`.
    """
    if not len(workload):
        return 0.0
    space = _IdealSpace(spec, budgets, workload, dtype)
    sample, scale = sampled(workload)

    def seconds(policy: Policy | None, lengths: Workload, scale: float) -> tuple[float, float]:
        if policy is None:
            return math.inf, math.inf
        return extrapolated(spec, policy, lengths, scale, lambda played: played.busiest_seconds(machine, dtype))

    candidates = list(also)
    for schedule, keep in (("diagonal", 4), ("zigzag", 1)):

        def score(point: tuple[float, ...], schedule: str = schedule) -> tuple[float, float]:
            return seconds(space.policy(point, schedule), sample, scale)

        found = [space.policy(point, schedule) for point in descend(space.axes(), score, keep=keep)]
        candidates += [policy for policy in found if policy is not None]
    lengths, scale = (workload, 1.0) if len(workload) <= PLAYED_REQUESTS else (sample, scale)
    return min((seconds(policy, lengths, scale) for policy in candidates), default=(0.0, math.inf))[1]


class _IdealSpace:
    """Points of the unit cube as policies that use every byte of the budgets for weights and KV."""

    def __init__(self, spec: ModelSpec, budgets: Budgets, workload: Workload, dtype: str) -> None:
        self.spec, self.budgets, self.dtype = spec, budgets, dtype
        self.workload = workload
        self.computing = "host" if budgets.device == "cpu" else "device"
        self.sizes = JobSizes(spec, workload, page_tokens=1)
        self.memory_bytes = sum(memory_bytes(unit) for unit in spec.units)

    def axes(self) -> list[tuple[float, ...]]:
        """What `search_axes` says, then: the cap on sequences; whether the embedding is resident."""
        return [*search_axes(self.budgets.device, self.budgets.disk_bytes > 0), (1.0,), (0.0,)]

    def policy(self, point: tuple[float, ...], schedule: str) -> Policy | None:
        """The policy of a point, or None where it does not fit."""
        on_device, on_host, kv_homes, kv_disk, quota, cap, embedding = point
        weights = placed_weights(
            self.memory_bytes, self.budgets.device, self.budgets.device_bytes, self.budgets.host_bytes, on_device, on_host
        )
        held = weight_bytes(self.spec, unit_homes(self.spec, weights))
        free = {"device": self.budgets.device_bytes - held["device"], "host": self.budgets.host_bytes - held["host"]}
        # A tied embedding costs nothing: its rows are the head's.
        resident = (embedding >= 0.5 or weights.disk == 0) and free[self.computing] >= self.spec.embedding_bytes
        free[self.computing] -= self.spec.embedding_bytes * resident
        if min(free.values()) < 0:
            return None
        pools = kv_pools(free, self.budgets.disk_bytes, kv_homes, kv_disk)
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
            schedule=schedule,
            max_num_seqs=max(1, round(cap * len(self.workload))),
            prefill_tokens=self.sizes.quota(sum(pools.values()), quota),
            micro_batch_tokens=1 << 20,
            page_tokens=1,
            compute_threads=1,
            io_threads=1,
        )
