"""`flexgen plan` for several machines, which are the stages of a pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.base.quantities import parse_link
from flexgen.base.steps import step
from flexgen.cli.spelling import in_flags
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.plan.machine import has_device_tier

if TYPE_CHECKING:
    from flexgen.plan.machine import Limits, Machine
    from flexgen.plan.model import ModelSpec
    from flexgen.plan.stages.job import StagedJob
    from flexgen.plan.stages.more import OneMore
    from flexgen.plan.stages.plans import StagesPlan
    from flexgen.plan.workload import Workload

_PANEL = "Several machines (docs/plans.md)"
DEFAULT_LINK = "10Gbit,0.1ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The flags of a plan for several machines, besides --stages: so many like --machine, or like this one."""

    machines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE,...", help="The machine of each stage, as for --machine, in order; t4-gcp*4 is four.", rich_help_panel=_PANEL
        ),
    ] = None
    link: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,LATENCY",
            help=f"Between neighbouring stages, such as 1Gbit,10ms or 125MB/s,0.1ms. Default: {DEFAULT_LINK}.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def is_asked_for(self, options: EngineOptions) -> bool:
        """Return whether the plan is one for several machines."""
        return self.machines is not None or options.stages is not None

    def names(self, machine: str | None, stages: int | None) -> list[str | None]:
        """Return the name of each stage's machine; None for this one.

        Raises:
            OptionError: The flags contradict each other, or a name is none.
        """
        from flexgen.plan.known.machines import machine_names

        if self.machines is None:
            return [machine] * (stages or 1)
        if machine is not None:
            raise OptionError("--machine is one machine and --machines are all stages: leave out one of them")
        names = machine_names(self.machines)
        if stages not in (None, len(names)):
            raise OptionError(f"--stages {stages}: --machines names {len(names)}; leave out --stages")
        return [*names]


def check(pipeline: Pipeline, options: EngineOptions, *, pareto: bool) -> None:
    """Refuse what has no meaning for several machines, or for one.

    Raises:
        OptionError: Something is asked for that is not.
    """
    if not pipeline.is_asked_for(options):
        if pipeline.link is not None:
            raise OptionError("--link is between stages: give --machines or --stages as well")
    elif pareto:
        raise OptionError("--pareto compares plans of one machine: leave it out, or --machines and --stages")
    elif options.allow_formats is not None:
        raise OptionError("allow_formats: a plan of several stages is made for given formats; give --weight-format and --kv-format instead")


def told(
    model: str,
    options: EngineOptions,
    machine: str | None,
    pipeline: Pipeline,
    workload_of: Callable[[int], Workload],
    *,
    as_json: bool,
) -> str:
    """Return the plan of several stages as text or JSON; `workload_of` makes the workload from the model's context."""
    from flexgen.plan.known.machines import PROCESS_BYTES, beside_checkpoint
    from flexgen.plan.stages.divide import divide
    from flexgen.plan.stages.job import StagedJob, StageMachine
    from flexgen.plan.stages.more import one_more
    from flexgen.plan.stages.pipeline import LinkRate
    from flexgen.report.stages import format_stages

    rate, latency = parse_link(DEFAULT_LINK if pipeline.link is None else pipeline.link, name="--link")
    names = pipeline.names(machine, options.stages)
    option = "machine" if pipeline.machines is None else "machines"
    known = {name: _limits_and_machine(options, name, option) for name in dict.fromkeys(names)}
    limits = {name: each for name, (each, _) in known.items()}
    device = next((each.device for each in limits.values() if has_device_tier(each.device)), "cpu")
    step(f"reading config and headers of {model}")
    spec = _spec_of(model, options, device, [box for _, box in known.values()])
    boxes = {name: box or _measured(each, spec, model) for name, (each, box) in known.items()}
    # Each machine has the files of its own layers.
    beside = {
        name: each if name is None else beside_checkpoint(each, spec.checkpoint_bytes // len(names), options)
        for name, each in limits.items()
    }
    context = min(spec.max_position_embeddings, options.max_model_len or spec.max_position_embeddings)
    machines = {
        name: StageMachine(machine=boxes[name], limits=beside[name], process_bytes=PROCESS_BYTES[each.device])
        for name, each in limits.items()
    }
    job = StagedJob(
        options=dataclasses.replace(options, dtype=spec.dtype), spec=spec, machines=tuple(machines[name] for name in names),
        workload=workload_of(context), link=LinkRate(bytes_per_s=rate, latency_s=latency),
    )  # fmt: skip
    step("choosing a plan")
    plan = divide(job)
    more = one_more(plan, job)
    if as_json:
        return _as_json(plan, job, more)
    counts = {name: names.count(name) for name in boxes}
    called = ", ".join(boxes[name].name + (f" * {number}" if number > 1 else "") for name, number in counts.items())
    return in_flags(f"{spec.name} on {called}\n{format_stages(plan, more)}")


def _as_json(plan: StagesPlan, job: StagedJob, more: OneMore | None) -> str:
    stages = [
        {
            "layers": [stage.layers.start, stage.layers.stop],
            "machine": json.loads(stage.plan.machine.to_json()),
            "limits": {**dataclasses.asdict(given.limits), "host_source": in_flags(given.limits.host_source)},
            "policy": dataclasses.asdict(stage.plan.policy),
            "forecast": dataclasses.asdict(stage.plan.forecast),
            "bound_by": stage.bound_by,
            "seconds_per_pass": stage.seconds_per_pass,
            "busy_share": stage.busy_share,
        }
        for stage, given in zip(plan.stages, job.machines, strict=True)
    ]
    values = {
        "model": {"name": job.spec.name, "number_format": job.spec.number_format},
        "link": dataclasses.asdict(plan.link),
        "forecast": dataclasses.asdict(plan.forecast),
        "bound_by": plan.bound_by,
        "bubble_share": plan.bubble_share,
        "round_trip_seconds": plan.round_trip_seconds,
        "stages": stages,
        "one_more": None if more is None else dataclasses.asdict(more),
    }
    return json.dumps(values, indent=2)


def _limits_and_machine(options: EngineOptions, name: str | None, option: str) -> tuple[Limits, Machine | None]:
    """Return the budgets on a machine, and the machine if it is not this one."""
    if name is None:
        from flexgen.profile.limits import find_limits

        return find_limits(options), None
    from flexgen.plan.known.machines import find_machine, limits_of

    machine = find_machine(name, option)
    return limits_of(machine, options), machine


def _spec_of(model: str, options: EngineOptions, device: str, boxes: Sequence[Machine | None]) -> ModelSpec:
    """Return the model in a dtype that all machines have units for."""
    from flexgen.session.dtypes import has_bfloat16
    from flexgen.session.lookup import spec_of

    bfloat16 = all(has_bfloat16(device) if box is None else box.has_bfloat16 for box in boxes)
    return spec_of(model, options, device=device, bfloat16=bfloat16)


def _measured(limits: Limits, spec: ModelSpec, model: str) -> Machine:
    """Return this machine, which is measured now unless its rates are kept."""
    from flexgen.profile.kept import cached_machine

    folder = Path(model) if Path(model).is_dir() else Path()
    return cached_machine(limits.device, spec.dtype, folder, formats=spec.decoded_from, sparse=spec.sparse_attention)
