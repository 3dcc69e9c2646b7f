"""The thread that computes attention on the host."""

from __future__ import annotations

import threading
import weakref

import pytest

from flexgen.kv.worker import AtOnce, Worker


def test_a_worker_keeps_order_and_the_first_error() -> None:
    worker, seen = Worker("flexgen-test-worker"), []

    def failing() -> None:
        raise ValueError("first")

    worker.submit(lambda: seen.append(1))
    worker.submit(failing)
    worker.submit(lambda: seen.append(2))
    with pytest.raises(ValueError, match="first"):
        worker.drain()
    assert seen == [1, 2]
    worker.close()
    assert "flexgen-test-worker" not in {thread.name for thread in threading.enumerate()}


def test_what_runs_at_once_has_run_when_it_is_submitted() -> None:
    worker, seen = AtOnce(), []
    worker.submit(lambda: seen.append(threading.current_thread()))
    assert seen == [threading.current_thread()]
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: seen.append(1 // 0))
    worker.drain()
    worker.close()


def test_submitting_never_waits() -> None:
    """The thread that submits has other micro-batches to go on with, whatever the worker waits for."""
    worker, may_go_on, seen = Worker("flexgen-test-worker"), threading.Event(), list[int]()
    worker.submit(lambda: assert_set(may_go_on))
    for number in range(100):
        worker.submit(lambda number=number: seen.append(number))
    assert not seen
    may_go_on.set()
    worker.drain()
    assert seen == list(range(100))
    worker.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


class Arrival:
    """What a job needs."""

    def __init__(self) -> None:
        self.has_arrived = threading.Event()

    def done(self) -> bool:
        return self.has_arrived.is_set()

    def wait(self) -> None:
        assert_set(self.has_arrived)


def test_a_job_whose_needs_have_not_arrived_holds_up_its_own_queue_only() -> None:
    for late_first in (False, True):
        worker, late, seen, both = Worker("flexgen-test-worker"), Arrival(), list[str](), threading.Event()
        worker.submit(lambda seen=seen: seen.append("late"), late, first=late_first)
        worker.submit(lambda seen=seen: seen.append("behind it"), first=late_first)
        worker.submit(lambda seen=seen: seen.append("other"), first=not late_first)
        worker.submit(both.set, first=not late_first)
        assert_set(both)
        assert seen == ["other"]
        late.has_arrived.set()
        worker.drain()
        assert seen == ["other", "late", "behind it"]
        worker.close()


def test_jobs_that_go_first_do_so() -> None:
    worker, may_go_on, seen = Worker("flexgen-test-worker"), threading.Event(), list[int]()
    worker.submit(lambda: assert_set(may_go_on))
    for number in range(4):
        worker.submit(lambda number=number: seen.append(number), first=number >= 2)
    may_go_on.set()
    worker.close()
    assert seen == [2, 3, 0, 1], "closing waits for all of them"


def test_the_error_of_what_never_arrives_is_that_of_the_job() -> None:
    class Broken(Arrival):
        def done(self) -> bool:
            raise ValueError("the copy failed")

    worker, broken = Worker("flexgen-test-worker"), Broken()
    worker.submit(lambda: broken.done() and None, broken)
    with pytest.raises(ValueError, match="the copy failed"):
        worker.drain()
    worker.close()


def test_a_job_that_has_run_is_let_go() -> None:
    """It refers to tensors; the thread may wait long for the next."""

    class Tensors:
        pass

    worker, tensors = Worker("flexgen-test-worker"), Tensors()
    known = weakref.ref(tensors)
    worker.submit(lambda tensors=tensors: None)
    del tensors
    worker.drain()
    assert known() is None
    worker.close()
