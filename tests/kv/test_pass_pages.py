"""Which pages slices of a pass see and store something in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from flexgen.kv.format import default_kv_format
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import KVGroup, group_layers
from flexgen.kv.pass_pages import PassPages
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
    pages = PassPages.of(groups_of(window), [slice_of(start, stop, (10, 11, 12, 13))])
    assert (pages.seen, pages.stored) == ([seen], [stored])


def test_tails() -> None:
    """A sequence stores in its tail, whatever its position."""
    pages = PassPages.of(groups_of(low_bit="int8"), [slice_of(9, 10, (10, 11, 12), (3,))])
    assert (pages.seen, pages.stored) == ([{10, 11, 12}, {3}], [{12}, {3}])


def test_pages_that_others_only_see_do_not_matter() -> None:
    groups = groups_of()
    shared, own, other = (slice_of(8, 9, table) for table in ((1, 2, 3), (1, 2, 4), (1, 3, 5)))
    first, second, third = (PassPages.of(groups, [each]) for each in (shared, own, other))
    assert not first.meet(second)
    assert not second.meet(first)
    assert first.meet(third), "page 3 is stored by one and seen by the other"
    assert third.meet(first)
    assert not PassPages.of(groups, []).meet(first)
