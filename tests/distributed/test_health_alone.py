"""The health of one rank with a store that is made to misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from flexgen.distributed.failure import Failure, Timings
from flexgen.distributed.health import Health
from flexgen.errors import StageError

TIMINGS = Timings(beat_seconds=0.02, silence_seconds=0.4, verdict_seconds=0.2, grace_seconds=0.2)
SECONDS = 30.0


class FakeStore:
    """A store in this process, whose other ranks beat by themselves until they are told not to."""

    def __init__(self, size: int) -> None:
        self.values = {f"beat/{rank}": b"0" for rank in range(size)}
        self.beating = set(range(1, size))
        self.hangs = threading.Event()
        self.is_gone = False

    def _pass(self) -> None:
        while self.hangs.is_set():
            time.sleep(0.01)
        if self.is_gone:
            raise RuntimeError("Connection reset by peer\nand a trace")

    def set(self, key: str, value: str, /) -> None:
        self._pass()
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        for rank in self.beating:
            self.values[f"beat/{rank}"] = str(time.monotonic_ns()).encode()
        return [self.values[key] for key in keys]

    def compare_set(self, key: str, expected_value: str, desired_value: str, /) -> bytes:
        if self.values.get(key, b"").decode() == expected_value:
            self.values[key] = desired_value.encode()
        return self.values[key]


def health_of(store: FakeStore, *, store_rank: int | None = None, end: Callable[[int], object] = lambda code: None) -> Health:
    health = Health(0, ["alpha", "beta", "gamma"], lambda: store, store_rank=store_rank, timings=TIMINGS, end=end)
    health.start()
    return health


def wait_until(holds: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def error_of(health: Health) -> str:
    wait_until(lambda: health.has_failed)
    with pytest.raises(StageError) as caught:
        health.check()
    health.stop()
    return str(caught.value)


def test_a_beat_that_stands_still_is_a_loss() -> None:
    store = FakeStore(3)
    health = health_of(store)
    health.check()
    store.beating.remove(2)
    assert error_of(health) == "rank 2 on gamma does not answer: it was not heard of for 0.4 s"


def test_the_first_report_is_the_verdict() -> None:
    store = FakeStore(3)
    health = health_of(store)
    store.values["failure"] = Failure(1, "failed: disk full").to_json().encode()
    health.suspect(2, "has ended")
    assert error_of(health) == "rank 1 on beta failed: disk full"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"rank": 1}', b"\xff", b"[" * 100_000])
def test_a_report_that_cannot_be_read_is_a_loss(data: bytes) -> None:
    assert Failure.from_json(data, 3) == Failure(None, "holds a report that cannot be read")


def test_a_report_about_a_rank_that_there_is_not() -> None:
    assert Failure.from_json(b'{"rank": 3, "reason": "x"}', 3).rank is None


def test_a_store_that_is_gone_is_the_loss_of_the_rank_that_serves_it() -> None:
    store = FakeStore(3)
    health = health_of(store, store_rank=1)
    store.is_gone = True
    assert error_of(health) == "rank 1 on beta has ended: its store is gone (Connection reset by peer)"


def test_a_store_that_hangs_is_the_loss_of_the_rank_that_serves_it() -> None:
    store = FakeStore(3)
    health = health_of(store, store_rank=1)
    store.hangs.set()
    assert error_of(health) == "rank 1 on beta does not answer: its store was not heard of for 0.4 s"
    store.hangs.clear()


def test_a_broken_connection_is_a_loss_without_a_verdict_too() -> None:
    store = FakeStore(3)
    health = health_of(store)
    store.hangs.set()
    health.suspect(2, "has ended")
    assert error_of(health) == "rank 2 on gamma has ended"
    store.hangs.clear()


def test_the_end_of_a_rank_that_is_done_is_no_loss() -> None:
    store = FakeStore(3)
    health = health_of(store)
    store.beating.remove(1)
    store.values["beat/1"] = b"done"
    health.suspect(1, "has ended")
    health.settle()
    time.sleep(2 * TIMINGS.silence_seconds)
    health.check()
    health.stop()


def test_waits_are_woken_and_late_ones_at_once() -> None:
    store, woken = FakeStore(3), list[str]()
    health = health_of(store)
    health.on_failure(lambda: woken.append("early"))
    health.suspect(2, "has ended")
    wait_until(lambda: woken)
    health.on_failure(lambda: woken.append("late"))
    assert woken == ["early", "late"]
    health.stop()


def test_a_wait_that_cannot_be_woken_does_not_keep_others_waiting() -> None:
    store, woken = FakeStore(3), list[str]()
    health = health_of(store)
    health.on_failure(lambda: woken[1])
    health.on_failure(lambda: woken.append("second"))
    health.suspect(2, "has ended")
    wait_until(lambda: woken)
    health.stop()


def test_a_main_thread_that_does_not_look_is_ended_and_one_that_has_looked_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    codes = list[int]()
    stuck = health_of(FakeStore(3), end=codes.append)
    stuck.suspect(2, "has ended")
    wait_until(lambda: codes)
    stuck.stop()
    assert codes == [75]
    assert capfd.readouterr().err == "flexgen: rank 2 on gamma has ended\nthe same command goes on\n"
    looking = health_of(FakeStore(3), end=codes.append)
    looking.suspect(2, "has ended")
    wait_until(lambda: looking.has_failed)
    with pytest.raises(StageError):
        looking.check()
    time.sleep(3 * TIMINGS.grace_seconds)
    looking.stop()
    assert codes == [75]


def test_its_own_error_is_told() -> None:
    store = FakeStore(3)
    health = health_of(store)
    health.fail("failed: out of memory")
    assert Failure.from_json(store.values["failure"], 3) == Failure(0, "failed: out of memory")
    health.stop()
    assert store.values["beat/0"] == b"left"
