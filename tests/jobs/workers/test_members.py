"""Who is alive: by the observer's own clock, by the end that a worker tells, and by its process where that can be seen."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexgen.errors import StorageError
from flexgen.jobs.workers.leases import Fate
from flexgen.jobs.workers.members import FAILED, FINISHED, REFUSED, STOPPED, Member, MemberFile, Observer, Process
from flexgen.jobs.workers.place import replace_json

ELSEWHERE = Process(host="other", boot="another boot", pid=1, started="1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observer(tmp_path: Path, clock: Clock) -> Observer:
    return Observer(tmp_path, lease_seconds=60.0, clock=clock)


def beat(folder: Path, number: int, process: Process = ELSEWHERE, **fields: object) -> None:
    replace_json(folder / "w", dataclasses.asdict(MemberFile(worker="w", process=process, beat=number, **fields)))


def test_a_worker_that_is_silent_for_long_is_dead_and_may_come_back(tmp_path: Path, clock: Clock, observer: Observer) -> None:
    for number in range(40):
        beat(tmp_path, number)
        assert observer.fate_of("w") is Fate.ALIVE
        clock.now += 5
    for _ in range(5):
        assert observer.fate_of("w") is Fate.ALIVE
        clock.now += 10
    clock.now += 15
    assert observer.fate_of("w") is Fate.DEAD
    beat(tmp_path, 41)
    clock.now += 1
    assert observer.fate_of("w") is Fate.ALIVE


def test_an_observer_that_was_stopped_itself_believes_nobody_dead(tmp_path: Path, clock: Clock, observer: Observer) -> None:
    """The clock has gone on while it was stopped, and so has the worker; it may only not have written again by now."""
    beat(tmp_path, 1)
    assert observer.fate_of("w") is Fate.ALIVE
    clock.now += 10_000
    assert observer.fate_of("w") is Fate.ALIVE
    for _ in range(3):
        clock.now += 10_000
    assert observer.fate_of("w") is Fate.ALIVE


def test_clocks_of_other_hosts_do_not_matter(tmp_path: Path, clock: Clock, observer: Observer) -> None:
    """A file's times are never looked at."""
    beat(tmp_path, 1)
    os.utime(tmp_path / "w", (0, 0))
    assert observer.fate_of("w") is Fate.ALIVE
    for _ in range(5):
        clock.now += 20
        observer.fate_of("w")
        os.utime(tmp_path / "w", (clock.now * 2, clock.now * 2))
    assert observer.fate_of("w") is Fate.DEAD


def test_a_worker_without_a_file_is_given_time(tmp_path: Path, clock: Clock, observer: Observer) -> None:
    for _ in range(4):
        assert observer.fate_of("unknown") is Fate.ALIVE
        clock.now += 15
    assert observer.fate_of("unknown") is Fate.DEAD
    assert observer.members() == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"worker": "w", "process": {}}'])
def test_a_file_that_cannot_be_understood_is_silence(tmp_path: Path, clock: Clock, observer: Observer, content: str) -> None:
    (tmp_path / "w").write_text(content)
    assert observer.fate_of("w") is Fate.ALIVE
    assert observer.members() == []


@pytest.mark.parametrize(
    ("state", "fate"), [(FINISHED, Fate.RELEASED), (STOPPED, Fate.RELEASED), (REFUSED, Fate.RELEASED), (FAILED, Fate.DEAD)]
)
def test_a_worker_says_how_it_ends(tmp_path: Path, observer: Observer, state: str, fate: Fate) -> None:
    with Member(tmp_path, lease_seconds=60.0, child=3) as member:
        member.tell(lines=4, leases=("0-0",), figures={"eta_seconds": None, "output_tokens": 5})
        member.end(state, "why")
    (told,) = observer.members()
    assert (told.child, told.lines, told.leases, told.state, told.reason) == (3, 4, ("0-0",), state, "why")
    assert told.has_ended
    assert observer.fate_of(member.id) is fate


def test_a_member_beats_until_it_ends(tmp_path: Path) -> None:
    observer = Observer(tmp_path, lease_seconds=0.04)
    beats: set[int] = set()
    with Member(tmp_path, lease_seconds=0.12) as member:
        while len(beats) < 4:  # a member that does not beat hangs here
            beats.add(observer.members()[0].beat)
            time.sleep(0.002)
    while observer.fate_of(member.id) is not Fate.DEAD:  # it has not said how it ended
        time.sleep(0.005)


def test_a_member_whose_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Member(tmp_path / "gone", lease_seconds=60.0).__enter__()


def test_a_process_of_this_host_that_is_gone_is_dead_at_once(tmp_path: Path, observer: Observer) -> None:
    code = (
        "from flexgen.jobs.workers.members import Process; import dataclasses, json; print(json.dumps(dataclasses.asdict(Process.this())))"
    )
    command = [sys.executable, "-c", f"{code}; import sys; sys.stdout.flush(); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        process = Process(**json.loads(child.stdout.readline()))
        beat(tmp_path, 1, process)
        assert observer.fate_of("w") is Fate.ALIVE
        assert process.is_here()
        child.kill()
        child.wait()
    assert process.is_gone()
    assert observer.fate_of("w") is Fate.DEAD


def test_process_ids_that_are_used_again_and_other_hosts() -> None:
    here = Process.this()
    assert (here.is_here(), here.is_gone()) == (True, False)
    earlier = dataclasses.replace(here, started="1")
    assert (earlier.is_here(), earlier.is_gone()) == (False, True)
    for elsewhere in (dataclasses.replace(here, boot="another"), dataclasses.replace(here, boot="")):
        assert (elsewhere.is_here(), elsewhere.is_gone()) == (False, False)
