"""KV of common prefixes: which sequence computes a prefix, which sequences use it, and how long it stays.

A stored prefix is a sequence that never continues: it shares its pages with the sequence that computes it and with all that
begin with it, on the same tier.  Others may use it from the moment its writer is admitted; they run after the writer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from flexgen.engine.sequence import LiveSequence, StoredPrefix
from flexgen.kv.cache import KVCache
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefix, CommonPrefixes

Key = tuple[str, Hashable, bytes]  # (home, regime, digest)


class PrefixStore:
    """The stored prefixes of each tier.

    Args:
        regime: A function that returns what the keys of a sequence's prompt depend on besides its tokens (models/rope.py).
    """

    def __init__(self, cache: KVCache, regime: Callable[[LiveSequence], Hashable] = lambda sequence: None) -> None:
        self._cache, self._regime = cache, regime
        self._stored: dict[Key, StoredPrefix] = {}  # least recently used first
        self._pages = {home: [Counter[int]() for _ in cache.groups] for home in cache.pools}  # page -> prefixes that hold it
        self._common = NO_PREFIXES
        self._left: dict[bytes, int] = {}  # digest -> unfinished requests that begin with the prefix
        self._first: dict[bytes, int] = {}  # digest -> the first request that began with the prefix

    def begin(self, common: CommonPrefixes) -> None:
        """Start a run whose requests have these prefixes in common."""
        self.clear()
        self._common, self._left, self._first = common, {}, {}

    def clear(self, home: str | None = None) -> None:
        """Forget all prefixes of a tier, or of all tiers; none may be in use."""
        for key in [key for key in self._stored if home in (None, key[0])]:
            self._drop(key)

    # -- requests ---------------------------------------------------------------------------------------------------------------

    def expect(self, sequence: LiveSequence) -> None:
        """Find the common prefixes of a sequence that begins to wait."""
        request = sequence.request
        sequence.path = self._common.path(request.sharable)
        sequence.beyond = self._common.beyond(request.sharable, request.offered)
        for point in (*sequence.path, *sequence.beyond):
            self._left.setdefault(point.digest, point.num_requests)
        for point in sequence.path:
            self._first.setdefault(point.digest, sequence.request.index)

    def order(self, sequence: LiveSequence) -> tuple[int, ...]:
        """Return a sort key: input order, but requests with a common prefix follow the first of them, at every depth of the tree."""
        return (*(self._first[point.digest] for point in sequence.path), sequence.request.index)

    def done(self, sequence: LiveSequence) -> None:
        """Count a request as finished, and free prefixes with which no other request will begin."""
        for point in sequence.path:
            self._left[point.digest] -= 1
        for point in (*sequence.path, *sequence.beyond):
            if self._left[point.digest] > 0:
                continue
            for key in [key for key, each in self._stored.items() if key[2] == point.digest and not each.num_users]:
                self._drop(key)

    # -- sequences --------------------------------------------------------------------------------------------------------------

    def hold(self, sequence: LiveSequence, home: str) -> StoredPrefix | None:
        """Return the longest stored prefix of a sequence; it and the shorter ones are kept until `let_go`."""
        found = [key for key in self._keys(sequence, sequence.path, home) if key in self._stored]
        for key in reversed(found):  # longer prefixes are evicted first, so the shortest counts as used last
            self._stored[key] = self._stored.pop(key)
        sequence.prefixes = [self._stored[key] for key in found]
        for each in sequence.prefixes:
            each.num_users += 1
        return sequence.prefixes[-1] if found else None

    def num_kept(self, sequence: LiveSequence) -> list[int]:
        """Return, for each group, the pages that `publish` would keep after the sequence itself drops them (they leave its window)."""
        lengths = [point.length for point in self._wanted(sequence)]
        return [
            sum(length // group.page_tokens - group.first_page(length) for length in lengths) if group.geometry.reach is not None else 0
            for group in self._cache.groups
        ]

    def publish(self, sequence: LiveSequence) -> None:
        """Offer the KV that an admitted sequence will compute to others, which must run after it."""
        kv = sequence.kv
        assert kv is not None
        wanted = self._wanted(sequence)
        for key, point in zip(self._keys(sequence, wanted, kv.home), wanted, strict=True):
            if key in self._stored:  # another has offered it, with which this one could not begin
                continue
            stored = StoredPrefix(kv=self._cache.fork(kv, point.length), length=point.length, writer=sequence, num_users=1)
            self._stored[key] = stored
            sequence.prefixes.append(stored)
            for pages, held in zip(self._pages[kv.home], stored.pages(), strict=True):
                pages.update(held)

    def let_go(self, sequence: LiveSequence) -> None:
        """Release the prefixes of a sequence that ends, is preempted or was not admitted; a prefix that it has not computed is dropped."""
        for each in sequence.prefixes:
            each.num_users -= 1
            if each.writer is sequence and each.is_stored:
                each.writer = None
        useless = {id(each) for each in sequence.prefixes if each.writer is sequence}
        sequence.prefixes, sequence.source = [], None
        for key in [key for key, each in self._stored.items() if id(each) in useless] if useless else ():
            self._drop(key)

    # -- room -------------------------------------------------------------------------------------------------------------------

    def num_pages(self, home: str) -> list[int]:
        """Return, for each group, the pages that prefixes hold."""
        return [len(pages) for pages in self._pages[home]]

    def num_unused(self, home: str) -> list[int]:
        """Return, for each group, the pages that become free if prefixes without users are forgotten."""
        used = [set[int]() for _ in self._cache.groups]
        for (at, _, _), each in self._stored.items():
            if at == home and each.num_users:
                for pages, held in zip(used, each.pages(), strict=True):
                    pages.update(held)
        return [len(pages) - len(of_users) for pages, of_users in zip(self._pages[home], used, strict=True)]

    def evict(self, home: str) -> bool:
        """Forget the least recently used prefix without users; return False if there is none."""
        key = next((key for key, each in self._stored.items() if key[0] == home and not each.num_users), None)
        if key is not None:
            self._drop(key)
        return key is not None

    # -- internals --------------------------------------------------------------------------------------------------------------

    def _wanted(self, sequence: LiveSequence) -> list[CommonPrefix]:
        """Return the prefixes that an admitted sequence computes and with which others will begin."""
        own = [point for point in sequence.path if point.length > sequence.num_stored and self._left[point.digest] > 1]
        return own + [point for point in sequence.beyond if self._left[point.digest] > 0]

    def _keys(self, sequence: LiveSequence, points: Sequence[CommonPrefix], home: str) -> list[Key]:
        regime = self._regime(sequence)
        return [(home, regime, point.digest) for point in points]

    def _drop(self, key: Key) -> None:
        stored = self._stored.pop(key)
        assert not stored.num_users
        for pages, held in zip(self._pages[key[0]], stored.pages(), strict=True):
            pages.subtract(held)
            for page in held:
                if not pages[page]:
                    del pages[page]
        self._cache.release(stored.kv)
