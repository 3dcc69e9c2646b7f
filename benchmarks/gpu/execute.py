"""Runs steps: each in a process of its own, within the time that is left, and leaves its result in a file.  Knows no step."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.quantities import MIB

from ..record import commit
from .step import Step

ROOT = Path(__file__).resolve().parents[2]
# A step may take this many times as long as it should; with less than this share of its time left, it does not begin.
PATIENCE, LEAST_SHARE = 3.0, 0.5
DONE, SKIPPED, FAILED, NO_TIME = "done", "skipped", "failed", "no time"
POLL_SECONDS = 0.25
_MEMORY_QUERY = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


def run_steps(steps: Iterable[Step], out: Path, seconds: float, *, again: bool = False, tell: Callable[[str], None] = print) -> list[Any]:
    """Run the steps that have no good result yet, and return the results of all.

    Args:
        steps: The steps, in order.
        out: The folder of the results.
        seconds: The time that all of them may take together.
        again: Whether to run those that went well, too.
        tell: Called with a line for each step.
    """
    end = time.monotonic() + seconds
    results: list[Any] = []
    for step in steps:
        path = out / f"{step.name}.json"
        found = None if again else _kept(path, step)
        if found is None:
            tell(f"{step.name}: {step.what} ...")
            found = _result(step, out, end - time.monotonic())
            _write(path, found)
            tell(f"{step.name}: {found['status']} after {found['seconds']:.0f} s" + (f" ({found['why']})" if found["why"] else ""))
        results.append(found)
    return results


def _kept(path: Path, step: Step) -> Any:
    """Return the result that a step has from an earlier run of the same command, if it went well."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if found["command"] == list(step.command) and found["status"] == DONE:
            return found
    return None


def _write(path: Path, result: Any) -> None:
    """Write a result as a whole, so that an interrupt leaves no half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)


def _result(step: Step, out: Path, seconds_left: float) -> dict[str, Any]:
    """Run a step, or say why it is not run."""
    status, why, ended = SKIPPED, step.skipped, None
    if not why and seconds_left < LEAST_SHARE * step.seconds:
        status, why = NO_TIME, f"{max(seconds_left, 0):.0f} s are left, and it takes about {step.seconds:.0f}"
    if not why:
        ended = _run(step, out, min(PATIENCE * step.seconds, seconds_left))
        status, why = (FAILED, ended.why) if ended.why else (DONE, "")
    return {
        "step": step.name, "what": step.what, "command": list(step.command), "status": status, "why": why,
        "seconds": ended.seconds if ended else 0.0, "result": ended.result if ended else None,
        "driver_peak_bytes": ended.driver_peak_bytes if ended else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **commit(),
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """A process that has ended.

    Attributes:
        why: Why it failed; empty if it did not.
        result: What it printed, as JSON if it is JSON.
        driver_peak_bytes: The most memory of the GPU that the driver counted meanwhile, beyond what was in use before.
    """

    why: str
    seconds: float
    result: Any
    driver_peak_bytes: int | None


def _run(step: Step, out: Path, seconds: float) -> _Ended:
    """Run a step's command for at most so long; it is ended with all that it has started."""
    start, why = time.monotonic(), ""
    log, errors = out / f"{step.name}.out", out / f"{step.name}.err"
    with log.open("w") as stdout, errors.open("w") as stderr, driver_peak() as peak:
        try:
            process = subprocess.Popen(step.command, stdout=stdout, stderr=stderr, cwd=ROOT, start_new_session=True)
        except OSError as error:
            return _Ended(why=str(error), seconds=0.0, result=None, driver_peak_bytes=None)
        try:
            code = process.wait(seconds)
            why = "" if code == 0 else f"it ended with {code}: {_tail(errors)}"
        except subprocess.TimeoutExpired:
            why = f"it took longer than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _Ended(why=why, seconds=time.monotonic() - start, result=_parsed(log.read_text(errors="replace")), driver_peak_bytes=peak())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"text": text[-10_000:]}


def _tail(path: Path, lines: int = 8) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def driver_peak() -> Iterator[Callable[[], int | None]]:
    """Watch the memory in use on the first GPU.

    Yields:
        A function that returns the most beyond what was in use before; None without a driver.
    """
    before = most = _used_bytes()
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while before is not None and not stop.wait(POLL_SECONDS):
            most = max(most or 0, _used_bytes() or 0)

    thread = threading.Thread(target=watch, name="driver-peak", daemon=True)
    thread.start()
    try:
        yield lambda: None if before is None or most is None else most - before
    finally:
        stop.set()
        thread.join()


def _used_bytes() -> int | None:
    if shutil.which(_MEMORY_QUERY[0]) is None:
        return None
    found = subprocess.run(_MEMORY_QUERY, capture_output=True, text=True, check=False)
    first = next(iter(found.stdout.split()), "")
    return int(first) * MIB if found.returncode == 0 and first.isdigit() else None
