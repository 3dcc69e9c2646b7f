"""Whatever becomes of one rank, all others end soon, with its name; and nobody complains where all is well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from crew import HANGS_SECONDS, PRELUDE, Crew

RING = """
from flexgen.distributed.wire import Outflow

def cut(number, frame):
    # Breaks the connections between ranks, but not those to the store.
    port = int(os.environ["MASTER_PORT"])
    for name in os.listdir("/proc/self/fd"):
        try:
            each = socket.socket(fileno=os.dup(int(name)))
            if port not in (each.getsockname()[1], each.getpeername()[1]):
                each.shutdown(socket.SHUT_RDWR)
        except (OSError, IndexError):
            pass

def fall_silent(number, frame):
    # The connections stay, and nothing comes through them.
    Outflow.send = lambda self, message: time.sleep(1000)

signal.signal(signal.SIGUSR1, cut)
signal.signal(signal.SIGUSR2, fall_silent)

def body(ranks):
    sender, receiver = ranks.sender((ranks.rank + 1) % ranks.size), ranks.receiver((ranks.rank - 1) % ranks.size)
    sender.send("hello", {}, [torch.ones(5)])
    receiver.receive()
    say("ready")
    if ranks.rank == int(os.environ.get("STUCK", "-1")):
        time.sleep(1000)
    receiver.receive()

run(body)
"""


def wait_until_ready(crew: Crew, size: int) -> None:
    for rank in range(size):
        crew.wait_for(rank, "ready")


def check_ended(crew: Crew, rank: int, named: int) -> None:
    """A rank ended because of another one, with one line about it, before long."""
    code, said = crew.wait(rank, 30), crew.printed(rank)
    assert code == 75, said
    assert [line for line in said.splitlines() if f"rank {named} on " in line and line.startswith(("StageError: ", "flexgen: "))], said
    assert not {"Traceback", "terminate", "Fatal"} & set(said.replace(":", " ").split()), said


@pytest.mark.parametrize("victim", range(3))
def test_a_rank_that_is_killed_ends_all_others(crew: Crew, victim: int) -> None:
    crew.start(3, RING)
    wait_until_ready(crew, 3)
    crew.signal(victim, signal.SIGKILL)
    for rank in {0, 1, 2} - {victim}:
        check_ended(crew, rank, victim)


@pytest.mark.parametrize("victim", range(3))
def test_a_rank_that_stands_still_ends_all_others_and_itself_when_it_goes_on(crew: Crew, victim: int) -> None:
    crew.start(3, RING, silence=3.0)
    wait_until_ready(crew, 3)
    crew.signal(victim, signal.SIGSTOP)
    for rank in {0, 1, 2} - {victim}:
        check_ended(crew, rank, victim)
    crew.signal(victim, signal.SIGCONT)
    assert crew.wait(victim, 30) == 75, crew.printed(victim)


@pytest.mark.parametrize("victim", range(3))
def test_connections_that_break_end_all_ranks(crew: Crew, victim: int) -> None:
    crew.start(3, RING)
    wait_until_ready(crew, 3)
    crew.signal(victim, signal.SIGUSR1)
    for rank in range(3):
        check_ended(crew, rank, victim)


@pytest.mark.parametrize("victim", range(2))
def test_a_connection_that_stays_open_but_is_silent_ends_all_ranks(crew: Crew, victim: int) -> None:
    crew.start(2, RING, silence=3.0)
    wait_until_ready(crew, 2)
    crew.signal(victim, signal.SIGUSR2)
    for rank in range(2):
        check_ended(crew, rank, victim)
        assert "nothing has arrived for " in crew.printed(rank)


@pytest.mark.parametrize("stuck", range(2))
def test_a_rank_whose_main_thread_is_stuck_is_ended(crew: Crew, stuck: int) -> None:
    crew.start(3, RING, grace=1.0, STUCK=str(stuck))
    wait_until_ready(crew, 3)
    crew.signal(2, signal.SIGKILL)
    for rank in range(2):
        check_ended(crew, rank, 2)
    assert "flexgen: rank 2 on " in crew.printed(stuck)


def test_a_short_stop_is_no_loss(crew: Crew) -> None:
    crew.start(2, RING, silence=6.0)
    wait_until_ready(crew, 2)
    crew.signal(1, signal.SIGSTOP)
    time.sleep(1.5)  # a quarter of what is endured, and many beats
    crew.signal(1, signal.SIGCONT)
    assert crew.wait(0, 1.0) is None
    assert crew.wait(1, 0.1) is None
    crew.signal(0, signal.SIGKILL)
    check_ended(crew, 1, 0)


FAILING = """
from flexgen.errors import OutOfMemoryError

