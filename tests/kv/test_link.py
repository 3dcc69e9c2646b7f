"""Pages in host memory that come to the device: which ones, when, and what is attended to on the host all the same."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.kv.compact import CompactPages
from flexgen.kv.link import KVLink
from flexgen.kv.linked import LinkedPlace, LinkedView
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import group_layers, of_positions
from flexgen.kv.place import Answer, DeferredAttention, PendingAttention, View
from flexgen.kv.sealed_views import SealedGroupPlan
from flexgen.kv.tiers import traits_of
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice
from flexgen.plan.policy import KV_RING_BATCHES, STEPS_ON_THE_WAY, Fractions
from tests.kv.test_places import GROUPS, KV, LAYERS, PAGE_TOKENS, Bench, Conversation, Piece, as_slice, attend, finished, open_linked
from tests.models.parity import policy


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Bench]:
    bench = open_linked(tmp_path)
    yield bench
    close(bench)


def close(bench: Bench) -> None:
    bench.place.close()
    for each in bench.close:
        each()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "flexgen-kv-link"]


def place_of(bench: Bench) -> LinkedPlace:
    assert isinstance(bench.place, LinkedPlace)
    return bench.place


def begun(bench: Bench, batches: list[list[Piece]]) -> list[View]:
    """The views of micro-batches of a pass that has begun."""
    for conversation, start, length in (piece for batch in batches for piece in batch):
        assert bench.cache.reserve(conversation.kv, start + length)
    views: list[View] = [bench.place.view([as_slice(piece) for piece in batch]) for batch in batches]
    bench.place.begin_pass(views)
    for view in views:
        view.device_groups = bench.copies.to_device(view.device_groups)
    return views


def link_of(view: View) -> tuple[KVLink, CompactPages]:
    assert isinstance(view, LinkedView)
    return view._link, view.pages


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def assert_right(answer: Answer, index: int, batch: list[Piece]) -> None:
    expected = torch.cat([conversation.dense(index, start, length) for conversation, start, length in batch])
    torch.testing.assert_close(finished(answer)[0].cpu(), expected, rtol=1e-9, atol=1e-9)


NEXT = Slice(sequence=0, token_ids=(1,), start=21, prompt_len=9, total=22, tables=(tuple(range(9)),) * len(GROUPS))
OTHER = replace(NEXT, sequence=1, tables=((0, 1, 2, 3, 4, 9, 6, 7, 8),) * len(GROUPS))  # which shares all but its own page


def test_pages_are_numbered_once_and_only_those_that_are_seen() -> None:
    pages = CompactPages(GROUPS, [NEXT, OTHER])
    seen = {(None, None): [0, 1, 2, 3, 4, 5, 9], (7, None): [3, 4, 5, 9], (None, 6): [4, 5, 9], (1, None): [5, 9]}
    for group, ids, plan in zip(GROUPS, pages.ids, pages.plan(), strict=True):
        assert ids.tolist() == seen[group.geometry.window, group.geometry.chunk]
        first = group.geometry.first_visible(21) // PAGE_TOKENS
        steps = plan.steps[0].steps
        assert ids[steps.tables].tolist() == [list(each.tables[0][first:6]) for each in (NEXT, OTHER)]
    assert pages.largest_layer_bytes == 7 * max(group.layer_page_bytes for group in GROUPS if group.geometry.reach is None)


@pytest.mark.parametrize("start", [21, 23, 2])
def test_a_page_that_is_not_sealed_comes_as_a_tail(start: int) -> None:
    groups = group_layers(KV, PAGE_TOKENS, kv_format("int4", torch.float64))
    number = len(of_positions(groups))
    tables = ((*(tuple(range(9)),) * number, *((7,),) * number), (*((0, 1, 2, 3, 4, 9),) * number, *((3,),) * number))
    slices = [replace(NEXT, start=start, total=start + 1, sequence=row, tables=each) for row, each in enumerate(tables)]
    pages = CompactPages(groups, slices)
    for index, (group, plan) in enumerate(zip(of_positions(groups), pages.plan(), strict=True)):
        assert isinstance(plan, SealedGroupPlan)
        first = group.geometry.first_visible(start) // PAGE_TOKENS
        assert pages.ids[index].tolist() == list(range(first, start // PAGE_TOKENS))
        tails = plan.steps[0].steps.tails
        assert tails is not None
        assert pages.ids[number + index][tails].tolist() == [7, 3]
        assert len(plan.full_tails) == len(plan.full_pages) == 0, "the host seals"


def test_the_link_runs_ahead_of_attention(linked: Bench) -> None:
    """All layers arrive before the first is attended to; then nothing has to be waited for."""
    conversation = Conversation(20, linked.cache.admit("host"))
    linked.run_pass([(conversation, 0, 9)], random.Random(0))
    batch: list[Piece] = [(conversation, 9, 1)]
    (view,) = begun(linked, [batch])
    link, pages = link_of(view)
    for layer in range(len(LAYERS)):
        until(partial(link.has_arrived, pages, layer))
    for layer in range(STEPS_ON_THE_WAY):  # more keys and values may not be on their way
        answer = attend(view, layer, batch, linked.device)
        assert isinstance(answer, torch.Tensor)
        assert_right(answer, layer, batch)
    for layer in range(STEPS_ON_THE_WAY, len(LAYERS)):
        assert_right(attend(view, layer, batch, linked.device), layer, batch)
    linked.place.finish_pass()


def test_a_small_ring_is_used_again_and_again(tmp_path: Path) -> None:
    """It holds one layer of one of three micro-batches, and a part of the next."""
    linked = open_linked(tmp_path, ring_bytes=14 * 1024)
    conversations = [Conversation(30, linked.cache.admit("host")) for _ in range(3)]
    linked.run_pass([(each, 0, 17 + place) for place, each in enumerate(conversations)], random.Random(0))
    for turn in range(6):
        batches: list[list[Piece]] = [[(each, 17 + place + turn, 1)] for place, each in enumerate(conversations)]
        views = begun(linked, batches)
        assert all(isinstance(view, LinkedView) and view.is_linked for view in views)
        for layer in range(len(LAYERS)):
            for view, batch in zip(views, batches, strict=True):
                assert_right(attend(view, layer, batch, linked.device), layer, batch)
        linked.place.finish_pass()
        for (conversation, start, _), *_ in batches:
            linked.cache.trim(conversation.kv, start + 1)
    close(linked)


def test_what_does_not_fit_the_ring_is_attended_to_on_the_host(tmp_path: Path) -> None:
    linked = open_linked(tmp_path, ring_bytes=2048)
    conversation = Conversation(20, linked.cache.admit("host"))
    linked.run_pass([(conversation, 0, 9)], random.Random(0))
    batch: list[Piece] = [(conversation, 9, 1)]
    (view,) = begun(linked, [batch])
    for layer in range(len(LAYERS)):
        answer = attend(view, layer, batch, linked.device)
        assert isinstance(answer, PendingAttention)
        assert_right(answer, layer, batch)
    linked.place.finish_pass()
    close(linked)


def test_what_a_prompt_of_the_same_pass_stores_is_attended_to_on_the_host(linked: Bench) -> None:
    """The link could not run ahead of that; other next tokens of the pass are not held up."""
    long, other = (Conversation(20, linked.cache.admit("host")) for _ in range(2))
    linked.run_pass([(other, 0, 9)], random.Random(0))
    batches: list[list[Piece]] = [[(other, 9, 1)], [(long, 0, 8)], [(long, 8, 1)]]
    views = begun(linked, batches)
    assert [getattr(view, "is_linked", None) for view in views] == [True, None, False]
    for layer in range(len(LAYERS)):
        for view, batch in zip(views, batches, strict=True):
            answer = attend(view, layer, batch, linked.device)
            assert isinstance(answer, PendingAttention) == (batch is batches[2])
            assert_right(answer, layer, batch)
    linked.place.finish_pass()


class Again:
    """Calls of a later layer that attends to the keys of an earlier one."""

    def __init__(self, view: View) -> None:
        self._view = view

    def attend(self, call: AttentionCall) -> Answer:
        return self._view.attend(replace(call, new=None))


def test_keys_of_an_earlier_layer_are_attended_to_on_the_host(linked: Bench) -> None:
    conversation = Conversation(20, linked.cache.admit("host"))
    linked.run_pass([(conversation, 0, 9)], random.Random(0))
    batch: list[Piece] = [(conversation, 9, 1)]
    (view,) = begun(linked, [batch])
    again: Any = Again(view)
    for layer in range(len(LAYERS)):
        assert_right(attend(view, layer, batch, linked.device), layer, batch)
        answer = attend(again, layer, batch, linked.device)
        assert isinstance(answer, PendingAttention)
        assert_right(answer, layer, batch)
    linked.place.finish_pass()


def test_few_micro_batches_have_new_keys_and_values_on_their_way(linked: Bench) -> None:
    conversation = Conversation(20, linked.cache.admit("host"))
    linked.run_pass([(conversation, 0, 5)], random.Random(0))
    batch: list[Piece] = [(conversation, 5, 1)]
    (view,) = begun(linked, [batch])
    may_go_on = threading.Event()
    place_of(linked)._attention.apart.worker.submit(lambda: may_go_on.wait(60) and None)
    for layer in range(STEPS_ON_THE_WAY):
        assert_right(attend(view, layer, batch, linked.device), layer, batch)
    answer = attend(view, STEPS_ON_THE_WAY, batch, linked.device)
    assert isinstance(answer, DeferredAttention)
    assert not answer.done()
    may_go_on.set()
    assert_right(answer, STEPS_ON_THE_WAY, batch)
    for layer in range(STEPS_ON_THE_WAY + 1, len(LAYERS)):
        assert_right(attend(view, layer, batch, linked.device), layer, batch)
    linked.place.finish_pass()


def test_a_failing_link_reaches_the_sweep(linked: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(20, linked.cache.admit("host"))
    linked.run_pass([(conversation, 0, 9)], random.Random(0))

    def failing(device: SimulatedDevice, *what: Any) -> Any:
        raise RuntimeError("no such copy")

    monkeypatch.setattr(SimulatedDevice, "copy_in", failing)
    batch: list[Piece] = [(conversation, 9, 1)]
    (view,) = begun(linked, [batch])
    with pytest.raises(RuntimeError, match="no such copy"):
        finished(attend(view, 0, batch, linked.device))


def test_a_link_that_waits_for_room_can_be_closed(tmp_path: Path) -> None:
    linked = open_linked(tmp_path, ring_bytes=8192)
    conversation = Conversation(20, linked.cache.admit("host"))
    linked.run_pass([(conversation, 0, 9)], random.Random(0))
    (view,) = begun(linked, [[(conversation, 9, 1)]])
    link, pages = link_of(view)
    until(partial(link.has_arrived, pages, 0))
    close(linked)


def test_a_micro_batch_has_room_for_several_next_tokens_or_for_one(linked: Bench) -> None:
    """By the pages that they see in the layer where these take most; the tail of a sequence counts."""
    page = max(group.layer_page_bytes for group in GROUPS)
    chosen = policy("sim", weights=Fractions(host=1.0), kv=Fractions(host=1.0), ring_bytes=1 << 16)
    chosen = replace(chosen, host_attention=False, kv_ring_bytes=1 << 16)
    traits, batch_bytes = traits_of("host", GROUPS, chosen), (1 << 16) // KV_RING_BATCHES
    assert traits.share_of_batch(3) == pytest.approx(page / batch_bytes)
    assert traits.share_of_batch(4) == pytest.approx(2 * page / batch_bytes)
    slices = [replace(NEXT, start=start) for start in (9, 21)]
    bytes_of = CompactPages(GROUPS, slices).largest_layer_bytes
    assert bytes_of <= sum(traits.share_of_batch(each.start) for each in slices) * batch_bytes
