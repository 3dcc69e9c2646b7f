"""An open engine whose model is divided into stages on several ranks, of which this is the first, together with its plan."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from flexgen.base.recorder import Recorder
from flexgen.base.steps import step
from flexgen.distributed.leader import StagePipeline
from flexgen.engine.pipeline import PipelineEngine
from flexgen.errors import OptionError
from flexgen.kv.lanes import StageKV, lanes_of
from flexgen.kv.pages import group_layers
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits, machine_of
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.search.ideal import budgets_of
from flexgen.plan.stages.divide import divide
from flexgen.plan.stages.job import StagedJob, StageMachine
from flexgen.plan.stages.pipeline import LinkRate
from flexgen.plan.stages.plans import StagePlan, StagesPlan, again
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport, StageReport
from flexgen.report.report import RunContext, make_report
from flexgen.report.stages import format_stages
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.session.model import ResolvedModel
from flexgen.session.prepare import Described, describe
from flexgen.session.stage_group import StageGroup
from flexgen.session.stage_runner import open_stage
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

logger = logging.getLogger(__name__)


class StagedEngine:
    """The engine that executes the plans of all stages, opened with its resident weights loaded on each.

    It has the interface of `PlannedEngine`.

    Args:
        found: The model.
        options: The options of the engine.
        workload: The work to plan for.
        group: The stages.
        recorder: The recorder of the trace; None without one.

    Attributes:
        plan: The plan of the first stage, with the forecast of all.
        stages: The plans of all stages.
        load_seconds: The time that loading the weights took.

    Raises:
        CapacityError: There is not enough memory; nothing stays open.
        ModelError: The model cannot be divided; nothing stays open.
        StageError: A stage does not work any more.
    """

    def __init__(
        self, found: ResolvedModel, options: EngineOptions, workload: Workload, group: StageGroup, recorder: Recorder | None = None
    ) -> None:
        self._group, self._workload = group, workload
        self._num_reports = 0
        with contextlib.ExitStack() as resources:
            here, self.stages = plan_stages(found, options, workload, group)
            self._number, group.num_opened = group.num_opened, group.num_opened + 1
            resources.callback(here.discard)
            first = self.stages.stages[0]
            self.plan = _as_one(self.stages)
            step("loading weights")
            start = time.perf_counter()
            group.tell("open", {"number": self._number, "stages": [_stage_message(each) for each in self.stages.stages]})
            resources.callback(self._close_followers)
            whole = here.model
            runner = open_stage(found, here, first.layers, first.plan.policy, resources, recorder)
            group.gather(f"opened/{self._number}")
            self.load_seconds = time.perf_counter() - start
            lanes = lanes_of([
                StageKV(
                    groups=group_layers(
                        [each for each in whole.layers if each.layer in stage.layers], stage.plan.policy.page_tokens, whole.kv_format
                    ),
                    policy=stage.plan.policy,
                )
                for stage in self.stages.stages
            ])  # fmt: skip
            self._pipeline = StagePipeline(runner, lanes, len(self.stages.stages), group.to_next, group.from_last)
            group.from_last.on_arrival = runner.wake
            self._engine = PipelineEngine(runner, lanes, self._pipeline)
            self._context = RunContext(
                load_seconds=self.load_seconds,
                budgets=budgets_of(here.limits, first.plan.spec, here.process_bytes),
                overlapping=options.overlap,
            )
            self._resources = resources.pop_all()
        logger.info("loaded in %.1f s", self.load_seconds)

    def expect(self, workload: Workload) -> None:
        """Set the work that comes next, and forecast it if it differs from the work expected so far."""
        if workload != self._workload:
            self.stages, self._workload = again(self.stages, workload), workload
            self.plan = _as_one(self.stages)

    def generate(
        self,
        requests: Iterable[TokenRequest],
        *,
        num_requests: int | None = None,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Answer requests; the arguments are those of `PlannedEngine.generate`."""
        remaining = RemainingTime(self.plan.forecast, self.plan.policy, self._expectation(), self._workload)
        log = self._engine.new_log(self.plan.machine, remaining=remaining, num_requests=num_requests, on_progress=on_progress)
        return self._engine.generate(requests, prefixes=prefixes, log=log, on_pass=on_pass)

    def report(self) -> RunReport:
        """Return the report on the last run."""
        runner = self._engine.runner
        self._num_reports += 1
        asked = f"{self._number}/{self._num_reports}"
        self._group.tell("figures", {"asked": asked})
        figures = [self._pipeline.figures.message(runner), *self._group.gather(f"figures/{asked}")]
        report = make_report(self._engine.log, self.plan, self._engine.placement(), runner.device_bytes(), self._context)
        stages = stage_reports(self.stages, figures, self._group.ranks.hosts, report.elapsed_seconds)
        return dataclasses.replace(report, stages=stages)

    def steady(self, *_: object, **__: object) -> NoReturn:
        """Refuse to measure passes in the middle of a job.

        Raises:
            OptionError: Always.
        """
        raise OptionError("passes in the middle of a job are measured on one machine: leave out stages")

    def close(self) -> None:
        """Close the engine on all stages, and remove the files written for it; may be called twice."""
        self._resources.close()

    def _close_followers(self) -> None:
        with contextlib.suppress(Exception):  # a stage that does not work closes nothing
            self._group.tell("close", {"number": self._number})

    def _expectation(self) -> Expectation:
        return Expectation(self.plan.spec, self.plan.machine, self.plan.policy.dtype)


