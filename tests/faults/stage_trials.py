"""Jobs on pipeline stages, one rank of which dies, stops or loses its link at a random time: all others end soon, and the job goes on.

    python -m faults.stage_trials FOLDER --trials 100 --at-once 4 --seed 0 [--kind "a link that is cut"]

Every rank is a child forked as in trials.py; where links are cut, in a network namespace of its own (networks.py), which needs root.  Jobs
have two ranks or three.  One JSON line per trial goes to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from faults.networks import INTERFACE, Network, network
from faults.trials import MODEL, REQUESTS, Workshop, command, write_model

NUMBERS_OF_STAGES = (2, 3)
SECONDS_TO_END = 30.0  # within which every other rank must have ended
CUT = "a link that is cut"
SIGNALS = {"kill -9 of a rank": signal.SIGKILL, "a rank that is stopped": signal.SIGSTOP}
KINDS = (*SIGNALS, CUT)
ESTABLISHED = "01"  # as the kernel writes the state of a connection


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTrial:
    """What became of a job of which one rank was struck.

    Attributes:
        kind: What was done to the rank.
        rank: The rank.
        struck: Whether it was still at work.
        codes: The exit codes of all ranks; negative for the signal that ended one.
        seconds: How long after the fault the last of the others ended; with a link that is cut, the last of all.
        named: Whether the others' messages name the rank.
        lost: Lines without a record after the job went on, and so on for the next two.
    """

    kind: str
    rank: int
    struck: bool
    codes: list[int]
    seconds: float
    named: bool
    lost: int
    duplicated: int
    wrong: int
    same_bytes: bool
    log: str = ""

    @property
    def good(self) -> bool:
        others = [code for rank, code in enumerate(self.codes) if rank != self.rank or self.kind == CUT]
        was_over = any(code in (0, 1) for code in self.codes)  # the job was done when the rank was struck
        ended = all(code == 75 or (was_over and code in (0, 1)) for code in others) and self.seconds < SECONDS_TO_END
        return ended and self.same_bytes and (self.named or was_over) and not (self.lost or self.duplicated or self.wrong)


class StageWorkshop(Workshop):
    """A workshop whose runs may have several ranks, on hosts of their own where there is a network."""

    network: Network | None = None

    def _write_model(self) -> None:
        write_model(self.folder / MODEL, num_layers=4)

    def try_rank(self, kind: str, numbers: random.Random) -> StageTrial:
        """Strike one rank of a job at a random time, and let the job go on in peace."""
        job, number = self.new_folder(), numbers.choice(NUMBERS_OF_STAGES)
        rank, after = numbers.randrange(number), numbers.uniform(0, 0.6 * number) * self.seconds
        port = _free_port()
        start = time.monotonic()
        pids = [self._fork(lambda each=each: self._rank(job, each, number, port)) for each in range(number)]  # type: ignore[misc]
        codes: dict[int, int] = {}
        self._wait(pids, codes, start + after)
        for pid in pids:
            self._wait_until_joined(pid)
        struck = rank not in codes and all(code not in (0, 1) for code in codes.values())
        if struck:
            self._strike(kind, rank, pids[rank])
        fault_at = time.monotonic()
        self._wait([pid for each, pid in enumerate(pids) if each != rank or kind == CUT], codes, fault_at + 2 * SECONDS_TO_END, pids)
        seconds = time.monotonic() - fault_at
        for each, pid in enumerate(pids):
            if each not in codes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                codes[each] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if self.network is not None:
            self.network.mend()
        log = (job / "log").read_text()
        go_on = self._fork(lambda: self._child(job, None))
        code = os.waitstatus_to_exitcode(os.waitpid(go_on, 0)[1])
        duplicated, wrong, lost = self._faults_of(job / "out.jsonl")
        trial = StageTrial(
            kind=kind, rank=rank, struck=struck, codes=[codes[each] for each in range(number)], seconds=seconds,
            named=f"stage {rank}" in log or f"rank {rank}" in log, lost=lost, duplicated=duplicated, wrong=wrong,
            same_bytes=self._is_whole(job / "out.jsonl") and code == 1,
        )  # fmt: skip
        if not trial.good:
            trial = dataclasses.replace(trial, log=(job / "log").read_text())
        shutil.rmtree(job)
        return trial

    def _strike(self, kind: str, rank: int, pid: int) -> None:
        if kind == CUT:
            assert self.network is not None
            self.network.hosts[rank].cut()
        else:
            os.kill(pid, SIGNALS[kind])

    def _wait_until_joined(self, pid: int) -> None:
        """Return once a rank is known to the others, or has ended; one that never came is the business of whoever starts the ranks."""
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            while process.status() != psutil.STATUS_ZOMBIE and not self._is_connected(process):
                time.sleep(0.02)
            time.sleep(0.1)

    def _is_connected(self, process: psutil.Process) -> bool:
        if self.network is None:
            return any(each.status == psutil.CONN_ESTABLISHED for each in process.net_connections())
        sockets = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]  # of its namespace, where it is alone
        return any(line.split()[3] == ESTABLISHED for line in sockets)

    def _wait(self, waited: list[int], codes: dict[int, int], until: float, pids: list[int] | None = None) -> None:
        """Collect the exit codes of ranks that end before a time, until all of `waited` have."""
        pids = waited if pids is None else pids
        while time.monotonic() < until and not all(pids.index(pid) in codes for pid in waited):
            for rank, pid in enumerate(pids):
                if rank not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
            time.sleep(0.005)

    def _rank(self, job: Path, rank: int, number: int, port: int) -> int:
        address, interface = "127.0.0.1", "lo"
        if self.network is not None:
            self.network.hosts[rank].enter()
            address, interface = self.network.hosts[0].address, INTERFACE
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": address, "MASTER_PORT": str(port),
        }  # fmt: skip
        self.flags = ("--stages", str(number), "--interface", interface)
        return self._child(job, None)

    def _flexgen(self, job: Path, *flags: str) -> int:
        from faults.trials import run_flexgen

        return run_flexgen(*command(self.folder / MODEL, self.folder / REQUESTS, job), *getattr(self, "flags", ()), *flags)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _import_stages() -> None:
    import flexgen.session.follower
    import flexgen.session.staged  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    args = parser.parse_args()
    workshop = StageWorkshop.open(args.folder)
    _import_stages()
    kinds = args.kind or list(SIGNALS)
    helpers = [workshop._fork(lambda each=each: _work(workshop, kinds, args, each)) for each in range(args.at_once)]  # type: ignore[misc]
    sys.exit(min(sum(os.waitpid(pid, 0)[1] for pid in helpers), 1))


def _work(workshop: StageWorkshop, kinds: list[str], args: argparse.Namespace, number: int) -> int:
    """Every so-many-th trial."""
    workshop.num_jobs = 1_000_000 * (number + 1)
    with network(max(NUMBERS_OF_STAGES)) if CUT in kinds else nullcontext() as workshop.network:
        for each in range(number, args.trials, args.at_once):
            trial = workshop.try_rank(kinds[each % len(kinds)], random.Random(f"{args.seed} {each}"))
            os.write(1, (json.dumps({**dataclasses.asdict(trial), "good": trial.good}) + "\n").encode())
    return 0


if __name__ == "__main__":
    main()
