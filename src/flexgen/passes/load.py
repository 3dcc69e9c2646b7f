"""Counts the work of a pass, from which the planner computes its time.  Uses no tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from flexgen.passes.geometry import KVGeometry
from flexgen.passes.plan import PassPlan, Slice
from flexgen.plan.price.work import PassLoad


class LayerGroup(Protocol):
    """Layers of one geometry, whose KV is stored in the same pages."""

    @property
    def page_tokens(self) -> int: ...

    @property
    def geometry(self) -> KVGeometry: ...


def pass_load(plan: PassPlan, homes: Sequence[str], groups: Sequence[LayerGroup], *, brought: Collection[str] = ("disk",)) -> PassLoad:
    """Return the work of a pass.

    Args:
        plan: The plan of the pass.
        homes: The tiers that hold KV.
        groups: The layer groups, in the order of the slices' page tables.
        brought: The tiers whose pages are brought to where they are attended to, once for all sequences of a micro-batch.
    """
    prompts, starts, steps = (dict.fromkeys(homes, 0) for _ in range(3))
    pairs = [0] * len(groups)
    attended, earlier = ({home: [0] * len(groups) for home in homes} for _ in range(2))
    repeated = {home: [0] * len(groups) for home in homes if home in brought}
    sampled = scored = 0
    for batch in plan.micro_batches:
        home = batch.home
        decodes = [each for each in batch.slices if each.is_decode]
        others = [each for each in batch.slices if not each.is_decode]
        steps[home] += len(decodes)
        prompts[home] += sum(each.length for each in others)
        starts[home] += sum(each.stop == each.total for each in others)
        sampled += sum(len(each.wanted) for each in batch.slices)
        scored += sum(len(set(each.scored)) for each in batch.slices)
        for index, group in enumerate(groups):
            attended[home][index] += sum(each.stop - group.geometry.first_visible(each.start) for each in decodes)
            pairs[index] += visible_pairs(others, group)
            earlier[home][index] += sum(each.start - group.geometry.first_visible(each.start) for each in others)
            if home in repeated:
                repeated[home][index] += tokens_read_twice(decodes, index, group)
    return PassLoad(
        prompt_tokens=prompts, num_prompts=starts, next_tokens=steps, prompt_pairs=pairs, attended_tokens=attended,
        repeated_tokens=repeated, earlier_tokens=earlier, num_sampled=sampled, num_scored=scored,
    )  # fmt: skip


def visible_pairs(slices: Iterable[Slice], group: LayerGroup) -> int:
    """Return the number of (query, visible token) pairs of the slices."""
    return sum(position + 1 - group.geometry.first_visible(position) for each in slices for position in range(each.start, each.stop))


def tokens_read_twice(decodes: Iterable[Slice], index: int, group: LayerGroup) -> int:
    """Return the number of tokens on pages that an earlier one of these slices reads as well.

    Args:
        decodes: Slices of one token.
        index: The index of the group among the slices' page tables.
        group: The layer group.
    """
    size = group.page_tokens
    pages = [
        page for each in decodes for page in each.tables[index][group.geometry.first_visible(each.start) // size : each.start // size + 1]
    ]
    return (len(pages) - len(set(pages))) * size
