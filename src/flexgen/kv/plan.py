"""The plan of a micro-batch: its index tensors in each layer group, made once per pass and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.kernels.prompts import paged_prompts
from flexgen.kv.pages import KVGroup, of_positions
from flexgen.kv.sealed_views import sealed_plan
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.sparse_plan import sparse_rows, step_parts
from flexgen.kv.views import GroupPlan, PromptPlan
from flexgen.passes.plan import Slice


class KVPlan:
    """The index tensors of a micro-batch.

    Args:
        groups: The layer groups.
        slices: The slices in the order of the micro-batch, next tokens before prompts.
        device: The device of the index tensors.
        sparse: What generated tokens keep of what they see; None for all of it.
        in_pages: Whether prompts are attended to in their pages, all at once.

    Attributes:
        slices: All slices.
        steps: The slices that are next tokens.
        prompts: The other slices.
        groups: The index tensors of each group of layers.
    """

    def __init__(
        self, groups: Sequence[KVGroup], slices: Sequence[Slice], device: torch.device, sparse: SparseAttention | None = None, *,
        in_pages: bool = False,
    ) -> None:  # fmt: skip
        num_steps = sum(1 for each in slices if each.is_decode)
        self.slices, self.steps, self.prompts = tuple(slices), tuple(slices[:num_steps]), tuple(slices[num_steps:])
        assert all(each.is_decode for each in self.steps)
        self._in_pages = in_pages and sparse is None
        self.groups = [
            sealed_plan(groups, index, self.steps, self.prompts, device, sparse)
            if group.stores_whole_pages
            else self._plan_group(index, group, device, sparse)
            for index, group in enumerate(of_positions(groups))
        ]

    def _plan_group(self, index: int, group: KVGroup, device: torch.device, sparse: SparseAttention | None) -> GroupPlan:
        def integers(values: Sequence[object]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        size, first_visible = group.page_tokens, group.geometry.first_visible
        page_ids, offsets = [], []
        for each in self.slices:
            positions = range(each.start, each.start + each.length)
            table = each.tables[index]
            page_ids += [table[position // size] for position in positions]
            offsets += [position % size for position in positions]
        prompts = []
        for each in self.prompts:
            first = min(first_visible(each.start), each.start)
            past = (integers(each.tables[index]), first, each.start) if first < each.start else None
            starts = [first_visible(position) - first for position in range(each.start, each.start + each.length)]
            kept = sparse_rows(group, each, first, device, sparse)
            prompts.append(PromptPlan(length=each.length, past=past, starts=integers(starts), sparse=kept))
        paged = None
        if self._in_pages and self.prompts:
            spans, tables = [(each.start, each.stop) for each in self.prompts], [each.tables[index] for each in self.prompts]
            paged = paged_prompts(spans, tables, [first_visible(position) for span in spans for position in range(*span)], device)
        return GroupPlan(
            page_ids=integers(page_ids),
            page_offsets=integers(offsets),
            num_steps=len(self.steps),
            steps=step_parts(group, index, self.steps, device, sparse=sparse),
            prompts=tuple(prompts),
            paged=paged,
        )
