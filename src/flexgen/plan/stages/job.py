"""A job on several machines, which are the stages of a pipeline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.stages.pipeline import LinkRate
from flexgen.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMachine:
    """The machine of a stage.

    Attributes:
        machine: Its rates.
        limits: Its budgets.
        process_bytes: The resident memory of the stage's process before any weight is loaded.
    """

    machine: Machine
    limits: Limits
    process_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedJob:
    """A model and a job for several machines.

    Attributes:
        options: The options, which hold for every stage; numbers of sequences and tokens are those of a pass, and bounds on time those of
            the whole. `dtype` must be a concrete dtype, and `device` is taken from the machines' limits.
        spec: The whole model.
        machines: The machine of each stage, in order.
        workload: The requests.
        link: The link between a stage and the next, and from the last one back.
        cut_points: The layers at which stages may begin; None for all.
    """

    options: EngineOptions
    spec: ModelSpec
    machines: tuple[StageMachine, ...]
    workload: Workload
    link: LinkRate
    cut_points: tuple[int, ...] | None = None

    @property
    def num_stages(self) -> int:
        return len(self.machines)

    def without_kv_on_disk(self) -> StagedJob:
        """Return the same job with no room for KV on any disk."""
        dry = [dataclasses.replace(each, limits=dataclasses.replace(each.limits, disk_bytes=0)) for each in self.machines]
        return dataclasses.replace(self, machines=tuple(dry))
