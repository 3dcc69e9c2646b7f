"""From options to a policy: what is pinned stays, the rest is searched with realistic rates; every byte is accounted.

Budgets are hard: a policy that does not fit, with everything the process needs beside it, is no candidate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from flexgen.errors import CapacityError, OptionError
from flexgen.options import TIERS, EngineOptions, parse_placement
from flexgen.plan.cost import DTYPE_BYTES, memory_bytes, unit_homes
from flexgen.plan.expect import expected_seconds
from flexgen.plan.footprint import RING_UNITS, activation_bytes, footprint, scratch_bytes
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.search import JobSizes, descend, extrapolated, kv_pools, placed_weights, pool_fractions, sampled, search_axes
from flexgen.plan.simulate import PAGE_TOKENS, Simulation
from flexgen.plan.workload import Workload
from flexgen.sizes import GIB, align_up, format_size

# A ring holds what a link delivers in this time, but never more than this share of its tier.
RING_SECONDS = 0.3
RING_SHARE = 0.05
# Live sequences vary around what the pools hold on average.
SEQUENCE_SLACK = 1.15
# Between plans that are about as fast, the one with shorter passes (results come sooner, forecasts matter less), that moves
# less (what does not move is never late), and that leaves the disk's other users and its life alone.
LONG_PASS_PENALTY, MOVING_PENALTY, SPILL_PENALTY = 0.02, 0.02, 0.15
# A smaller share of KV is not worth a folder on disk.
LEAST_SPILL = 0.05
# What is planned for when nothing is known of the job.
NOMINAL_WORKLOAD = Workload(prompt_lens=(512,) * 256, output_lens=(128,) * 256)


def resolve(
    options: EngineOptions,
    spec: ModelSpec,
    machine: Machine,
    limits: Limits,
    workload: Workload,
    *,
    process_bytes: int,
    kv_tiers: Sequence[str] = ("device", "host", "disk"),
) -> Policy:
    """The policy of a run.

    Args:
        options: what they say is pinned; `dtype` must be a dtype by now, and `device` is taken from `limits`.
        process_bytes: resident memory of the process before any weight is loaded.
        kv_tiers: where KV may live; never chosen on disk when the offload folder lies in memory.

    Raises:
        OptionError: an option that cannot be honoured on this device.
        CapacityError: it does not fit; the message says what is missing and what to change.
    """
    planned = _servable(spec, limits, workload if len(workload) else NOMINAL_WORKLOAD)
    return _Planner(options, spec, machine, limits, planned, process_bytes, kv_tiers).best()


def _servable(spec: ModelSpec, limits: Limits, workload: Workload) -> Workload:
    """Without requests that no tier could ever hold: they end in errors of their own, and no room is kept for them."""
    most = max(limits.host_bytes, limits.device_bytes, limits.disk_bytes)
    lengths = zip(workload.prompt_lens, workload.output_lens, strict=True)
    kept = [(s, n) for s, n in lengths if spec.kv_bytes(s + n - 1) <= most]
    if len(kept) in (0, len(workload)):
        return workload
    return Workload(prompt_lens=tuple(s for s, _ in kept), output_lens=tuple(n for _, n in kept))


class _Planner:
    """The search of one `resolve`: points of the unit cube become policies that fit, or None."""

    def __init__(
        self,
        options: EngineOptions,
        spec: ModelSpec,
        machine: Machine,
        limits: Limits,
        workload: Workload,
        process_bytes: int,
        kv_tiers: Sequence[str],
    ) -> None:
        if options.dtype not in DTYPE_BYTES:
            raise OptionError(f"dtype={options.dtype!r}: a plan needs one of {', '.join(DTYPE_BYTES)}")
        self.options, self.spec, self.machine, self.limits, self.workload = options, spec, machine, limits, workload
        self.process_bytes, self.kv_tiers, self.dtype = process_bytes, kv_tiers, options.dtype
        self.on_cpu = limits.device == "cpu"
        self.computing = "host" if self.on_cpu else "device"
        self.weights = _pinned("weights", options.weights, limits.device)
        self.kv = _pinned("kv", options.kv, limits.device)
        for tier in TIERS:
            if self.kv is not None and getattr(self.kv, tier) > 0 and tier not in kv_tiers:
                raise OptionError(f"kv={options.kv!r}: KV can live on {' or '.join(kv_tiers)} here, not on {tier}")
        self.disk_bytes = limits.disk_bytes if "disk" in kv_tiers and not limits.offload_in_memory else 0
        self.sizes = JobSizes(spec, workload, PAGE_TOKENS)
        # Two layers of all KV on disk are staged: one that is attended to, one on its way.
        layer = max((group.bytes_per_token for group in spec.kv_groups), default=0)
        self.staged = 2 * layer / max(spec.kv_bytes_per_token, 1)

    def best(self) -> Policy:
        """Raises CapacityError."""
        if self._lacking(kv_bytes=0):
            raise CapacityError("; ".join(self._lacking(kv_bytes=self.sizes.smallest)))
        sample, scale = sampled(self.workload)
        known: dict[Policy, tuple[float, float]] = {}
        for micro_batch_tokens in self._micro_batches():

            def score(point: tuple[float, ...], micro_batch_tokens: int = micro_batch_tokens) -> tuple[float, float]:
                policy = self.policy(point, micro_batch_tokens)
                if policy is None:
                    return math.inf, math.inf
                if policy not in known:
                    known[policy] = extrapolated(self.spec, policy, sample, scale, lambda played: self._seconds(played, policy))
                refused, seconds = known[policy]
                moving = 2 - getattr(policy.weights, self.computing) - getattr(policy.kv, self.computing)
                penalty = LONG_PASS_PENALTY * point[4] + MOVING_PENALTY * moving + SPILL_PENALTY * policy.kv.disk
                return refused, seconds * (1 + penalty)

            policy = self.policy(descend(self._axes(), score, keep=4)[0], micro_batch_tokens)
            if policy is not None:
                return dataclasses.replace(policy, longest_sequence=self.sizes.longest)
        raise CapacityError("; ".join(self._lacking(kv_bytes=self.sizes.smallest)) or self._no_pool())

    def _seconds(self, played: Simulation, policy: Policy) -> float:
        return float(expected_seconds(played, self.spec, policy, self.machine).sum())

    def _micro_batches(self) -> list[int]:
        """The fewest rows at which dense rates are near their best, within reason; smaller ones where those do not fit."""
        if self.options.micro_batch_tokens is not None:
            return [self.options.micro_batch_tokens]
        points = self.machine.dense_rows.get(self.dtype, [])
        best = max((rate for _, rate in points), default=0.0)
        favourable = min((rows for rows, rate in points if rate >= 0.97 * best), default=512)
        first = 512 if self.on_cpu else min(max(favourable, 512), 4096)
        return [first, *(tokens for tokens in (256, 128, 64, 32) if tokens < first)]

    def _axes(self) -> list[tuple[float, ...]]:
        """Coarse values of what is not pinned."""
        on_device, on_host, kv_homes, kv_disk, quota = search_axes(self.limits.device, self.disk_bytes > 0)
        if self.weights is not None:
            on_device, on_host = (), ()
        if self.kv is not None:
            kv_homes, kv_disk = (), ()
        elif not self.on_cpu and not {"device", "host"} <= set(self.kv_tiers):
            kv_homes = (0.0,) if "device" in self.kv_tiers else (1.0,)
        if self.options.schedule != "diagonal" or self.options.prefill_tokens is not None:
            quota = ()
        return [on_device, on_host, kv_homes, kv_disk, quota, (0.0, 1.0)]

    def policy(self, point: tuple[float, ...], micro_batch_tokens: int) -> Policy | None:
        """The policy of a point, or None where it does not fit."""
        on_device, on_host, kv_homes, kv_disk, quota, embedding = point
        kv_disk = 0.0 if kv_disk < LEAST_SPILL else kv_disk
        spills = kv_disk > 0 or (self.kv is not None and self.kv.disk > 0)
        prefill_tokens = self.options.prefill_tokens or self._least_quota(micro_batch_tokens)
        bare = self._draft(Fractions(disk=1.0), micro_batch_tokens, prefill_tokens, spills=spills)
        weights = self.weights or self._place(bare, on_device, on_host)
        draft = self._draft(weights, micro_batch_tokens, prefill_tokens, spills=spills)
        if self.options.schedule == "diagonal" and self.options.prefill_tokens is None:
            pool_bytes = sum(self._pools(self._free(draft), kv_homes, kv_disk).values())
            prefill_tokens = self.sizes.quota(pool_bytes, quota)
            draft = self._draft(weights, micro_batch_tokens, prefill_tokens, spills=spills)
        # Rows are gathered as long as any unit streams: the same bytes of units save more reading.
        draft = dataclasses.replace(draft, embedding_resident=embedding >= 0.5 and draft.weights.disk == 0)
        free = self._free(draft)

        def free_for(max_num_seqs: int) -> dict[str, int]:
            grown = self._for(draft, max_num_seqs).workspace_bytes - draft.workspace_bytes
            return {tier: size - grown * (tier == self.computing) for tier, size in free.items()}

        def is_fed(number: int) -> bool:
            left = free_for(number)
            return min(left.values()) >= 0 and self._fed(self._pools(left, kv_homes, kv_disk)) >= number

        max_num_seqs = self.options.max_num_seqs or _largest(len(self.workload), is_fed)
        pools = self._pools(free_for(max_num_seqs), kv_homes, kv_disk)
        if min(free_for(max_num_seqs).values()) < 0 or max(pools.values()) < self.sizes.smallest:
            return None
        found = {f"kv_{tier}_bytes": size for tier, size in pools.items()}
        found["kv_staging_bytes"] = draft.kv_staging_bytes + int(self.staged * pools["disk"])
        if self.options.prefill_tokens is None:
            found["prefill_tokens"] = min(prefill_tokens, max_num_seqs * self.sizes.longest_prompt)
        return dataclasses.replace(self._for(draft, max_num_seqs), kv=self.kv or pool_fractions(pools), **found)

    def _least_quota(self, micro_batch_tokens: int) -> int:
        """Prompt tokens that a pass admits at the least: a zigzag block enters at once, a row is one micro-batch."""
        return {"diagonal": 1, "zigzag": self.sizes.prompt_tokens, "row": micro_batch_tokens}[self.options.schedule]

    def _fed(self, pools: dict[str, int]) -> int:
        """About how many sequences these pools keep alive."""
        return math.ceil(self.sizes.block(sum(pools.values())) * SEQUENCE_SLACK)

    def _draft(self, weights: Fractions, micro_batch_tokens: int, prefill_tokens: int, *, spills: bool) -> Policy:
        """A policy with everything but KV, for one sequence; if it `spills`, with staging for a prompt's KV on disk."""
        homes = unit_homes(self.spec, weights)
        from_disk = [unit.disk_bytes for unit, home in zip(self.spec.units, homes, strict=True) if home == "disk"]
        over_link = [unit.decoded_bytes for unit, home in zip(self.spec.units, homes, strict=True) if home != "device" and not self.on_cpu]
        draft = Policy(
            device=self.limits.device,
            dtype=self.dtype,
            weights=weights,
            kv=self.kv or Fractions(host=1.0 - spills, disk=float(spills)),
            kv_device_bytes=0,
            kv_host_bytes=0,
            kv_disk_bytes=0,
            host_ring_bytes=_ring(from_disk, self.machine.disk_read_bytes_per_s * RING_SECONDS, self.limits.host_bytes),
            kv_staging_bytes=self.sizes.layer * spills,
            device_ring_bytes=_ring(over_link, 0, self.limits.device_bytes),
            workspace_bytes=0,
            embedding_resident=False,
            schedule=self.options.schedule,
            max_num_seqs=1,
            prefill_tokens=prefill_tokens,
            micro_batch_tokens=micro_batch_tokens,
            page_tokens=PAGE_TOKENS,
            compute_threads=self.machine.cores,
            io_threads=2 if self.machine.cores <= 4 else 4,
        )
        scratch = scratch_bytes(self.spec, homes) if self.on_cpu else 0
        return dataclasses.replace(draft, workspace_bytes=self._activations(draft, 1) + scratch)

    def _activations(self, draft: Policy, max_num_seqs: int) -> int:
        return align_up(activation_bytes(self.spec, self.sizes, dataclasses.replace(draft, max_num_seqs=max_num_seqs)), 4096)

    def _for(self, draft: Policy, max_num_seqs: int) -> Policy:
        """The draft with the workspace of so many sequences."""
        grown = self._activations(draft, max_num_seqs) - self._activations(draft, draft.max_num_seqs)
        return dataclasses.replace(draft, max_num_seqs=max_num_seqs, workspace_bytes=draft.workspace_bytes + grown)

    def _free(self, draft: Policy) -> dict[str, int]:
        """Bytes left in memory."""
        used = footprint(draft, self.spec, self.limits, process_bytes=self.process_bytes)
        budgets = {"device": self.limits.device_bytes, "host": self.limits.host_bytes}
        return {tier: budget - sum(used.get(tier, {}).values()) for tier, budget in budgets.items()}

    def _place(self, bare: Policy, on_device: float, on_host: float) -> Fractions:
        """Shares of what is left for weights beside the rings and the KV of one request; all of them where that fits."""
        room: dict[str, float] = {**self._free(bare)}
        room[self.computing] -= self.sizes.largest
        whole = self._draft(Fractions(**{self.computing: 1.0}), bare.micro_batch_tokens, bare.prefill_tokens, spills=False)
        if self._free(whole)[self.computing] >= self.sizes.largest:
            room[self.computing] = sum(memory_bytes(unit) for unit in self.spec.units)
        elif not self.on_cpu:
            # What the device does not hold may fit on the host, which then needs no staging.
            rest = placed_weights(self.spec, self.limits.device, room["device"], math.inf, on_device, 1.0)
            beside = self._draft(rest, bare.micro_batch_tokens, bare.prefill_tokens, spills=bare.kv_staging_bytes > 0)
            room["host"] = math.inf if self._free(beside)["host"] >= 0 else room["host"]
        return placed_weights(self.spec, self.limits.device, room["device"], room["host"], on_device, on_host)

    def _pools(self, free: dict[str, int], kv_homes: float, kv_disk: float) -> dict[str, int]:
        """Pool bytes per tier; no more than all requests can need."""
        if self.kv is None:
            pools = kv_pools(free, self.disk_bytes, kv_homes, kv_disk, staged=self.staged)
        else:
            pools = self._pinned_pools(self.kv, {tier: max(size, 0) for tier, size in free.items()})
        # A sequence lives in one tier, so each tier may leave a gap of almost the largest.
        enough = self.sizes.all + self.sizes.largest * sum(size > 0 for size in pools.values())
        share = min(enough / max(sum(pools.values()), 1), 1.0)
        return {tier: int(size * share) for tier, size in pools.items()}

    def _pinned_pools(self, kv: Fractions, free: dict[str, int]) -> dict[str, int]:
        """The largest pools in the given proportion; those on disk take staging, or all of a folder in memory, from the host's."""
        host = kv.host + kv.disk * (self.staged + self.limits.offload_in_memory)
        totals = [free["host"] / host] if host else []
        totals += [free["device"] / kv.device] if kv.device else []
        totals += [self.limits.disk_bytes / kv.disk] if kv.disk else []
        return {tier: int(getattr(kv, tier) * min(totals)) for tier in TIERS}

    def _lacking(self, kv_bytes: int) -> list[str]:
        """Per tier that is too small, what the smallest plan there is needs, with one request of `kv_bytes`."""
        weights = self.weights or Fractions(disk=1.0)
        micro_batch_tokens = self._micro_batches()[-1]
        prefill_tokens = self.options.prefill_tokens or self._least_quota(micro_batch_tokens)
        draft = self._draft(weights, micro_batch_tokens, prefill_tokens, spills=self.kv is not None and self.kv.disk > 0)
        draft = self._for(draft, self.options.max_num_seqs or 1)
        kv_shares = self.kv or Fractions(**{self.computing: 1.0})
        used = footprint(draft, self.spec, self.limits, process_bytes=self.process_bytes)
        lines: list[str] = []
        for tier, budget in (("host", self.limits.host_bytes), ("device", self.limits.device_bytes)):
            parts = used.get(tier, {}) | {"KV of one request": math.ceil(kv_bytes * getattr(kv_shares, tier))}
            needed = sum(parts.values())
            if needed > budget and tier in used:
                listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
                lines.append(
                    f"{self.spec.name} needs at least {needed / GIB:.2f} GiB of {tier} memory ({listed}), {budget / GIB:.2f} GiB are in "
                    f"the budget, {(needed - budget) / GIB:.2f} GiB are missing: raise --{tier}-mem{self._advice(tier)}"
                )
        return lines

    def _no_pool(self) -> str:
        return (
            f"the KV cache of the smallest request needs {self.sizes.smallest / GIB:.2f} GiB in one tier, and none has them to spare: "
            f"raise --{self.computing}-mem{self._advice('disk')}"
        )

    def _advice(self, tier: str) -> str:
        options = self.options
        pins = {"--weights": self.weights, "--kv": self.kv}
        advice = [f"give {tier} a smaller share in {flag}" for flag, pin in pins.items() if pin is not None and getattr(pin, tier) > 0]
        for name in ("max_num_seqs", "prefill_tokens", "micro_batch_tokens"):
            if getattr(options, name) is not None:
                advice.append(f"lower --{name.replace('_', '-')}")
        return "".join(f", or {each}" for each in [*advice, "shorten the longest prompts"])


def _pinned(name: str, text: str | None, device: str) -> Fractions | None:
    if text is None:
        return None
    shares = parse_placement(text, name=name)
    if device == "cpu" and shares["device"] > 0:
        raise OptionError(f"{name}={text!r}: on a CPU device there is no device tier; divide between host and disk")
    return Fractions(**shares)


def _ring(streamed: Sequence[int], wanted: float, tier_bytes: int) -> int:
    """A few units, and a while of the link where there is room, but no more than what streams."""
    return align_up(min(max(RING_UNITS * max(streamed, default=0), int(min(wanted, RING_SHARE * tier_bytes))), sum(streamed)), 4096)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` for which `holds`, which no longer does once it does not."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
