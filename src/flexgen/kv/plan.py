"""The plan of a micro-batch: its index tensors in each layer group, made once per pass and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flexgen.devices.base import HOST
from flexgen.kernels.prompts import paged_prompts
from flexgen.kv.pages import KVGroup, of_positions
from flexgen.kv.sealed_views import SealedGroupPlan, sealed_plan
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.sparse_plan import sparse_rows, step_parts
from flexgen.kv.views import GroupPlan, PromptPlan
from flexgen.passes.arrays import starts_of
from flexgen.passes.plan import Slice

GroupPlans = tuple[GroupPlan | SealedGroupPlan, ...]  # of each group of layers


class KVPlan:
    """The index tensors of a micro-batch, in host memory.

    They are made by operations on whole arrays, with a loop over slices but none over tokens.

    Args:
        groups: The layer groups.
        slices: The slices in the order of the micro-batch, next tokens before prompts.
        sparse: What generated tokens keep of what they see; None for all of it.
        in_pages: Whether prompts are attended to in their pages, all at once.

    Attributes:
        slices: All slices.
        steps: The slices that are next tokens.
        prompts: The other slices.
        groups: The index tensors of each group of layers.
    """

    def __init__(
        self, groups: Sequence[KVGroup], slices: Sequence[Slice], sparse: SparseAttention | None = None, *, in_pages: bool = False
    ) -> None:
        num_steps = sum(1 for each in slices if each.is_decode)
        self.slices, self.steps, self.prompts = tuple(slices), tuple(slices[:num_steps]), tuple(slices[num_steps:])
        assert all(each.is_decode for each in self.steps)
        self._in_pages = in_pages and sparse is None
        self.groups: GroupPlans = tuple(
            sealed_plan(groups, index, self.steps, self.prompts, sparse)
            if group.stores_whole_pages
            else self._plan_group(index, group, sparse)
            for index, group in enumerate(of_positions(groups))
        )

    def _plan_group(self, index: int, group: KVGroup, sparse: SparseAttention | None) -> GroupPlan:
        size = group.page_tokens
        tables = [np.array(each.tables[index], dtype=np.int64) for each in self.prompts]
        positions = [np.arange(each.start, each.stop) for each in self.prompts]
        seen = [group.geometry.first_visible(each) for each in positions]
        prompts: list[PromptPlan] = []
        for each, table, starts in zip(self.prompts, tables, seen, strict=True):
            first = min(int(starts[0]), each.start)
            past = (torch.from_numpy(table), first, each.start) if first < each.start else None
            kept = sparse_rows(group, each, first, sparse)
            prompts.append(PromptPlan(length=each.length, past=past, starts=torch.from_numpy(starts - first), sparse=kept))
        paged = None
        if self._in_pages and prompts:
            paged = paged_prompts([(each.start, each.stop) for each in self.prompts], tables, np.concatenate(seen), HOST)
        of_steps = starts_of(self.steps)
        pages_of_steps = np.array([each.tables[index][each.start // size] for each in self.steps], dtype=np.int64)
        pages_of_prompts = [table[each // size] for table, each in zip(tables, positions, strict=True)]
        return GroupPlan(
            page_ids=torch.from_numpy(np.concatenate([pages_of_steps, *pages_of_prompts])),
            page_offsets=torch.from_numpy(np.concatenate([of_steps, *positions]) % size),
            num_steps=len(self.steps),
            steps=step_parts(group, index, self.steps, sparse=sparse),
            prompts=tuple(prompts),
            paged=paged,
        )
