"""Slots for the last pages of sequences: one each while there are some, free again when the page is full or its sequence has ended."""

from __future__ import annotations

import torch

from flexgen.kv.format import PlainKV
from flexgen.kv.pages import KVGroup
from flexgen.kv.tails import Tails
from flexgen.passes.geometry import KVGeometry

GROUP = KVGroup(
    layers=(0, 1), page_tokens=4, format=PlainKV(torch.float32), geometry=KVGeometry(key_heads=1, key_dim=2, value_heads=1, value_dim=2)
)  # fmt: skip


def test_slots_of_sequences_that_ended_elsewhere_are_free_again() -> None:
    """Whoever plans the passes of a stage on another machine gives pages back there."""
    tails = Tails([GROUP, GROUP], 2 * 2 * GROUP.page_bytes)
    slots = [tails.keep(0, page, sequence) for page, sequence in ((10, 1), (11, 2), (12, 3))]
    assert None not in slots[:2]
    assert slots[0] != slots[1]
    assert slots[2] is None, "all are taken"
    assert tails.keep(1, 10, 1) is not None
    tails.end({1, 7})
    assert (tails.slot(0, 10), tails.slot(1, 10), tails.slot(0, 11)) == (None, None, slots[1])
    assert tails.keep(0, 12, 3) == slots[0]
    tails.end({1})
    assert tails.slot(0, 12) == slots[0], "the page was another sequence's before"


def test_a_page_that_another_sequence_took_over_is_that_one_s() -> None:
    tails = Tails([GROUP], GROUP.page_bytes)
    slot = tails.keep(0, 10, 1)
    assert tails.keep(0, 10, 2) == slot
    tails.end({1})
    assert tails.slot(0, 10) == slot
    tails.forget(0, [10, 11])
    tails.end({2})
    assert tails.keep(0, 11, 3) == slot
