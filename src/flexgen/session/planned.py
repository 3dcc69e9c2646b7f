"""An open engine together with its plan: opens it, keeps the log of each run, and reports on the last one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flexgen.base.recorder import Recorder
from flexgen.base.steps import step
from flexgen.engine.steady import SteadyEngine
from flexgen.errors import EngineError
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.search.ideal import budgets_of
from flexgen.plan.tell.forecast import forecast_again
from flexgen.plan.tell.middle import find_middle
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.plan.workload import Workload
from flexgen.profile.check import MachineCheck
from flexgen.report.progress import Progress, RunReport
from flexgen.report.report import RunContext, make_report
from flexgen.report.steady import MeasuredPass, SteadyReport, make_steady_report
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.session.opening import limited_device, offload_folder
from flexgen.session.prepare import Prepared
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

logger = logging.getLogger(__name__)

# From this expected duration of a job on, the brief check of the machine before and after it costs little in comparison.
CHECKED_SECONDS = 5.0


class PlannedEngine:
    """The engine that executes a plan, opened with its resident weights loaded.

    Args:
        prepared: The plan and the model.
        recorder: The recorder of the trace; None without one.

    Attributes:
        plan: The plan, with the forecast of the work that is expected next.
        load_seconds: The time that loading the weights took.

    Raises:
        CapacityError: There is not enough memory; nothing stays open.
        StorageError: No offload folder can be made; nothing stays open.
    """

    def __init__(self, prepared: Prepared, recorder: Recorder | None = None) -> None:
        step("loading weights")
        self.plan, self._workload = prepared.plan, prepared.workload
        with contextlib.ExitStack() as resources:
            resources.callback(prepared.discard)
            prepared.write_weights()
            check = _machine_check(prepared) if prepared.device is None else None
            self._clock = None if prepared.device is None else prepared.device.clock
            start = time.perf_counter()
            self._engine = _opened(prepared, resources, recorder)
            self._engine.load()
            self.load_seconds = time.perf_counter() - start
            logger.info("loaded in %.1f s", self.load_seconds)
            self._context = RunContext(
                load_seconds=self.load_seconds,
                budgets=budgets_of(prepared.limits, self.plan.spec, prepared.process_bytes),
                check=check.end if check is not None else None,
                overlapping=prepared.overlap,
            )
            self._resources = resources.pop_all()

    def expect(self, workload: Workload) -> None:
        """Set the work that comes next, and forecast it if it differs from the work expected so far."""
        if workload != self._workload:
            forecast = forecast_again(self.plan.forecast, self.plan.policy, self._expectation(), workload)
            self.plan, self._workload = dataclasses.replace(self.plan, forecast=forecast), workload

    def generate(
        self,
        requests: Iterable[TokenRequest],
        *,
        num_requests: int | None = None,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Answer requests, as `Engine.generate` does.

        Args:
            requests: As for `Engine.generate`.
            num_requests: The number of requests, if it is known.
            prefixes: As for `Engine.generate`.
            on_progress: Called now and then with the progress of the run.
            on_pass: As for `Engine.generate`.
        """
        remaining = RemainingTime(self.plan.forecast, self.plan.policy, self._expectation(), self._workload)
        log = self._engine.new_log(self.plan.machine, remaining=remaining, num_requests=num_requests, on_progress=on_progress)
        return self._engine.generate(requests, prefixes=prefixes, log=log, on_pass=on_pass)

    def report(self) -> RunReport:
        """Return the report on the last run."""
        runner = self._engine.runner
        return make_report(self._engine.log, self.plan, runner.placement(), runner.device_bytes(), self._context)

    def steady(
        self,
        requests: Iterable[TokenRequest],
        *,
        num_warmup: int,
        num_passes: int,
        seed: int,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> SteadyReport:
        """Measure passes in the middle of the job that the plan was made for; those before it are not computed.

        Args:
            requests: The requests of the job, without common prefixes; they are pulled as they are needed.
            num_warmup: The number of passes that are computed before those that count.
            num_passes: The number of passes that count.
            seed: The seed of what stands for the tokens, keys and values that were not computed.
            on_progress: Called now and then with the progress of the passes.

        Raises:
            OptionError: The job has fewer passes between its beginning and its end.
            StorageError: Something could not be read or written.
            EngineError: The engine cannot continue, or has fewer passes to make than planned.
        """
        middle = find_middle(self.plan, self._workload, num_passes, num_before=num_warmup)
        num_skipped = middle.first - num_warmup
        step(f"going through {num_skipped} passes without computing them, and filling the KV cache")
        start = time.perf_counter()
        with self._engine.middle(requests, num_skipped=num_skipped, seed=seed) as run_pass:
            prepare_seconds = time.perf_counter() - start
            if self._clock is not None:
                self._clock.start()
            warmup = self._measured(run_pass, num_warmup, on_progress)
            passes = self._measured(run_pass, num_passes, on_progress)
            if len(passes) < num_passes:
                raise EngineError(f"the job was over after {len(passes)} of {num_passes} passes, earlier than planned: raise num_prompts")
            report = self.report()
        return make_steady_report(
            report, self.plan, self._workload, self._context.budgets, middle,
            num_skipped=num_skipped, prepare_seconds=prepare_seconds, warmup=warmup, passes=passes,
        )  # fmt: skip

    def _measured(self, run_pass: Callable[[], bool], count: int, on_progress: Callable[[Progress], None] | None) -> list[MeasuredPass]:
        """Run so many passes, which have a log of their own."""
        self._engine.log = log = self._engine.new_log(self.plan.machine, on_progress=on_progress)
        passes: list[MeasuredPass] = []
        now = self._engine.runner.now
        end, moved = now(), log.bytes_moved()
        while len(passes) < count and run_pass():
            start, before = end, moved
            end, moved = now(), log.bytes_moved()
            passes.append(MeasuredPass.of(log.passes.last, end - start, {link: moved[link] - before[link] for link in moved}))
        log.over()
        return passes

    def close(self) -> None:
        """Close the engine, and remove the files written for it; may be called twice."""
        self._resources.close()

    def _expectation(self) -> Expectation:
        return Expectation(self.plan.spec, self.plan.machine, self.plan.policy.dtype)


def _opened(prepared: Prepared, resources: contextlib.ExitStack, recorder: Recorder | None) -> SteadyEngine:
    """Return an engine without weights; `resources` closes it and removes its offload folder."""
    limits, policy = prepared.limits, prepared.plan.policy
    offload_dir, backend = offload_folder(policy, limits, resources), limited_device(limits, prepared.device)
    engine = SteadyEngine(
        prepared.model, policy, backend=backend, offload_dir=offload_dir, verify_reads=prepared.verify_reads, overlap=prepared.overlap,
        recorder=recorder,
    )  # fmt: skip
    resources.callback(engine.close)
    return engine


def _machine_check(prepared: Prepared) -> MachineCheck | None:
    """Start measuring how fast the machine is now; return None for a short job."""
    policy, layouts, seconds = prepared.plan.policy, prepared.model.layouts, prepared.plan.forecast.seconds
    if seconds < CHECKED_SECONDS:
        return None
    streams = policy.weights.disk and prepared.random_weights is None  # random files have holes, which say nothing of a disk
    files = {extent.path for layout in layouts for extent in layout.extents} if streams else set[Path]()
    check = MachineCheck(
        machine=prepared.plan.machine, device=policy.device, dtype=policy.dtype, max_bytes=policy.workspace_bytes,
        job_seconds=seconds, weights=max(files, key=lambda path: path.stat().st_size, default=None),
    )  # fmt: skip
    check.start()
    return check
