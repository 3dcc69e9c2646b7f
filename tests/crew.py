"""Runs small programs as the ranks of a run, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NURSERY = Path(__file__).with_name("nursery.py")
HANGS_SECONDS = 60.0  # nothing here takes as long, on however busy a machine

# What every program begins with.  `run(body)` joins the others, and ends as the command does.
PRELUDE = """
import json, os, signal, socket, sys, threading, time
import torch
from flexgen.distributed.failure import Timings
from flexgen.distributed.ranks import Ranks
from flexgen.errors import FlexGenError, StageError

TIMINGS = Timings(beat_seconds=0.1, silence_seconds=SILENCE, verdict_seconds=1.0, grace_seconds=GRACE)

def say(*words):
    print(*words, flush=True)

def run(body, **keywords):
    try:
        with Ranks.join(os.environ, "lo", 30.0, timings=TIMINGS, **keywords) as ranks:
            body(ranks)
    except StageError as error:
        say("StageError:", error)
        sys.exit(75)
    except FlexGenError as error:
        say(f"{type(error).__name__}:", error)
        sys.exit(3)
    say("ended")
"""


class Crew:
    """Ranks of a test.

    Args:
        nursery: The process that they are forked from.
        folder: A folder for what they print.
    """

    def __init__(self, nursery: subprocess.Popen[str], folder: Path) -> None:
        self._nursery, self._folder = nursery, folder
        self.processes: list[int] = []
        self.codes: dict[int, int | None] = {}

    def start(self, size: int, program: str, *, silence: float = 10.0, grace: float = 2.0, **environment: str) -> None:
        """Start `size` ranks of a program.

        Args:
            size: Their number.
            program: What follows the prelude, in Python.
            silence: When a rank counts as lost, in seconds.
            grace: When a rank whose main thread is stuck is ended, in seconds.
            environment: More variables.
        """
        places = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
        prelude = PRELUDE.replace("SILENCE", str(silence)).replace("GRACE", str(grace))
        for rank in range(size):
            log = str(self._folder / f"rank-{rank}")
            self.processes.append(
                self._ask({"start": prelude + program, "environment": {**places, "RANK": str(rank)}, "log": log})
            )  # fmt: skip

    def wait(self, rank: int, seconds: float = HANGS_SECONDS) -> int | None:
        """Return the exit code of a rank, negative for a signal; None if it has not ended."""
        if self.codes.get(rank) is None:
            self.codes[rank] = self._ask({"wait": self.processes[rank], "seconds": seconds})
        return self.codes[rank]

    def printed(self, rank: int) -> str:
        """Return what a rank has printed so far, on both streams."""
        path = self._folder / f"rank-{rank}"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, rank: int, text: str, seconds: float = HANGS_SECONDS) -> None:
        """Wait until a rank has printed something."""
        until = time.monotonic() + seconds
        while text not in self.printed(rank):
            assert time.monotonic() < until, f"rank {rank} has not printed {text!r}:\n{self.printed(rank)}"
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank], number)

    def end_well(self) -> None:
        """Wait for all ranks, which end without an error and without a word on the way out."""
        for rank in range(len(self.processes)):
            code = self.wait(rank)
            printed = self.printed(rank)
            assert (code, printed.endswith("ended\n")) == (0, True), f"rank {rank} ended with {code}:\n{printed}"

    def close(self) -> None:
        for rank, process in enumerate(self.processes):
            if self.codes.get(rank) is None:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                self.wait(rank)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(request) + "\n")
        self._nursery.stdin.flush()
        return json.loads(self._nursery.stdout.readline())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(NURSERY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait(HANGS_SECONDS)


@pytest.fixture
def crew(nursery: subprocess.Popen[str], tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(nursery, tmp_path)
    yield crew
    crew.close()
