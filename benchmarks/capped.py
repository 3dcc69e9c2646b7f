"""Run a command in a memory cgroup of its own: what a machine with that much memory would do.

    python benchmarks/capped.py 4GiB -- flexgen run MODEL requests.jsonl -o answers.jsonl

The command's exit status is kept; its peak memory and how often it met the limit go to stderr as one JSON line.  The cap counts
everything the kernel charges to the group, the page cache of files it reads or maps included.  Needs write access to the cgroup tree
(root, or a delegated v2 subtree); v1 and v2 are both understood.  The page cache is dropped first where that is allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flexgen.base.quantities import parse_size

CGROUP_ROOT = Path("/sys/fs/cgroup")


class NoCgroup(Exception):
    """This process may not make memory cgroups here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where a version of the kernel interface keeps its numbers."""

    limit: str
    peak: str
    swap_limit: str
    swap_limit_is_sum: bool

    def read_failures(self, group: Path) -> tuple[int, int]:
        """(times the limit was met, processes killed for it)."""
        if self is V1:
            return int((group / "memory.failcnt").read_text()), _key(group / "memory.oom_control", "oom_kill")
        return _key(group / "memory.events", "max"), _key(group / "memory.events", "oom_kill")


V1 = Files(
    limit="memory.limit_in_bytes", peak="memory.max_usage_in_bytes", swap_limit="memory.memsw.limit_in_bytes", swap_limit_is_sum=True
)
V2 = Files(limit="memory.max", peak="memory.peak", swap_limit="memory.swap.max", swap_limit_is_sum=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a capped command ended.

    Attributes:
        peak_bytes: largest charge of the group, page cache included; None where the kernel does not say (v2 before 5.19).
        failcnt: how often the limit was met (reclaiming cache counts; it is no error).
        oom_kills: processes the kernel killed for it.
    """

    returncode: int
    timed_out: bool
    elapsed_seconds: float
    limit_bytes: int
    peak_bytes: int | None
    failcnt: int
    oom_kills: int
    cache_dropped: bool

    @property
    def survived(self) -> bool:
        return self.returncode == 0 and not self.timed_out and not self.oom_kills


def _key(path: Path, name: str) -> int:
    """The number behind `name` in a file of "name number" lines; 0 when absent."""
    rows = (line.split() for line in path.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)


def drop_page_cache() -> bool:
    """Forget cached file contents, so that every system starts cold; False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[tuple[Path, Files]]:
    """A fresh group with that limit and no swap, removed afterwards.

    Raises:
        NoCgroup: when the tree is missing or not writable.
    """
    parent, files = _find_parent()
    group = parent / f"flexgen-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if files is V2:
            (parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / files.limit).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise NoCgroup(f"cannot make a memory cgroup below {parent}: {error}") from error
    if (group / files.swap_limit).exists():
        (group / files.swap_limit).write_text(str(limit_bytes if files.swap_limit_is_sum else 0))
    try:
        yield group, files
    finally:
        _remove(group)


def _find_parent() -> tuple[Path, Files]:
    """The folder in which groups can be made: of v1 the memory hierarchy, of v2 the group above our own (ours holds processes)."""
    if (CGROUP_ROOT / "memory" / V1.limit).exists():
        return CGROUP_ROOT / "memory", V1
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        return (CGROUP_ROOT / own.strip("/")).parent if own != "/" else CGROUP_ROOT, V2
    raise NoCgroup(f"no memory controller below {CGROUP_ROOT}")


def _remove(group: Path) -> None:
    """Kill what is left in the group and remove it; a dying process keeps it busy for a moment."""
    for _ in range(100):
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    print(f"capped: {group} could not be removed", file=sys.stderr)


def run_capped(
    limit_bytes: int,
    argv: Sequence[str],
    *,
    timeout_seconds: float | None = None,
    hopeless: Callable[[], bool] | None = None,
    stdout: IO[str] | int | None = None,
    stderr: IO[str] | int | None = None,
) -> Outcome:
    """Run `argv` in a memory cgroup of `limit_bytes`, cold.

    Args:
        timeout_seconds: then it is killed, and `timed_out` is set. hopeless: asked every second, whether to do so now.

    Raises:
        NoCgroup: when no group can be made here.
    """
    dropped = drop_page_cache()
    with memory_cgroup(limit_bytes) as (group, files):
        # A shell enters the group and becomes the command, so that not a byte is charged elsewhere.
        enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *argv]
        started = time.perf_counter()
        process = subprocess.Popen(enter, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, start_new_session=True)
        timed_out = False
        try:
            while process.poll() is None and not timed_out:
                left = math.inf if timeout_seconds is None else started + timeout_seconds - time.perf_counter()
                timed_out = left <= 0 or (hopeless is not None and hopeless())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(min(left, 1.0), 0.0))
            timed_out &= process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        elapsed = time.perf_counter() - started
        failcnt, oom_kills = files.read_failures(group)
        peak = int((group / files.peak).read_text()) if (group / files.peak).exists() else None
    return Outcome(
        returncode=process.returncode,
        timed_out=timed_out,
        elapsed_seconds=round(elapsed, 3),
        limit_bytes=limit_bytes,
        peak_bytes=peak,
        failcnt=failcnt,
        oom_kills=oom_kills,
        cache_dropped=dropped,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("limit", type=parse_size, help="bytes, or 4GiB, 16GB")
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.usage = "capped.py [-h] [--timeout SECONDS] LIMIT -- COMMAND ..."
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if not command:
        parser.error("no command given after --")
    try:
        outcome = run_capped(args.limit, command, timeout_seconds=args.timeout)
    except NoCgroup as error:
        print(f"capped: {error}", file=sys.stderr)
        return 125
    print(json.dumps(dataclasses.asdict(outcome)), file=sys.stderr)
    return outcome.returncode if outcome.returncode >= 0 else 128 - outcome.returncode


if __name__ == "__main__":
    sys.exit(main())
