"""Processors of actors' own: two processes on one machine do not get the same ones while there are enough."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from flexgen.ray_data import processors
from flexgen.ray_data.processors import OwnProcessors

HOLDER = """
import sys
from flexgen.ray_data import processors
processors.NAME = sys.argv[1]
own = processors.OwnProcessors(1)
print(sorted(own.numbers), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> str:
    """Names that no other run of these tests uses."""
    monkeypatch.setattr(processors, "NAME", f"flexgen-test-{os.getpid()}")
    return processors.NAME


@pytest.fixture
def holder(own_names: str) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds one processor."""
    command = [sys.executable, "-c", HOLDER, own_names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as found:
        yield found
        found.kill()


def test_threads_run_on_the_processors_until_it_is_closed() -> None:
    before, seen = os.sched_getaffinity(0), []
    go, done = threading.Event(), threading.Event()

    def look() -> None:
        go.wait()
        seen.append(os.sched_getaffinity(0))
        done.wait()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=look)
    thread.start()
    with OwnProcessors(1) as own:
        assert os.sched_getaffinity(0) == own.numbers
        go.set()
        while not seen:
            thread.join(0.01)
    done.set()
    thread.join()
    assert len(own.numbers) == 1
    assert seen == [own.numbers, before]
    assert os.sched_getaffinity(0) == before


def test_two_processes(holder: subprocess.Popen[str]) -> None:
    assert holder.stdout is not None
    first = set(eval(holder.stdout.readline()))
    available = os.sched_getaffinity(0)
    with OwnProcessors(1) as own:
        assert not first & own.numbers or len(available) == 1
    with OwnProcessors(len(available)) as everything:
        assert everything.numbers == available  # those that are taken are shared where too few are free


def test_a_process_that_was_killed_holds_nothing(holder: subprocess.Popen[str]) -> None:
    assert holder.stdout is not None
    first = set(eval(holder.stdout.readline()))
    holder.kill()
    holder.wait()
    with OwnProcessors(1) as own:
        assert own.numbers == first
