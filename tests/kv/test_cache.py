"""Pages: the free list against a set, sequences that grow, lose what no query sees, and give everything back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import EngineError
from flexgen.kv.cache import KVCache
from flexgen.kv.format import PlainKV
from flexgen.kv.pages import KVGroup, PageList, PagePool, Pool, divide_pool, group_layers, layer_index
from flexgen.passes.geometry import KVGeometry, LayerKV

NUM_PAGES = 20


@given(st.lists(st.one_of(st.integers(1, 12), st.lists(st.integers(0, NUM_PAGES - 1), max_size=8)), max_size=40), st.booleans())
def test_free_pages_are_a_set(steps: list[int | list[int]], contiguous: bool) -> None:
    """An integer takes that many pages; a list gives those of its pages back that are taken."""
    pages, free = PageList(NUM_PAGES), set(range(NUM_PAGES))
    for step in steps:
        if isinstance(step, int):
            taken = pages.take(step, contiguous=contiguous)
            run = any(all(start + i in free for i in range(step)) for start in range(NUM_PAGES - step + 1))
            assert (taken is not None) == (run if contiguous else step <= len(free))
            if taken is not None:
                assert len(set(taken)) == step
                assert set(taken) <= free
                assert not run or taken == list(range(taken[0], taken[0] + step))
                free -= set(taken)
        else:
            back = set(step) - free
            pages.give_back(list(back))
            free |= back
        assert pages.num_free == len(free)
    assert sorted(pages.take(len(free)) or []) == sorted(free)


def test_the_smallest_run_that_fits_is_taken() -> None:
    pages = PageList(12)
    pages.take(12)
    pages.give_back([0, 1, 2, 3, 6, 7, 10])
    assert pages.take(2) == [6, 7]
    assert pages.take(3, contiguous=True) == [0, 1, 2]
    assert pages.take(2, contiguous=True) is None
    assert sorted(pages.take(2) or []) == [3, 10]
    assert pages.take(1) is None


@pytest.mark.parametrize("freed", [[3], [0], [7], [4, 4]])
def test_a_page_freed_twice(freed: list[int]) -> None:
    pages = PageList(8)
    pages.take(8)
    pages.give_back([0, 3, 7])
    with pytest.raises(EngineError, match="freed twice"):
        pages.give_back(freed)


def group(window: int | None = None, chunk: int | None = None, *, layers: int = 2, page_tokens: int = 4) -> KVGroup:
    return KVGroup(
        layers=tuple(range(layers)), page_tokens=page_tokens, format=PlainKV(torch.float32),
        geometry=KVGeometry(key_heads=1, key_dim=2, value_heads=1, value_dim=2, window=window, chunk=chunk),
    )  # fmt: skip


def check_accounts(cache: KVCache, pool: Pool, live: list[list]) -> None:
    """Every page is free or held, is counted once, and nothing is missing that is still seen; `live` has [kv, length]."""
    held_bytes = 0
    for index, each in enumerate(cache.groups):
        held = {page for kv, _ in live for page in kv.tables[index] if page >= 0}
        assert len(held) + pool.free[index].num_free == pool.num_pages[index], "lost, or freed too early"
        held_bytes += len(held) * each.page_bytes
        for kv, length in live:
            assert len(kv.tables[index]) == -(-length // each.page_tokens)
            assert -1 not in kv.tables[index][each.geometry.first_visible(length) // each.page_tokens :], "still seen"
    assert cache.used_bytes["host"] == held_bytes <= cache.peak_bytes["host"]


def check_release(cache: KVCache, pool: Pool, live: list[list]) -> None:
    """All pages are free once all sequences are released."""
    for kv, _ in live:
        cache.release(kv)
    assert [pages.num_free for pages in pool.free] == pool.num_pages
    assert cache.used_bytes["host"] == 0


GROUPS = [group(), group(window=6), group(chunk=8), group(chunk=7), group(window=1)]


@pytest.mark.parametrize("group", GROUPS, ids=["full", "window", "chunk", "odd chunk", "window of one"])
def test_what_is_seen_and_what_is_held(group: KVGroup) -> None:
    most = 0
    for length in range(1, 60):
        position = length - 1
        if group.geometry.window:
            seen = range(max(0, position - group.geometry.window + 1), length)
        elif group.geometry.chunk:
            seen = range(position // group.geometry.chunk * group.geometry.chunk, length)
        else:
            seen = range(length)
        assert group.geometry.first_visible(position) == seen.start
        during = len({p // group.page_tokens for p in seen})  # while its last token is computed
        held = group.num_pages(length) - group.first_page(length)  # until its next token is computed
        most = max(most, during, held)
        assert held <= during
        assert most <= group.most_pages_held(length) <= most + 1


@given(
    st.lists(st.tuples(st.sampled_from(["admit", "grow", "release"]), st.integers(0, 9), st.integers(1, 20)), max_size=60),
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=3),
)
def test_sequences_never_share_lose_or_double_a_page(steps: list[tuple[str, int, int]], groups: list[KVGroup]) -> None:
    pool = Pool(groups, [12, 9, 7][: len(groups)])
    cache = KVCache(groups, {"host": pool})
    live: list[list] = []  # [kv, length]
    for action, which, tokens in steps:
        if action == "admit":
            kv = cache.admit("host")
            if cache.reserve(kv, tokens):
                live.append([kv, tokens])
            else:
                assert kv.tables == [[] for _ in groups], "nothing was taken"
        elif live and action == "grow":
            entry = live[which % len(live)]
            kv, length = entry
            cache.trim(kv, length)
            before = [list(table) for table in kv.tables]
            if cache.reserve(kv, length + tokens):
                entry[1] += tokens
            else:
                assert kv.tables == before
        elif live:
            cache.release(live.pop(which % len(live))[0])
        for index in range(len(groups)):
            held = [page for kv, _ in live for page in kv.tables[index] if page >= 0]
            assert len(held) == len(set(held)), "shared"
        check_accounts(cache, pool, live)
    check_release(cache, pool, live)


@given(
    st.lists(st.tuples(st.sampled_from(["admit", "fork", "grow", "release"]), st.integers(0, 9), st.integers(1, 20)), max_size=60),
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=3),
)
def test_forks_share_what_their_queries_see(steps: list[tuple[str, int, int]], groups: list[KVGroup]) -> None:
    """A page comes free with the last sequence that holds it, and is counted once."""
    pool = Pool(groups, [12, 9, 7][: len(groups)])
    cache = KVCache(groups, {"host": pool})
    live: list[list] = []  # [kv, length]
    for action, which, tokens in steps:
        if action == "admit":
            kv = cache.admit("host")
            if cache.reserve(kv, tokens):
                live.append([kv, tokens])
        elif live and action == "fork":
            kv, length = live[which % len(live)]
            for shared in range(length // 4 * 4, 0, -4):
                if all(each.geometry.first_visible(shared) // 4 >= kv.freed[index] for index, each in enumerate(groups)):
                    fork = cache.fork(kv, shared)
                    assert all(
                        fork.tables[i][p] == kv.tables[i][p]
                        for i, e in enumerate(groups)
                        for p in range(e.geometry.first_visible(shared) // 4, shared // 4)
                    )
                    live.append([fork, shared])
                    break
        elif live and action == "grow":
            entry = live[which % len(live)]
            cache.trim(entry[0], entry[1])
            entry[1] += tokens * cache.reserve(entry[0], entry[1] + tokens)
        elif live:
            cache.release(live.pop(which % len(live))[0])
        check_accounts(cache, pool, live)
    check_release(cache, pool, live)


def test_trimming_frees_what_lies_behind_the_window() -> None:
    groups = [group(window=6)]
    pool = Pool(groups, [10])
    cache = KVCache(groups, {"host": pool})
    kv = cache.admit("host")
    assert cache.reserve(kv, 20)
    cache.trim(kv, 20)  # the next query is at 20 and sees from 15
    assert kv.tables[0][:3] == [-1, -1, -1]
    assert len([page for page in kv.tables[0] if page >= 0]) == 2
    cache.trim(kv, 20)
    assert pool.free[0].num_free == 8


def test_layers_of_equal_shape_are_a_group() -> None:
    full = KVGeometry(key_heads=2, key_dim=16, value_heads=2, value_dim=16)
    layers = {0: full, 1: replace(full, window=128), 2: full, 5: replace(full, window=128)}
    kv = [LayerKV(layer=layer, geometry=geometry, flops_per_pair=1.0) for layer, geometry in layers.items()]
    groups = group_layers(kv, 16, PlainKV(torch.bfloat16))
    assert [each.layers for each in groups] == [(0, 2), (1, 5)]
    assert [each.geometry.window for each in groups] == [None, 128]
    assert layer_index(groups) == {0: (0, 0), 2: (0, 1), 1: (1, 0), 5: (1, 1)}
    assert groups[0].page_bytes == 2 * 2 * (2 * 16 * 16 * 2)


@given(st.lists(st.sampled_from(GROUPS), min_size=1, max_size=4), st.integers(2000, 10**6))
def test_a_pool_is_divided_within_its_bytes(groups: list[KVGroup], pool_bytes: int) -> None:
    pages = divide_pool(groups, pool_bytes, 64)
    assert sum(count * each.page_bytes for count, each in zip(pages, groups, strict=True)) <= pool_bytes
    first = [-(-64 // each.page_tokens) + 1 if each.geometry.reach else 0 for each in groups]
    if sum(count * each.page_bytes for count, each in zip(first, groups, strict=True)) > pool_bytes:
        return
    shares = [(count - whole) / each.most_pages_held(64) for count, whole, each in zip(pages, first, groups, strict=True)]
    assert max(shares) - min(shares) <= 1, "all groups run out together"


def test_a_pool_is_two_arenas_of_its_own_size() -> None:
    asked: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    groups = [group(layers=3), group(window=6)]
    pool = PagePool(groups, [5, 2], allocate)
    assert [tuple(memory.keys.shape) for memory in pool.memory] == [(3, 5, 32), (2, 2, 32)]
    assert [tuple(memory.values.shape) for memory in pool.memory] == [(3, 5, 32), (2, 2, 32)]
    assert sum(asked) <= 5 * groups[0].page_bytes + 2 * groups[1].page_bytes + 2 * 256
    pool.memory[0].keys.zero_()
    assert (pool.memory[0].values == 0xFF).all(), "keys and values do not overlap"
