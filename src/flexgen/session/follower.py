"""A pipeline stage other than the first: it describes its machine, opens its part of the model, and computes passes as the leader says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flexgen.base.from_json import dataclass_from_json
from flexgen.distributed.agreement import check_agreement
from flexgen.distributed.boundaries import HIDDEN, LinkBoundary, PassAbandoned
from flexgen.distributed.channel import Frame
from flexgen.distributed.cores import own_cores
from flexgen.distributed.figures import StageFigures
from flexgen.distributed.last_stage import LastStage
from flexgen.distributed.launch import end_with_parent
from flexgen.distributed.leader import PASS, RESULT
from flexgen.distributed.messages import for_next_stage, read_plan
from flexgen.distributed.place import place_of
from flexgen.distributed.ranks import Ranks
from flexgen.engine.runner import ModelRunner
from flexgen.errors import EngineError, FlexGenError, StageError
from flexgen.options import EngineOptions
from flexgen.plan.policy import Policy
from flexgen.session.lookup import files_of
from flexgen.session.model import ResolvedModel
from flexgen.session.prepare import Described, describe
from flexgen.session.stage_device import see_own_device
from flexgen.session.stage_facts import stage_facts
from flexgen.session.stage_group import JOB, PATIENCE_SECONDS, PROBE_BYTES, PROBE_FRAMES
from flexgen.session.stage_runner import open_stage
from flexgen.session.stage_traces import TRACE, send_trace, trace_of_stage
from flexgen.session.weights import in_weight_format

logger = logging.getLogger(__name__)

CLOSE = "close"
_OWN_WAY = (PASS, HIDDEN, "end", TRACE)  # frames that do not reach the next stage as they are
RESUMABLE = 75  # the exit code of a failure after which the same command goes on


class Stage:
    """One stage, open or not.

    Args:
        found: The model.
        rank: The rank of this stage, at least 1.
        ranks: All ranks.
    """

    def __init__(self, found: ResolvedModel, ranks: Ranks) -> None:
        self._found, self._ranks = found, ranks
        self._source = ranks.receiver(ranks.rank - 1)
        is_last = ranks.rank == ranks.size - 1
        self._onward = ranks.sender(0 if is_last else ranks.rank + 1)
        self._next, self._results = (None, self._onward) if is_last else (self._onward, None)
        self._here: Described | None = None
        self._runner: ModelRunner | None = None
        self._last: LastStage | None = None
        self._figures = StageFigures()
        self._resources = contextlib.ExitStack()
        self._actions: Mapping[str, Callable[[Frame], None]] = {
            "describe": self._describe, "probe": self._probe, "ping": self._ping, "open": self._open, PASS: self._pass,
            "figures": self._tell_figures, CLOSE: self._close, "end": self._end, TRACE: self._hand_on, HIDDEN: self._leave_out,
        }  # fmt: skip
        self._ended = self._abandoned = False
        self._ping_at = 0
        self._probes: list[float] = []
        self._rate = 0.0

    def run(self) -> None:
        """Do what the leader says until it says that this is the end.

        Raises:
            StageError: Another stage does not work any more.
            FlexGenError: This stage cannot go on.
        """
        try:
            while not self._ended:
                self._act(self._source.receive())
            self._say_goodbye()
        finally:
            self._resources.close()

    def _act(self, frame: Frame) -> None:
        """Do what a frame says, and have the stages behind this one do it."""
        if self._next is not None and frame.kind not in _OWN_WAY:
            self._next.send(frame.kind, frame.header, frame.tensors)
        self._actions[frame.kind](frame)

    def _say_goodbye(self) -> None:
        """Send this stage's trace, and have the next stage end, or the first one know that all have ended."""
        self._resources.close()
        if self._found.recorder is not None and self._found.options.trace is not None:
            self._found.end_trace()
            send_trace(Path(self._found.options.trace), self._ranks.rank, self._ping_at, self._onward)
        self._onward.send("end", {})
        self._onward.flush()

    def _end(self, frame: Frame) -> None:
        self._ended = True

    def _probe(self, frame: Frame) -> None:
        """Measure the rate of the link from the stage before, and have the next stage measure its own."""
        self._probes.append(time.perf_counter())
        if len(self._probes) == PROBE_FRAMES:
            seconds = max(self._probes[-1] - self._probes[0], 1e-9)
            self._rate, self._probes = (PROBE_FRAMES - 1) * PROBE_BYTES / seconds, []

    def _ping(self, frame: Frame) -> None:
        if (recorder := self._found.recorder) is not None:
            self._ping_at = recorder.now()
        if self._results is not None:
            self._results.send("pong", {})

    def _describe(self, frame: Frame) -> None:
        if self._here is not None:
            self._here.discard()
        self._here = here = describe(self._found, self._found.options, self._ranks.local_size)
        self._ranks.publish(f"described/{frame.header['number']}/{self._ranks.rank}", {
            "machine": json.loads(here.machine.to_json()), "limits": dataclasses.asdict(here.limits),
            "process_bytes": here.process_bytes, "bytes_per_s": self._rate,
        })  # fmt: skip

    def _open(self, frame: Frame) -> None:
        stage, number = frame.header["stages"][self._ranks.rank], frame.header["number"]
        policy, layers = dataclass_from_json(Policy, stage["policy"], "policy"), range(*stage["layers"])
        if self._here is None:
            raise EngineError("a stage was opened before it was described")
        with contextlib.ExitStack() as resources:
            resources.callback(self._here.discard)
            self._runner = open_stage(self._found, self._here, layers, policy, resources, self._found.recorder)
            self._resources.push(resources.pop_all())
        self._here = None
        self._source.on_arrival = self._runner.wake
        self._figures = StageFigures()
        self._last = LastStage(self._runner.copies) if self._results is not None else None
        self._ranks.publish(f"opened/{number}/{self._ranks.rank}", {})
        logger.info("layers %d to %d are open", layers.start, layers.stop - 1)

    def _check_wanted(self, unit: int) -> None:
        """Give up a pass whose results nobody waits for, because the leader has closed the engine."""
        if self._source.holds(CLOSE):
            raise PassAbandoned(None)

    def _pass(self, frame: Frame) -> None:
        if self._abandoned:  # the engine is about to be closed
            return
        header = frame.header
        if self._next is not None:
            self._next.send(PASS, header | {"plan": for_next_stage(header["plan"])}, frame.tensors)
        runner, plan, number = self._runner, read_plan(header["plan"]), header["pass"]
        if runner is None:
            raise EngineError(f"pass {number} came to a stage that is not open")
        runner.forget(set(header["forget"]))
        if self._last is not None:
            self._last.learn(header, frame.tensors)
        start = time.perf_counter()
        boundary = LinkBoundary(number, len(plan.micro_batches), self._source, self._next)
        try:
            with torch.no_grad():
                outputs, waits = runner.run(plan, self._check_wanted, boundary)
        except PassAbandoned as error:
            self._abandoned = True
            if error.frame is not None:
                self._act(error.frame)
            return
        self._figures.add(time.perf_counter() - start, waits)
        if self._last is not None and self._results is not None:
            with torch.no_grad():
                self._results.send(RESULT, {"pass": number, "block": header["block"], "answers": self._last.choose(plan, outputs)})

    def _tell_figures(self, frame: Frame) -> None:
        if self._runner is not None:
            self._ranks.publish(f"figures/{frame.header['asked']}/{self._ranks.rank}", self._figures.message(self._runner))

    def _close(self, frame: Frame) -> None:
        self._runner, self._last, self._abandoned = None, None, False
        self._resources.close()

    def _hand_on(self, frame: Frame) -> None:
        """Send a part of an earlier stage's trace on its way to the first."""
        self._onward.send(frame.kind, frame.header, frame.tensors)

    def _leave_out(self, frame: Frame) -> None:
        """Ignore hidden states of a pass that was given up."""


