"""Who may enter the block: forecasts of answer lengths, homes for KV, shared beginnings, projected pages.  No tensors."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flexgen.engine.prefixes import PrefixStore
from flexgen.engine.sequence import LiveSequence
from flexgen.kv.cache import KVCache
from flexgen.kv.pages import KVGroup
from flexgen.plan.play.answer_lengths import RESERVED_QUANTILE

MIN_OBSERVED = 32
MANY_TOKENS = 1 << 40
MAX_PROJECTED_TIMES = 256

HeldPages = Callable[[np.ndarray], np.ndarray]  # numbers of stored tokens -> pages held at most


class LengthForecast:
    """Expected answer lengths: max_tokens at first, then at most a high quantile of what was seen."""

    def __init__(self) -> None:
        self._counts = array("q")  # answers by length
        self._num_seen = 0
        self._quantile = 0  # a length, with `_below` answers that are shorter
        self._below = 0

    def observe(self, num_tokens: int) -> None:
        """Take in the length of a finished answer."""
        self._counts.extend([0] * (num_tokens + 1 - len(self._counts)))
        self._counts[num_tokens] += 1
        self._num_seen += 1
        self._below += num_tokens < self._quantile
        rank = int(RESERVED_QUANTILE * (self._num_seen - 1))
        while self._below > rank:
            self._quantile -= 1
            self._below -= self._counts[self._quantile]
        while self._below + self._counts[self._quantile] <= rank:
            self._below += self._counts[self._quantile]
            self._quantile += 1

    def expect(self, max_tokens: int) -> int:
        """Tokens that an answer of at most `max_tokens` will have."""
        return max_tokens if self._num_seen < MIN_OBSERVED else min(max_tokens, self._quantile)


class Homes:
    """Chooses each sequence's KV home so that the plan's shares of KV bytes are kept.

    Args:
        shares: tier -> fraction; tiers with pages only.
    """

    def __init__(self, shares: dict[str, float]) -> None:
        self._shares = {tier: share for tier, share in shares.items() if share > 0}
        self._given = dict.fromkeys(self._shares, 0)

    def by_need(self) -> list[str]:
        """Tiers, the one furthest behind its share first."""
        total = sum(self._given.values()) + 1
        return sorted(self._shares, key=lambda tier: self._given[tier] - self._shares[tier] * total)

    def give(self, tier: str, tokens: int) -> None:
        self._given[tier] += tokens


def held_pages(group: KVGroup) -> HeldPages:
    """Most pages of a group held on the way to given numbers of stored tokens, as an array function.

    Windows and chunks hold a page more or less from pass to pass; the most of it rises with the length only, so that
    a sum over sequences peaks where one of them ends.
    """
    most = group.most_pages_held(MANY_TOKENS)

    def held(lengths: np.ndarray) -> np.ndarray:
        return np.minimum(-(-lengths // group.page_tokens), most)

    return held


def fits_projected(
    stored: np.ndarray, remaining: np.ndarray, candidate: tuple[int, int], pages: Sequence[HeldPages], capacity: Sequence[int],
    elsewhere: Sequence[np.ndarray | int],
) -> bool:  # fmt: skip
    """Whether a candidate's KV fits beside the live ones' at every future pass.

    A sequence holds stored + t tokens t passes from now, while t <= remaining; the sum peaks where one ends.

    Args:
        stored: The tokens that each live sequence has stored after this pass.
        remaining: The passes that each still takes after it.
        candidate: (stored, remaining) of the one that would join.
        pages: For each layer group, the pages held at given lengths.
        capacity: The pages of each group.
        elsewhere: For each group, how many of each sequence's pages (the candidate's last) are counted elsewhere.
    """
    lengths = np.append(stored, candidate[0])
    ends = np.append(remaining, candidate[1])
    times = np.unique(ends)
    if len(times) > MAX_PROJECTED_TIMES:
        times = times[np.linspace(0, len(times) - 1, MAX_PROJECTED_TIMES).astype(int)]
    future = lengths[None, :] + np.minimum(times[:, None], ends[None, :])  # (times, sequences)
    alive = np.append(-1, times[:-1])[:, None] < ends[None, :]  # those that end since the last of the times looked at, too
    return all(
        ((held(future) - others) * alive).sum(axis=1).max() <= room for held, room, others in zip(pages, capacity, elsewhere, strict=True)
    )


class Neighbours:
    """The live sequences of one tier, as numbers that stay the same while others are admitted to a pass.

    Args:
        groups: The layer groups.
        pages: For each of them, the pages held at given lengths.

    Attributes:
        num_pages: For each group, what the sequences hold at most, if each held its most at the same time.
    """

    def __init__(self, groups: Sequence[KVGroup], pages: Sequence[HeldPages]) -> None:
        self._groups, self._pages = groups, pages
        self._stored: list[int] = []
        self._remaining: list[int] = []
        self._shared: list[int] = []
        self.num_pages = [0] * len(groups)

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, sequence: LiveSequence) -> None:
        self._stored.append(len(sequence.tokens))
        self._remaining.append(sequence.remaining - 1)
        self._shared.append(sequence.num_shared)
        self.num_pages = [sum(pair) for pair in zip(self.num_pages, self._most(sequence), strict=True)]

    def fit_beside(self, sequence: LiveSequence, num_pages: Sequence[int]) -> bool:
        """Whether pages for what each sequence has to itself suffice at every future pass."""
        most = self._most(sequence)
        if all(held + more <= room for held, more, room in zip(self.num_pages, most, num_pages, strict=True)):
            return True  # without looking at when each holds its most
        stored, remaining = np.array(self._stored, dtype=np.int64), np.array(self._remaining, dtype=np.int64)
        shared = np.array([*self._shared, sequence.num_shared], dtype=np.int64)
        candidate = (len(sequence.tokens), sequence.remaining - 1)
        return fits_projected(stored, remaining, candidate, self._pages, num_pages, [_elsewhere(shared, each) for each in self._groups])

    def _most(self, sequence: LiveSequence) -> list[int]:
        """For each group, the most pages that the sequence has to itself."""
        final = np.int64(len(sequence.tokens) + sequence.remaining - 1)
        return [
            int(held(final)) - int(_elsewhere(np.int64(sequence.num_shared), group))
            for held, group in zip(self._pages, self._groups, strict=True)
        ]


def _elsewhere(shared: Any, group: KVGroup) -> Any:
    """Pages of shared tokens that are counted with stored prefixes.

    Behind a window a sequence soon lets go of what it shares: its pages are counted as its own from the start.
    """
    return shared // group.page_tokens * (group.geometry.reach is None)


class Admission:
    """Admits sequences into the KV cache.  What has no room gives way in this order: stored prefixes without users, those who wait."""

    def __init__(self, cache: KVCache, homes: Homes, prefixes: PrefixStore) -> None:
        self._cache, self._homes, self._prefixes = cache, homes, prefixes
        self._pages = [held_pages(group) for group in cache.groups]
        self._live: Iterable[LiveSequence] = ()
        self._neighbours: dict[str, Neighbours] | None = None

    def begin_pass(self, live: Iterable[LiveSequence]) -> None:
        """Look at the live sequences anew; those that are admitted from now on are added to them.

        Args:
            live: It is read when the first sequence asks for room.
        """
        self._live, self._neighbours = live, None

    def can_ever_fit(self, sequence: LiveSequence) -> bool:
        final = sequence.prompt_len + sequence.request.max_tokens - 1
        return any(self._cache.could_ever_hold(tier, len(sequence.tokens), final) for tier in self._homes.by_need())

    def admit(self, sequence: LiveSequence) -> bool:
        """Give the sequence a home and pages for its tokens, if its projected KV fits; it begins with the longest prefix stored there."""
        for tier in self._homes.by_need():
            neighbours = self._of(tier)
            if self._enter(sequence, neighbours, tier):
                break
            if not neighbours:  # prefixes have no users, and are in the way
                self._prefixes.clear(tier)
                if self._enter(sequence, neighbours, tier):
                    break
        else:
            return False
        self._homes.give(tier, sequence.final_len - sequence.num_stored)
        if neighbours.fit_beside(sequence, self._room(tier, self._prefixes.num_kept(sequence))):
            self._prefixes.publish(sequence)
        neighbours.add(sequence)
        return True

    def _of(self, tier: str) -> Neighbours:
        """The live sequences of a tier."""
        if self._neighbours is None:
            self._neighbours = {each: Neighbours(self._cache.groups, self._pages) for each in self._cache.pools}
            for each in self._live:
                if each.kv is not None:
                    self._neighbours[each.kv.home].add(each)
        return self._neighbours[tier]

    def _enter(self, sequence: LiveSequence, neighbours: Neighbours, tier: str) -> bool:
        found = self._prefixes.hold(sequence, tier)
        if self._clear_for(sequence, neighbours, tier):
            kv = self._cache.admit(tier) if found is None else self._cache.fork(found.kv, found.length)
            # On disk a sequence's pages should lie together: it takes all that it expects to need at once, if it can.
            ahead = sequence.final_len if tier == "disk" else 0
            if self._cache.reserve(kv, len(sequence.tokens), ahead) or (not neighbours and self._cache.reserve(kv, len(sequence.tokens))):
                sequence.kv, sequence.source = kv, found
                sequence.num_stored = 0 if found is None else found.length
                return True
            self._cache.release(kv)
        self._prefixes.let_go(sequence)
        return False

    def _clear_for(self, sequence: LiveSequence, neighbours: Neighbours, tier: str) -> bool:
        """Whether the projected KV fits, for which prefixes without users are forgotten if that is enough."""
        unused = self._prefixes.num_unused(tier)
        if not neighbours.fit_beside(sequence, self._room(tier, [-pages for pages in unused])):
            return False
        while not neighbours.fit_beside(sequence, self._room(tier)) and self._prefixes.evict(tier):
            pass
        return True

    def _room(self, tier: str, more: Sequence[int] = ()) -> list[int]:
        """Pages per group besides those of stored prefixes, and of `more`."""
        sizes, held = self._cache.pools[tier].num_pages, self._prefixes.num_pages(tier)
        return [size - pages - extra for size, pages, extra in zip(sizes, held, more or [0] * len(sizes), strict=True)]
