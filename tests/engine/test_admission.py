"""Admission against brute force: what is let in never runs a pool dry, and what fits alone is let into an empty block."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flexgen.engine.admission import MIN_OBSERVED, Admission, Homes, LengthForecast, held_pages
from flexgen.engine.prefixes import PrefixStore
from flexgen.engine.sequence import LiveSequence
from flexgen.kv.cache import KVCache
from flexgen.kv.format import PlainKV
from flexgen.kv.pages import KVGroup, Pool
from flexgen.passes.geometry import KVGeometry
from flexgen.plan.play.answer_lengths import RESERVED_QUANTILE
from flexgen.request import TokenRequest
from flexgen.text.common_prefixes import PrefixCensus


def group(window: int | None = None, chunk: int | None = None) -> KVGroup:
    return KVGroup(
        layers=(0,), page_tokens=4, format=PlainKV(torch.float32),
        geometry=KVGeometry(key_heads=1, key_dim=1, value_heads=1, value_dim=1, window=window, chunk=chunk),
    )  # fmt: skip


GROUPS = [group(), group(window=6), group(window=9), group(chunk=8), group(chunk=7)]
lengths = st.tuples(st.integers(1, 30), st.integers(1, 25))  # (prompt, answer)


def waiting(index: int, prompt: int, answer: int) -> LiveSequence:
    return LiveSequence(TokenRequest(index=index, prompt_token_ids=(0,) * prompt, max_tokens=answer), answer)


def pools(groups: list[KVGroup], num_pages: int, tiers: Iterable[str]) -> dict[str, Pool]:
    """As many pages of each group on each tier."""
    sizes = [num_pages] * len(groups)
    return {tier: Pool(groups, sizes, reserves_ahead=[tier == "disk"] * len(groups)) for tier in tiers}


@given(
    st.lists(lengths, min_size=1, max_size=15),
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=2),
    st.sampled_from([{"host": 1.0}, {"disk": 1.0}, {"host": 0.7, "disk": 0.3}]),
    st.integers(4, 14),
)
def test_right_forecasts_never_run_a_pool_dry(
    requests: list[tuple[int, int]], groups: list[KVGroup], shares: dict[str, float], num_pages: int
) -> None:
    """The engine's passes without computing: live sequences take their pages first, then others are admitted."""
    cache = KVCache(groups, pools(groups, num_pages, shares))
    admission = Admission(cache, Homes(shares), PrefixStore(cache))
    queue = [waiting(index, *each) for index, each in enumerate(requests)]
    queue = [each for each in queue if admission.can_ever_fit(each)]
    live: list[LiveSequence] = []
    while queue or live:
        for each in live:
            assert each.kv is not None
            assert cache.reserve(each.kv, len(each.tokens)), "a live sequence finds no page"
        admission.begin_pass(live)
        while queue and admission.admit(queue[0]):
            live.append(queue.pop(0))
        assert live, "nothing was admitted into an empty block"
        for each in live:
            assert each.kv is not None
            each.num_stored = len(each.tokens)
            each.append(0)
            if each.num_generated == each.request.max_tokens:
                cache.release(each.kv)
                each.kv = None
            else:
                cache.trim(each.kv, each.num_stored)
        live = [each for each in live if each.kv is not None]
    assert all(used == 0 for used in cache.used_bytes.values())


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 9), st.integers(1, 25)), min_size=1, max_size=15),
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=2),
    st.sampled_from([{"host": 1.0}, {"disk": 1.0}, {"host": 0.7, "disk": 0.3}]),
    st.integers(8, 20),
)
@example([(1, 1, 1, 1), (0, 0, 4, 25), (0, 0, 1, 8), (1, 0, 1, 1), (1, 1, 1, 12)], [group(window=6)], {"disk": 1.0}, 15)
def test_prefixes_never_run_a_pool_dry(
    requests: list[tuple[int, int, int, int]], groups: list[KVGroup], shares: dict[str, float], num_pages: int
) -> None:
    """Each (instruction, block of examples, own tokens, answer); who computes a prefix does so before those behind it."""
    prompts = [(first,) * 9 + (second,) * 8 + (3 + index,) * own for index, (first, second, own, _) in enumerate(requests)]
    census = PrefixCensus(4)
    for prompt in prompts:
        census.add(prompt)
    cache = KVCache(groups, pools(groups, num_pages, shares))
    prefixes = PrefixStore(cache)
    prefixes.begin(census.common())
    admission = Admission(cache, Homes(shares), prefixes)
    queue = [
        LiveSequence(TokenRequest(index=index, prompt_token_ids=prompt, max_tokens=requests[index][3]), requests[index][3])
        for index, prompt in enumerate(prompts)
    ]
    for each in queue:
        prefixes.expect(each)
    for each in [each for each in queue if not admission.can_ever_fit(each)]:
        queue.remove(each)
        prefixes.done(each)
    live: list[LiveSequence] = []
    while queue or live:
        for each in live:
            assert each.kv is not None
            while not cache.reserve(each.kv, len(each.tokens)):
                assert prefixes.evict(each.kv.home), "a live sequence finds no page"
        admission.begin_pass(live)
        while queue and admission.admit(queue[0]):
            live.append(queue.pop(0))
        assert live, "nothing was admitted into an empty block"
        for each in live:
            assert each.kv is not None
            assert each.behind is None or each.behind in live[: live.index(each)], "nobody computes what it begins with"
            each.num_stored = len(each.tokens)
        for each in live:
            assert each.kv is not None
            each.append(0)
            if each.num_generated == each.request.max_tokens:
                cache.release(each.kv)
                each.kv = None
                prefixes.let_go(each)
                prefixes.done(each)
            else:
                cache.trim(each.kv, each.num_stored)
        live = [each for each in live if each.kv is not None]
    assert all(used == 0 for used in cache.used_bytes.values()), "what the last request has used is freed with it"
    assert all(prefixes.num_pages(tier) == [0] * len(groups) for tier in shares)


