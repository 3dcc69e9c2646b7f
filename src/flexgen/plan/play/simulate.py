"""Simulates a whole job pass by pass: which sequences each pass carries, and the work that it is.

Every answer is as long as the workload expects. Room that is kept for more falls free when the answer ends; an answer for which less is
kept takes the room that it needs all the same (the engine would preempt another sequence).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen.options import SCHEDULES, TIERS
from flexgen.plan.machine import Machine, has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.admit import admit
from flexgen.plan.play.rules import Admissions, Needs, Pools, Rules
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.requests import Floats, Ints, earlier_tokens, held_kv_bytes, is_next_token, kv_room, shared_kv_bytes, visible_pairs
from flexgen.plan.price.weights import unit_homes, weights_work
from flexgen.plan.price.work import PassLoad, PassWork, ideal_seconds, price
from flexgen.plan.workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class Queue:
    """Runs of equal neighbours; each attribute has a number per run.

    Attributes:
        prompt_len: The tokens of the prompt.
        output_len: The tokens of the answer, or 1 if there is none: the number of passes.
        reserved_len: The tokens of the answer for which room is kept, counted in the same way.
        most: The most tokens that each may generate, counted in the same way.
        found_len: The leading tokens of the prompt that are already computed.
        scored_len: The positions of the prompt at which known tokens are scored.
        is_answered: 1 if there is an answer, 0 if the prompt is only scored.
        count: The number of requests.
    """

    prompt_len: Ints
    output_len: Ints
    reserved_len: Ints
    most: Ints
    found_len: Ints
    scored_len: Ints
    is_answered: Ints
    count: Ints

    @property
    def num_requests(self) -> int:
        return int(self.count.sum())

    def only(self, chosen: npt.NDArray[np.bool_]) -> Queue:
        """Return the queue of the chosen runs."""
        return Queue(*(getattr(self, name)[chosen] for name in Queue.__slots__))


def queue_of(workload: Workload) -> Queue:
    """Return the requests as a queue: longest reserved answer first, in input order among equals."""
    most = np.maximum(np.array(workload.output_lens, dtype=np.int64), 1)
    expected = np.array(workload.answer_lens, dtype=np.int64)
    kept = np.array(workload.reserved_lens, dtype=np.int64) if workload.reserved_lens else most
    reserved = np.maximum(kept, expected)
    order = np.argsort(-(kept if workload.reserved_lens else reserved), kind="stable")
    prompts, found = (np.array(lengths, dtype=np.int64) for lengths in (workload.prompt_lens, workload.found_lens))
    scored = np.array(workload.scored_lens or (0,) * len(workload), dtype=np.int64)
    is_answered = (np.array(workload.output_lens, dtype=np.int64) > 0).astype(np.int64)
    columns = [lengths[order] for lengths in (prompts, expected, reserved, most, found, scored, is_answered)]
    begins = np.ones(len(order), dtype=bool)
    if len(order) > 1:
        begins[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    first = np.flatnonzero(begins)
    return Queue(*(column[first] for column in columns), count=np.diff(first, append=len(order)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A job as played.

    Attributes:
        work: The work of each pass: a PassWork whose numbers are arrays over the passes.
        live: The number of sequences in each pass.
        kv_bytes: Per home tier, the bytes of pages held during each pass; empty where admissions were given.
        queue: The runs of requests that can fit.
        groups: The groups of equal requests that entered together.
        end_passes: The pass after the last one of every such group.
        num_requests: The number of requests of the job.
        num_refused: The number of those whose KV can never fit; they are left out.
    """

    work: PassWork
    live: Ints
    kv_bytes: dict[str, Ints]
    queue: Queue
    groups: Admissions
    end_passes: Ints
    num_requests: int
    num_refused: int

    @property
    def num_passes(self) -> int:
        return len(self.live)

    @property
    def first_passes(self) -> Ints:
        """The first pass of every group of equal requests that entered together."""
        return self.groups.first_pass

    def passes(self) -> list[PassWork]:
        """Return the work of each pass."""
        names = [field.name for field in dataclasses.fields(PassWork)]
        columns = [np.broadcast_to(np.asarray(getattr(self.work, name)), self.live.shape).tolist() for name in names]
        return [PassWork(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    def total(self) -> PassWork:
        """Return the work of all passes together."""
        names = [field.name for field in dataclasses.fields(PassWork)]
        return PassWork(**{name: _spread(getattr(self.work, name), self.num_passes).sum().item() for name in names})

    def seconds(self, expectation: Expectation, policy: Policy, *, times: Mapping[str, float] | None = None) -> Floats:
        """Return the expected seconds of each pass; `times` says, by resource, how many times as fast it is assumed to be."""
        return np.broadcast_to(expectation.seconds(self.work, policy, times=times), (self.num_passes,))

    def longest_request_seconds(self, seconds: Floats) -> float:
        """Return the time from first to last pass of the request that takes longest, given the seconds of each pass."""
        if not len(self.first_passes):
            return 0.0
        until = np.concatenate([[0.0], np.cumsum(seconds)])
        return float((until[self.end_passes] - until[self.first_passes]).max())

    def ideal_seconds(self, machine: Machine, dtype: str) -> dict[str, Floats]:
        """Return, by resource, the ideal seconds in each pass."""
        return {resource: _spread(each, self.num_passes) for resource, each in ideal_seconds(self.work, machine, dtype).items()}

    def busiest_seconds(self, machine: Machine, dtype: str) -> float:
        """Return the sum over the passes of the busiest resource's ideal time."""
        return float(np.maximum.reduce(list(self.ideal_seconds(machine, dtype).values())).sum())


def simulate(
    spec: ModelSpec, policy: Policy, job: Workload | Queue, *, weights: PassWork | None = None, like: Simulation | None = None
) -> Simulation:
    """Play `job` under `policy`.

    A request admitted by pass p computes its prompt there, scores it if that is wanted, and yields its first token; its n-th and last comes
    from pass p + n - 1. A prompt that is only scored leaves after pass p. Requests enter longest reserved answer first, in input order
    among equals, and none overtakes another. Diagonal: they enter whenever there is room, within a bucket of prompt tokens that every pass
    refills. Zigzag: they enter an empty block, all at once. Row: they enter an empty block, as many as one micro-batch holds. A prefix that
    prompts share is computed by the first that has it, and held from then on.

    Args:
        spec: The model.
        policy: The policy to play.
        job: The job, or its requests as a queue.
        weights: The work of moving weights in every pass; None to compute it here.
        like: The same job as played where its requests enter: at another stage, with pools of its own. They enter here in the same passes,
            in homes of this policy. None to play it here.
    """
    tiers = [tier for tier in TIERS if getattr(policy, f"kv_{tier}_bytes") > 0 and getattr(policy.kv, tier) > 0]
    weights = weights or weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    whole = job if isinstance(job, Queue) else queue_of(job)
    if like is None:
        queue, num_refused, groups, used = _play(spec, policy, whole, tiers)
    else:
        queue, num_refused, used = like.queue, like.num_refused, ()
        groups = _rehomed(like.groups, [getattr(policy.kv, tier) for tier in tiers])
    end_passes = groups.first_pass + queue.output_len[groups.run]
    num_passes = int(end_passes.max(initial=0))
    load = _load(spec, policy, queue, groups, tiers, num_passes)
    work = price(load, spec, policy, weights)
    live = np.asarray(sum(load.num_prompts.values()) + sum(load.next_tokens.values()), dtype=np.int64)
    return Simulation(
        work=work,
        live=_spread(live, num_passes).astype(np.int64),
        kv_bytes=dict(zip(tiers, used, strict=like is None)),
        queue=queue,
        groups=groups,
        end_passes=end_passes,
        num_requests=whole.num_requests,
        num_refused=num_refused,
    )


def _play(spec: ModelSpec, policy: Policy, queue: Queue, tiers: Sequence[str]) -> tuple[Queue, int, Admissions, Ints]:
    """Return the runs that can fit, the number of other requests, the admissions, and the bytes used by tier and pass."""
    held = held_kv_bytes(spec, policy.page_tokens, int((queue.prompt_len + queue.most).max(initial=0)))
    shared = shared_kv_bytes(spec, policy.page_tokens, int(queue.found_len.max(initial=0)))
    room = kv_room(spec, policy)
    capacity = np.array([room[tier] for tier in tiers], dtype=np.int64)
    at_most = held[queue.prompt_len + queue.most - 1]
    fits = at_most <= capacity.max(initial=-1)
    num_refused, queue = int(queue.count[~fits].sum()), queue.only(fits)
    # Room for the longest prefix is set aside in each tier; the prefixes of other requests come after it and are no longer.
    # A request that needs the whole tier displaces it.
    prefix = shared[queue.found_len.max(initial=0)]
    capacity = np.maximum(capacity - prefix, np.minimum(capacity, at_most[fits].max(initial=0)))
    rules = Rules(
        schedule=SCHEDULES.index(policy.schedule),
        max_num_seqs=policy.max_num_seqs,
        prefill_tokens=policy.prefill_tokens,
        micro_batch_tokens=policy.micro_batch_tokens,
        frees_early=bool((queue.reserved_len > queue.output_len).any()),
    )
    shares = np.array([getattr(policy.kv, tier) for tier in tiers], dtype=np.float64)
    # On disk a sequence takes from the start what it needs at its longest, so that its pages lie together.
    pools = Pools(capacity=capacity, share=shares, whole=np.array([tier == "disk" for tier in tiers], dtype=bool))
    columns = (queue.prompt_len, queue.output_len, queue.reserved_len, queue.found_len, queue.count)
    groups, used = admit(columns, Needs(held=held, shared=shared), pools, rules)
    return queue, num_refused, Admissions(*groups), used


def _rehomed(groups: Admissions, shares: Sequence[float]) -> Admissions:
    """Return the same sequences in other pools, which have these shares of all sequences so far, to within a few sequences."""
    due = np.zeros(len(shares))
    rows: list[tuple[int, int, int, int]] = []
    for first_pass, run, count in zip(groups.first_pass.tolist(), groups.run.tolist(), groups.num_seqs.tolist(), strict=True):
        due += count * np.array(shares)
        given = np.floor(np.maximum(due, 0)).astype(np.int64)
        while given.sum() != count:  # a pool that had too many before has fewer now
            short = given.sum() < count
            given[np.argmax(due - given) if short else np.argmin(np.where(given > 0, due - given, np.inf))] += 1 if short else -1
        due -= given
        rows += [(first_pass, run, pool, number) for pool, number in enumerate(given.tolist()) if number]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return Admissions(*columns)


def _load(spec: ModelSpec, policy: Policy, queue: Queue, groups: Admissions, tiers: Sequence[str], num_passes: int) -> PassLoad:
    """Return the load of every pass, summed over all groups at once."""
    pairs: list[Any] = [0 for _ in spec.kv_groups]
    prompt_tokens: dict[str, Any] = {}
    num_prompts: dict[str, Any] = {}
    next_tokens: dict[str, Any] = {}
    attended: dict[str, list[Any]] = {}
    earlier: dict[str, list[Any]] = {}
    longest = int((queue.prompt_len + queue.output_len).max(initial=1))
    scored = _at(groups.first_pass, groups.num_seqs * queue.scored_len[groups.run], num_passes)
    sampled = _between(
        groups.first_pass, groups.first_pass + queue.output_len[groups.run], groups.num_seqs * queue.is_answered[groups.run], num_passes
    )
    for pool, tier in enumerate(tiers):
        here = groups.pool == pool
        index, count, run = groups.first_pass[here], groups.num_seqs[here], groups.run[here]
        prompt_len, output_len, found_len = queue.prompt_len[run], queue.output_len[run], queue.found_len[run]
        alone = np.where(is_next_token(prompt_len, found_len), count, 0)
        entering = count - alone
        prompt_tokens[tier] = _at(index, entering * (prompt_len - found_len), num_passes)
        num_prompts[tier] = _at(index, entering, num_passes)
        next_tokens[tier] = _between(index + 1, index + output_len, count, num_passes) + _at(index, alone, num_passes)
        attended[tier] = []
        for number, group in enumerate(spec.kv_groups):
            window = group.window or longest
            visible = visible_pairs(prompt_len, window) - visible_pairs(found_len, window)
            pairs[number] = pairs[number] + _at(index, entering * visible, num_passes)
            # The k-th next token sees prompt_len + k tokens, a ramp, until the window is full.
            full = index + np.clip(window - prompt_len + 1, 1, output_len)
            ramp = _between(index + 1, full, count * (prompt_len - index), num_passes)
            ramp = ramp + _between(index + 1, full, count, num_passes) * np.arange(num_passes)
            of_alone = _at(index, alone * np.minimum(prompt_len, window), num_passes)
            attended[tier].append(of_alone + ramp + window * _between(full, index + output_len, count, num_passes))
        if tier != "device" and has_device_tier(policy.device):
            own = prompt_len - found_len
            chunk = own if tier == "disk" else policy.micro_batch_tokens
            before = [earlier_tokens(found_len, own, group.window or longest, chunk) for group in spec.kv_groups]
            earlier[tier] = [_at(index, entering * each, num_passes) for each in before]
    return PassLoad(
        prompt_tokens=prompt_tokens, num_prompts=num_prompts, next_tokens=next_tokens, prompt_pairs=pairs, attended_tokens=attended,
        earlier_tokens=earlier, num_sampled=sampled, num_scored=scored,
    )  # fmt: skip


def _at(index: Ints, amount: Ints, num_passes: int) -> Ints:
    """Return sums by pass; the float64 used in between holds them exactly up to 2^53."""
    return np.bincount(index, weights=amount, minlength=num_passes).astype(np.int64)


def _between(start: Ints, end: Ints, amount: Ints, num_passes: int) -> Ints:
    """Return `amount` in each pass from `start` to before `end`."""
    change = _at(start, amount, num_passes + 1) - _at(end, amount, num_passes + 1)
    return change.cumsum()[:num_passes]


def _spread(amount: Any, num_passes: int) -> Floats:
    return np.broadcast_to(np.asarray(amount, dtype=np.float64), (num_passes,))
