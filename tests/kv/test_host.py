"""Attention on the host beside a device: what crosses the link, and who waits for it."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.devices import sim
from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.staging import Staging
from flexgen.kv.host import HostAttention, HostPlace, HostView
from flexgen.kv.place import DeferredAttention, PendingAttention, View
from flexgen.plan.policy import PROMPTS_ON_THE_WAY
from tests.kv.test_places import LAYERS, PAGE_TOKENS, Bench, Conversation, Piece, as_slice, attend, finished, open_host


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Bench]:
    """Pages on the host, beside a device."""
    bench = open_host(tmp_path)
    yield bench
    bench.place.close()
    for close in bench.close:
        close()


def started(bench: Bench, pieces: list[Piece]) -> View:
    """The view of a micro-batch that is about to run."""
    for conversation, start, length in pieces:
        assert bench.cache.reserve(conversation.kv, start + length)
    view = bench.place.view([as_slice(piece) for piece in pieces])
    view.device_groups = bench.copies.to_device(view.device_groups)
    return view


def attention_of(bench: Bench) -> HostAttention:
    assert isinstance(bench.place, HostPlace)
    return bench.place._attention


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def test_what_is_new_crosses_as_one_copy_and_sinks_once(beside: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    really = Staging.to_host

    def to_host(staging: Staging, *tensors: torch.Tensor) -> Any:
        sent.append(len(tensors))
        return really(staging, *tensors)

    monkeypatch.setattr(Staging, "to_host", to_host)
    conversation = Conversation(20, beside.cache.admit("host"))
    beside.run_pass([(conversation, 0, 2)], random.Random(0))
    assert sent == [2] * len(LAYERS), "keys and values of a prompt"
    sent.clear()
    for position in range(2, 6):
        beside.run_pass([(conversation, position, 1)], random.Random(0))
    first = [4 if layer.sinks is not None else 3 for layer in LAYERS]
    assert sent == first + [3] * (3 * len(LAYERS))


def test_attention_is_done_before_its_result_has_crossed_the_link(beside: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for the copy: computing does."""
    monkeypatch.setattr(sim, "EARLY", 0.0)
    conversation = Conversation(20, beside.cache.admit("host"))
    beside.run_pass([(conversation, 0, 5)], random.Random(0))
    copies: list[Any] = []
    really = SimulatedDevice.copy_in_urgently

    def copy_in_urgently(device: SimulatedDevice, destination: torch.Tensor, source: torch.Tensor) -> Any:
        copies.append(really(device, destination, source))
        return copies[-1]

    monkeypatch.setattr(SimulatedDevice, "copy_in_urgently", copy_in_urgently)
    piece = (conversation, 5, 1)
    answer = attend(started(beside, [piece]), 0, [piece], beside.device)
    assert isinstance(answer, PendingAttention)
    beside.place.finish_pass()  # the worker has nothing left to do
    assert answer.done()
    (copy,) = copies
    assert copy.copied is None, "it has not even begun"
    torch.testing.assert_close(finished(answer)[0].cpu(), conversation.dense(0, 5, 1), rtol=1e-9, atol=1e-9)


def test_prompts_whose_kv_has_no_room_wait_and_stop_nothing_else(beside: Bench) -> None:
    conversations = [Conversation(20, beside.cache.admit("host")) for _ in range(PROMPTS_ON_THE_WAY + 2)]
    *prompts, step = conversations
    beside.run_pass([(step, 0, 3)], random.Random(0))
    may_go_on = threading.Event()
    attention = attention_of(beside)
    attention.lane.worker.submit(lambda: assert_set(may_go_on))
    pieces: list[Piece] = [(each, 0, 5) for each in prompts]
    answers = [attend(started(beside, [piece]), 0, [piece], beside.device) for piece in pieces]
    assert [isinstance(each, torch.Tensor) for each in answers] == [True] * PROMPTS_ON_THE_WAY + [False]
    deferred = answers[-1]
    assert isinstance(deferred, DeferredAttention)
    assert not deferred.done()
    pieces.append((step, 3, 1))
    answers.append(attend(started(beside, pieces[-1:]), 0, pieces[-1:], beside.device))
    assert isinstance(answers[-1], PendingAttention), "next tokens are never put off"
    may_go_on.set()
    for answer, (conversation, start, length) in zip(answers, pieces, strict=True):
        torch.testing.assert_close(finished(answer)[0].cpu(), conversation.dense(0, start, length), rtol=1e-9, atol=1e-9)
    beside.place.finish_pass()
    assert attention.flow.has_room()


