"""Admission of sequences: forecasts of answer lengths, homes of KV, common prefixes, projected pages.  Uses no tensors."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
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

HeldPages = Callable[[Any], Any]  # numbers of stored tokens, one or an array of them -> pages held at most


class LengthForecast:
    """A forecast of answer lengths: `max_tokens` at first, later at most a high quantile of the observed lengths."""

    def __init__(self) -> None:
        self._counts = array("q")  # the number of answers of each length
        self._num_seen = 0
        self._quantile = 0  # a length; `_below` answers are shorter
        self._below = 0

    def observe(self, num_tokens: int) -> None:
        """Record the length of a finished answer."""
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
        """Return the number of tokens that an answer of at most `max_tokens` is expected to have."""
        return max_tokens if self._num_seen < MIN_OBSERVED else min(max_tokens, self._quantile)


class Homes:
    """A chooser of each sequence's home that keeps the plan's shares of KV bytes.

    Args:
        shares: The fraction of each tier, or of each lane of a pipeline; only those with pages are included.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = {tier: share for tier, share in shares.items() if share > 0}
        self._given = dict.fromkeys(self._shares, 0)

    def by_need(self) -> list[str]:
        """Return the tiers, the one furthest behind its share first."""
        total = sum(self._given.values()) + 1
        return sorted(self._shares, key=lambda tier: self._given[tier] - self._shares[tier] * total)

    def give(self, tier: str, tokens: int) -> None:
        self._given[tier] += tokens


