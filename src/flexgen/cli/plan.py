"""`flexgen plan`: forecasts a job on this machine or another, without running it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.base.steps import step
from flexgen.cli import plan_answer, plan_stages
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import engine_command, takes
from flexgen.cli.reading import Reading, check_source, lengths_of
from flexgen.cli.terminal import showing
from flexgen.errors import CapacityError, OptionError
from flexgen.options import ALLOWABLE_FORMATS, EngineOptions
from flexgen.plan.machine import int8_name

if TYPE_CHECKING:
    from flexgen.plan.formats import Formats
    from flexgen.plan.machine import Limits, Machine
    from flexgen.plan.model import ModelSpec
    from flexgen.plan.search.space import Space
    from flexgen.plan.tell.forecast import Plan
    from flexgen.plan.tell.formats import FormatGain
    from flexgen.plan.workload import Workload

logger = logging.getLogger(__name__)

_JOB = "The job"
PROMPT_LEN, GEN_LEN, NUM_REQUESTS = 512, 128, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The flags of a job of many equal requests."""

    prompt_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Tokens of each prompt. Default: {PROMPT_LEN}, or what fits the context.", rich_help_panel=_JOB
        ),
    ] = None
    prefix_len: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Tokens that all prompts begin with. Default: 0.", rich_help_panel=_JOB)
    ] = None
    gen_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Tokens of each answer. Default: {GEN_LEN}, or a quarter of the context.", rich_help_panel=_JOB
        ),
    ] = None
    num_requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"How many. Default: {NUM_REQUESTS:,}.", rich_help_panel=_JOB)
    ] = None

    def given(self) -> list[str]:
        """Return the flags that were given."""
        names = (field.name for field in dataclasses.fields(self))
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A job on a machine, in any dtype; `box` is the machine, or None for this one."""

    model: str
    options: EngineOptions
    limits: Limits
    box: Machine | None
    workload: Workload

    def machine(self, spec: ModelSpec) -> Machine:
        """Return the machine; this one is measured now unless its rates are kept."""
        if self.box is not None:
            return self.box
        from flexgen.profile.kept import cached_machine

        return cached_machine(self.limits.device, spec.dtype, self._weights_folder, formats=spec.decoded_from, sparse=spec.sparse_attention)

    def job_in(self, formats: Formats, spec: ModelSpec) -> dict[str, Any]:
        """Return the arguments of `make_plan` for the model in certain formats."""
        return dataclasses.replace(self, options=self.options.in_formats(formats.weights, formats.kv)).job(spec, self.machine(spec))

    def left_to_convert(self, formats: Formats, spec: ModelSpec) -> float:
        """Return the share of a conversion that is still to be done: all of it, unless the model and the machine are here."""
        if formats.weights == self.options.weight_format:
            return 0.0
        if self.box is not None or not Path(self.model).is_dir():
            return 1.0
        from flexgen.hub.resolve import resolve_model
        from flexgen.quantize.cache import conversion_left
        from flexgen.quantize.settings import QuantizeSettings

        return conversion_left(resolve_model(self.model, with_weights=False), QuantizeSettings(weight_format=formats.weights))

    def job(self, spec: ModelSpec, machine: Machine) -> dict[str, Any]:
        """Return the arguments of `make_plan` and `space_of`."""
        from flexgen.plan.known.machines import PROCESS_BYTES

        options = dataclasses.replace(self.options, dtype=spec.dtype, device=self.limits.device)
        given = {"options": options, "spec": spec, "machine": machine, "limits": self.limits, "workload": self.workload}
        return given | {"process_bytes": PROCESS_BYTES[self.limits.device]}

    def plan_in(self, dtype: str) -> Plan | None:
        """Return the plan in another dtype; None where the machine was not measured in it, or nothing fits the budgets."""
        from flexgen.plan.tell.forecast import make_plan

        machine = self.box or self._kept(dtype)
        needed = dtype if self.options.cpu_compute == "auto" else int8_name(dtype)
        if machine is None or dtype not in machine.dense or needed not in machine.dense:
            return None
        spec = _spec_of(self.model, dataclasses.replace(self.options, dtype=dtype), self.limits.device)
        try:
            return make_plan(**self.job(spec, machine))
        except CapacityError:
            return None

    def _kept(self, dtype: str) -> Machine | None:
        from flexgen.profile.kept import kept_machine

        return kept_machine(self.limits.device, dtype, self._weights_folder)

    @property
    def _weights_folder(self) -> Path:
        """The folder from which weights stream; the current folder if the model is not a local folder."""
        return Path(self.model) if Path(self.model).is_dir() else Path()


@engine_command
@takes("lengths", Lengths)
@takes("reading", Reading)
@takes("pipeline", plan_stages.Pipeline)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a GGUF file, a hub id (of which config and headers are read), or a name such as opt-175b."
        ),
    ],
    options: EngineOptions,
    lengths: Lengths,
    reading: Reading,
    pipeline: plan_stages.Pipeline,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A known machine (t4-gcp), or a file: of `flexgen profile -o`, or a few figures. Default: this one."
        ),
    ] = None,
    source: Annotated[Path | None, typer.Option("--input", metavar="FILE", help="Requests, as for `flexgen run`.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also show what shorter requests would cost.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON: model, machine, limits, policy, forecast, formats, faster_format, other_formats, pareto if asked for; of "
            "several machines model, link, forecast, bound_by, bubble_share, round_trip_seconds, stages, one_more.",
        ),
    ] = False,
) -> int:
    """Show how long a job would take, and what decides that.

    Where weights and KV cache would live, how fast it would go, and what
    would help. Nothing is run, and no weights are read.
    """
    if options.trace is not None:
        raise OptionError("a plan runs nothing that could be traced: leave out --trace")
    if source is not None and lengths.given():
        raise OptionError(f"the lengths come from --input: leave out {lengths.given()[0]}")
    plan_stages.check(pipeline, options, pareto=pareto)
    check_source(source, reading)

    def workload_of(context: int) -> Workload:
        return _equal_lengths(lengths, context, options) if source is None else lengths_of(source, reading, model, options)

    with showing("auto"):
        if pipeline.is_asked_for(options):
            told = plan_stages.told(model, options, machine, pipeline, workload_of, as_json=as_json)
        else:
            told = _told(model, options, machine, workload_of, pareto=pareto, as_json=as_json)
    print(told)
    return ExitCode.ALL_ANSWERED


def _told(
    model: str, options: EngineOptions, machine: str | None, workload_of: Callable[[int], Workload], *, pareto: bool, as_json: bool
) -> str:
    """Return the plan as text or JSON; `workload_of` makes the workload from the model's context."""
    from flexgen.plan.known.machines import beside_checkpoint
    from flexgen.plan.search.solve import space_of
    from flexgen.plan.tell.alternatives import faster_dtype
    from flexgen.plan.tell.alternatives import pareto as curve_of
    from flexgen.plan.tell.formats import jobs_in_formats, plan_in_formats, specs_of

    limits, box = _limits_and_machine(options, machine)
    step(f"reading config and headers of {model}")
    bfloat16 = _has_bfloat16(limits.device, box)
    spec, specs = specs_of(options, lambda asked: _spec_of(model, asked, limits.device, bfloat16=bfloat16))
    if options.dtype == "auto" and not bfloat16 and (spec.dtype, spec.number_format) == ("float16", "bfloat16"):
        from flexgen.session.dtypes import without_bfloat16

        logger.warning(without_bfloat16("this GPU" if box is None else box.name))
    if box is not None:
        limits = beside_checkpoint(limits, spec.checkpoint_bytes, options)
    context = min(spec.max_position_embeddings, options.max_model_len or spec.max_position_embeddings)
    question = _Question(model=model, options=options, limits=limits, box=box, workload=workload_of(context))
    jobs = jobs_in_formats(spec, specs, question.job_in, question.left_to_convert)
    step("choosing a plan")
    plan = plan_in_formats(jobs)
    assert plan.formats is not None
    chosen = plan.formats.chosen
    job, question = jobs[chosen].arguments, dataclasses.replace(question, options=options.in_formats(chosen.weights, chosen.kv))
    answer = plan_answer.Answer(
        plan=plan,
        limits=limits,
        allowed=options.allow_formats,
        faster=faster_dtype(plan, question.plan_in),
        others=_gains(plan, space_of(**job), options, lambda spec: space_of(**dict(job, spec=spec))),
        curve=curve_of(space_of(**job)) if pareto else [],
    )
    return plan_answer.as_json(answer) if as_json else plan_answer.as_text(answer)