def _refer_to_leader(number: int, frame: object) -> None:
    """Say who ends the run: torchrun sends its signals to all stages, and the first one then lets the pass end."""
    logger.warning("%s: a stage ends with the first one, stage 0: stop that", signal.Signals(number).name)


def follow(ranks: Ranks, model: str, options: EngineOptions) -> int:
    """Serve as a stage until the leader ends, and return the exit code.

    Args:
        ranks: The ranks, which are closed.
        model: The folder, GGUF file or hub id of the model.
        options: The options; budgets and placements are those of this host.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _refer_to_leader)
    with contextlib.closing(ranks):
        try:
            if options.trace is not None:
                options = dataclasses.replace(options, trace=trace_of_stage(options.trace, ranks.rank))
            files = in_weight_format(files_of(model, options), options)
            found = ResolvedModel(files, options)
            found.check()
            check_agreement(ranks, stage_facts(found, ranks.size), timeout=PATIENCE_SECONDS)
            Stage(found, ranks).run()
        except StageError as error:
            sys.stderr.write(f"flexgen: {error}\n")
            return RESUMABLE
        except BaseException as error:
            ranks.abort(f"{type(error).__name__}: {error}" if not isinstance(error, FlexGenError) else str(error))
            if not isinstance(error, (FlexGenError, MemoryError, OSError)):
                raise
            sys.stderr.write(f"flexgen: {error}\n")
            return RESUMABLE
    return 0


def follow_leader(model: str, options: EngineOptions) -> int:
    """Serve as the stage that the environment names; see `follow`."""
    own_cores(place_of(os.environ))
    see_own_device(options.devices)
    return follow(Ranks.join(os.environ, options.interface, patience=PATIENCE_SECONDS), model, options)


def main() -> int:
    """Serve a leader on the same host, which says what to do."""
    end_with_parent(os.environ)
    ranks = Ranks.join(os.environ)
    job = ranks.lookup(JOB)
    return follow(ranks, job["model"], EngineOptions(**job["options"]))


if __name__ == "__main__":
    sys.exit(main())