@pytest.mark.parametrize("group", GROUPS, ids=["full", "window 6", "window 9", "chunk 8", "chunk 7"])
def test_held_pages_bound_what_is_held(group: KVGroup) -> None:
    import numpy as np

    lengths = np.arange(1, 80)
    held = held_pages(group)(lengths)
    for length, bound in zip(lengths.tolist(), held.tolist(), strict=True):
        during = -(-length // 4) - group.geometry.first_visible(length - 1) // 4
        assert during <= bound
    assert (np.diff(held) >= 0).all()


def test_an_empty_block_takes_the_longest_that_fits() -> None:
    cache = KVCache([group()], {"host": Pool([group()], [5])})
    admission = Admission(cache, Homes({"host": 1.0}), PrefixStore(cache))
    assert admission.can_ever_fit(waiting(0, 17, 4))  # the last token is never stored
    assert not admission.can_ever_fit(waiting(0, 17, 5))
    assert not admission.can_ever_fit(waiting(0, 21, 1))
    assert admission.admit(waiting(0, 17, 4))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(0, 10))
def test_homes_keep_the_shares_of_the_tokens(tokens: list[int], tenths: int) -> None:
    homes = Homes({"host": tenths / 10, "disk": 1 - tenths / 10})
    given_tokens = {"host": 0, "disk": 0}
    for each in tokens:
        tier = homes.by_need()[0]
        homes.give(tier, each)
        given_tokens[tier] += each
    assert abs(given_tokens["host"] - tenths / 10 * sum(tokens)) <= max(tokens)
    assert "host" in homes.by_need() or tenths == 0


def test_forecast() -> None:
    forecast = LengthForecast()
    for length in range(1, MIN_OBSERVED):
        forecast.observe(length)
        assert forecast.expect(500) == 500, "max_tokens until enough was seen"
    for length in range(MIN_OBSERVED, 101):
        forecast.observe(length)
    assert forecast.expect(500) == pytest.approx(RESERVED_QUANTILE * 100, abs=1)
    assert forecast.expect(20) == 20


@given(st.lists(st.integers(0, 40), min_size=MIN_OBSERVED, max_size=120))
def test_the_forecast_is_the_quantile_of_what_was_seen(lengths: list[int]) -> None:
    forecast = LengthForecast()
    for length in lengths:
        forecast.observe(length)
    assert forecast.expect(1000) == sorted(lengths)[int(RESERVED_QUANTILE * (len(lengths) - 1))]
