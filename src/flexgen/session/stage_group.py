"""The ranks of a pipeline as a model's session sees them: who they are, and the channels between neighbours.

All engines of a session share them, because ranks are started once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexgen.base.quantities import MIB, counted
from flexgen.base.steps import step
from flexgen.distributed.agreement import check_agreement
from flexgen.distributed.channel import Receiver, Sender
from flexgen.distributed.cores import own_cores
from flexgen.distributed.launch import start_followers
from flexgen.distributed.place import is_placed, place_of
from flexgen.distributed.ranks import Ranks
from flexgen.errors import OptionError, StageError
from flexgen.session.model import ResolvedModel
from flexgen.session.stage_facts import stage_facts
from flexgen.session.stage_traces import gather_traces

logger = logging.getLogger(__name__)

JOB = "job"  # the key under which the leader tells followers that it started what to do
PROBE_FRAMES, PROBE_BYTES = 8, MIB  # what measures the rate of a link
PATIENCE_SECONDS = 24 * 3600.0  # for what takes a stage long while it is well: downloads, conversions, loading
LOOPBACK = "lo"
FOLLOWER = "flexgen.session.follower"  # the module that they run


def join_stages(found: ResolvedModel, num_stages: int) -> StageGroup:
    """Return the stages of a pipeline: the processes that torchrun has started, or else more processes of this machine.

    Raises:
        OptionError: torchrun started another number of processes.
        StageError: The stages differ in what all need alike, or one of them does not work.
    """
    options = found.options
    with contextlib.ExitStack() as opened:
        if is_placed(os.environ):
            place = place_of(os.environ)
            if place.size != num_stages:
                raise OptionError(f"stages={num_stages}, and torchrun has started {place.size} processes: both must be the same")
            if (cores := own_cores(place)) is not None:
                opened.callback(cores.close)
            step(f"waiting for {counted(num_stages - 1, 'other stage')}")
            ranks = Ranks.join(os.environ, options.interface, patience=PATIENCE_SECONDS)
            opened.push(ranks)
        else:
            step(f"starting {counted(num_stages - 1, 'more stage')} on this machine")
            interface = options.interface or LOOPBACK
            followers = start_followers(
                num_stages, interface, options.devices.split(",") if options.devices else (), program=(sys.executable, "-m", FOLLOWER)
            )
            opened.callback(followers.close)
            ranks = Ranks.join(followers.environment, interface, watchdog=False, while_waiting=followers.check)
            ranks.health.on_failure(followers.hurry)
            opened.push(ranks)
            ranks.publish(JOB, {"model": str(found.files.name), "options": dataclasses.asdict(options)})
        check_agreement(ranks, stage_facts(found, num_stages), timeout=PATIENCE_SECONDS)
        return StageGroup(found, ranks, opened.pop_all())


class StageGroup:
    """The stages of a pipeline, of which this process is the first.

    Args:
        found: The model.
        ranks: The ranks, at least 2.
        opened: What ends the other stages.

    Attributes:
        ranks: The ranks.
        to_next: What sends to the second stage.
        from_last: What receives from the last stage.
        num_opened: The number of engines that were opened.
        num_described: How often the machines were described.
    """

    def __init__(self, found: ResolvedModel, ranks: Ranks, opened: contextlib.ExitStack) -> None:
        self.ranks, self._found, self._opened = ranks, found, opened
        self.num_opened = self.num_described = self._ping_at = 0
        self._hop_seconds = 0.0
        self.to_next: Sender = ranks.sender(1)
        self.from_last: Receiver = ranks.receiver(ranks.size - 1)

    def tell(self, kind: str, header: dict[str, Any]) -> None:
        """Send something to all followers, down the chain."""
        self.to_next.send(kind, header)

    def gather(self, key: str) -> list[dict[str, Any]]:
        """Wait for what each follower publishes under `key`, and return it in the order of the stages, the second first."""
        return [self.ranks.lookup(f"{key}/{rank}", PATIENCE_SECONDS) for rank in range(1, self.ranks.size)]

    def probe(self) -> None:
        """Send what every link's rate is measured with."""
        for _ in range(PROBE_FRAMES):
            self.to_next.send("probe", {}, [torch.zeros(PROBE_BYTES, dtype=torch.uint8)])

    def ping_seconds(self) -> float:
        """Return the latency of a link, as the mean over the way down the chain and back."""
        start = time.perf_counter()
        if (recorder := self._found.recorder) is not None:
            self._ping_at = recorder.now()
        self.tell("ping", {})
        self.from_last.receive()
        self._hop_seconds = (time.perf_counter() - start) / self.ranks.size
        return self._hop_seconds

    def close(self) -> None:
        """End all stages, and gather their traces; those that were started here are waited for.  The trace of this stage is complete."""
        try:
            self.tell("end", {})
            trace = self._found.options.trace
            if trace is not None and self._found.recorder is not None:
                gather_traces(Path(trace), self._ping_at, round(1e6 * self._hop_seconds), self.from_last, self.ranks.hosts)
            else:
                while self.from_last.receive().kind != "end":
                    pass
        except StageError as error:  # what a stage could not do has been said, or the run is over anyway
            logger.debug("the stages did not end as they should: %s", error)
        finally:
            self._opened.close()