def held_pages(group: KVGroup) -> HeldPages:
    """Return a function from numbers of stored tokens to the most pages of a group that a sequence holds on the way there.

    The function takes and returns arrays.  With windows and chunks the pages held vary by one from pass to pass, but the most
    held so far only rises with the length, so that a sum over sequences peaks where one of them ends.
    """
    most = group.most_pages_held(MANY_TOKENS)

    def held(lengths: np.ndarray) -> np.ndarray:
        return np.minimum(-(-lengths // group.page_tokens), most)

    return held


def fits_projected(
    stored: np.ndarray, remaining: np.ndarray, candidate: tuple[int, int], pages: Sequence[HeldPages], capacity: Sequence[int],
    elsewhere: Sequence[np.ndarray | int],
) -> bool:  # fmt: skip
    """Return whether a candidate's KV fits beside that of the live sequences in every future pass.

    A sequence holds stored + t tokens t passes from now, while t <= remaining; the sum peaks where one ends.

    Args:
        stored: The tokens that each live sequence has stored after this pass.
        remaining: The passes that each live sequence still takes after this pass.
        candidate: The candidate's (stored, remaining).
        pages: For each layer group, a function from lengths to the pages held.
        capacity: The pages of each group.
        elsewhere: For each group, how many pages of each sequence (the candidate last) are counted elsewhere.
    """
    lengths = np.append(stored, candidate[0])
    ends = np.append(remaining, candidate[1])
    times = np.unique(ends)
    if len(times) > MAX_PROJECTED_TIMES:
        times = times[np.linspace(0, len(times) - 1, MAX_PROJECTED_TIMES).astype(int)]
    future = lengths[None, :] + np.minimum(times[:, None], ends[None, :])  # (times, sequences)
    alive = np.append(-1, times[:-1])[:, None] < ends[None, :]  # includes the sequences that have ended since the previous time
    return all(
        ((held(future) - others) * alive).sum(axis=1).max() <= room for held, room, others in zip(pages, capacity, elsewhere, strict=True)
    )


class Neighbours:
    """The live sequences of one tier, as numbers that stay the same while others are admitted to a pass.

    Args:
        groups: The layer groups.
        pages: For each group, a function from lengths to the pages held.

    Attributes:
        num_pages: For each group, the pages that the sequences hold if all hold their most at the same time.
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
        """Return whether the pages that each sequence has to itself suffice in every future pass."""
        most = self._most(sequence)
        if all(held + more <= room for held, more, room in zip(self.num_pages, most, num_pages, strict=True)):
            return True  # without considering when each sequence holds its most pages
        stored, remaining = np.array(self._stored, dtype=np.int64), np.array(self._remaining, dtype=np.int64)
        shared = np.array([*self._shared, sequence.num_shared], dtype=np.int64)
        candidate = (len(sequence.tokens), sequence.remaining - 1)
        return fits_projected(stored, remaining, candidate, self._pages, num_pages, [_elsewhere(shared, each) for each in self._groups])

    def _most(self, sequence: LiveSequence) -> list[int]:
        """Return, for each group, the most pages that the sequence has to itself."""
        final = np.int64(len(sequence.tokens) + sequence.remaining - 1)
        return [
            int(held(final)) - int(_elsewhere(np.int64(sequence.num_shared), group))
            for held, group in zip(self._pages, self._groups, strict=True)
        ]


def _elsewhere(shared: Any, group: KVGroup) -> Any:
    """Return the number of pages of shared tokens that are counted with stored prefixes.

    With a window a sequence soon drops the pages that it shares, so they are counted as its own from the start.
    """
    return group.num_shared(shared) * (group.geometry.reach is None)


class Admission:
    """Admits sequences into the KV cache.

    If there is too little room, stored prefixes without users are forgotten first; if that is not enough, the sequence waits.
    """

    def __init__(self, cache: KVCache, homes: Homes, prefixes: PrefixStore) -> None:
        self._cache, self._homes, self._prefixes = cache, homes, prefixes
        self._pages = [held_pages(group) for group in cache.groups]
        self._live: Iterable[LiveSequence] = ()
        self._neighbours: dict[str, Neighbours] | None = None

    def begin_pass(self, live: Iterable[LiveSequence]) -> None:
        """Update the live sequences; sequences that are admitted later in this pass are added to them.

        Args:
            live: The live sequences; it is iterated over when the first sequence asks for room.
        """
        self._live, self._neighbours = live, None

    def can_ever_fit(self, sequence: LiveSequence) -> bool:
        final = sequence.prompt_len + sequence.request.max_tokens - 1
        return any(self._cache.could_ever_hold(tier, len(sequence.tokens), final) for tier in self._homes.by_need())

    def admit(self, sequence: LiveSequence) -> bool:
        """Give the sequence a home and pages if its projected KV fits; it starts with the longest prefix that is stored there."""
        for tier in self._homes.by_need():
            neighbours = self._of(tier)
            if self._enter(sequence, neighbours, tier):
                break
            if not neighbours:  # prefixes have no users, and only take up room
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
        """Return the live sequences of a tier."""
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
            length = len(sequence.tokens)
            if self._cache.reserve(kv, length, sequence.final_len) or (not neighbours and self._cache.reserve(kv, length)):
                sequence.kv, sequence.source = kv, found
                sequence.num_stored = 0 if found is None else found.length
                return True
            self._cache.release(kv)
        self._prefixes.let_go(sequence)
        return False

    def _clear_for(self, sequence: LiveSequence, neighbours: Neighbours, tier: str) -> bool:
        """Return whether the projected KV fits, and forget prefixes without users if that makes it fit."""
        unused = self._prefixes.num_unused(tier)
        if not neighbours.fit_beside(sequence, self._room(tier, [-pages for pages in unused])):
            return False
        while not neighbours.fit_beside(sequence, self._room(tier)) and self._prefixes.evict(tier):
            pass
        return True

    def _room(self, tier: str, more: Sequence[int] = ()) -> list[int]:
        """Return, for each group, the pages that remain after those of stored prefixes and after `more`."""
        sizes, held = self._cache.pools[tier].num_pages, self._prefixes.num_pages(tier)
        return [size - pages - extra for size, pages, extra in zip(sizes, held, more or [0] * len(sizes), strict=True)]
