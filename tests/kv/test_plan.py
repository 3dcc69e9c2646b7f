"""The index tensors of a micro-batch, against loops over its tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from flexgen.kv.format import PlainKV
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import KVGroup, group_layers, of_positions
from flexgen.kv.plan import KVPlan
from flexgen.kv.sealed_views import SealedGroupPlan
from flexgen.kv.views import GroupPlan
from flexgen.passes.geometry import KVGeometry, LayerKV
from flexgen.passes.plan import Slice

SIZE = 4  # tokens of a page
REACHES = ({}, {"window": 6}, {"chunk": 5}, {"window": 1})
LAYERS = [
    LayerKV(layer=index, geometry=KVGeometry(key_heads=1, key_dim=32, value_heads=1, value_dim=32, **reach), flops_per_pair=1.0)
    for index, reach in enumerate(REACHES)
]


def first_seen(geometry: KVGeometry, position: int) -> int:
    if geometry.window is not None:
        return max(0, position - geometry.window + 1)
    return position // geometry.chunk * geometry.chunk if geometry.chunk is not None else 0


def slices(chance: random.Random, groups: Sequence[KVGroup]) -> list[Slice]:
    """Next tokens before prompts and chunks; pages that are no longer seen are gone from tables, and ids are drawn without order."""
    spans = [(start, 1) for start in chance.choices(range(1, 30), k=chance.randint(0, 4))]
    spans += [(chance.choice([0, 3, 8, 17]), chance.choice([2, 5, 11])) for _ in range(chance.randint(0 if spans else 1, 3))]
    made = []
    for start, length in spans:
        tables = [
            tuple(
                -1 if (page + 1) * SIZE <= first_seen(group.geometry, start) else chance.randrange(100)
                for page in range(group.num_pages(start + length))
            )
            if group.tail_of is None
            else (chance.randrange(9),)
            for group in groups
        ]
        made.append(
            Slice(
                sequence=0, token_ids=(7,) * length, start=start, prompt_len=start + length, total=start + length, tables=tuple(tables)
            )
        )  # fmt: skip
    return made


def test_reaches_of_many_positions_are_those_of_each() -> None:
    for layer in LAYERS:
        geometry = layer.geometry
        found = geometry.first_visible(torch.arange(40).numpy())
        assert found.tolist() == [geometry.first_visible(n) for n in range(40)] == [first_seen(geometry, n) for n in range(40)]


@pytest.mark.parametrize("seed", range(30))
def test_plain_pages(seed: int) -> None:
    chance, groups = random.Random(seed), group_layers(LAYERS, SIZE, PlainKV(torch.float32))
    batch = slices(chance, groups)
    plan = KVPlan(groups, batch, in_pages=True)
    assert (list(plan.steps), list(plan.prompts)) == ([s for s in batch if s.is_decode], [s for s in batch if not s.is_decode])
    for index, (group, found) in enumerate(zip(groups, plan.groups, strict=True)):
        assert isinstance(found, GroupPlan)
        tokens = [(each, position) for each in batch for position in range(each.start, each.stop)]
        assert found.page_ids.tolist() == [each.tables[index][position // SIZE] for each, position in tokens]
        assert found.page_offsets.tolist() == [position % SIZE for _, position in tokens]
        (part,), seen = found.steps, [first_seen(group.geometry, each.start) for each in plan.steps]
        tables = [each.tables[index][first // SIZE : each.start // SIZE + 1] for each, first in zip(plan.steps, seen, strict=True)]
        widest = max((len(table) for table in tables), default=1)
        assert part.steps.tables.tolist() == [[*table, *[-1] * (widest - len(table))] for table in tables]
        assert part.steps.starts.tolist() == [first % SIZE for first in seen]
        assert part.steps.lengths.tolist() == [each.start + 1 - first // SIZE * SIZE for each, first in zip(plan.steps, seen, strict=True)]
        for each, prompt in zip(plan.prompts, found.prompts, strict=True):
            first = min(first_seen(group.geometry, each.start), each.start)
            assert prompt.starts.tolist() == [first_seen(group.geometry, position) - first for position in range(each.start, each.stop)]
            assert (prompt.past is None) == (first == each.start)
            if prompt.past is not None:
                assert (prompt.past[0].tolist(), *prompt.past[1:]) == (list(each.tables[index]), first, each.start)
        assert (found.paged is not None) == bool(plan.prompts)
        if found.paged is not None:
            seen = [first_seen(group.geometry, position) for each in plan.prompts for position in range(each.start, each.stop)]
            assert found.paged.starts.tolist() == seen


@pytest.mark.parametrize("seed", range(30))
def test_sealed_pages(seed: int) -> None:
    chance, groups = random.Random(seed), group_layers(LAYERS, SIZE, kv_format("int8", torch.float32))
    batch = slices(chance, groups)
    plan = KVPlan(groups, batch)
    for index, (group, found) in enumerate(zip(of_positions(groups), plan.groups, strict=True)):
        assert isinstance(found, SealedGroupPlan)
        tail = index + len(of_positions(groups))
        kept: list[tuple[int, int, int]] = []
        row = 0
        for each in batch:
            for position in range(each.start, each.stop):
                if position >= (each.stop - 1) // SIZE * SIZE:
                    kept.append((row, each.tables[tail][0], position % SIZE))
                row += 1
        assert list(zip(found.tail_rows.tolist(), found.tail_ids.tolist(), found.tail_offsets.tolist(), strict=True)) == kept
        full = [each for each in plan.steps if each.stop % SIZE == 0]
        assert found.full_tails.tolist() == [each.tables[tail][0] for each in full]
        assert found.full_pages.tolist() == [each.tables[index][each.start // SIZE] for each in full]
        for each, prompt in zip(plan.prompts, found.prompts, strict=True):
            origin = min(first_seen(group.geometry, each.start), each.start) // SIZE * SIZE
            assert prompt.starts.tolist() == [first_seen(group.geometry, position) - origin for position in range(each.start, each.stop)]
            assert prompt.borders.tolist() == [position // SIZE * SIZE - origin for position in range(each.start, each.stop)]
            assert prompt.complete.tolist() == [each.tables[index][page] for page in range(each.start // SIZE, each.stop // SIZE)]
            assert prompt.tail.tolist() == [each.tables[tail][0]]
