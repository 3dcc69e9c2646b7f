"""Items that arrive together are answered together, each by its own answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from flexgen.evaluation.gather import Gatherer

PATIENCE_SECONDS = 60.0


def test_items_of_many_threads_are_answered_by_one_call() -> None:
    calls: list[list[int]] = []
    started = threading.Barrier(20)

    def double(items: Sequence[int]) -> list[int]:
        calls.append(list(items))
        return [2 * item for item in items]

    gathered = Gatherer(double, quiet_seconds=PATIENCE_SECONDS, most=20)
    answers: dict[int, int] = {}

    def ask(item: int) -> None:
        started.wait()
        answers[item] = gathered.submit(item).result(PATIENCE_SECONDS)

    threads = [threading.Thread(target=ask, args=(item,)) for item in range(20)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert answers == {item: 2 * item for item in range(20)}
    assert [sorted(call) for call in calls] == [list(range(20))]


def test_what_arrives_during_a_call_waits_for_the_next() -> None:
    entered, go_on = threading.Event(), threading.Event()
    calls: list[list[int]] = []

    def answer(items: Sequence[int]) -> Sequence[int]:
        calls.append(list(items))
        entered.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return items

    gathered = Gatherer(answer, quiet_seconds=0.0)
    first = gathered.submit(1)
    assert entered.wait(PATIENCE_SECONDS)
    later = [gathered.submit(2), gathered.submit(3)]
    go_on.set()
    assert [future.result(PATIENCE_SECONDS) for future in (first, *later)] == [1, 2, 3]
    assert calls == [[1], [2, 3]]


def test_it_answers_again_after_a_pause() -> None:
    gathered = Gatherer(list[int], quiet_seconds=0.0)
    assert gathered.submit(1).result(PATIENCE_SECONDS) == 1
    while any(thread.name == "flexgen-gather" for thread in threading.enumerate()):
        threading.Event().wait(0.001)
    assert gathered.submit(2).result(PATIENCE_SECONDS) == 2


def test_the_error_of_a_call_is_that_of_its_items_and_of_no_later_ones() -> None:
    def answer(items: Sequence[int]) -> Sequence[int]:
        if 0 in items:
            raise ZeroDivisionError("0")
        return items

    gathered = Gatherer(answer, quiet_seconds=PATIENCE_SECONDS, most=2)
    futures = [gathered.submit(0), gathered.submit(1)]
    for future in futures:
        with pytest.raises(ZeroDivisionError):
            future.result(PATIENCE_SECONDS)
    assert [gathered.submit(item) for item in (2, 3)][1].result(PATIENCE_SECONDS) == 3


def test_items_that_nobody_waits_for_are_not_answered() -> None:
    calls: list[list[int]] = []

    def answer(items: Sequence[int]) -> Sequence[int]:
        calls.append(list(items))
        return items

    gathered = Gatherer(answer, quiet_seconds=PATIENCE_SECONDS, most=2)
    assert gathered.submit(1).cancel()
    assert gathered.submit(2).result(PATIENCE_SECONDS) == 2
    assert calls == [[2]]
