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
