"""The thread that computes attention on the host."""

from __future__ import annotations

import threading

import pytest

from flexgen.kv.worker import Worker


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