def plan_stages(found: ResolvedModel, options: EngineOptions, workload: Workload, group: StageGroup) -> tuple[Described, StagesPlan]:
    """Return the model and the machine as the first stage sees them, and the plans of all stages.

    Raises:
        CapacityError: A stage does not fit its machine.
        ModelError: The model cannot be divided.
        StageError: A stage does not work any more.
    """
    group.probe()
    number, group.num_described = group.num_described, group.num_described + 1
    group.tell("describe", {"number": number})
    here = describe(found, options, group.ranks.local_size)
    try:
        others = group.gather(f"described/{number}")
        link_latency = group.ping_seconds()
        step("choosing a plan")
        first = StageMachine(machine=here.machine, limits=here.limits, process_bytes=here.process_bytes)
        stages = divide(StagedJob(
            options=here.options, spec=here.model.spec, machines=(first, *map(_stage_machine, others)), workload=workload,
            link=LinkRate(bytes_per_s=min(each["bytes_per_s"] for each in others), latency_s=link_latency),
            cut_points=here.model.cut_points,
        ))  # fmt: skip
    except BaseException:
        here.discard()
        raise
    return here, stages


def _stage_machine(described: Mapping[str, Any]) -> StageMachine:
    """Return the machine that a follower described."""
    return StageMachine(
        machine=machine_of(described["machine"]), limits=Limits(**described["limits"]), process_bytes=described["process_bytes"]
    )


def _stage_message(stage: StagePlan) -> dict[str, Any]:
    return {"layers": [stage.layers.start, stage.layers.stop], "policy": dataclasses.asdict(stage.plan.policy)}


def stage_reports(stages: StagesPlan, figures: Sequence[Mapping[str, Any]], hosts: Sequence[str], elapsed: float) -> list[StageReport]:
    """Return what each stage was planned to do, and what it did.

    Args:
        stages: The plans.
        figures: The figures of each stage (see `StageFigures`).
        hosts: The host of each stage.
        elapsed: The seconds of the run.
    """
    found: list[StageReport] = []
    for host, stage, told in zip(hosts, stages.stages, figures, strict=True):
        seconds = told["seconds"] - told["waits"].get("link", 0.0)
        found.append(StageReport(
            host=host, first_layer=stage.layers.start, num_layers=len(stage.layers), bound_by=stage.bound_by,
            planned_pass_seconds=stage.seconds_per_pass, passes=told["passes"], pass_seconds=seconds / max(told["passes"], 1),
            busy_share=seconds / max(elapsed, 1e-9), waits=told["waits"], bytes_moved=told["bytes_moved"],
        ))  # fmt: skip
    return found


def plan_only(found: ResolvedModel, options: EngineOptions, workload: Workload, group: StageGroup) -> Plan:
    """Return the plan of the first stage, with the forecast of all; no weights are read."""
    here, stages = plan_stages(found, options, workload, group)
    here.discard()
    return _as_one(stages)


def _as_one(stages: StagesPlan) -> Plan:
    """Return the plan of the first stage with the forecast of all, which is told in the words of all."""
    return dataclasses.replace(stages.stages[0].plan, forecast=stages.forecast, told=format_stages(stages, None))
