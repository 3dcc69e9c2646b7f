"""A whole job, pass by pass, without doing it: which sequences each pass carries, what that moves and computes.

`simulate` plays one policy; `least_ideal_seconds` looks for T*, the least ideal time of a job within budgets.
Lengths are taken as certain: every answer is as long as the workload says, so a projection is never wrong.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen.options import TIERS
from flexgen.plan.cost import PassLoad, PassWork, ideal_seconds, memory_bytes, price, unit_homes, weight_bytes, weights_work
from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.workload import Workload
from flexgen.sizes import align_up

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PAGE_TOKENS = 16
# Jobs beyond these sizes are searched on a sample of their requests and extrapolated; then the winner is played whole.
SEARCH_REQUESTS = 512
SEARCH_LENGTHS = 64
PLAYED_REQUESTS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A job as played.

    Attributes:
        work: PassWork whose numbers are arrays over the passes.
        live: sequences in each pass. kv_bytes: home tier -> bytes of pages held during each pass.
        num_refused: requests whose KV can never fit; they are left out.
    """

    work: PassWork
    live: Ints
    kv_bytes: dict[str, Ints]
    num_refused: int

    @property
    def num_passes(self) -> int:
        return len(self.live)

    def passes(self) -> list[PassWork]:
        """The work of each pass."""
        names = [field.name for field in dataclasses.fields(PassWork)]
        columns = [np.broadcast_to(np.asarray(getattr(self.work, name)), self.live.shape).tolist() for name in names]
        return [PassWork(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    def total(self) -> PassWork:
        """The work of all passes."""
        names = [field.name for field in dataclasses.fields(PassWork)]
        return PassWork(**{name: _spread(getattr(self.work, name), self.num_passes).sum().item() for name in names})

    def ideal_seconds(self, machine: Machine, dtype: str) -> dict[str, Floats]:
        """Resource -> ideal seconds in each pass."""
        return {resource: _spread(each, self.num_passes) for resource, each in ideal_seconds(self.work, machine, dtype).items()}

    def busiest_seconds(self, machine: Machine, dtype: str) -> float:
        """The sum over the passes of the busiest resource's ideal time."""
        return float(np.maximum.reduce(list(self.ideal_seconds(machine, dtype).values())).sum())


def simulate(spec: ModelSpec, policy: Policy, workload: Workload) -> Simulation:
    """Play `workload` under `policy`.

    A request admitted by pass p computes its prompt there and yields its first token; its n-th and last comes from pass
    p + n - 1.  Requests enter longest answer first, in input order among equals, and none overtakes.  Diagonal: whenever
    there is room, within a bucket of prompt tokens that every pass refills.  Zigzag: into an empty block, all at once.
    Row: into an empty block, one micro-batch.
    """
    pools = {tier: size for tier in TIERS if (size := getattr(policy, f"kv_{tier}_bytes")) > 0}
    weights = weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    admissions, used, num_refused = _Job(spec, policy, workload, pools).play()
    num_passes = max((admission.end for admission in admissions), default=0)
    load = _load(spec, admissions, pools, num_passes)
    work = price(load, spec, policy, weights)
    live = np.asarray(sum(load.num_prompts.values()) + sum(load.next_tokens.values()), dtype=np.int64)
    return Simulation(
        work=work,
        live=_spread(live, num_passes).astype(np.int64),
        kv_bytes=used,
        num_refused=num_refused,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admission:
    """`count` equal sequences that enter together."""

    index: int  # of the pass
    prompt_len: int
    output_len: int
    count: int
    home: str

    @property
    def end(self) -> int:
        return self.index + self.output_len


class _Pool:
    """Pages of one tier, as projected for every future pass."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: Ints = np.zeros(256, dtype=np.int64)

    def until(self, end: int) -> Ints:
        """What is used in the passes before `end`."""
        if end > len(self.used):
            self.used = np.concatenate([self.used, np.zeros(max(end - len(self.used), len(self.used)), dtype=np.int64)])
        return self.used[:end]

    def fitting(self, index: int, held: Ints) -> int:
        """How many more sequences holding `held` bytes in the passes from `index` on fit in all of them."""
        return int(((self.capacity - self.until(index + len(held))[index:]) // held).min())

    def earliest(self, index: int, held: Ints) -> int:
        """A pass after `index` before which such a sequence cannot enter, given that it cannot at `index`.

        Where a pass leaves too little room for its age, it must be younger by then: young enough for the room.
        """
        room = self.capacity - self.used[index : index + len(held)]
        crowded = np.flatnonzero(room < held)
        ages = np.searchsorted(held, room[crowded], side="right") - 1
        return max(int((index + crowded - ages).max(initial=0)), index + 1)

    def add(self, index: int, held: Ints, count: int) -> None:
        self.used[index : index + len(held)] += held * count


class _Job:
    """The admission of one job: the loop over passes, as engine/schedule.py and engine/admission.py run it."""

    def __init__(self, spec: ModelSpec, policy: Policy, workload: Workload, pools: dict[str, int]) -> None:
        self.policy = policy
        self.pools = {tier: _Pool(size) for tier, size in pools.items() if getattr(policy.kv, tier) > 0}
        self.given = dict.fromkeys(self.pools, 0)
        longest = max((s + max(n, 1) for s, n in zip(workload.prompt_lens, workload.output_lens, strict=True)), default=0)
        self.held = held_kv_bytes(spec, policy.page_tokens, longest)
        runs = _runs(workload)
        most = max((pool.capacity for pool in self.pools.values()), default=-1)
        can_fit = [self.held[s + n - 1] <= most for s, n, _ in runs]
        self.num_refused = sum(run[2] for run, fits in zip(runs, can_fit, strict=True) if not fits)
        self.waiting = [list(run) for run, fits in zip(runs, can_fit, strict=True) if fits][::-1]  # the next one last
        self.live = 0
        self.credit, self.refilled = 0, -1  # of prompt tokens; the pass that last added to it
        self.admissions: list[_Admission] = []

    def _held(self, prompt_len: int, output_len: int) -> Ints:
        """Bytes of pages in each pass of a sequence's life (its last token gets no KV)."""
        return self.held[prompt_len : prompt_len + output_len]

    def play(self) -> tuple[list[_Admission], dict[str, Ints], int]:
        index = last_end = 0
        ending: list[tuple[int, int]] = []  # a heap of (first pass without them, sequences)
        while self.waiting:
            while ending and ending[0][0] <= index:
                self.live -= heapq.heappop(ending)[1]
            next_index = None
            if self.policy.schedule == "diagonal" or self.live == 0:
                first = len(self.admissions)
                next_index = self._admit(index)
                for admission in self.admissions[first:]:
                    heapq.heappush(ending, (admission.end, admission.count))
                    last_end = max(last_end, admission.end)
            if next_index is None or self.policy.schedule != "diagonal":
                index = ending[0][0]  # for want of a place, or in a closed block, nothing changes before a sequence ends
            else:
                index = min(next_index, last_end)  # there is no pass without a sequence
        return self.admissions, {tier: pool.until(last_end) for tier, pool in self.pools.items()}, self.num_refused

    def _admit(self, index: int) -> int | None:
        """Take in what may enter; the next pass that could take in more, None if that needs a sequence to end."""
        self._refill(index)
        taken = 0
        while self.waiting:
            prompt_len, output_len, waiting = self.waiting[-1]
            places, within_quota = self.policy.max_num_seqs - self.live, self._within_quota(prompt_len, taken)
            if places <= 0:
                return None
            if within_quota <= 0:
                return index + 1 + max(-self.credit, 0) // self.policy.prefill_tokens
            held = self._held(prompt_len, output_len)
            home, count = self._home(index, held, min(waiting, places, within_quota))
            if not count:
                return min(pool.earliest(index, self._reserved(tier, held)) for tier, pool in self.pools.items())
            self.pools[home].add(index, self._reserved(home, held), count)
            self.given[home] += count * (prompt_len + output_len - 1)
            self.admissions.append(_Admission(index=index, prompt_len=prompt_len, output_len=output_len, count=count, home=home))
            self.live += count
            self.credit -= count * prompt_len
            taken += count * prompt_len
            self.waiting[-1][2] -= count
            if not self.waiting[-1][2]:
                self.waiting.pop()
        return index + 1

    def _refill(self, index: int) -> None:
        """Every pass adds its quota; an empty block waits for no pass."""
        quota = self.policy.prefill_tokens
        self.credit = min(self.credit + quota * (index - self.refilled), quota)
        self.refilled = index
        if self.live == 0 and self.credit <= 0:
            self.credit += quota * (1 + -self.credit // quota)

    def _within_quota(self, prompt_len: int, taken: int) -> int:
        """How many such prompts the pass still admits; the last may overdraw, at the cost of the next passes."""
        if self.policy.schedule == "diagonal":
            return -(-max(self.credit, 0) // prompt_len)
        if self.policy.schedule == "row":
            return max((self.policy.micro_batch_tokens - taken) // prompt_len, int(taken == 0))
        return self.policy.max_num_seqs

    def _home(self, index: int, held: Ints, wanted: int) -> tuple[str, int]:
        """The tier furthest behind its share of the tokens given so far that has room; and how many enter there."""
        if len(self.pools) == 1:
            ((tier, pool),) = self.pools.items()
            return tier, min(pool.fitting(index, self._reserved(tier, held)), wanted)
        total = sum(self.given.values()) + 1
        for tier in sorted(self.pools, key=lambda tier: self.given[tier] - getattr(self.policy.kv, tier) * total):
            if self.pools[tier].fitting(index, self._reserved(tier, held)) > 0:
                return tier, 1
        return "", 0

    def _reserved(self, tier: str, held: Ints) -> Ints:
        """On disk a sequence takes from the start what it needs at its longest, so that its pages lie together."""
        return np.full_like(held, held[-1]) if tier == "disk" else held


def _runs(workload: Workload) -> list[tuple[int, int, int]]:
    """(prompt_len, output_len, count) of equal neighbours, longest answer first."""
    pairs = [(s, max(n, 1)) for s, n in zip(workload.prompt_lens, workload.output_lens, strict=True)]
    pairs.sort(key=lambda pair: -pair[1])
    return [(s, n, len(list(run))) for (s, n), run in itertools.groupby(pairs)]


def held_kv_bytes(spec: ModelSpec, page_tokens: int, max_tokens: int) -> Ints:
    """Bytes of the most pages that a sequence holds on its way to 0, 1, ... max_tokens tokens.

    Pages behind a window are freed, but the window begins and ends within pages.
    """
    tokens = np.arange(max_tokens + 1, dtype=np.int64)
    held = np.zeros_like(tokens)
    for group in spec.kv_groups:
        pages = -(-tokens // page_tokens)
        if group.window is not None:
            pages = np.minimum(pages, -(-group.window // page_tokens) + 1)
        held += pages * (page_tokens * group.num_layers * group.bytes_per_token)
    return held


def _load(spec: ModelSpec, admissions: Sequence[_Admission], pools: Iterable[str], num_passes: int) -> PassLoad:
    """What every pass carries, summed over all admissions at once."""
    table = np.array([(a.index, a.prompt_len, a.output_len, a.count) for a in admissions], dtype=np.int64).reshape(-1, 4)
    homes = np.array([a.home for a in admissions], dtype=object)
    pairs: list[Any] = [0 for _ in spec.kv_groups]
    prompt_tokens: dict[str, Any] = {}
    num_prompts: dict[str, Any] = {}
    next_tokens: dict[str, Any] = {}
    attended: dict[str, list[Any]] = {}
    for tier in pools:
        index, prompt_len, output_len, count = table[homes == tier].T
        prompt_tokens[tier] = _at(index, count * prompt_len, num_passes)
        num_prompts[tier] = _at(index, count, num_passes)
        next_tokens[tier] = _between(index + 1, index + output_len, count, num_passes)
        attended[tier] = []
        for number, group in enumerate(spec.kv_groups):
            window = group.window or int(table[:, 1:3].sum(axis=1).max(initial=1))
            beyond = np.maximum(prompt_len - window, 0)
            visible = prompt_len * (prompt_len + 1) // 2 - beyond * (beyond + 1) // 2
            pairs[number] = pairs[number] + _at(index, count * visible, num_passes)
            # The k-th next token sees prompt_len + k tokens, a ramp, until the window is full.
            full = index + np.clip(window - prompt_len + 1, 1, output_len)
            ramp = _between(index + 1, full, count * (prompt_len - index), num_passes)
            ramp = ramp + _between(index + 1, full, count, num_passes) * np.arange(num_passes)
            attended[tier].append(ramp + window * _between(full, index + output_len, count, num_passes))
    return PassLoad(
        prompt_tokens=prompt_tokens, num_prompts=num_prompts, next_tokens=next_tokens, prompt_pairs=pairs, attended_tokens=attended
    )


def _at(index: Ints, amount: Ints, num_passes: int) -> Ints:
    total = np.zeros(num_passes, dtype=np.int64)
    np.add.at(total, index, amount)
    return total


def _between(start: Ints, end: Ints, amount: Ints, num_passes: int) -> Ints:
    """`amount` in each pass from `start` to before `end`."""
    change = np.zeros(num_passes + 1, dtype=np.int64)
    np.add.at(change, start, amount)
    np.add.at(change, end, -amount)
    return change.cumsum()[:num_passes]


def _spread(amount: Any, num_passes: int) -> Floats:
    return np.broadcast_to(np.asarray(amount, dtype=np.float64), (num_passes,))


# ---------------------------------------------------------------------------------------------------------------------
# The least ideal time


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

    def axes(self) -> list[tuple[float, ...]]:
        """What `search_axes` says, then: the cap on sequences; whether the embedding is resident."""
        return [*search_axes(self.budgets.device, self.budgets.disk_bytes > 0), (1.0,), (0.0,)]

    def policy(self, point: tuple[float, ...], schedule: str) -> Policy | None:
        """The policy of a point, or None where it does not fit."""
        on_device, on_host, kv_homes, kv_disk, quota, cap, embedding = point
        weights = placed_weights(self.spec, self.budgets.device, self.budgets.device_bytes, self.budgets.host_bytes, on_device, on_host)
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


# What the search for T* and the planner share


def search_axes(device: str, kv_on_disk: bool) -> list[tuple[float, ...]]:
    """Coarse values of: weights on the device, on the host (of what fits); homes of KV; disk's share of KV; prefill quota."""
    if device == "cpu":
        return [(), _steps(10), (), _steps(2) if kv_on_disk else (), _steps(8)]
    if kv_on_disk:
        return [_steps(2), _steps(2), _steps(2), _steps(2), _steps(4)]
    return [_steps(4), _steps(2), _steps(2), (), _steps(6)]


def _steps(number: int) -> tuple[float, ...]:
    return tuple(each / number for each in range(number + 1))


def placed_weights(spec: ModelSpec, device: str, device_bytes: float, host_bytes: float, on_device: float, on_host: float) -> Fractions:
    """Home shares that use `on_device` and `on_host` (0 to 1) of the most that fits each tier."""
    whole = max(sum(memory_bytes(unit) for unit in spec.units), 1)
    share = on_device * min(max(device_bytes, 0) / whole, 1.0) if device != "cpu" else 0.0
    host = on_host * min(max(host_bytes, 0) / whole, 1.0 - share)
    disk = 1.0 - share - host
    return Fractions(device=share, host=host, disk=disk if disk > 1e-9 else 0.0)


def kv_pools(free: dict[str, int], disk_bytes: int, kv_homes: float, kv_disk: float, *, staged: float = 0.0) -> dict[str, int]:
    """Pool bytes per tier.

    Args:
        kv_homes: 0 takes the device, 1 the host, between both. kv_disk: the disk's share of all KV.
        staged: host bytes of staging that a byte on disk takes.
    """
    device = max(free["device"], 0) if kv_homes < 1 and kv_disk < 1 else 0
    room = max(free["host"], 0)
    host = room if (kv_homes > 0 or free["device"] <= 0) and kv_disk < 1 else 0
    most = min(disk_bytes, int(room / staged) if staged else disk_bytes)
    if kv_disk >= 1:
        return {"device": 0, "host": 0, "disk": most}
    # Each byte on the host brings `ratio` bytes on disk, and these their staging on the host.
    ratio = kv_disk / (1 - kv_disk)
    host = min(host, int(max(room - staged * ratio * device, 0) / (1 + staged * ratio)))
    return {"device": device, "host": host, "disk": min(int((device + host) * ratio), most)}


def pool_fractions(pools: dict[str, int]) -> Fractions:
    """The shares of all KV bytes that pools of these sizes stand for."""
    total = max(sum(pools.values()), 1)
    return Fractions(**{tier: size / total for tier, size in pools.items()})


class JobSizes:
    """What a job's requests need: their KV bytes, and the prompt tokens that keep a block full.

    Attributes:
        largest, smallest, all: KV bytes at their longest; of a single one with what windowed layers hold of it during
            its prompt. mean: of a live sequence. layer: of one layer of the longest.
        prompt_tokens: of all. longest_prompt, longest: tokens of a prompt, of a whole sequence.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, page_tokens: int) -> None:
        lengths = [(s, max(n, 1)) for s, n in zip(workload.prompt_lens, workload.output_lens, strict=True)]
        held = held_kv_bytes(spec, page_tokens, max(s + n for s, n in lengths))
        peaks = [int(held[s + n - 1]) for s, n in lengths]
        before = np.concatenate([[0], np.cumsum(held)])
        self._number, self._passes = len(lengths), sum(n for _, n in lengths)
        self.prompt_tokens = sum(s for s, _ in lengths)
        self.longest_prompt, self.longest = max(s for s, _ in lengths), max(s + n for s, n in lengths)
        whole = sum(
            (align_up(max(s + n for s, n in lengths), page_tokens) + page_tokens) * group.num_layers * group.bytes_per_token
            for group in spec.kv_groups
            if group.window is not None
        )
        self.largest, self.smallest, self.all = max(peaks) + whole, min(peaks) + whole, sum(peaks)
        self.mean = max(sum(int(before[s + n] - before[s]) for s, n in lengths) / self._passes, 1.0)
        self.layer = self.longest * max((group.bytes_per_token for group in spec.kv_groups), default=0)

    def block(self, pool_bytes: float) -> float:
        """About how many sequences pools keep alive."""
        return min(pool_bytes / self.mean, self._number)

    def quota(self, pool_bytes: float, share: float) -> int:
        """Prompt tokens per pass: from half of what replaces those that end (`share` 0) to the whole block at once (1)."""
        prompts = max(self.block(pool_bytes), 1.0) * self.prompt_tokens / self._number
        slowest = self._number / self._passes / 2
        return math.ceil(prompts * slowest ** (1 - share))


def sampled(workload: Workload) -> tuple[Workload, float]:
    """A job small enough to be played hundreds of times, and how many times larger the real one is.

    Requests are drawn evenly from the sorted lengths; where many lengths differ, neighbours are averaged.
    """
    lengths = sorted(zip(workload.output_lens, workload.prompt_lens, strict=True))
    scale = max(len(lengths) / SEARCH_REQUESTS, 1.0)
    if scale > 1:
        lengths = [lengths[int((each + 0.5) * scale)] for each in range(SEARCH_REQUESTS)]
    if len(set(lengths)) > SEARCH_LENGTHS:
        bounds = [each * len(lengths) // SEARCH_LENGTHS for each in range(SEARCH_LENGTHS + 1)]
        groups = [lengths[start:end] for start, end in itertools.pairwise(bounds)]
        means = [(round(sum(n for n, _ in group) / len(group)), round(sum(s for _, s in group) / len(group))) for group in groups]
        lengths = [mean for mean, group in zip(means, groups, strict=True) for _ in group]
    return Workload(prompt_lens=tuple(s for _, s in lengths), output_lens=tuple(n for n, _ in lengths)), scale


def extrapolated(
    spec: ModelSpec, policy: Policy, sample: Workload, scale: float, seconds: Callable[[Simulation], float]
) -> tuple[float, float]:
    """(share of refused requests, seconds) of a job `scale` times the sample.

    Ramp and tail happen once: what the sample takes longer than every other of its requests is the steady state's.
    """
    played = simulate(spec, policy, sample)
    refused, total = played.num_refused / max(len(sample), 1), seconds(played)
    if scale > 1:
        half = Workload(prompt_lens=sample.prompt_lens[::2], output_lens=sample.output_lens[::2])
        total += max(total - seconds(simulate(spec, policy, half)), 0.0) * 2 * (scale - 1)
    return refused, total


def descend(
    axes: Sequence[tuple[float, ...]], score: Callable[[tuple[float, ...]], tuple[float, float]], *, keep: int, rounds: int = 8
) -> list[tuple[float, ...]]:
    """The best points, best first: all of a grid, then some of the best moved along their axes in halving steps.

    Every axis lies within 0 and 1; one without values stays at 0, one of a single value starts there.  What is moved
    are the `keep` best points, and as many of different homes of KV (axes 2 and 3), between which no single step leads.
    """
    known: dict[tuple[float, ...], tuple[float, float]] = {}

    def look(point: tuple[float, ...]) -> tuple[float, float]:
        if point not in known:
            known[point] = score(point)
        return known[point]

    ranked = sorted(itertools.product(*(axis or (0.0,) for axis in axes)), key=look)
    best_by_homes: dict[tuple[float, ...], tuple[float, ...]] = {}
    for point in ranked:
        best_by_homes.setdefault(point[2:4], point)
    found: list[tuple[float, ...]] = []
    for start in dict.fromkeys([*ranked[:keep], *list(best_by_homes.values())[:keep]]):
        point, step = start, 0.5 / max(1, *(len(axis) for axis in axes))
        for _ in range(rounds):
            moves = [
                (*point[:axis], min(max(point[axis] + sign * step, 0.0), 1.0), *point[axis + 1 :])
                for axis in range(len(axes))
                for sign in (-1, 1)
                if axes[axis]
            ]
            nearest = min(moves, key=look, default=point)
            if look(nearest) < look(point):
                point = nearest
            else:
                step /= 2
        found.append(point)
    return sorted(found, key=look)
