"""Lanes: shares that add up, pages that no two sequences share on any stage, and plans that say to each stage what is its own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import EngineError
from flexgen.kv.cache import KVCache, SequenceKV
from flexgen.kv.format import PlainKV
from flexgen.kv.lanes import Lanes, StageKV, lanes_of
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import group_layers
from flexgen.kv.tiers import block_pages
from flexgen.options import TIERS
from flexgen.passes.geometry import KVGeometry, LayerKV
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.policy import Fractions, Policy
from tests.models.parity import policy

PLAIN = PlainKV(torch.float32)
LONGEST, NUM_BLOCKS = 24, 2
GEOMETRIES = [
    KVGeometry(key_heads=1, key_dim=8, value_heads=1, value_dim=8),
    KVGeometry(key_heads=1, key_dim=8, value_heads=1, value_dim=8, window=9),
]


def stage(layers: range, device: str = "cpu", /, *, pool_bytes: int = 100_000, low_bit: bool = False, **kv: float) -> StageKV:
    """Layers that see everything and layers with windows in turn; the shares of its tiers add up to 1."""
    chosen = policy(device, weights=Fractions(host=1), kv=Fractions(**kv), ring_bytes=0)
    sizes = {f"kv_{tier}_bytes": int(kv.get(tier, 0) * pool_bytes) for tier in TIERS}
    held = [LayerKV(layer=layer, geometry=GEOMETRIES[layer % 2], flops_per_pair=1.0) for layer in layers]
    groups = group_layers(held, chosen.page_tokens, kv_format("int8", torch.float32) if low_bit else PLAIN)
    return StageKV(groups=groups, policy=replace(chosen, **sizes, longest_sequence=LONGEST, num_blocks=NUM_BLOCKS))


def kv_of(weights: tuple[int, int, int]) -> dict[str, float]:
    return {tier: weight / sum(weights) for tier, weight in zip(TIERS, weights, strict=True) if weight}


shares = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)).filter(any).map(kv_of)
pipelines = st.lists(shares, min_size=1, max_size=4).map(
    lambda kv: [stage(range(2 * index, 2 * index + 2), "sim", **each) for index, each in enumerate(kv)]
)


def test_one_stage_has_its_tiers() -> None:
    lanes = lanes_of([stage(range(4), host=0.75, disk=0.25)])
    assert lanes.shares == pytest.approx({"host": 0.75, "disk": 0.25})
    pools = lanes.pools(0)
    for tier, pool in pools.items():
        assert pool.num_pages == block_pages(tier, lanes.groups, stage(range(4), host=0.75, disk=0.25).policy)
    assert pools["disk"].reserves_ahead == (True, True)
    assert pools["host"].reserves_ahead == (False, False)


def test_stages_cut_what_others_do_not() -> None:
    lanes = lanes_of([stage(range(2), host=0.5, disk=0.5), stage(range(2, 4), "sim", device=0.25, host=0.75), stage(range(4, 5), host=1)])
    assert lanes.shares == pytest.approx({"host+device+host": 0.25, "host+host+host": 0.25, "disk+host+host": 0.5})
    assert lanes.traits["host+device+host"].mixes
    assert not lanes.traits["host+host+host"].mixes, "the second stage has a device, so that next tokens are attended to on its host"
    assert lanes.traits["host+host+host"].chunks
    assert not lanes.traits["disk+host+host"].chunks
    assert lanes.pools(0)["disk+host+host"].reserves_ahead == (True, True, False, False, False)


def test_the_largest_share_of_a_batch_counts() -> None:
    brings = [stage(range(2), "sim", host=1.0), stage(range(2, 6), "sim", host=1.0)]
    brings = [replace(each, policy=replace(each.policy, host_attention=False, kv_ring_bytes=3000)) for each in brings]
    lanes, of_stages = lanes_of(brings), [lanes_of([each]).traits["host"] for each in brings]
    assert lanes.traits["host+host"].share_of_batch(20) == max(each.share_of_batch(20) for each in of_stages) > 0


def test_a_stage_without_memory_for_kv() -> None:
    with pytest.raises(EngineError, match="no memory for KV"):
        lanes_of([stage(range(2), host=1.0), stage(range(2, 4), host=1.0, pool_bytes=0)])


def test_parts_that_hold_no_sequence_are_no_lanes() -> None:
    """There is room for the longest sequence once, which two lanes would each have half of."""
    one, other = stage(range(0, 2, 2), host=0.5, disk=0.5, pool_bytes=100_000), stage(range(2, 4, 2), host=1.0, pool_bytes=3 * 1024)
    assert block_pages("host", other.groups, other.policy) == [6]
    assert len(lanes_of([one, other]).shares) == 2
    tight = replace(other, policy=replace(other.policy, kv_host_bytes=5 * 512))
    assert block_pages("host", tight.groups, tight.policy) == [5]
    lanes = lanes_of([one, tight])
    (name,) = lanes.shares
    assert lanes.shares[name] == 1.0
    assert lanes.pools(0)[name].num_pages[1] == 5, "all pages are the one lane's"


@given(pipelines)
def test_shares_and_pages_add_up(stages: list[StageKV]) -> None:
    lanes = lanes_of(stages)
    assert sum(lanes.shares.values()) == pytest.approx(1.0)
    assert all(share > 0 for share in lanes.shares.values())
    assert list(lanes.traits) == list(lanes.shares)
    taken: dict[tuple[int, str, int], list[int]] = {}
    for block in range(NUM_BLOCKS):
        for name, pool in lanes.pools(block).items():
            assert lanes.holds_longest(name)
            places = [(number, index) for number, each in enumerate(stages) for index in range(len(each.groups))]
            for place, (number, index) in enumerate(places):
                tier = name.split("+")[number]
                pages = pool.take(place, pool.num_pages[place])
                assert pages is not None
                count = block_pages(tier, stages[number].groups, stages[number].policy)[index]
                assert all(block * count <= page < (block + 1) * count for page in pages)
                taken.setdefault((number, tier, index), []).extend(pages)
    for (number, tier, index), pages in taken.items():
        count = block_pages(tier, stages[number].groups, stages[number].policy)[index]
        assert sorted(pages) == list(range(NUM_BLOCKS * count)), "each page of a tier belongs to one lane of one block"


@given(pipelines, st.lists(st.tuples(st.integers(0, 1), st.integers(1, LONGEST), st.booleans()), max_size=30), st.booleans())
def test_sequences_never_share_a_page_on_any_stage(stages: list[StageKV], steps: list[tuple[int, int, bool]], low_bit: bool) -> None:
    """Sequences enter the lanes of both blocks in turn, and leave; each stage sees its own tables only."""
    if low_bit:
        stages = [stage(range(2 * n, 2 * n + 2), "sim", low_bit=True, **kv_of_policy(each.policy)) for n, each in enumerate(stages)]
    lanes = lanes_of(stages)
    caches = [KVCache(lanes.groups, lanes.pools(block)) for block in range(NUM_BLOCKS)]
    names = itertools.cycle(lanes.shares)
    live: list[tuple[int, SequenceKV]] = []
    for block, length, leaves in steps:
        kv = caches[block].admit(next(names))
        if caches[block].reserve(kv, length):
            live.append((block, kv))
        else:
            assert kv.tables == [[] for _ in lanes.groups], "none are taken where some are missing"
        check_pages(lanes, stages, [each for _, each in live])
        if leaves and live:
            which, gone = live.pop(0)
            caches[which].release(gone)
    for number in range(len(stages)):
        held = sum(lanes.used_bytes(number, caches).values())
        assert (held > 0) == bool(live)
    for which, gone in live:
        caches[which].release(gone)
    for cache in caches:
        assert all(used == 0 for used in cache.used_bytes.values())
        for pool in cache.pools.values():
            assert [each.num_free for each in pool.free] == pool.num_pages


def kv_of_policy(chosen: Policy) -> dict[str, float]:
    return {tier: getattr(chosen.kv, tier) for tier in TIERS if getattr(chosen.kv, tier)}


def check_pages(lanes: Lanes, stages: list[StageKV], live: list[SequenceKV]) -> None:
    def one(number: int, kv: SequenceKV) -> MicroBatch:
        tables = tuple(map(tuple, kv.tables))
        return MicroBatch(home=kv.home, slices=(Slice(sequence=number, token_ids=(1,), start=0, prompt_len=1, total=1, tables=tables),))

    plan = PassPlan(micro_batches=tuple(one(number, kv) for number, kv in enumerate(live)))
    for number, each in enumerate(stages):
        own = lanes.for_stage(plan, number)
        seen: set[tuple[str, int, int]] = set()
        for batch, kv in zip(own.micro_batches, live, strict=True):
            assert batch.home == kv.home.split("+")[number]
            (piece,) = batch.slices
            assert len(piece.tables) == len(each.groups)
            pages = [(batch.home, index, page) for index, table in enumerate(piece.tables) for page in table]
            assert not seen & set(pages)
            seen.update(pages)
    if live:
        whole = [table for number in range(len(stages)) for table in lanes.for_stage(plan, number).micro_batches[0].slices[0].tables]
        assert whole == list(map(tuple, live[0].tables))


def test_used_bytes_are_those_of_the_tier_and_of_the_stage() -> None:
    stages = [stage(range(2), host=0.5, disk=0.5), stage(range(2, 6), host=1.0)]
    lanes = lanes_of(stages)
    caches = [KVCache(lanes.groups, lanes.pools(block)) for block in range(NUM_BLOCKS)]
    for cache, name in zip(caches, ("host+host", "disk+host"), strict=True):
        assert cache.reserve(cache.admit(name), 10)
    first, second = (lanes.used_bytes(number, caches) for number in range(2))
    pages = [sum(2 * group.page_bytes for group in each.groups) for each in stages]
    assert first == {"host": pages[0], "disk": pages[0]}
    assert second == {"host": 2 * pages[1]}
