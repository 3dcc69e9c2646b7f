"""The space of policies: points of the unit cube become policies that fit the budgets, or none.

Budgets are hard: every byte is accounted for, including everything that the process needs besides.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from flexgen.base.option_values import parse_placement
from flexgen.errors import OptionError
from flexgen.options import DTYPE_BYTES, TIERS, WEIGHT_HOMES, EngineOptions
from flexgen.plan.machine import Limits, Machine, has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.blocks import ALONE, Blocks
from flexgen.plan.policy import PAGE_TOKENS, Fractions, Policy
from flexgen.plan.price.memory import PlacedWeights
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.price.weights import active_share, can_stay_encoded
from flexgen.plan.search.drafts import Drafts, WeightSizes
from flexgen.plan.search.kv_pools import KVHomes, KVPools
from flexgen.plan.search.point import AXES, Point
from flexgen.plan.search.steady import FreeMemory
from flexgen.plan.workload import Workload

# The number of live sequences may exceed the pools' average by this factor.
SEQUENCE_SLACK = 1.15
# A smaller share of KV on disk is not worth an offload folder.
LEAST_SPILL = 0.05

# The most tokens of a micro-batch, unless pinned.
MAX_MICRO_BATCH_TOKENS = 16384


class Space:
    """The policies for one model, machine, job and set of options.

    With several blocks in flight the job is that of one of them, and each has pools of its own.

    Raises:
        OptionError: An option cannot be honoured on this device.
    """

    def __init__(
        self,
        options: EngineOptions,
        spec: ModelSpec,
        machine: Machine,
        limits: Limits,
        workload: Workload,
        process_bytes: int,
        kv_tiers: Sequence[str],
        blocks: Blocks = ALONE,
    ) -> None:
        if options.dtype not in DTYPE_BYTES:
            raise OptionError(f"dtype={options.dtype!r}: a plan needs one of {', '.join(DTYPE_BYTES)}")
        self.options, self.spec, self.machine, self.workload = options, spec, machine, workload
        self.dtype = options.dtype
        self.on_cpu = not has_device_tier(limits.device)
        self.computing = "host" if self.on_cpu else "device"
        options.check_placement(limits.device)
        self.weight_sizes = WeightSizes.of(spec, limits.device)
        self.weights = _pinned("weights", options.weights, tuple(WEIGHT_HOMES))
        if self.weights is not None and self.weights.encoded and not self.weight_sizes.can_stay_encoded:
            raise OptionError(f"weights={options.weights!r}: {_why_not_encoded(spec)}: give that share to host")
        self.kv = _pinned("kv", options.kv, TIERS)
        for tier in TIERS:
            if self.kv is not None and getattr(self.kv, tier) > 0 and tier not in kv_tiers:
                raise OptionError(f"kv={options.kv!r}: KV can live on {' or '.join(kv_tiers)} here, not on {tier}")
        self._allowed_kv_tiers, self.blocks = kv_tiers, blocks
        self.sizes = JobSizes(spec, workload, PAGE_TOKENS)
        self.placed = PlacedWeights(spec, limits.device)
        self.drafts = Drafts(
            spec, machine, limits, self.sizes, self.placed, dtype=self.dtype, process_bytes=process_bytes, kv=self.kv,
            num_seqs=options.max_num_seqs or 1, num_blocks=blocks.num_blocks,
        )  # fmt: skip
        self._take_limits(limits)

    def _take_limits(self, limits: Limits) -> None:
        """Set the attributes that follow from the budgets."""
        self.limits = limits
        allowed = self._allowed_kv_tiers
        self.disk_bytes = limits.disk_bytes if "disk" in allowed and not limits.offload_in_memory else 0
        exists = {"device": not self.on_cpu, "host": True, "disk": self.disk_bytes > 0}
        self.kv_tiers = tuple(tier for tier in TIERS if tier in allowed and exists[tier])
        self.pools = KVPools(self.spec, self.sizes, limits, self.disk_bytes, self.kv, self.blocks.num_blocks)

    def micro_batches(self) -> list[int]:
        """Return the sizes of micro-batches to choose from.

        They reach from the rows at which dense rates are near their best even for experts, which see a part of them, down to what fits
        anywhere. With the row schedule, a micro-batch is all that a pass carries, so larger ones are worth trying whatever the rates.
        """
        if self.options.micro_batch_tokens is not None:
            return [self.options.micro_batch_tokens]
        points = self.machine.dense[self.machine.known(self.dtype)]
        best = max(rate.best for _, rate in points)
        favourable = round(min(rows for rows, rate in points if rate.best >= 0.97 * best))
        first = 512 if self.on_cpu else min(max(favourable, 512), 4096)
        share = min((active_share(unit, self.dtype) for unit in self.spec.units if unit.flops_per_token > 0), default=1.0)
        widest = MAX_MICRO_BATCH_TOKENS if self.options.schedule == "row" else min(first / share, MAX_MICRO_BATCH_TOKENS)
        sizes = [first * 2**power for power in range(MAX_MICRO_BATCH_TOKENS.bit_length()) if first * 2**power <= max(widest, first)]
        return [*reversed(sizes), *(tokens for tokens in (256, 128, 64, 32) if tokens < first)]

    def schedules(self) -> tuple[str, ...]:
        """Return the schedules to choose from; "row" only if the options state it, since it is for comparisons only."""
        if self.options.schedule != "auto":
            return (self.options.schedule,)
        return ("diagonal",) if self.options.prefill_tokens is not None else ("diagonal", "zigzag")

    def host_attentions(self) -> tuple[bool, ...]:
        """Return whether the host attends to KV in its memory, both answers where that is to choose."""
        chosen = {"on": (True,), "off": (False,), "auto": (True, False)}[self.options.host_attention]
        nothing_to_choose = self.on_cpu or "host" not in self.kv_tiers or (self.kv is not None and not self.kv.host)
        return chosen[:1] if nothing_to_choose else chosen

    def free_axes(self, schedule: str) -> tuple[str, ...]:
        """Return the axes that are not pinned and make a difference."""
        free = set(AXES) - ({"cap"} if self.options.max_num_seqs is not None else set())
        if self.weights is not None:
            free -= {"on_device", "on_host", "encoded"}
        if not self.weight_sizes.can_stay_encoded:
            free -= {"encoded"}
        if self.on_cpu:
            free -= {"on_device", "kv_homes"}
        if self.kv is not None:
            free -= {"kv_homes", "kv_disk"}
        elif not {"device", "host"} <= set(self.kv_tiers):
            free -= {"kv_homes"}
        if not self.disk_bytes:
            free -= {"kv_disk"}
        if schedule != "diagonal" or self.options.prefill_tokens is not None:
            free -= {"quota"}
        return tuple(axis for axis in AXES if axis in free)

    def default_homes(self) -> float:
        """Return `kv_homes` for KV whose homes are not free: the device, unless KV may not live there."""
        return 0.0 if "device" in self.kv_tiers else 1.0

    def policy(self, point: Point) -> Policy | None:
        """Return the policy of a point, or None where it does not fit."""
        kv = KVHomes(point.kv_homes, 0.0 if point.kv_disk < LEAST_SPILL else point.kv_disk)
        spills = kv.disk > 0 or (self.kv is not None and self.kv.disk > 0)
        bare = self._bare(point, spills=spills)
        weights = self.weights or self._place(bare, point)
        how = {"spills": spills, "host_attention": bare.host_attention}
        draft = self.drafts.draft(weights, point.schedule, point.micro_batch_tokens, bare.prefill_tokens, **how)
        if point.schedule == "diagonal" and self.options.prefill_tokens is None:
            draft = self._with_quota(draft, kv, point.quota, spills=spills)
        # Rows are gathered as long as any unit streams, because units of the same bytes at home save more reading than the embedding.
        if point.embedding and weights.disk == 0:
            resident = dataclasses.replace(draft, embedding_resident=True)
            draft = resident if self._holds_largest(resident, kv) else draft
        max_num_seqs = self.options.max_num_seqs or max(round(point.cap * self._num_seqs_fed(draft, kv)), 1)
        left = self._left(draft, self.drafts.free(draft), max_num_seqs)
        pools = self.pools.sized(left, kv, max_num_seqs)
        if min(left.values()) < 0 or max(pools.values()) < self.sizes.smallest:
            return None
        chosen = self.pools.given_to(self.drafts.for_seqs(draft, max_num_seqs), pools, max_num_seqs)
        quota = self.options.prefill_tokens or min(draft.prefill_tokens, max_num_seqs * self.sizes.longest_prompt)
        chosen = dataclasses.replace(chosen, longest_sequence=self.sizes.longest, prefill_tokens=quota)
        return self.drafts.with_copies(chosen)

    def _with_quota(self, draft: Policy, kv: KVHomes, quota: float, *, spills: bool) -> Policy:
        """Return the draft with that share of prompt tokens per pass, or with the most that leaves room for the KV of one request."""

        def admitting(tokens: int) -> Policy:
            how = {"spills": spills, "host_attention": draft.host_attention}
            return self.drafts.draft(draft.weights, draft.schedule, draft.micro_batch_tokens, tokens, **how)

        wanted = self.sizes.quota(sum(self.pools.sized(self.drafts.free(draft), kv).values()), quota)
        if self._holds_largest(admitting(wanted), kv):
            return admitting(wanted)
        return admitting(_largest(wanted, lambda tokens: self._holds_largest(admitting(tokens), kv)))

    def _holds_largest(self, draft: Policy, kv: KVHomes) -> bool:
        """Return whether the draft leaves room for the KV of the largest request."""
        left = self._left(draft, self.drafts.free(draft), self.options.max_num_seqs or 1)
        return min(left.values()) >= 0 and max(self.pools.sized(left, kv).values()) >= self.sizes.largest

    def _num_seqs_fed(self, draft: Policy, kv: KVHomes) -> int:
        """Return the largest number of sequences that can be alive in the pools which remain beside their workspace."""
        free = self.drafts.free(draft)

        def is_fed(number: int) -> bool:
            left = self._left(draft, free, number)
            pools = self.pools.sized(left, kv)
            return min(left.values()) >= 0 and max(pools.values()) >= self.sizes.smallest and self._fed(pools) >= number

        most = min(self._fed(self.pools.sized(free, kv)), len(self.workload))  # pools shrink as workspaces grow
        if draft.schedule == "row":
            most = min(most, max(draft.micro_batch_tokens // self.sizes.shortest_prompt, 1))
        return _largest(most, is_fed)

    def free_memory(self, point: Point, *, spills: bool) -> tuple[Policy, FreeMemory]:
        """Return a policy with all weights on disk, and the memory that it leaves for weights and KV if the sequences are the fewest.

        Where pages come to the device, the policy is that of many sequences, whose micro-batches are full.
        """
        bare = self._bare(point, spills=spills)
        many = 1024
        grown: dict[str, float] = {}  # a pinned number of sequences has its workspace already
        if self.options.max_num_seqs is None:
            grown = {tier: size / many for tier, size in self.drafts.growth(bare, 1 + many).items()}
        free = self.drafts.free(bare)
        return self.drafts.for_seqs(bare, many) if bare.kv_ring_bytes else bare, FreeMemory(
            memory_bytes={"device": free["device"], "host": free["host"], "disk": self.disk_bytes},
            disk_growth=self.spec.disk_kv_growth,
            sequence_bytes=grown,
            kv_bytes=self.blocks.num_blocks * self.sizes.mean,
            staged=self.pools.staged,
        )

    def place_like(self, point: Point, weights: Mapping[str, float], *, spills: bool) -> Point:
        """Return the point whose weights have about these shares."""
        in_host_memory = weights.get("host", 0.0) + weights.get("encoded", 0.0)
        encoded = min(weights.get("encoded", 0.0) / in_host_memory, 1.0) if in_host_memory > 1e-9 else 0.0
        room = self._weights_room(self._bare(point, spills=spills), 1.0, encoded)
        device = self.weight_sizes.most_on_device(room)
        on_device = min(weights.get("device", 0.0) / device, 1.0) if device else 0.0
        host = min(max(room["host"], 0.0) / self.weight_sizes.in_host_memory(encoded), 1.0 - on_device * device)
        on_host = min(in_host_memory / host, 1.0) if host > 1e-9 else 0.0
        return dataclasses.replace(point, on_device=on_device, on_host=on_host, encoded=encoded)

    def _bare(self, point: Point, *, spills: bool) -> Policy:
        prefill_tokens = self.options.prefill_tokens or self._least_quota(point.schedule, point.micro_batch_tokens)
        choices = self.host_attentions()
        how = {"spills": spills, "host_attention": point.host_attention if point.host_attention in choices else choices[0]}
        return self.drafts.draft(Fractions(disk=1.0), point.schedule, point.micro_batch_tokens, prefill_tokens, **how)

    def _least_quota(self, schedule: str, micro_batch_tokens: int) -> int:
        """Return the fewest prompt tokens that a pass admits: a zigzag block enters at once, a row is one micro-batch."""
        return {"diagonal": 1, "zigzag": self.sizes.prompt_tokens, "row": micro_batch_tokens}[schedule]

    def _fed(self, pools: dict[str, int]) -> int:
        """Return the approximate number of sequences that these pools keep alive."""
        return math.ceil(self.sizes.block(sum(pools.values())) * SEQUENCE_SLACK)

    def _place(self, bare: Policy, point: Point) -> Fractions:
        """Return shares of the room that the rings and the KV of one request leave for weights; all of them where that fits."""
        encoded = point.encoded * self.weight_sizes.can_stay_encoded
        room = self._weights_room(bare, point.on_device, encoded)
        placed = self.weight_sizes.placed(room, point.on_device, point.on_host, encoded)
        homes = self.placed.of(placed).homes
        lived = {home: share for home in WEIGHT_HOMES if (share := getattr(placed, home)) and home in homes}  # one without a unit has none
        return Fractions(**{home: share / sum(lived.values()) for home, share in lived.items()})

    def _weights_room(self, bare: Policy, on_device: float, encoded: float) -> dict[str, float]:
        """Return the bytes per tier that weights may take."""
        room: dict[str, float] = {**self.drafts.free(bare)}
        room[self.computing] -= self.blocks.num_blocks * self.sizes.largest
        drafted = (bare.schedule, bare.micro_batch_tokens, bare.prefill_tokens)
        computing = Fractions(host=1.0 - encoded, encoded=encoded) if self.on_cpu else Fractions(device=1.0)
        whole = self.drafts.draft(computing, *drafted, spills=False, host_attention=bare.host_attention)
        if self.drafts.free(whole)[self.computing] >= self.blocks.num_blocks * self.sizes.smallest:
            room[self.computing] = math.inf
        elif not self.on_cpu:
            # The weights that the device does not hold may all fit on the host, which then needs no staging.
            rest = self.weight_sizes.placed({**room, "host": math.inf}, on_device, 1.0, encoded)
            how = {"spills": bare.kv_staging_bytes > 0, "host_attention": bare.host_attention}
            beside = self.drafts.draft(rest, *drafted, **how)
            room["host"] = math.inf if self.drafts.free(beside)["host"] >= 0 else room["host"]
        return room

    def _left(self, draft: Policy, free: dict[str, int], max_num_seqs: int) -> dict[str, int]:
        """Return the bytes that remain of `free` once the workspace is that of so many sequences."""
        grown = self.drafts.growth(draft, max_num_seqs)
        return {tier: size - grown[tier] for tier, size in free.items()}

    def within(self, limits: Limits) -> Space:
        """Return the policies for the same requests within other budgets."""
        again = copy.copy(self)
        again.drafts = self.drafts.within(limits)
        again._take_limits(limits)
        return again

    def smallest(self, weights: Fractions, *, spills: bool) -> Policy:
        """Return the plan with these weights that needs the least memory, without KV; if it `spills`, with staging for KV on disk."""
        schedule, micro_batch_tokens = self.schedules()[0], self.micro_batches()[-1]
        prefill_tokens = self.options.prefill_tokens or self._least_quota(schedule, micro_batch_tokens)
        host_attention = self.host_attentions()[0]
        return self.drafts.draft(weights, schedule, micro_batch_tokens, prefill_tokens, spills=spills, host_attention=host_attention)


def _why_not_encoded(spec: ModelSpec) -> str:
    """Return why keeping weights encoded in host memory would save none of it."""
    if any(can_stay_encoded(unit) for unit in spec.units):
        return f"the device decodes {spec.number_format} itself, so that host memory holds weights as stored anyway"
    return f"the weights ({spec.number_format}) take no less memory as stored than in {spec.dtype}"


def _pinned(name: str, text: str | None, homes: Sequence[str]) -> Fractions | None:
    return None if text is None else Fractions(**parse_placement(text, name=name, homes=homes))


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `most` for which `holds` is true, given that it stays false once it is false."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
