"""KV cache in pages: pools per tier, page tables per sequence and layer group, projections for admission.

A page holds `page_tokens` tokens of one layer; a page id stands for that page in every layer of its group.  Pages
wholly behind a window are freed.  Sequences that begin alike may share pages.  Knows no models and computes no attention.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from flexgen.base.quantities import align_up
from flexgen.errors import EngineError

# (key_heads, key_dim, value_heads, value_dim, window, chunk)
GroupShape = tuple[int, int, int, int, int | None, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that cache tensors of one shape and see equally far back.

    Attributes:
        layers: the model's layer indices, in order; a layer's place here indexes the pools.
        key_heads, key_dim, value_heads, value_dim: of the cached tensors.
        window: visible tokens, or None. chunk: tokens attend within aligned chunks, or None.
    """

    layers: tuple[int, ...]
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None
    chunk: int | None
    page_tokens: int
    dtype: torch.dtype

    @property
    def key_page_bytes(self) -> int:
        """One layer's keys of one page."""
        return self.key_heads * self.key_dim * self.page_tokens * self.dtype.itemsize

    @property
    def value_page_bytes(self) -> int:
        return self.value_heads * self.value_dim * self.page_tokens * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """A page id's bytes over all layers of the group."""
        return len(self.layers) * (self.key_page_bytes + self.value_page_bytes)

    def first_visible(self, position: int) -> int:
        """The earliest token that a query at `position` sees."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        if self.chunk is not None:
            return position - position % self.chunk
        return 0

    def pages_held(self, length: int) -> int:
        """Pages of a sequence that has stored `length` tokens and goes on."""
        return -(-length // self.page_tokens) - self.first_visible(length) // self.page_tokens

    def most_pages_held(self, length: int) -> int:
        """The most that it held on its way there; windows and chunks begin within pages."""
        pages, reach = -(-length // self.page_tokens), self.window or self.chunk
        return pages if reach is None else min(pages, -(-reach // self.page_tokens) + 1)


def group_layers(layers: Sequence[tuple[int, GroupShape]], page_tokens: int, dtype: torch.dtype) -> tuple[KVGroup, ...]:
    """Groups of layers with equal (key_heads, key_dim, value_heads, value_dim, window, chunk)."""
    by_shape: dict[GroupShape, list[int]] = {}
    for layer, shape in layers:
        by_shape.setdefault(shape, []).append(layer)
    return tuple(
        KVGroup(
            layers=tuple(members), key_heads=shape[0], key_dim=shape[1], value_heads=shape[2], value_dim=shape[3],
            window=shape[4], chunk=shape[5], page_tokens=page_tokens, dtype=dtype,
        )
        for shape, members in by_shape.items()
    )  # fmt: skip


def divide_pool(groups: Sequence[KVGroup], pool_bytes: int, longest: int) -> list[int]:
    """Pages per group such that all run out together for sequences of `longest` tokens.

    Groups that see only so far first get the pages of one whole sequence: a prompt's are freed only after its pass.
    """
    first = [-(-longest // group.page_tokens) + 1 if group.window or group.chunk else 0 for group in groups]
    rest = pool_bytes - sum(pages * group.page_bytes for pages, group in zip(first, groups, strict=True))
    if rest < 0:
        first, rest = [0] * len(groups), pool_bytes
    wanted = [group.most_pages_held(longest) * group.page_bytes for group in groups]
    shared = [int(rest * want / sum(wanted)) // group.page_bytes for group, want in zip(groups, wanted, strict=True)]
    return [whole + share for whole, share in zip(first, shared, strict=True)]


def layer_index(groups: Sequence[KVGroup]) -> dict[int, tuple[int, int]]:
    """The model's layer index -> (group, place within the group)."""
    return {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}


class PagePool:
    """The pages of one tier that computing or kernels can reach directly.

    Attributes:
        keys: per group (layers, pages, key_heads, key_dim, page_tokens).
        values: per group (layers, pages, value_heads, page_tokens, value_dim).
    """

    def __init__(self, groups: Sequence[KVGroup], num_pages: Sequence[int], allocate: Callable[[int], torch.Tensor]) -> None:
        self.groups = groups
        self.num_pages = list(num_pages)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for group, count in zip(groups, num_pages, strict=True):
            layers = len(group.layers)
            key_bytes, value_bytes = layers * count * group.key_page_bytes, layers * count * group.value_page_bytes
            arena = allocate(max(align_up(key_bytes, 256) + value_bytes, 1))
            keys, values = arena[:key_bytes], arena[align_up(key_bytes, 256) : align_up(key_bytes, 256) + value_bytes]
            shape = (layers, count, group.key_heads, group.key_dim, group.page_tokens)
            self.keys.append(keys.view(group.dtype).view(shape))
            shape = (layers, count, group.value_heads, group.page_tokens, group.value_dim)
            self.values.append(values.view(group.dtype).view(shape))
        self._free = [PageList(count) for count in num_pages]

    def take(self, group: int, count: int) -> list[int] | None:
        return self._free[group].take(count)

    def give_back(self, group: int, pages: Sequence[int]) -> None:
        self._free[group].give_back(pages)


