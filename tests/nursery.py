"""The program of a process that has imported torch and computed nothing; every rank of a test is forked from it, in milliseconds.

It reads requests from standard input, a line of JSON each, and answers each with one: {"start": program, "environment", "log"} with the
process, {"wait": process, "seconds"} with its exit code, negative for a signal, or null if it has not ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

import flexgen.distributed.agreement
import flexgen.distributed.launch
import flexgen.distributed.ranks


def answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def exit_code(process: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def serve() -> Any:
    """Answer requests until there are no more; in a child, return what it is to do."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer(exit_code(request["wait"], request["seconds"]))
        elif (process := os.fork()) == 0:
            return request
        else:
            answer(process)
    return None


job = serve()
if job is not None:
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["environment"])
    exec(compile(job["start"], "<rank>", "exec"), {"__name__": "__main__", "torch": torch, "flexgen": flexgen})
