"""Keeps an engine open from one call to the next, and replaces it when its plan no longer fits. Loads torch only to plan or open one."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
from typing import TYPE_CHECKING

from flexgen.base.steps import step
from flexgen.distributed.place import is_placed
from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.plan.formats import FormatChoice, Formats
from flexgen.plan.play.answer_lengths import expected
from flexgen.plan.policy import KV_RING_BATCHES
from flexgen.plan.price.copies import copies_bytes, longest_layer_bytes
from flexgen.plan.price.memory import activation_bytes
from flexgen.plan.price.requests import JobSizes, kv_room
from flexgen.plan.search.solve import NOMINAL_WORKLOAD
from flexgen.plan.tell.forecast import Forecast, Plan
from flexgen.plan.workload import Workload
from flexgen.session.model import ResolvedModel
from flexgen.session.weights import in_weight_format

if TYPE_CHECKING:
    from flexgen.plan.model import ModelSpec
    from flexgen.plan.policy import Policy
    from flexgen.session.planned import PlannedEngine
    from flexgen.session.stage_group import StageGroup
    from flexgen.session.staged import StagedEngine


# The approximate time of planning, in addition to loading.
PLAN_SECONDS = 5.0
# A plan for growing calls has room for a prompt, and for an answer, of at least this many tokens.
ROOM_TOKENS = 256


def plan_job(model: ResolvedModel, options: EngineOptions, workload: Workload) -> Plan:
    """Return the plan that `open_engine` would execute; no weights are read.

    Raises:
        CapacityError: A budget cannot be granted, or the budgets are too small.
        ModelError: The model cannot be served.
        OptionError: An option cannot be honoured on this machine.
    """
    step("loading PyTorch")
    from flexgen.session.prepare import prepare

    prepared = prepare(model, options, workload)
    prepared.discard()
    return prepared.plan


def choose_formats(model: ResolvedModel, options: EngineOptions, workload: Workload) -> Plan:
    """Return the plan in the formats that are best for a job, among those that the options allow; nothing is converted.

    Raises:
        CapacityError: As for `plan_job`.
        ModelError: As for `plan_job`.
        OptionError: As for `plan_job`.
    """
    step("loading PyTorch")
    from flexgen.session.formats import plan_formats

    return plan_formats(model, options, workload)


def open_engine(model: ResolvedModel, options: EngineOptions, workload: Workload) -> PlannedEngine:
    """Plan for the workload, load the model, and return the engine that serves it.

    Raises:
        CapacityError: As for `plan_job`; nothing stays open.
        ModelError: As for `plan_job`; nothing stays open.
        OptionError: As for `plan_job`; nothing stays open.
        StorageError: The trace cannot be written; nothing stays open.
    """
    step("loading PyTorch")
    from flexgen.session.planned import PlannedEngine
    from flexgen.session.prepare import prepare

    recorder = model.recorder  # its file is tried before anything is measured
    return PlannedEngine(prepare(model, options, workload), recorder)


class EngineSession:
    """At most one engine, opened when there is work and kept for as long as its plan holds.

    Args:
        model: The model that engines serve, with the options that the first one is opened with.

    Attributes:
        model: The model that engines serve; its weights are converted when their format is chosen.
        options: The options that the next engine is opened with; formats are chosen for the first work, and stay.
        engine: The open engine; None before the first work and after `close`.
    """

    def __init__(self, model: ResolvedModel) -> None:
        self.model, self.options = model, model.options
        self.engine: PlannedEngine | StagedEngine | None = None
        self._formats: FormatChoice | None = None
        self._group: StageGroup | None = None  # the other stages, once they were needed
        if has_stages(self.options) and (is_placed(os.environ) or self.options.devices is not None):
            from flexgen.session.stage_device import see_own_device

            see_own_device(self.options.devices)
        if has_stages(self.options) and is_placed(os.environ):
            self._join()  # the other ranks of torchrun wait
        self._planned = Workload(prompt_lens=(), output_lens=())  # the work that the engine was opened for
        self._hopeless = math.inf  # requests of so many tokens or more fit no plan
        self._slow_seconds = 0.0  # forecast of the jobs that another plan might have done faster
        self._max_num_seqs = 0  # of the last engine, even after it was closed

    def keep_formats(self, formats: Formats) -> None:
        """Serve in these formats, those of an earlier run, and choose no others.

        Raises:
            OptionError: The options do not allow them.
            FlexGenError: The weights cannot be converted.
        """
        if formats.weights not in self.options.choices("weight_format") or formats.kv not in self.options.choices("kv_format"):
            raise OptionError(f"{formats}, which the formats that are allowed ({self.options.allow_formats}) leave out")
        self._settle(FormatChoice(chosen=formats))

    def _settle(self, choice: FormatChoice) -> None:
        """Serve in the formats that were chosen; weights are converted now if they are not in the cache."""
        chosen = choice.chosen
        converts, changes = chosen.weights != self.options.weight_format, chosen.kv != self.options.kv_format
        options = self.options.in_formats(chosen.weights, chosen.kv)
        if converts or changes:
            self.model = ResolvedModel(in_weight_format(self.model.files, options) if converts else self.model.files, options)
        self.options, self._formats = options, choice

    def plan(self, workload: Workload) -> Plan:
        """Return the plan of the engine that `serving` would open if none were open; nothing is converted."""
        if has_stages(self.options):
            from flexgen.session.staged import plan_only

            return plan_only(self.model, self.options, workload, self._join())
        return (choose_formats if self.options.allow_formats is not None else plan_job)(self.model, self.options, workload)

    def serving(self, workload: Workload) -> PlannedEngine | StagedEngine:
        """Return the open engine if its plan serves the workload, else a fresh one.

        Raises:
            CapacityError: As for `open_engine`.
            ModelError: As for `open_engine`.
            OptionError: As for `open_engine`.
        """
        if self.engine is None:
            return self._opened(workload)
        self.engine.expect(workload)
        if self._serves(self.engine, workload):
            return self.engine
        self.close()  # a closed engine still holds its memory,
        gc.collect()  # and its hooks refer back to their modules
        if self.options.max_request_seconds is None and self.options.max_job_seconds is None:
            with contextlib.suppress(CapacityError):  # the work may still fit without the additional room
                self._opened(with_room(workload, self.model.token_limits[1])).expect(workload)
        return self.engine or self._opened(workload)

    def shrink(self) -> int | None:
        """Make the next engine keep half as many sequences alive as the last one.

        Returns:
            The new number of sequences; None if it was one already.
        """
        if self._max_num_seqs <= 1:
            return None
        self.close()
        self._max_num_seqs //= 2  # kept even if no engine can be opened with it
        self.options = dataclasses.replace(self.options, max_num_seqs=self._max_num_seqs)
        return self._max_num_seqs

    def close(self) -> None:
        """Close the engine that is open, if one is."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()

    def end(self) -> None:
        """Close the engine, and the trace, which no other engine will go on with."""
        self.close()
        self.model.end_trace()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _join(self) -> StageGroup:
        """Return the stages of the pipeline, which begin now if they have not."""
        if self._group is None:
            step("loading PyTorch")
            from flexgen.session import stage_group

            assert self.options.stages is not None
            self._group = stage_group.join_stages(self.model, self.options.stages)
        return self._group

    def _open(self, workload: Workload) -> PlannedEngine | StagedEngine:
        if not has_stages(self.options):
            return open_engine(self.model, self.options, workload)
        group = self._join()
        from flexgen.session.staged import StagedEngine

        return StagedEngine(self.model, self.options, workload, group, self.model.recorder)

    def _opened(self, workload: Workload) -> PlannedEngine | StagedEngine:
        if self.options.allow_formats is not None:
            choice = choose_formats(self.model, self.options, workload).formats
            assert choice is not None
            self._settle(choice)
        engine = self._open(workload)
        if self._formats is not None:
            engine.plan = dataclasses.replace(engine.plan, formats=self._formats)
        self.engine, self._planned, self._slow_seconds = engine, workload, 0.0
        policy = engine.plan.policy
        self._max_num_seqs = policy.max_num_seqs
        self._hopeless = min((total for total in _totals(workload) if total > policy.longest_sequence), default=math.inf)
        return engine

    def _serves(self, engine: PlannedEngine | StagedEngine, workload: Workload) -> bool:
        """Return whether the plan serves the workload and a new plan would not pay.

        A job that the plan was not made for may run slower than it could: once such jobs have taken as long as opening an engine does, a
        fresh plan is due.
        """
        policy, spec, forecast = engine.plan.policy, engine.plan.spec, engine.plan.forecast
        new, planned = (_without(each, self._hopeless) for each in (workload, self._planned))
        if not _has_room(policy, spec, planned, new) or not _keeps(forecast, self.options):
            return False
        if _binds(policy, spec, self._planned, workload, self.options):
            self._slow_seconds += forecast.seconds
        return self._slow_seconds <= PLAN_SECONDS + engine.load_seconds


