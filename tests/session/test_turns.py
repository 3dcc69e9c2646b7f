"""One call at a time: other threads wait, iterators keep the engine, forked processes are refused."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Generator

import pytest

from flexgen.errors import FlexGenError
from flexgen.session.turns import Turns


def items(closed: list[str]) -> Generator[int]:
    try:
        yield from range(3)
    finally:
        closed.append("closed")


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread that has begun, and what comes of it: a value or an error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except FlexGenError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def in_child(function: Callable[[], object]) -> bytes:
    """What a forked process writes of the result."""
    read, write = os.pipe()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads, since Python 3.12
        pid = os.fork()
    if pid == 0:
        try:
            said = str(function())
        except BaseException as error:  # noqa: BLE001  (told to the parent)
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read()


def call(turns: Turns) -> str:
    with turns.call():
        return "done"


def test_a_call_waits_for_that_of_another_thread() -> None:
    turns, order = Turns(), []

    def second() -> None:
        with turns.call():
            order.append("second")

    with turns.call():
        thread, _ = in_thread(second)
        thread.join(timeout=0.2)
        order.append("first")
        assert thread.is_alive()
    thread.join()
    assert order == ["first", "second"]


def test_calls_are_refused_until_an_iterator_is_at_its_end() -> None:
    turns, closed = Turns(), []
    results = turns.iterate(items(closed))
    assert call(turns) == "done"  # it has not begun
    assert next(results) == 0
    with pytest.raises(FlexGenError, match="exhaust or close"):
        call(turns)
    thread, told = in_thread(lambda: call(turns))
    thread.join()
    assert isinstance(told[0], FlexGenError)
    assert list(results) == [1, 2]
    assert call(turns) == "done"


@pytest.mark.parametrize("leave", [lambda results: results.close(), lambda results: results.throw(KeyboardInterrupt)])
def test_an_iterator_that_is_left_lets_go(leave: Callable[[Generator[int]], object]) -> None:
    turns, closed = Turns(), []
    results = turns.iterate(items(closed))
    next(results)
    try:
        leave(results)
    except KeyboardInterrupt:
        pass
    assert closed == ["closed"]
    assert call(turns) == "done"


def test_an_iterator_that_fails_lets_go() -> None:
    def failing() -> Generator[int]:
        yield 0
        raise ValueError("no more")

    turns = Turns()
    results = turns.iterate(failing())
    next(results)
    with pytest.raises(ValueError, match="no more"):
        next(results)
    assert call(turns) == "done"


def test_a_second_iterator_is_refused() -> None:
    turns = Turns()
    first, second = turns.iterate(items([])), turns.iterate(items([]))
    next(first)
    with pytest.raises(FlexGenError, match="exhaust or close"):
        next(second)
    assert list(first) == [1, 2]


def test_a_call_from_within_a_call_is_refused_instead_of_waiting_for_itself() -> None:
    turns = Turns()
    with turns.call(), pytest.raises(FlexGenError):
        call(turns)

    def asks() -> Generator[str]:
        with pytest.raises(FlexGenError, match="exhaust or close"):
            call(turns)
        with pytest.raises(FlexGenError, match="within its own call"), turns.end(wait=True):
            pass
        yield "refused"

    assert list(turns.iterate(asks())) == ["refused"]


def test_the_end_closes_iterators_and_refuses_what_follows() -> None:
    turns, closed = Turns(), []
    results = turns.iterate(items(closed))
    next(results)
    with turns.end(wait=True) as mine:
        assert mine
        assert closed == ["closed"]
    for use in (lambda: next(results), lambda: call(turns), turns.check):
        with pytest.raises(FlexGenError, match="closed"):
            use()


def test_the_end_waits_for_a_call_only_if_told_so() -> None:
    turns, order = Turns(), []

    def end(wait: bool) -> bool:
        with turns.end(wait=wait) as mine:
            order.append("end")
            return mine

    with turns.call():
        hasty, told = in_thread(lambda: end(False))
        hasty.join()
        assert told == [False]
        patient, told = in_thread(lambda: end(True))
        patient.join(timeout=0.2)
        order.append("call")
    patient.join()
    assert told == [True]
    assert order == ["end", "call", "end"]


def test_a_forked_process_is_refused_even_while_another_thread_is_at_work() -> None:
    turns, go_on = Turns(), threading.Event()

    def work() -> None:
        with turns.call():
            begun.set()
            go_on.wait()

    begun = threading.Event()
    thread, _ = in_thread(work)
    begun.wait()
    assert b"spawn" in in_child(lambda: call(turns))
    assert in_child(lambda: turns.end(wait=True).__enter__()) == b"False"  # nothing of it is the child's
    go_on.set()
    thread.join()


def test_a_forked_process_cannot_go_on_iterating_but_may_forget_to() -> None:
    turns, closed = Turns(), []
    results = turns.iterate(items(closed))
    next(results)
    assert b"spawn" in in_child(lambda: next(results))
    assert in_child(lambda: (results.close(), closed)[1]) == b"[]"
    assert list(results) == [1, 2]


def test_what_was_not_used_before_a_fork_can_be_used_behind_it() -> None:
    turns = Turns()
    assert in_child(lambda: call(turns)) == b"done"
    assert call(turns) == "done"