class Late:
    """The completion of a copy, which the host does not see before it may."""

    def __init__(self, event: Any, may_be_seen: threading.Event) -> None:
        self._event, self._may_be_seen = event, may_be_seen

    def done(self) -> bool:
        return self._may_be_seen.is_set() and self._event.done()

    def wait(self) -> None:
        assert_set(self._may_be_seen)
        self._event.wait()


def begun(bench: Bench, batches: list[list[Piece]]) -> list[View]:
    """The views of a pass that is about to run."""
    views = [started(bench, pieces) for pieces in batches]
    bench.place.begin_pass(views)
    return views


def test_next_tokens_do_not_wait_for_what_prompts_store(beside: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, step = (Conversation(20, beside.cache.admit("host")) for _ in range(2))
    beside.run_pass([(step, 0, 3)], random.Random(0))
    batches: list[list[Piece]] = [[(prompt, 0, 5)], [(step, 3, 1)]]
    of_prompt, of_step = begun(beside, batches)
    may_be_seen, really = threading.Event(), Staging.to_host

    def to_host(staging: Staging, *tensors: torch.Tensor) -> Any:
        copies = really(staging, *tensors)
        return dataclasses.replace(copies, event=Late(copies.event, may_be_seen))

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "to_host", to_host)
        attend(of_prompt, 0, batches[0], beside.device)
    answer = attend(of_step, 0, batches[1], beside.device)
    assert not isinstance(answer, torch.Tensor)
    torch.testing.assert_close(finished(answer)[0].cpu(), step.dense(0, 3, 1), rtol=1e-9, atol=1e-9)
    assert not may_be_seen.is_set()
    may_be_seen.set()
    beside.place.finish_pass()


def test_next_tokens_that_see_what_a_prompt_stores_do_wait(beside: Bench) -> None:
    """So do those whose own page is seen by a prompt; those that only share what was stored before do not."""
    prompt, step = (Conversation(20, beside.cache.admit("host")) for _ in range(2))
    beside.run_pass([(step, 0, 12), (prompt, 0, 12)], random.Random(0))
    pages = [[list(table) for table in each.kv.tables] for each in (prompt, step)]

    def is_apart(batches: list[list[Piece]]) -> bool:
        view = begun(beside, batches)[-1]
        assert isinstance(view, HostView)
        return view.is_apart

    batches: list[list[Piece]] = [[(prompt, 12, 4)], [(step, 12, 1)]]
    assert is_apart(batches)
    for table, others in zip(step.kv.tables, pages[0], strict=True):
        table[0] = others[0]
    assert is_apart(batches), "the first page was complete before"
    for table, others in zip(step.kv.tables, prompt.kv.tables, strict=True):
        table[12 // PAGE_TOKENS] = others[12 // PAGE_TOKENS]
    assert not is_apart(batches)
    assert not HostView(attention_of(beside), attention_of(beside).plan([as_slice((step, 12, 1))]), lambda layer: None).is_apart  # type: ignore[arg-type]
    for conversation, own in zip((prompt, step), pages, strict=True):
        for table, ids in zip(conversation.kv.tables, own, strict=True):
            table[: len(ids)] = ids


def test_an_error_of_one_thread_is_raised_when_the_other_has_run_too(beside: Bench) -> None:
    attention, may_go_on, seen = attention_of(beside), threading.Event(), list[int]()

    def failing() -> None:
        raise ValueError("no such page")

    def slow() -> None:
        assert_set(may_go_on)
        seen.append(1)

    for first, second in ((attention.lane, attention.apart), (attention.apart, attention.lane)):
        may_go_on.clear()
        first.worker.submit(failing)
        second.worker.submit(slow)
        threading.Timer(0.05, may_go_on.set).start()
        with pytest.raises(ValueError, match="no such page"):
            beside.place.finish_pass()
        assert seen.pop() == 1


def test_kv_of_prompts_that_go_on_leaves_when_it_is_taken(beside: Bench) -> None:
    """What came from their pages is in memory of the device until then."""
    conversations = [Conversation(20, beside.cache.admit("host")) for _ in range(PROMPTS_ON_THE_WAY)]
    beside.run_pass([(each, 0, 5) for each in conversations], random.Random(0))
    flow = attention_of(beside).flow
    answers = [attend(started(beside, [(each, 5, 4)]), 0, [(each, 5, 4)], beside.device) for each in conversations]
    beside.place.finish_pass()
    assert all(isinstance(each, PendingAttention) and each.done() for each in answers)
    assert not flow.has_room()
    for answer, conversation in zip(answers, conversations, strict=True):
        torch.testing.assert_close(finished(answer)[0].cpu(), conversation.dense(0, 5, 4), rtol=1e-9, atol=1e-9)
        assert flow.has_room()