def has_stages(options: EngineOptions) -> bool:
    """Return whether the model is divided into stages."""
    return options.stages is not None and options.stages > 1


def with_room(workload: Workload, max_model_len: int) -> Workload:
    """Add a request that may be twice as long as the longest, so that few plans serve growing calls; its expected answer is one token."""
    job = expected(workload)
    prompt = min(2 * max(*job.prompt_lens, ROOM_TOKENS // 2), max_model_len - 1)
    most = min(2 * max(*job.output_lens, ROOM_TOKENS // 2), max_model_len - prompt)
    return dataclasses.replace(
        job,
        prompt_lens=(*job.prompt_lens, prompt),
        output_lens=(*job.output_lens, most),
        least_lens=(*job.least_lens, 0) if job.least_lens else (),
        expected_lens=(*job.answer_lens, 1),
        reserved_lens=(*job.reserved_lens, most) if job.reserved_lens else (),
        shared_lens=(*job.shared_lens, 0) if job.shared_lens else (),
        scored_lens=(*job.scored_lens, 2 * max(job.scored_lens)) if job.scored_lens else (),
    )


def _totals(workload: Workload) -> list[int]:
    """Return the most tokens of each request, prompt and answer together."""
    return [prompt + most for prompt, most in zip(workload.prompt_lens, workload.output_lens, strict=True)]


def _without(workload: Workload, hopeless: float) -> Workload:
    """Return the requests with fewer tokens than `hopeless`, for which a plan makes room."""
    totals = _totals(workload)
    return workload if max(totals, default=0) < hopeless else workload.take([i for i, total in enumerate(totals) if total < hopeless])


def _has_room(policy: Policy, spec: ModelSpec, planned: Workload, new: Workload) -> bool:
    """Return whether every request fits a pool, and activations and copies the memory reserved for them."""
    if not len(new):
        return True
    known, wanted = (JobSizes(spec, each, policy.page_tokens) for each in (planned if len(planned) else NOMINAL_WORKLOAD, new))
    if wanted.longest > known.longest and wanted.largest > max(kv_room(spec, policy).values()):
        return False  # a sequence's KV has one home
    if policy.kv_ring_bytes and KV_RING_BATCHES * longest_layer_bytes(spec, wanted, policy.page_tokens) > policy.kv_ring_bytes:
        return False
    copies = zip(copies_bytes(spec, wanted, policy), copies_bytes(spec, known, policy), strict=True)
    return activation_bytes(spec, wanted, policy) <= activation_bytes(spec, known, policy) and all(new <= old for new, old in copies)


def _keeps(forecast: Forecast, options: EngineOptions) -> bool:
    """Return whether the forecast keeps the bounds on time."""
    request_bound, job_bound = options.max_request_seconds or math.inf, options.max_job_seconds or math.inf
    return forecast.request_seconds <= request_bound and forecast.seconds <= job_bound


def _binds(policy: Policy, spec: ModelSpec, planned: Workload, new: Workload, options: EngineOptions) -> bool:
    """Return whether limits that came from the planned work, not from the budgets, keep the new work from being done together."""

    def block_bytes(workload: Workload) -> int:
        return min(len(workload), policy.max_num_seqs) * spec.kv_bytes(max(_totals(workload), default=0))

    if options.max_num_seqs is None and len(planned) <= policy.max_num_seqs < len(new):
        return True
    return block_bytes(planned) <= sum(kv_room(spec, policy).values()) < block_bytes(new)
