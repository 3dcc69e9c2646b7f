"""What a pass may compute together on each tier, by the policy alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen.kv.tiers import Traits, traits_of
from flexgen.plan.policy import Fractions
from tests.kv.test_places import GROUPS
from tests.models.parity import policy


@pytest.mark.parametrize(
    ("device", "tier", "wanted"),
    [
        ("cpu", "host", Traits(chunks=True, mixes=True)),
        ("cpu", "disk", Traits(chunks=False, mixes=False)),
        ("sim", "device", Traits(chunks=True, mixes=True)),
        ("sim", "host", Traits(chunks=True, mixes=False)),
        ("sim", "disk", Traits(chunks=False, mixes=False)),
    ],
)
def test_where_kv_lives_decides(device: str, tier: str, wanted: Traits) -> None:
    chosen = policy(device, weights=Fractions(host=1), kv=Fractions(host=1), ring_bytes=0)
    assert traits_of(tier, GROUPS, chosen) == wanted
    assert wanted.share_of_batch(10**6) == 0


def test_pages_that_come_to_the_device_limit_a_micro_batch() -> None:
    chosen = policy("sim", weights=Fractions(host=1), kv=Fractions(host=1), ring_bytes=0)
    found = traits_of("host", GROUPS, replace(chosen, host_attention=False, kv_ring_bytes=3000))
    assert (found.chunks, found.mixes) == (True, False)
    assert 0 < found.share_of_batch(3) < found.share_of_batch(40)