def _gains(plan: Plan, space: Space, options: EngineOptions, space_of: Callable[[ModelSpec], Space]) -> list[FormatGain]:
    """Return what formats that are neither allowed nor asked for would gain beside those of the plan."""
    from flexgen.plan.tell.formats import format_gains

    names = [
        name
        for name, (option, value) in ALLOWABLE_FORMATS.items()
        if value not in options.choices(option) and (option != "weight_format" or options.load_format != "dummy")
    ]
    return format_gains(plan, space, names, space_of)


def _spec_of(model: str, options: EngineOptions, device: str, *, bfloat16: bool = True) -> ModelSpec:
    from flexgen.session.lookup import spec_of

    return spec_of(model, options, device=device, bfloat16=bfloat16)


def _has_bfloat16(device: str, box: Machine | None) -> bool:
    """Return whether a machine, or this one, has units for bfloat16."""
    if box is not None:
        return box.has_bfloat16
    from flexgen.session.dtypes import has_bfloat16

    return has_bfloat16(device)


def _limits_and_machine(options: EngineOptions, name: str | None) -> tuple[Limits, Machine | None]:
    """Return the budgets, and the machine if it is not this one."""
    if name is None:
        from flexgen.profile.limits import find_limits

        return find_limits(options), None
    from flexgen.plan.known.machines import find_machine, limits_of

    machine = find_machine(name)
    return limits_of(machine, options), machine


def _equal_lengths(asked: Lengths, context: int, options: EngineOptions) -> Workload:
    from flexgen.plan.policy import PAGE_TOKENS
    from flexgen.plan.workload import Workload

    answer = asked.gen_len or min(GEN_LEN, context // 4)
    prompt, number = asked.prompt_len or min(PROMPT_LEN, max(context - answer, 1)), asked.num_requests or NUM_REQUESTS
    if prompt + answer > context:
        raise OptionError(f"--prompt-len {prompt} and --gen-len {answer} exceed the context of {context}")
    prefix = asked.prefix_len or 0
    if prefix > prompt:
        raise OptionError(f"--prefix-len {prefix} is more than a prompt has (--prompt-len {prompt})")
    shared = prefix // PAGE_TOKENS * PAGE_TOKENS if options.prefix_sharing else 0  # in whole pages, which the first request computes
    return Workload(prompt_lens=(prompt,) * number, output_lens=(answer,) * number, shared_lens=(0, *(shared,) * (number - 1)))
