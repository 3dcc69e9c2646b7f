"""Where the KV of a sequence lives on all stages of a pipeline together: a lane is one tier for each stage.

Shares of tiers differ from stage to stage.  In the order of the tiers, fastest first, every stage cuts the sequences into parts, and what
no stage cuts any further is a lane.  So a lane is for a pipeline what a tier is for one machine: the home of a sequence, with pages of its
own in every group of every stage, which are taken together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from flexgen.errors import EngineError
from flexgen.kv.cache import KVCache
from flexgen.kv.pages import KVGroup, Pool
from flexgen.kv.tiers import Traits, block_pages, pool_bytes, stored_groups, traits_of
from flexgen.options import TIERS
from flexgen.passes.plan import MicroBatch, PassPlan
from flexgen.plan.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class StageKV:
    """The KV of one stage.

    Attributes:
        groups: The layer groups of the stage, with those of tails.
        policy: The policy of the stage.
    """

    groups: tuple[KVGroup, ...]
    policy: Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePages:
    """The pages of a lane in one group.

    Attributes:
        own: The lane's page ids of the first block.
        per_block: The number of pages that a block has in the pool, those of other lanes included.
    """

    own: range
    per_block: int


class Lanes:
    """The lanes of a pipeline.

    Args:
        stages: The KV of each stage.
        shares: The tiers of each lane, one for each stage, with the share of the sequences that it gets; the shares add up to 1.

    Attributes:
        groups: The layer groups of all stages, one stage after the other.
        shares: The share of each lane, by its name.
        traits: What a pass may compute together of each lane's sequences.
    """

    def __init__(self, stages: Sequence[StageKV], shares: Mapping[tuple[str, ...], float]) -> None:
        self._stages = tuple(stages)
        self._tiers = {_name(tiers): tiers for tiers in shares}
        self.shares = {_name(tiers): share for tiers, share in shares.items()}
        self.traits = {name: self._traits(tiers) for name, tiers in self._tiers.items()}
        borders = list(accumulate((len(stage.groups) for stage in stages), initial=0))
        self._of_stage = [slice(start, stop) for start, stop in pairwise(borders)]
        self.groups = _joined([stage.groups for stage in stages])
        self._pages = {name: list[LanePages]() for name in self._tiers}
        for index, stage in enumerate(stages):
            for name, pages in _divided(stage, {name: (tiers[index], self.shares[name]) for name, tiers in self._tiers.items()}).items():
                self._pages[name] += pages

    def _traits(self, tiers: Sequence[str]) -> Traits:
        all_traits = [traits_of(tier, stage.groups, stage.policy) for tier, stage in zip(tiers, self._stages, strict=True)]
        return Traits(
            chunks=all(each.chunks for each in all_traits),
            mixes=all(each.mixes for each in all_traits),
            share_of_batch=lambda position: max(each.share_of_batch(position) for each in all_traits),
        )

    def pools(self, block: int) -> dict[str, Pool]:
        """Return the pages of each lane in one block, without memory."""
        return {name: self._pool(name, block) for name in self._tiers}

    def _pool(self, name: str, block: int) -> Pool:
        tiers, pages = self._tiers[name], self._pages[name]
        stored = [stored_groups(tier, stage.groups) for tier, stage in zip(tiers, self._stages, strict=True)]
        ahead = [tier == "disk" for tier, stage in zip(tiers, self._stages, strict=True) for _ in stage.groups]
        first_pages = [block * each.per_block + each.own.start for each in pages]
        return Pool(_joined(stored), [len(each.own) for each in pages], first_pages=first_pages, reserves_ahead=ahead)

    def holds_longest(self, name: str) -> bool:
        """Return whether a sequence as long as the longest fits a lane if it is alone."""
        return all(
            max(group.num_pages(stage.policy.longest_sequence), group.most_pages_held(stage.policy.longest_sequence)) <= len(pages.own)
            for stage, groups in zip(self._stages, self._of_stage, strict=True)
            for group, pages in zip(self.groups[groups], self._pages[name][groups], strict=True)
        )

    def for_stage(self, plan: PassPlan, stage: int) -> PassPlan:
        """Return the plan of a pass as one stage executes it: with its own tiers and page tables."""
        return PassPlan(micro_batches=tuple(self._batch_for(batch, stage) for batch in plan.micro_batches))

    def _batch_for(self, batch: MicroBatch, stage: int) -> MicroBatch:
        groups = self._of_stage[stage]
        slices = tuple(replace(each, tables=each.tables[groups]) for each in batch.slices)
        return replace(batch, home=self._tiers[batch.home][stage], slices=slices)

    def used_bytes(self, stage: int, caches: Iterable[KVCache]) -> dict[str, int]:
        """Return the bytes of the pages that sequences hold on each tier of a stage.

        Args:
            stage: The stage.
            caches: The caches of the blocks, over the pools of the lanes.
        """
        found: dict[str, int] = {}
        for cache in caches:
            for name, tiers in self._tiers.items():
                held = zip(cache.pools[name].groups[self._of_stage[stage]], cache.used_pages[name][self._of_stage[stage]], strict=True)
                found[tiers[stage]] = found.get(tiers[stage], 0) + sum(count * group.page_bytes for group, count in held)
        return found


def lanes_of(stages: Sequence[StageKV]) -> Lanes:
    """Return the lanes of a pipeline: those of all parts that can hold the longest sequence, or the one that comes next to it.

    Raises:
        EngineError: A stage has no memory for KV.
    """
    parts = _parts([_shares(stage.policy) for stage in stages])
    while True:
        total = sum(parts.values())
        lanes = Lanes(stages, {tiers: share / total for tiers, share in parts.items()})
        narrow = [tiers for tiers in parts if not lanes.holds_longest(_name(tiers))]
        if not narrow or len(parts) == 1:
            return lanes
        del parts[min(narrow, key=lambda tiers: parts[tiers])]  # its pages go to the other lanes with the same tiers


def _name(tiers: Sequence[str]) -> str:
    return "+".join(tiers)


def _shares(policy: Policy) -> dict[str, float]:
    """Return the share of each tier that has pages, fastest first; the shares add up to 1."""
    shares = {tier: getattr(policy.kv, tier) for tier in TIERS if pool_bytes(tier, policy) and getattr(policy.kv, tier) > 0}
    if not shares:
        raise EngineError("a stage has no memory for KV")
    total = sum(shares.values())
    return {tier: share / total for tier, share in shares.items()}


def _parts(stages: Sequence[Mapping[str, float]]) -> dict[tuple[str, ...], float]:
    """Return the tiers of all stages in each part that none of them cuts any further, with its share, in order."""
    stops = [[*list(accumulate(shares.values()))[:-1], 1.0] for shares in stages]
    parts: dict[tuple[str, ...], float] = {}
    for start, stop in pairwise(sorted({0.0, *(each for stage in stops for each in stage)})):
        middle = (start + stop) / 2
        tiers = tuple(
            next(tier for tier, end in zip(shares, ends, strict=True) if middle <= end) for shares, ends in zip(stages, stops, strict=True)
        )
        parts[tiers] = parts.get(tiers, 0.0) + stop - start
    return parts


def _joined(stages: Iterable[Sequence[KVGroup]]) -> tuple[KVGroup, ...]:
    """Return the groups of all stages, in which tails still belong to theirs."""
    joined: list[KVGroup] = []
    for groups in stages:
        first = len(joined)
        joined += [group if group.tail_of is None else replace(group, tail_of=first + group.tail_of) for group in groups]
    return tuple(joined)


def _divided(stage: StageKV, lanes: Mapping[str, tuple[str, float]]) -> dict[str, list[LanePages]]:
    """Return the pages of each lane in the groups of a stage: lanes with the same tier divide its pages by their shares.

    Args:
        stage: The stage.
        lanes: The tier of each lane on this stage, and its share.
    """
    divided: dict[str, list[LanePages]] = {name: [] for name in lanes}
    for tier in {tier for tier, _ in lanes.values()}:
        shares = {name: share for name, (its_tier, share) in lanes.items() if its_tier == tier}
        ends = list(accumulate(shares.values()))
        for count in block_pages(tier, stage.groups, stage.policy):
            borders = [0, *(round(count * end / ends[-1]) for end in ends)]
            for name, (start, stop) in zip(shares, pairwise(borders), strict=True):
                divided[name].append(LanePages(own=range(start, stop), per_block=count))
    return divided
