"""The pages that a micro-batch of next tokens sees, with new numbers from 0 on, so that they alone can be brought elsewhere.

A page that several sequences share has one number.  Of layers with windows or chunks only what is seen has any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from flexgen.base.quantities import align_up
from flexgen.kv.pages import VALUES_ALIGNMENT, KVGroup, PageMemory, layer_index, with_tail
from flexgen.kv.plan import GroupPlans, KVPlan
from flexgen.kv.sealed_views import SealedGroupPlan
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.views import GroupPlan
from flexgen.passes.arrays import starts_of
from flexgen.passes.plan import Slice


class CompactPages:
    """The pages that the next tokens of a micro-batch see, those that hold the tokens themselves included.

    Args:
        groups: The layer groups.
        slices: The next tokens.

    Attributes:
        ids: For each layer group, the page ids in the order of the new numbers, int64 (pages,).
    """

    def __init__(self, groups: Sequence[KVGroup], slices: Sequence[Slice]) -> None:
        self._groups = groups
        numbered = [_numbered(group, index, slices) for index, group in enumerate(groups)]
        self.ids = [torch.from_numpy(ids) for ids, _ in numbered]
        self._slices = [
            dataclasses.replace(each, tables=tuple(tables[row] for _, tables in numbered)) for row, each in enumerate(slices)
        ]  # with new numbers

    def plan(self, sparse: SparseAttention | None = None) -> GroupPlans:
        """Return index tensors by the new numbers, which store new tokens and attend to all, but seal no page.

        Args:
            sparse: What generated tokens keep of what they see; None for all of it.
        """
        return tuple(_without_sealing(each) for each in KVPlan(self._groups, self._slices, sparse).groups)

    @property
    def largest_layer_bytes(self) -> int:
        """The bytes of the pages in the layer where they take most."""
        return max(self.layer_bytes(group) for group, _ in layer_index(self._groups).values())

    def layer_bytes(self, index: int) -> int:
        """Return the bytes of the pages in one layer of a group, with those of its tails."""
        return sum(
            align_up(self._count(each) * size, VALUES_ALIGNMENT)
            for each in with_tail(self._groups, index)
            for size in self._groups[each].plane_bytes
        )

    def in_memory(self, index: int, memory: torch.Tensor) -> list[PageMemory]:
        """Return the pages of one layer of a group, and of its tails if it has tails.

        Args:
            index: The index of the group.
            memory: Their memory, uint8 of `layer_bytes`.
        """
        offset = 0

        def allocate(size_bytes: int) -> torch.Tensor:
            nonlocal offset
            start, offset = offset, offset + align_up(size_bytes, VALUES_ALIGNMENT)
            return memory[start : start + size_bytes]

        return [PageMemory(self._groups[each], 1, self._count(each), allocate) for each in with_tail(self._groups, index)]

    def _count(self, index: int) -> int:
        """Return the number of pages that there is room for: where there are none, kernels read one all the same, and ignore it."""
        return max(len(self.ids[index]), 1)


def _numbered(group: KVGroup, index: int, slices: Sequence[Slice]) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Return the ids of the pages that next tokens see in a group, ascending, and for each of them its table with their new numbers."""
    starts = starts_of(slices)
    firsts, own = np.zeros_like(starts), np.ones_like(starts)
    if group.tail_of is None:
        firsts = group.geometry.first_visible(starts) // group.page_tokens
        own = starts // group.page_tokens + (not group.stores_whole_pages)  # a token's own page is not sealed yet
    tables = [
        np.array(each.tables[index][first:stop], dtype=np.int64)
        for each, first, stop in zip(slices, firsts.tolist(), own.tolist(), strict=True)
    ]
    ids, numbers = np.unique(np.concatenate(tables), return_inverse=True)
    parts = np.split(numbers, np.cumsum([len(table) for table in tables])[:-1])
    behind = (-1,) if group.stores_whole_pages else ()
    return ids, [(-1,) * first + tuple(part.tolist()) + behind for first, part in zip(firsts.tolist(), parts, strict=True)]


def _without_sealing(plan: GroupPlan | SealedGroupPlan) -> GroupPlan | SealedGroupPlan:
    """Return a plan that stores new tokens in tails without sealing those that they complete."""
    if isinstance(plan, GroupPlan):
        return plan
    none = torch.empty(0, dtype=torch.int64)
    return dataclasses.replace(plan, full_tails=none, full_pages=none)
