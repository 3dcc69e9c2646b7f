"""The KV cache: which pages each sequence holds on its tier, and which of them are shared.

Pages that lie wholly before a window are freed.  Sequences with a common prefix may share pages.  The cache does not access the bytes
of KV and computes no attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flexgen.kv.pages import KVGroup, Pool


@dataclass(slots=True)
class SequenceKV:
    """The pages of one sequence.

    Attributes:
        home: The tier that holds them.
        tables: For each group, the page id of each page of tokens; -1 once freed.
        freed: For each group, the number of leading pages that are freed already.
    """

    home: str
    tables: list[list[int]]
    freed: list[int] = field(default_factory=list)


class KVCache:
    """The pages of all sequences, on all tiers.

    Args:
        groups: The model's layer groups.
        pools: The pool of each tier.

    Attributes:
        used_pages: For each tier and group, the number of pages that sequences hold now.
        used_bytes: For each tier, the bytes of these pages.
        peak_bytes: For each tier, the most bytes that they have held.
    """

    def __init__(self, groups: Sequence[KVGroup], pools: Mapping[str, Pool]) -> None:
        self.groups = tuple(groups)
        self.pools = pools
        self._page_bytes = {home: [group.page_bytes for group in pool.groups] for home, pool in pools.items()}
        self.used_pages = {home: [0] * len(groups) for home in pools}
        self.used_bytes = dict.fromkeys(pools, 0)
        self.peak_bytes = dict.fromkeys(pools, 0)
        self._sharers = {home: [Counter[int]() for _ in groups] for home in pools}  # page -> the number of its holders besides the first

    def admit(self, home: str) -> SequenceKV:
        """Return a new sequence without pages."""
        return SequenceKV(home, [[] for _ in self.groups], [0] * len(self.groups))

    def fork(self, kv: SequenceKV, length: int) -> SequenceKV:
        """Return a new sequence that shares the first `length` tokens of another.

        It shares whole pages only, and of these only the ones that later queries attend to.
        """
        forked = self.admit(kv.home)
        for index, group in enumerate(self.groups):
            table = kv.tables[index][: group.num_shared(length)]
            first = min(group.first_page(length), len(table))
            assert first >= kv.freed[index] or first == len(table), "what it must see is gone"
            self._sharers[kv.home][index].update(table[first:])
            forked.tables[index], forked.freed[index] = [-1] * first + table[first:], first
        return forked

    def reserve(self, kv: SequenceKV, length: int, ahead: int = 0) -> bool:
        """Reserve pages for `length` tokens.

        Args:
            kv: The sequence.
            length: The number of its tokens.
            ahead: The number of tokens for which layers that see all tokens reserve pages at the same time, where the pool asks for that.

        Returns:
            Whether the pages were reserved; if the pool has too few, none are.
        """
        pool, taken = self.pools[kv.home], []
        for index, group in enumerate(self.groups):
            goes_ahead = ahead > length and pool.reserves_ahead[index] and group.geometry.reach is None
            wanted = ahead if goes_ahead else length
            missing = group.num_pages(wanted) - len(kv.tables[index])
            pages = pool.take(index, missing) if missing > 0 else []
            if pages is None:
                for other, given in taken:
                    pool.give_back(other, given)
                return False
            taken.append((index, pages))
        for index, pages in taken:
            if pages:
                kv.tables[index] += pages
                self._count(kv.home, index, len(pages))
        return True

    def trim(self, kv: SequenceKV, length: int) -> None:
        """Free the pages that no query after the first `length` tokens attends to."""
        for index, group in enumerate(self.groups):
            useless = min(group.first_page(length), len(kv.tables[index]))
            if useless > kv.freed[index]:
                table = kv.tables[index]
                self._let_go(kv.home, index, table[kv.freed[index] : useless])
                table[kv.freed[index] : useless] = [-1] * (useless - kv.freed[index])
                kv.freed[index] = useless

    def release(self, kv: SequenceKV) -> None:
        """Drop all pages of a sequence, and free those that it shares with no other."""
        for index in range(len(self.groups)):
            self._let_go(kv.home, index, kv.tables[index][kv.freed[index] :])
            kv.tables[index], kv.freed[index] = [], 0

    def _let_go(self, home: str, index: int, pages: Iterable[int]) -> None:
        sharers, freed = self._sharers[home][index], []
        for page in pages:
            if sharers[page] > 1:
                sharers[page] -= 1
            elif sharers.pop(page, 0) == 0:
                freed.append(page)
        self.pools[home].give_back(index, freed)
        self._count(home, index, -len(freed))

    def _count(self, home: str, index: int, num_pages: int) -> None:
        self.used_pages[home][index] += num_pages
        self.used_bytes[home] += num_pages * self._page_bytes[home][index]
        self.peak_bytes[home] = max(self.peak_bytes[home], self.used_bytes[home])

    def could_ever_hold(self, home: str, prompt_len: int, final_len: int) -> bool:
        """Return whether a sequence would fit the tier if it were alone."""
        return all(
            max(group.num_pages(prompt_len), group.most_pages_held(final_len)) <= self.pools[home].num_pages[index]
            for index, group in enumerate(self.groups)
        )
