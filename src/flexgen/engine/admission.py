"""Who may enter the block: forecasts of answer lengths, homes for KV, projected pages.  No tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from flexgen.engine.schedule import Pages, fits_projected
from flexgen.engine.sequence import Sequence
from flexgen.memory.kv_cache import KVCache, KVGroup

MIN_OBSERVED = 32
FORECAST_QUANTILE = 0.9
MANY_TOKENS = 1 << 40


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
        rank = int(FORECAST_QUANTILE * (self._num_seen - 1))
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


def held_pages(group: KVGroup) -> Pages:
    """Most pages of a group held on the way to given numbers of stored tokens, as an array function.

    Windows and chunks hold a page more or less from pass to pass; the most of it rises with the length only, so that
    a sum over sequences peaks where one of them ends.
    """
    most = group.most_pages_held(MANY_TOKENS)

    def held(lengths: np.ndarray) -> np.ndarray:
        return np.minimum(-(-lengths // group.page_tokens), most)

    return held


class Admission:
    """Admits sequences into the KV cache."""

    def __init__(self, cache: KVCache, homes: Homes) -> None:
        self._cache, self._homes = cache, homes
        self._pages = [held_pages(group) for group in cache.groups]

    def can_ever_fit(self, sequence: Sequence) -> bool:
        final = len(sequence.request.prompt_token_ids) + sequence.request.max_tokens - 1
        return any(self._cache.could_ever_hold(tier, len(sequence.tokens), final) for tier in self._homes.by_need())

    def admit(self, sequence: Sequence, live: Iterable[Sequence]) -> bool:
        """Give the sequence a home and pages for its tokens, if its projected KV fits."""
        for tier in self._homes.by_need():
            neighbours = [each for each in live if each.kv is not None and each.kv.home == tier]
            if not self._fits(sequence, neighbours, tier):
                continue
            kv = self._cache.admit(tier)
            length = len(sequence.tokens)
            # On disk a sequence's pages should lie together: it takes all that it expects to need at once, if it can.
            together = max(sequence.final_len, length) if tier == "disk" else length
            if self._cache.reserve(kv, together) or (not neighbours and self._cache.reserve(kv, length)):
                sequence.kv = kv
                self._homes.give(tier, sequence.final_len)
                return True
        return False

    def _fits(self, sequence: Sequence, neighbours: SequenceOf[Sequence], tier: str) -> bool:
        stored = np.array([len(each.tokens) for each in neighbours], dtype=np.int64)
        remaining = np.array([each.remaining - 1 for each in neighbours], dtype=np.int64)
        candidate = (len(sequence.tokens), sequence.remaining - 1)
        return fits_projected(stored, remaining, candidate, self._pages, self._cache.pools[tier].num_pages)