def body(ranks):
    sender, receiver = ranks.sender((ranks.rank + 1) % ranks.size), ranks.receiver((ranks.rank - 1) % ranks.size)
    sender.send("hello", {}, [])
    receiver.receive()
    if ranks.rank == int(os.environ["FAILS"]):
        raise OutOfMemoryError("memory ran out on the host")
    receiver.receive()

run(body)
"""


@pytest.mark.parametrize("fails", [0, 2])
def test_an_error_of_a_rank_ends_all_others_with_its_words(crew: Crew, fails: int) -> None:
    crew.start(4, FAILING, FAILS=str(fails))
    for rank in set(range(4)) - {fails}:
        check_ended(crew, rank, fails)
        assert " failed: memory ran out on the host\n" in crew.printed(rank)
    assert crew.wait(fails) == 3
    assert crew.printed(fails) == "OutOfMemoryError: memory ran out on the host\n"


ENDING = """
def body(ranks):
    sender, receiver = ranks.sender((ranks.rank + 1) % ranks.size), ranks.receiver((ranks.rank - 1) % ranks.size)
    for index in range(50):
        sender.send("block", {"index": index}, [torch.zeros(1 << 17)])
    if ranks.rank == 1:
        time.sleep(2.5)  # longer than a rank may be silent; the others have come to their end
    for index in range(50 if ranks.rank else 7):  # what is left is of no interest
        assert receiver.receive().header == {"index": index}

run(body)
"""


def test_ranks_that_end_at_different_times_end_well(crew: Crew) -> None:
    crew.start(3, ENDING, silence=2.0)
    crew.end_well()
    assert [crew.printed(rank) for rank in range(3)] == ["ended\n"] * 3


EARLY = """
def body(ranks):
    if ranks.rank == 0:
        ranks.sender(1)
    else:
        ranks.receiver(0).receive()

run(body)
"""


def test_a_rank_that_ends_while_another_waits_for_it_is_no_clean_end(crew: Crew) -> None:
    crew.start(2, EARLY)
    assert crew.wait(1) == 75
    assert "StageError: rank 0 on " in crew.printed(1)
    assert " has ended, and rank 1 on " in crew.printed(1)
    check_ended(crew, 0, 1)


STORE = """
from datetime import timedelta
from torch.distributed import TCPStore

port = int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "2":
    store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=30), wait_for_workers=False)
    say("ready")
    time.sleep(1000)
os.environ["WORLD_SIZE"] = "2"
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_store_of_torchrun_that_is_lost_ends_all_ranks(crew: Crew, number: int) -> None:
    crew.start(3, STORE + RING, silence=3.0, TORCHELASTIC_USE_AGENT_STORE="True")
    wait_until_ready(crew, 3)
    crew.signal(2, number)
    for rank in range(2):
        code, said = crew.wait(rank, 30), crew.printed(rank)
        assert (code, "StageError: the server of the store " in said) == (75, True), said


def test_a_rank_that_does_not_come_is_named(crew: Crew) -> None:
    program = "Ranks.join(os.environ, 'lo', 0.5)"
    crew.start(1, f"os.environ['WORLD_SIZE'] = '3'\ntry:\n    {program}\nexcept StageError as error:\n    say(error)\n")
    assert crew.wait(0) == 0
    assert crew.printed(0) == "of 3 ranks 1, 2 did not come within 0.5 s: are all started?\n"


@pytest.mark.slow
def test_torchrun_starts_ranks(tmp_path: object) -> None:
    """The command itself, with its own store."""
    script = f"{tmp_path}/script.py"
    program = """
def body(ranks):
    sender, receiver = ranks.sender(1 - ranks.rank), ranks.receiver(1 - ranks.rank)
    sender.send("hello", {"from": ranks.rank}, [])
    print(f"rank {ranks.rank} of {ranks.size} hears from {receiver.receive().header['from']}\\n", end="", flush=True)

run(body)
"""
    with open(script, "w") as file:  # noqa: PTH123
        file.write(PRELUDE.replace("SILENCE", "10.0").replace("GRACE", "2.0") + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert {"rank 0 of 2 hears from 1", "rank 1 of 2 hears from 0"} <= set(done.stdout.splitlines())
