"""Which pages slices of a pass see and store something in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from flexgen.kv.format import default_kv_format
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import KVGroup, group_layers
from flexgen.kv.pass_pages import apart, pages_of
from flexgen.passes.geometry import KVGeometry, LayerKV
from flexgen.passes.plan import Slice

PAGE = 4


def groups_of(window: int | None = None, low_bit: str | None = None) -> tuple[KVGroup, ...]:
    geometry = KVGeometry(key_heads=1, key_dim=32, value_heads=1, value_dim=32, window=window)
    chosen = default_kv_format(torch.float32) if low_bit is None else kv_format(low_bit, torch.float32)
    return group_layers([LayerKV(layer=0, geometry=geometry, flops_per_pair=1.0)], PAGE, chosen)


def slice_of(start: int, stop: int, *tables: Sequence[int]) -> Slice:
    return Slice(
        sequence=0, token_ids=(0,) * (stop - start), start=start, prompt_len=stop, total=stop, tables=tuple(tuple(each) for each in tables)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("start", "stop", "window", "seen", "stored"),
    [
        (0, 9, None, {10, 11, 12}, {10, 11, 12}),
        (8, 9, None, {10, 11, 12}, {12}),
        (7, 8, None, {10, 11}, {11}),
        (6, 10, None, {10, 11, 12}, {11, 12}),
        (9, 10, 3, {11, 12}, {12}),
    ],
)
def test_pages_of_positions(start: int, stop: int, window: int | None, seen: set[int], stored: set[int]) -> None:
    (group,), piece = groups_of(window), slice_of(start, stop, (10, 11, 12, 13))
    found = pages_of(group, piece.tables[0], piece)
    assert tuple(map(set, found)) == (seen, stored)


def test_tails() -> None:
    """A sequence stores in its tail, whatever its position."""
    groups, piece = groups_of(low_bit="int8"), slice_of(9, 10, (10, 11, 12), (3,))
    found = [tuple(map(set, pages_of(group, table, piece))) for group, table in zip(groups, piece.tables, strict=True)]
    assert found == [({10, 11, 12}, {12}), ({3}, {3})]


def test_pages_that_others_only_see_do_not_matter() -> None:
    groups = groups_of()
    shared, own, other = (slice_of(8, 9, table) for table in ((1, 2, 3), (1, 2, 4), (1, 3, 5)))
    assert apart(groups, [[shared], [own]]) == [True, True]
    assert apart(groups, [[shared], [other]]) == [False, False], "page 3 is stored by one and seen by the other"
    assert apart(groups, [[other], [shared]]) == [False, False]
    assert apart(groups, [[shared, other], [own]]) == [True, True], "within one micro-batch there is an order"
    assert apart(groups, []) == []


def test_next_tokens_that_follow_others_are_in_order_with_them() -> None:
    """A prompt sees what the first stores, the second sees it too, but has nothing to do with the prompt's own pages."""
    first, second, unrelated = slice_of(7, 8, (1, 2)), slice_of(8, 9, (1, 2, 3)), slice_of(8, 9, (7, 8, 9))
    prompt = slice_of(8, 14, (1, 2, 4, 5))
    assert apart(groups_of(), [[prompt], [first], [second], [unrelated]]) == [False, False, False, True]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_two_that_store_in_one_page(order: tuple[int, ...]) -> None:
    """Chunks of a prompt, beside a sequence that sees that page."""
    batches = [[slice_of(0, 6, (1, 2))], [slice_of(6, 8, (1, 2))], [slice_of(8, 9, (1, 2, 3))]]
    assert apart(groups_of(), [batches[each] for each in order]) == [False] * 3
