"""Pages of KV: layer groups, the memory that holds their pages, and which pages are free.

A page holds `page_tokens` tokens of one layer; a page id stands for that page in every layer of its group.  A format that stores whole
pages only has a second group for the same layers, whose pages are tails: each sequence holds one, with the tokens of its last page.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexgen.base.quantities import align_up
from flexgen.errors import EngineError
from flexgen.io.aligned import allocate_memory
from flexgen.kv.format import DiskSlot, KVFormat, KVPages
from flexgen.passes.geometry import KVGeometry, LayerKV, by_geometry

VALUES_ALIGNMENT = 256  # more than any vector load needs; direct I/O uses pages that are multiples of its own alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers with equal geometries, which share page tables and pools.

    Attributes:
        layers: The model's layer indices, in order; an index into `layers` is also one into the memory of the group.
        geometry: The geometry of the cache of each layer.
        page_tokens: The number of tokens of a page.
        format: The format of keys and values in a page.
        tail_of: The index of the group whose tails these pages are; None for pages of tokens at fixed positions.
        slot: The layout of a page in which keys and values lie together, as on disk; None where they lie apart.
    """

    layers: tuple[int, ...]
    geometry: KVGeometry
    page_tokens: int
    format: KVFormat
    tail_of: int | None = None
    slot: DiskSlot | None = None

    @property
    def stores_whole_pages(self) -> bool:
        """Whether a page is written once, when it is complete."""
        return self.format.tail is not None

    @property
    def key_page_bytes(self) -> int:
        """The bytes of a page's keys in one layer, where they lie apart from the values."""
        return self.page_tokens * self.format.key_bytes(self.geometry)

    @property
    def value_page_bytes(self) -> int:
        """The bytes of a page's values in one layer, where they lie apart from the keys."""
        return self.page_tokens * self.format.value_bytes(self.geometry)

    @property
    def layer_page_bytes(self) -> int:
        """The bytes of a page in one layer."""
        return sum(self.plane_bytes)

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """The bytes of a page's adjacent pieces in one layer: keys and values, or both together."""
        return (self.key_page_bytes, self.value_page_bytes) if self.slot is None else (self.slot.page_bytes,)

    @property
    def page_bytes(self) -> int:
        """The bytes of a page in all layers of the group."""
        return len(self.layers) * self.layer_page_bytes

    def num_pages(self, tokens: int) -> int:
        """Return the number of pages that hold this many tokens; the last page may be partly filled."""
        return -(-tokens // self.page_tokens) if self.tail_of is None else min(tokens, 1)

    def num_shared(self, tokens: Any) -> Any:
        """Return the number of pages that two sequences share if they have this many tokens in common (a number or an array of them)."""
        return tokens // self.page_tokens if self.tail_of is None else tokens * 0

    def first_page(self, position: int) -> int:
        """Return the index of the first page that a query at `position` attends to."""
        return self.geometry.first_visible(position) // self.page_tokens

    def most_pages_held(self, length: int) -> int:
        """Return the most pages that a sequence holds until it has `length` tokens; windows and chunks may begin within a page."""
        pages, reach = self.num_pages(length), self.geometry.reach
        return pages if reach is None else min(pages, self.num_pages(reach) + 1)


def group_layers(layers: Iterable[LayerKV], page_tokens: int, kv_format: KVFormat) -> tuple[KVGroup, ...]:
    """Return the layer groups of a model, and behind them those of their tails, in the same order."""
    groups = [
        KVGroup(layers=tuple(each.layer for each in members), geometry=geometry, page_tokens=page_tokens, format=kv_format)
        for geometry, members in by_geometry(layers).items()
    ]
    if (tail := kv_format.tail) is None:
        return tuple(groups)
    tails = [
        replace(group, geometry=replace(group.geometry, window=None, chunk=None), format=tail, tail_of=index)
        for index, group in enumerate(groups)
    ]
    return (*groups, *tails)


def on_disk(groups: Iterable[KVGroup]) -> tuple[KVGroup, ...]:
    """Return the groups with the layout that their pages have on disk, and in staging."""
    return tuple(replace(group, slot=group.format.disk_slot(group.geometry, group.page_tokens)) for group in groups)


def of_positions(groups: Iterable[KVGroup]) -> tuple[KVGroup, ...]:
    """Return the groups of layers alone, without those of tails."""
    return tuple(group for group in groups if group.tail_of is None)


def with_tail(groups: Sequence[KVGroup], index: int) -> tuple[int, ...]:
    """Return the index of a group, and behind it that of its tails, if it has tails."""
    return (index, *(place for place, group in enumerate(groups) if group.tail_of == index))


def layer_index(groups: Sequence[KVGroup]) -> dict[int, tuple[int, int]]:
    """Return, for each layer index of the model, (group, index within the group); tails have the same place in their own group."""
    return {layer: (g, i) for g, group in enumerate(groups) if group.tail_of is None for i, layer in enumerate(group.layers)}


def divide_pool(groups: Sequence[KVGroup], pool_bytes: int, longest: int, num_seqs: int = 1) -> list[int]:
    """Return the pages of each group such that all groups run out together for sequences of `longest` tokens.

    Groups with windows or chunks first get the pages of one whole sequence, since the pages of a prompt are freed only after its pass.

    Args:
        groups: The layer groups.
        pool_bytes: The size of the pool.
        longest: The tokens of the longest sequence.
        num_seqs: The most sequences that are alive at once, each of which needs a tail where there are tails; there are fewer tails only
            where so many would leave no room for the longest sequence.
    """
    tails, others = [group for group in groups if group.tail_of is not None], of_positions(groups)
    if tails:
        pages = sum(group.num_pages(longest) * group.page_bytes for group in others)
        tail_bytes = sum(group.page_bytes for group in tails)
        num_tails = max(min(num_seqs, (pool_bytes - pages) // tail_bytes), 1)
        if pool_bytes < num_tails * tail_bytes:
            return [0] * len(groups)
        return [*divide_pool(others, pool_bytes - num_tails * tail_bytes, longest), *(num_tails for _ in tails)]
    first = [group.num_pages(longest) + 1 if group.geometry.reach is not None else 0 for group in groups]
    rest = pool_bytes - sum(pages * group.page_bytes for pages, group in zip(first, groups, strict=True))
    if rest < 0:
        first, rest = [0] * len(groups), pool_bytes
    wanted = [group.most_pages_held(longest) * group.page_bytes for group in groups]
    shared = [int(rest * want / sum(wanted)) // group.page_bytes for group, want in zip(groups, wanted, strict=True)]
    return [whole + share for whole, share in zip(first, shared, strict=True)]


Allocate = Callable[[int], torch.Tensor]  # makes a uint8 tensor of this many bytes


class PageMemory:
    """Memory for `count` pages of a group in some of its layers, plane by plane.

    Args:
        group: The group of the pages.
        num_layers: The number of layers.
        count: The number of pages per layer.
        allocate: A function that makes a uint8 tensor of a given number of bytes.

    Attributes:
        keys: The keys, uint8 (layers, pages, bytes of a page's keys).  In slots, keys and values are uint8 (layers, pages, bytes of a slot)
            in the same memory, and `values` begins where the values of the first head begin.
        values: The values, uint8 (layers, pages, bytes of a page's values).
        planes: The memory of each plane, uint8 (layers, pages, bytes of a page in it).
    """

    def __init__(self, group: KVGroup, num_layers: int, count: int, allocate: Allocate) -> None:
        self._group = group
        sizes = [num_layers * count * each for each in group.plane_bytes]
        if group.slot is None:
            begin = align_up(sizes[0], VALUES_ALIGNMENT)
            arena = allocate(max(begin + sizes[1], 1))
            self.keys, self.values = self.planes = tuple(
                arena[start : start + size].view(num_layers, count, each)
                for start, size, each in zip((0, begin), sizes, group.plane_bytes, strict=True)
            )
        else:
            begin, shape = group.slot.values_at, (num_layers, count, group.slot.page_bytes)
            arena = allocate(sizes[0] + begin)
            self.keys, self.values = arena[: sizes[0]].view(shape), arena[begin : begin + sizes[0]].view(shape)
            self.planes = (self.keys,)

    def pages(self, layer: int) -> KVPages:
        """Return the pages of one layer, by its index in this memory."""
        return self._group.format.pages(self.keys[layer], self.values[layer], self._group.geometry, self._group.page_tokens)


def layer_pages(memories: Sequence[PageMemory], layer: int) -> KVPages:
    """Return the pages of one layer, by its index in the memory; `memories` are those of its group and, if it has tails, of these."""
    pages = memories[0].pages(layer)
    return pages if len(memories) == 1 else pages.beside(memories[1].pages(layer))


class Pool:
    """The free pages of a tier.

    Args:
        groups: The layer groups.
        num_pages: The number of pages of each group.
        first_pages: The first page id of each group; 0 if it is left out.
        reserves_ahead: For each group, whether a sequence takes at once all pages that it expects to need, so that they are contiguous.

    Attributes:
        free: The free pages of each group.
    """

    def __init__(
        self, groups: Sequence[KVGroup], num_pages: Sequence[int], *, first_pages: Sequence[int] = (), reserves_ahead: Sequence[bool] = ()
    ) -> None:
        self.groups, self.num_pages = tuple(groups), list(num_pages)
        self.reserves_ahead = tuple(reserves_ahead) or (False,) * len(self.groups)
        firsts = first_pages or [0] * len(self.groups)
        self.free = [PageList(count, first) for count, first in zip(num_pages, firsts, strict=True)]

    def take(self, group: int, count: int) -> list[int] | None:
        """Return `count` page ids, or None if too few are free, in which case none are taken."""
        return self.free[group].take(count)

    def give_back(self, group: int, pages: Sequence[int]) -> None:
        """Free these page ids."""
        self.free[group].give_back(pages)


class PagePool(Pool):
    """The pages of a tier that computing or kernels can access directly.

    Attributes:
        memory: The memory of each group.
        pages: For each layer index of the model, that layer's pages.
    """

    def __init__(self, groups: Sequence[KVGroup], num_pages: Sequence[int], allocate: Allocate = allocate_memory) -> None:
        super().__init__(groups, num_pages)
        self.memory = [PageMemory(group, len(group.layers), count, allocate) for group, count in zip(groups, num_pages, strict=True)]
        self.pages = {
            layer: layer_pages([self.memory[each] for each in with_tail(groups, group)], place)
            for layer, (group, place) in layer_index(groups).items()
        }


class PageList:
    """Free page ids as sorted runs, so that ids that are taken together are contiguous where possible."""

    def __init__(self, num_pages: int, first: int = 0) -> None:
        self._starts = [first] if num_pages else []
        self._stops = [first + num_pages] if num_pages else []
        self.num_free = num_pages

    def take(self, count: int, *, contiguous: bool = False) -> list[int] | None:
        """Return `count` page ids; None, with none taken, if too few are free or no run is long enough for `contiguous`."""
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
