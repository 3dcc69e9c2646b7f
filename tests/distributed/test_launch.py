"""Followers of one machine: their environment, cores and output, and that none is left however the leader ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from crew import HANGS_SECONDS, Crew

from flexgen.cli.options import follow_if_told
from flexgen.distributed.launch import start_followers
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.session.follower import _refer_to_leader

# The leader's program; FOLLOWER is the program of followers.
LEADER = """
from flexgen.distributed import launch
launch._TERM_SECONDS = 1.0
program = [sys.executable, "-c", FOLLOWER]
"""
LIGHT = "import os, signal, sys, time; from flexgen.distributed.launch import end_with_parent; end_with_parent(os.environ); "


def leader(follower: str, program: str) -> str:
    return LEADER.replace("FOLLOWER", repr(LIGHT + follower)) + program


def check_gone(processes: list[int]) -> None:
    until = time.monotonic() + HANGS_SECONDS
    while left := [each for each in processes if psutil.pid_exists(each) and psutil.Process(each).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, f"{left} are left"
        time.sleep(0.02)


def test_followers_have_places_devices_and_cores_and_their_lines_are_marked(crew: Crew) -> None:
    follower = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
time.sleep(0.5)
print([os.environ[name] for name in names], sorted(os.sched_getaffinity(0)))
print("and an error", file=sys.stderr)
"""
    program = """
before = os.sched_getaffinity(0)
with launch.start_followers(3, devices=("cuda:0", "cuda:1", "cuda:2"), program=program) as followers:
    shares = [os.sched_getaffinity(each) for each in (0, *(process.pid for process in followers.processes))]
    assert [followers.environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "3"]
    assert set().union(*shares) == before and (len(before) < 3 or sum(map(len, shares)) == len(before))
    say("cores", [sorted(share) for share in shares])
assert os.sched_getaffinity(0) == before
assert [process.returncode for process in followers.processes] == [0, 0]
say("ended")
"""
    crew.start(1, leader(follower, program), CUDA_VISIBLE_DEVICES="4,6,7")
    crew.end_well()
    lines = crew.printed(0).splitlines()
    shares = eval(lines[0].removeprefix("cores "))
    for rank, device in ((1, "6"), (2, "7")):
        assert f"stage {rank}: {[str(rank), str(rank), '3', '3', '127.0.0.1', device]} {shares[rank]}" in lines
        assert f"stage {rank}: and an error" in lines


def test_followers_die_with_a_leader_that_is_killed(crew: Crew) -> None:
    program = """
followers = launch.start_followers(3, program=program)
say(*(process.pid for process in followers.processes))
time.sleep(1000)
"""
    crew.start(1, leader("print('here', flush=True); time.sleep(1000)", program))
    crew.wait_for(0, "stage 1: here")
    crew.wait_for(0, "stage 2: here")
    processes = [int(each) for each in crew.printed(0).partition("\n")[0].split()]
    crew.signal(0, signal.SIGKILL)
    check_gone(processes)


def test_followers_that_do_not_end_are_ended_after_an_error(crew: Crew, tmp_path: Path) -> None:
    """One that takes no notice of SIGTERM, one that is stopped, and one that has ended before."""
    follower = """
rank, folder = os.environ["RANK"], os.environ["FOLDER"]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{folder}/here-{rank}", "w").close()
if rank == "2":
    os.kill(os.getpid(), signal.SIGSTOP)
if rank == "3":
    while not all(os.path.exists(f"{folder}/here-{each}") for each in (1, 2)):
        time.sleep(0.01)
    sys.exit(7)
time.sleep(1000)
"""
    program = """
launch._PATIENCE_SECONDS = 0.5
try:
    with launch.start_followers(4, program=program) as followers:
        say("pids", *(process.pid for process in followers.processes))
        while True:
            time.sleep(0.02)
            followers.check()
except StageError as error:
    say(error)
say([process.returncode for process in followers.processes])
say("ended")
"""
    crew.start(1, leader(follower, program), FOLDER=str(tmp_path))
    crew.end_well()
    lines = crew.printed(0).splitlines()
    assert "rank 3 on this machine has ended (exit code 7)" in lines
    assert lines[-2] == "[-9, -9, 7]"
    check_gone([int(each) for each in next(line for line in lines if line.startswith("pids")).split()[1:]])


FOLLOWING = """
import json
from flexgen.distributed.ranks import Ranks
with Ranks.join(os.environ) as ranks:
    receiver = ranks.receiver(0)
    frame = receiver.receive()
    ranks.sender(0).send("sum", {"rank": ranks.rank}, [frame.tensors[0] * 2])
"""
LEADING = """
with launch.start_followers(2, program=program) as followers:
    with Ranks.join(followers.environment, "lo", while_waiting=followers.check) as ranks:
        ranks.sender(1).send("numbers", {}, [torch.arange(4.0)])
        say(ranks.receiver(1).receive().tensors[0].tolist())
say([process.returncode for process in followers.processes])
say("ended")
"""


def test_a_leader_and_its_follower_work_together(crew: Crew) -> None:
    crew.start(1, leader(FOLLOWING, LEADING))
    crew.end_well()
    assert crew.printed(0) == "[0.0, 2.0, 4.0, 6.0]\n[0]\nended\n"


@pytest.mark.parametrize(
    ("devices", "visible", "said"),
    [(("cuda:0",), "0", "1 devices for 2 stages"), (("cuda:0", "cuda:3"), "0,1", "device cuda:3: CUDA_VISIBLE_DEVICES=0,1 shows 2")],
)
def test_devices_that_are_not_there(devices: tuple[str, ...], visible: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        start_followers(2, devices=devices, program=["false"], environment={"CUDA_VISIBLE_DEVICES": visible})


def test_a_program_that_cannot_be_started_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        start_followers(2, program=[str(tmp_path / "nothing")])


def test_a_follower_that_is_stopped_is_not_waited_for_long_after_a_failure(crew: Crew) -> None:
    """It neither ends by itself nor by SIGTERM."""
    program = """
import signal, time
with launch.start_followers(2, program=program) as followers:
    followers.processes[0].send_signal(signal.SIGSTOP)
    followers.hurry()
    start = time.monotonic()
say(followers.processes[0].returncode, time.monotonic() - start < 9)
"""
    crew.start(1, leader("time.sleep(600)", program))
    assert (crew.wait(0), crew.printed(0).split()) == (0, ["-9", "True"])


@pytest.mark.parametrize(("stages", "started"), [(None, "2"), (3, "2"), (2, "1")])
def test_torchrun_starts_as_many_processes_as_there_are_stages(stages: int | None, started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": started, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": started}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=f"torchrun has started {started} process(es)?: give --stages {started}"):
        follow_if_told("a model", EngineOptions(stages=stages))


def test_a_signal_to_a_follower_names_who_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    _refer_to_leader(signal.SIGTERM, None)
    assert "SIGTERM: a stage ends with the first one" in caplog.text
