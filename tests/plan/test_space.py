"""The space of policies, and copies of it with other budgets."""

import dataclasses
import random

import pytest
from plan.instances import TIERS, instance_of

from flexgen.base.quantities import GIB
from flexgen.plan.play.simulate import simulate
from flexgen.plan.price.requests import kv_room
from flexgen.plan.search.kv_pools import pool_fractions
from flexgen.plan.search.point import Point


def random_points(space, draw, number):
    """Points anywhere in the unit cube, some of them with all KV on disk."""
    for _ in range(number):
        yield Point(
            on_device=draw.random(), on_host=draw.random(), encoded=draw.choice([0.0, draw.random(), 1.0]), kv_homes=draw.random(),
            kv_disk=draw.choice([0.0, draw.random(), 1.0]),
            quota=draw.random(), cap=draw.random(), embedding=draw.random() < 0.5, schedule=draw.choice(space.schedules()),
            micro_batch_tokens=draw.choice(space.micro_batches()), host_attention=draw.choice(space.host_attentions()),
        )  # fmt: skip


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("seed", range(20))
def test_a_space_within_other_budgets_is_the_space_made_for_them(seed, tier):
    instance = instance_of(seed)
    draw = random.Random(seed)
    name = f"{tier}_bytes"
    size = draw.choice([0.5, 2.0]) * getattr(instance.limits, name) + draw.choice([0, GIB])
    limits = dataclasses.replace(instance.limits, **{name: int(size)})
    within, fresh = instance.space().within(limits), dataclasses.replace(instance, limits=limits).space()
    assert (within.limits, within.disk_bytes, within.kv_tiers) == (fresh.limits, fresh.disk_bytes, fresh.kv_tiers)
    for point in random_points(fresh, draw, 40):
        assert within.free_axes(point.schedule) == fresh.free_axes(point.schedule)
        assert within.policy(point) == fresh.policy(point)
        assert within.free_memory(point, spills=True) == fresh.free_memory(point, spills=True)


@pytest.mark.parametrize("seed", range(12))
def test_padded_pages_take_their_room_on_disk(seed):
    """The pool on disk is one of padded bytes within the budget, and what lives there is as much KV as its share says."""
    instance = instance_of(seed)
    groups = tuple(dataclasses.replace(group, slot_bytes_per_token=3 * group.bytes_per_token // 2) for group in instance.spec.kv_groups)
    spec = dataclasses.replace(instance.spec, kv_groups=groups, kv_format="int8")
    space, draw = dataclasses.replace(instance, spec=spec).space(), random.Random(seed)
    spilled = 0
    for point in random_points(space, draw, 60):
        if (policy := space.policy(point)) is None or not policy.kv_disk_bytes:
            continue
        spilled += 1
        room = kv_room(spec, policy)
        assert policy.kv_disk_bytes <= space.disk_bytes
        assert room["disk"] == pytest.approx(policy.kv_disk_bytes / 1.5, abs=1)
        shares = pool_fractions(room)
        assert space.kv is not None or shares.disk == pytest.approx(policy.kv.disk, abs=1e-3)
        if spilled < 4:
            played = simulate(spec, policy, space.workload)
            assert max(played.kv_bytes.get("disk", [0])) <= room["disk"]
    assert spilled or not space.disk_bytes