class PageList:
    """Free page ids as sorted runs: what is asked for together comes contiguous where possible."""

    def __init__(self, num_pages: int) -> None:
        self._starts = [0] if num_pages else []
        self._stops = [num_pages] if num_pages else []
        self.num_free = num_pages

    def take(self, count: int, *, contiguous: bool = False) -> list[int] | None:
        """`count` page ids, or None (and nothing taken) when there are too few, or no such run."""
        if count > self.num_free:
            return None
        fitting = [index for index in range(len(self._starts)) if self._stops[index] - self._starts[index] >= count]
        if fitting:  # the smallest run that fits
            index = min(fitting, key=lambda i: self._stops[i] - self._starts[i])
            return self._cut(index, count)
        if contiguous:
            return None
        pages: list[int] = []
        while len(pages) < count:
            length = self._stops[-1] - self._starts[-1]
            pages += self._cut(len(self._starts) - 1, min(length, count - len(pages)))
        return pages

    def _cut(self, index: int, count: int) -> list[int]:
        start = self._starts[index]
        self.num_free -= count
        self._starts[index] += count
        if self._starts[index] == self._stops[index]:
            del self._starts[index], self._stops[index]
        return list(range(start, start + count))

    def give_back(self, pages: Sequence[int]) -> None:
        for page in sorted(pages):
            index = bisect.bisect_right(self._starts, page)
            joins_before = index > 0 and self._stops[index - 1] == page
            joins_after = index < len(self._starts) and self._starts[index] == page + 1
            if index > 0 and self._stops[index - 1] > page:
                raise EngineError(f"page {page} was freed twice")
            if joins_before and joins_after:
                self._stops[index - 1] = self._stops[index]
                del self._starts[index], self._stops[index]
            elif joins_before:
                self._stops[index - 1] = page + 1
            elif joins_after:
                self._starts[index] = page
            else:
                self._starts.insert(index, page)
                self._stops.insert(index, page + 1)
            self.num_free += 1


@dataclass(slots=True)
class SequenceKV:
    """One sequence's pages.

    Attributes:
        home: the tier. tables: per group, the page id of each page of tokens; -1 once freed.
        freed: per group, leading pages already freed.
    """

    home: str
    tables: list[list[int]]
    freed: list[int] = field(default_factory=list)


class Pool(Protocol):
    """What a tier's pool offers to hold sequences (PagePool here, DiskPool in kv_disk.py)."""

    num_pages: list[int]

    def take(self, group: int, count: int) -> list[int] | None: ...

    def give_back(self, group: int, pages: Sequence[int]) -> None: ...


class KVCache:
    """Sequences' pages over all tiers.

    Args:
        groups: layer groups. pools: tier -> its pool.
    """

    def __init__(self, groups: Sequence[KVGroup], pools: Mapping[str, Pool]) -> None:
        self.groups = tuple(groups)
        self.pools = pools
        self.used_bytes = dict.fromkeys(pools, 0)
        self.peak_bytes = dict.fromkeys(pools, 0)
        self._sharers = {home: [Counter[int]() for _ in groups] for home in pools}  # page -> sequences that hold it besides one

    def admit(self, home: str) -> SequenceKV:
        """A sequence without pages."""
        return SequenceKV(home, [[] for _ in self.groups], [0] * len(self.groups))

    def fork(self, kv: SequenceKV, length: int) -> SequenceKV:
        """A sequence that shares the first `length` tokens of another, in whole pages: those that queries behind them see."""
        forked = self.admit(kv.home)
        for index, group in enumerate(self.groups):
            table = kv.tables[index][: length // group.page_tokens]
            first = min(group.first_visible(length) // group.page_tokens, len(table))
            assert first >= kv.freed[index] or first == len(table), "what it must see is gone"
            self._sharers[kv.home][index].update(table[first:])
            forked.tables[index], forked.freed[index] = [-1] * first + table[first:], first
        return forked

    def reserve(self, kv: SequenceKV, length: int) -> bool:
        """Make room for `length` tokens; False (and nothing taken) when the pool has too few pages."""
        pool, taken = self.pools[kv.home], []
        for index, group in enumerate(self.groups):
            missing = -(-length // group.page_tokens) - len(kv.tables[index])
            pages = pool.take(index, missing) if missing > 0 else []
            if pages is None:
                for other, given in taken:
                    pool.give_back(other, given)
                return False
            taken.append((index, pages))
        for index, pages in taken:
            kv.tables[index] += pages
            self._count(kv.home, len(pages) * self.groups[index].page_bytes)
        return True

    def trim(self, kv: SequenceKV, length: int) -> None:
        """Free the pages that no later query sees, when `length` tokens are stored."""
        for index, group in enumerate(self.groups):
            useless = min(group.first_visible(length) // group.page_tokens, len(kv.tables[index]))
            if useless > kv.freed[index]:
                table = kv.tables[index]
                self._let_go(kv.home, index, table[kv.freed[index] : useless])
                table[kv.freed[index] : useless] = [-1] * (useless - kv.freed[index])
                kv.freed[index] = useless

    def release(self, kv: SequenceKV) -> None:
        """Free all pages of a sequence that it shares with no other."""
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
        self._count(home, -len(freed) * self.groups[index].page_bytes)

    def _count(self, home: str, delta_bytes: int) -> None:
        self.used_bytes[home] += delta_bytes
        self.peak_bytes[home] = max(self.peak_bytes[home], self.used_bytes[home])

    def could_ever_hold(self, home: str, prompt_len: int, final_len: int) -> bool:
        """Whether a sequence alone would fit the tier."""
        return all(
            max(-(-prompt_len // group.page_tokens), group.most_pages_held(final_len)) <= self.pools[home].num_pages[index]
            for index, group in enumerate(self.groups)
        )
