"""An open engine together with its plan: keeps the log of each run, and reports on the last one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

from flexgen.engine.engine import Engine
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.tell.forecast import Plan, forecast_again
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.plan.workload import Workload
from flexgen.report.pass_log import PassLog
from flexgen.report.progress import Progress, RunReport
from flexgen.report.report import RunContext, make_report
from flexgen.report.run_log import RunLog
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes


class PlannedEngine:
    """An open engine and the plan that it executes.

    Args:
        engine: The engine, with its weights loaded.
        plan: The plan that it executes.
        workload: The work that it was planned for.
        context: The facts beyond plan and engine that reports state.
        resources: The stack that closes the engine and removes the files written for it.

    Attributes:
        plan: The plan, with the forecast of the work that is expected next.
        load_seconds: The time that loading the weights took.
    """

    def __init__(self, engine: Engine, plan: Plan, workload: Workload, context: RunContext, resources: contextlib.ExitStack) -> None:
        self.plan, self.load_seconds = plan, context.load_seconds
        self._engine, self._workload, self._context, self._resources = engine, workload, context, resources

    def expect(self, workload: Workload) -> None:
        """Set the work that comes next, if it differs from the work that the engine was planned for, and forecast it."""
        self._workload = workload
        self.plan = dataclasses.replace(
            self.plan, forecast=forecast_again(self.plan.forecast, self.plan.policy, self._expectation(), workload)
        )

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
        passes = PassLog(self.plan.spec, self.plan.machine, self.plan.policy, self._engine.runner.homes)
        log = RunLog(self._engine.runner, passes, remaining=remaining, num_requests=num_requests, on_progress=on_progress)
        return self._engine.generate(requests, prefixes=prefixes, log=log, on_pass=on_pass)

    def report(self) -> RunReport:
        """Return the report on the last run."""
        runner = self._engine.runner
        return make_report(self._engine.log, self.plan, runner.placement(), runner.device_bytes(), self._context)

    def close(self) -> None:
        """Close the engine, and remove the files written for it; may be called twice."""
        self._resources.close()

    def _expectation(self) -> Expectation:
        return Expectation(self.plan.spec, self.plan.machine, self.plan.policy.dtype)
