"""A whole job, pass by pass, without doing it: which sequences each pass carries, what that moves and computes.

Every answer is as long as the workload expects.  Where room is kept for more, it falls free when the answer ends; where for less, the
answer takes what it needs all the same (the engine would compute a neighbour again).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen.options import TIERS
from flexgen.plan.cost import PassLoad, PassWork, ideal_seconds, price, unit_homes, weights_work
from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Policy
from flexgen.plan.queue import Queue, Run, queue_of
from flexgen.plan.workload import Workload

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PAGE_TOKENS = 16
# Equal sequences that enter together are given homes in about so many steps; up to twice as many, one by one, as the engine does.
HOME_STEPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A job as played.

    Attributes:
        work: PassWork whose numbers are arrays over the passes.
        live: sequences in each pass. kv_bytes: home tier -> bytes of pages held during each pass.
        first_passes, end_passes: of every group of equal requests that entered together, its first pass and the one after its last.
        num_refused: requests whose KV can never fit; they are left out.
    """

    work: PassWork
    live: Ints
    kv_bytes: dict[str, Ints]
    first_passes: Ints
    end_passes: Ints
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


def simulate(spec: ModelSpec, policy: Policy, job: Workload | Queue, *, weights: PassWork | None = None) -> Simulation:
    """Play `job` under `policy`.

    A request admitted by pass p computes its prompt there and yields its first token; its n-th and last comes from pass
    p + n - 1.  Requests enter longest reserved answer first, in input order among equals, and none overtakes.  Diagonal: whenever
    there is room, within a bucket of prompt tokens that every pass refills.  Zigzag: into an empty block, all at once.
    Row: into an empty block, one micro-batch.  What prompts share is computed by the first that has it, and held from then on.

    Args:
        weights: what every pass moves of them, where that is known already.
    """
    pools = {tier: size for tier in TIERS if (size := getattr(policy, f"kv_{tier}_bytes")) > 0}
    weights = weights or weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    admissions, used, num_refused = _Job(spec, policy, job if isinstance(job, tuple) else queue_of(job), pools).play()
    num_passes = max((admission.end for admission in admissions), default=0)
    load = _load(spec, admissions, pools, num_passes)
    work = price(load, spec, policy, weights)
    live = np.asarray(sum(load.num_prompts.values()) + sum(load.next_tokens.values()), dtype=np.int64)
    return Simulation(
        work=work,
        live=_spread(live, num_passes).astype(np.int64),
        kv_bytes=used,
        first_passes=np.array([admission.index for admission in admissions], dtype=np.int64),
        end_passes=np.array([admission.end for admission in admissions], dtype=np.int64),
        num_refused=num_refused,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admission:
    """`count` equal sequences that enter together."""

    index: int  # of the pass
    prompt_len: int
    output_len: int
    reserved_len: int
    found_len: int
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
        self.until(index + len(held))
        self.used[index : index + len(held)] += held * count


class _Job:
    """The admission of one job: the loop over passes, as engine/schedule.py and engine/admission.py run it."""

    def __init__(self, spec: ModelSpec, policy: Policy, queue: Queue, pools: dict[str, int]) -> None:
        self.policy = policy
        self.pools = {tier: _Pool(size) for tier, size in pools.items() if getattr(policy.kv, tier) > 0}
        self.shares = {tier: getattr(policy.kv, tier) for tier in self.pools}
        self.given = dict.fromkeys(self.pools, 0)
        self.held = held_kv_bytes(spec, policy.page_tokens, max((run.prompt_len + run.most for run in queue), default=0))
        self.shared = shared_kv_bytes(spec, policy.page_tokens, max((run.found_len for run in queue), default=0))
        capacity = max((pool.capacity for pool in self.pools.values()), default=-1)
        can_fit = [self.held[run.prompt_len + run.most - 1] <= capacity for run in queue]
        self.num_refused = sum(run.count for run, fits in zip(queue, can_fit, strict=True) if not fits)
        self.waiting = [run for run, fits in zip(queue, can_fit, strict=True) if fits][::-1]  # the next one last
        self.left = self.waiting[-1].count if self.waiting else 0  # of it, since some may have entered
        self._keep_prefix()
        self.live = 0
        self.credit, self.refilled = 0, -1  # of prompt tokens; the pass that last added to it
        self.early = any(run.reserved_len > run.output_len for run in self.waiting)
        self.admissions: list[_Admission] = []

    def _keep_prefix(self) -> None:
        """Set aside, in each tier, the longest shared beginning; those of other requests come after it and are as long at most."""
        prefix = int(self.shared[max((run.found_len for run in self.waiting), default=0)])
        largest = max((int(self.held[run.prompt_len + run.most - 1]) for run in self.waiting), default=0)
        for pool in self.pools.values():  # a request that needs it all makes the prefix give way
            pool.capacity = max(pool.capacity - prefix, min(pool.capacity, largest))

    def _held(self, run: Run | _Admission) -> Ints:
        """Bytes of its own pages in each pass of a sequence's life (its last token gets no KV)."""
        return self.held[run.prompt_len : run.prompt_len + run.reserved_len] - self.shared[run.found_len]

    def _end(self, admission: _Admission) -> None:
        """Its places fall free, and what was kept for more tokens than there were."""
        self.live -= admission.count
        if admission.reserved_len > admission.output_len:
            kept = self._reserved(admission.home, self._held(admission))
            self.pools[admission.home].add(admission.end, kept[admission.output_len :], -admission.count)

    def play(self) -> tuple[list[_Admission], dict[str, Ints], int]:
        index = last_end = 0
        ending: list[tuple[int, int, _Admission]] = []  # a heap of (first pass without them, number, sequences)
        while self.waiting:
            while ending and ending[0][0] <= index:
                self._end(heapq.heappop(ending)[2])
            next_index = None
            if self.policy.schedule == "diagonal" or self.live == 0:
                first = len(self.admissions)
                next_index = self._admit(index)
                for number, admission in enumerate(self.admissions[first:], first):
                    heapq.heappush(ending, (admission.end, number, admission))
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
            run = self.waiting[-1]
            places, within_quota = self.policy.max_num_seqs - self.live, self._within_quota(run.own_len, taken)
            if places <= 0:
                return None
            if within_quota <= 0:
                return index + 1 + max(-self.credit, 0) // self.policy.prefill_tokens
            held = self._held(run)
            entering = self._homes(index, held, run.own_len + run.reserved_len - 1, min(self.left, places, within_quota))
            if not entering:
                earliest = min(pool.earliest(index, self._reserved(tier, held)) for tier, pool in self.pools.items())
                # Room that was kept for more falls free with the next answer that ends.
                return None if self.live and self.early else earliest
            for home, number in entering.items():
                self.pools[home].add(index, self._reserved(home, held), number)
                self.admissions.append(
                    _Admission(
                        index=index, prompt_len=run.prompt_len, output_len=run.output_len, reserved_len=run.reserved_len,
                        found_len=run.found_len, count=number, home=home,
                    )
                )  # fmt: skip
            count = sum(entering.values())
            self.live += count
            self.credit -= count * run.own_len
            taken += count * run.own_len
            self.left -= count
            if not self.left:
                self.waiting.pop()
                self.left = self.waiting[-1].count if self.waiting else 0
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

    def _homes(self, index: int, held: Ints, tokens: int, wanted: int) -> dict[str, int]:
        """How many of `wanted` equal sequences of so many tokens enter now, by home.

        Each goes to the tier with room that is furthest behind its share of the tokens given so far; of very many, some at once.
        """
        room = {tier: pool.fitting(index, self._reserved(tier, held)) for tier, pool in self.pools.items()}
        entering: dict[str, int] = {}
        if len(room) == 1:
            ((tier, most),) = room.items()
            return {tier: min(most, wanted)} if most > 0 else {}
        total = sum(self.given.values()) + 1
        step = max(wanted // HOME_STEPS, 1)
        while wanted > 0:
            behind = {tier: self.given[tier] - self.shares[tier] * total for tier, most in room.items() if most > 0}
            if not behind:
                break
            tier = min(behind, key=behind.__getitem__)
            number = min(step, room[tier], wanted)
            wanted -= number
            room[tier] -= number
            entering[tier] = entering.get(tier, 0) + number
            self.given[tier] += number * tokens
            total += number * tokens
        return entering

    def _reserved(self, tier: str, held: Ints) -> Ints:
        """On disk a sequence takes from the start what it needs at its longest, so that its pages lie together."""
        return np.full_like(held, held[-1]) if tier == "disk" else held


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


def shared_kv_bytes(spec: ModelSpec, page_tokens: int, max_tokens: int) -> Ints:
    """Bytes of pages that sequences with 0, 1, ... max_tokens tokens in common hold once; windows soon move on from them."""
    pages = np.arange(max_tokens + 1, dtype=np.int64) // page_tokens
    page_bytes = sum(page_tokens * group.num_layers * group.bytes_per_token for group in spec.kv_groups if group.window is None)
    return pages * page_bytes


def _load(spec: ModelSpec, admissions: Sequence[_Admission], pools: Iterable[str], num_passes: int) -> PassLoad:
    """What every pass carries, summed over all admissions at once."""
    table = np.array([(a.index, a.prompt_len, a.output_len, a.count, a.found_len) for a in admissions], dtype=np.int64).reshape(-1, 5)
    homes = np.array([a.home for a in admissions], dtype=object)
    pairs: list[Any] = [0 for _ in spec.kv_groups]
    prompt_tokens: dict[str, Any] = {}
    num_prompts: dict[str, Any] = {}
    next_tokens: dict[str, Any] = {}
    attended: dict[str, list[Any]] = {}
    for tier in pools:
        index, prompt_len, output_len, count, found_len = table[homes == tier].T
        prompt_tokens[tier] = _at(index, count * (prompt_len - found_len), num_passes)
        num_prompts[tier] = _at(index, count, num_passes)
        next_tokens[tier] = _between(index + 1, index + output_len, count, num_passes)
        attended[tier] = []
        for number, group in enumerate(spec.kv_groups):
            window = group.window or int(table[:, 1:3].sum(axis=1).max(initial=1))
            visible = visible_pairs(prompt_len, window) - visible_pairs(found_len, window)
            pairs[number] = pairs[number] + _at(index, count * visible, num_passes)
            # The k-th next token sees prompt_len + k tokens, a ramp, until the window is full.
            full = index + np.clip(window - prompt_len + 1, 1, output_len)
            ramp = _between(index + 1, full, count * (prompt_len - index), num_passes)
            ramp = ramp + _between(index + 1, full, count, num_passes) * np.arange(num_passes)
            attended[tier].append(ramp + window * _between(full, index + output_len, count, num_passes))
    return PassLoad(
        prompt_tokens=prompt_tokens, num_prompts=num_prompts, next_tokens=next_tokens, prompt_pairs=pairs, attended_tokens=attended
    )


def visible_pairs(prompt_len: Any, window: int | float) -> Any:
    """(query, visible token) pairs of whole prompts."""
    beyond = np.maximum(prompt_len - window, 0)
    return (prompt_len * (prompt_len + 1) - beyond * (beyond + 1)) // 2


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
