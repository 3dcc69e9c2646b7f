"""The kernels' own threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import EngineError
from flexgen.kernels.threads import KernelThreads, split_evenly


def kernel_threads() -> int:
    return sum(thread.name.startswith("flexgen-kernel-") for thread in threading.enumerate())


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_every_range_runs_once(num_threads: int) -> None:
    ranges = [(i, i + 1) for i in range(50)]
    with KernelThreads(num_threads) as threads:
        for _ in range(20):
            seen: list[tuple[int, int]] = []
            threads.run(lambda begin, end: seen.append((begin, end)), ranges)  # noqa: B023
            assert sorted(seen) == ranges


def test_ranges_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=120)

    def meet(begin: int, end: int) -> None:
        barrier.wait()

    with KernelThreads(3) as threads:
        threads.run(meet, [(0, 1), (1, 2), (2, 3)])


def test_two_callers_at_once() -> None:
    with KernelThreads(2) as threads:
        totals = [0, 0]

        def call(caller: int) -> None:
            lock = threading.Lock()

            def add(begin: int, end: int) -> None:
                with lock:
                    totals[caller] += end - begin

            for _ in range(100):
                threads.run(add, [(i, i + 1) for i in range(10)])

        callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert totals == [1000, 1000]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_errors_reach_the_caller(num_threads: int) -> None:
    def fail(begin: int, end: int) -> None:
        if begin == 3:
            raise KeyError(begin)

    with KernelThreads(num_threads) as threads:
        with pytest.raises(KeyError):
            threads.run(fail, [(i, i + 1) for i in range(8)])
        threads.run(lambda begin, end: None, [(0, 1), (1, 2)])


def test_threads_end() -> None:
    before = kernel_threads()
    threads = KernelThreads(4)
    assert kernel_threads() == before + 3
    threads.close()
    threads.close()
    assert kernel_threads() == before
    with pytest.raises(EngineError, match="closed"):
        threads.run(lambda begin, end: None, [(0, 1)])


def test_forgotten_threads_end_and_keep_nothing_alive() -> None:
    class Big:
        pass

    before, big = kernel_threads(), Big()
    threads = KernelThreads(3)
    threads.run(lambda begin, end, big=big: time.sleep(0.001), [(i, i + 1) for i in range(6)])
    gone = weakref.ref(big)
    del big, threads
    gc.collect()
    deadline = time.monotonic() + 120
    while (kernel_threads() > before or gone() is not None) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kernel_threads() == before
    assert gone() is None


def test_no_thread_is_no_number() -> None:
    with pytest.raises(EngineError, match="0 threads"):
        KernelThreads(0)


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 20))
def test_split_covers_all_and_balances(costs: list[int], num_slices: int) -> None:
    ranges = split_evenly(np.array(costs, dtype=np.int64), num_slices)
    assert [i for begin, end in ranges for i in range(begin, end)] == list(range(len(costs)))
    assert len(ranges) <= num_slices
    assert all(sum(costs[begin:end]) <= sum(costs) / num_slices + max(costs) for begin, end in ranges)
