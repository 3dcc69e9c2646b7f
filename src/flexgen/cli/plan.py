"""`flexgen plan`: forecasts a job on this machine or another, without running it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.base.quantities import MIB
from flexgen.base.steps import step
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import engine_command, takes
from flexgen.cli.reading import Reading, check_source, lengths_of
from flexgen.cli.terminal import showing
from flexgen.errors import CapacityError, OptionError
from flexgen.formats.table import runs
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.plan.machine import Limits, Machine
    from flexgen.plan.model import ModelSpec
    from flexgen.plan.tell.alternatives import FasterFormat, ParetoPoint
    from flexgen.plan.tell.forecast import Plan
    from flexgen.plan.workload import Workload

# Approximate resident memory of a run before any weight is loaded: the interpreter, torch, transformers, kernels.
PROCESS_BYTES = {"cpu": 480 * MIB, "sim": 480 * MIB, "cuda": 1500 * MIB}
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

    def machine(self, dtype: str) -> Machine:
        """Return the machine; this one is measured now unless its rates are kept."""
        if self.box is not None:
            return self.box
        from flexgen.profile.measure import cached_machine

        return cached_machine(self.limits.device, dtype, self._weights_folder)

    def job(self, spec: ModelSpec, machine: Machine) -> dict[str, Any]:
        """Return the arguments of `make_plan` and `space_of`."""
        options = dataclasses.replace(self.options, dtype=spec.dtype, device=self.limits.device)
        given = {"options": options, "spec": spec, "machine": machine, "limits": self.limits, "workload": self.workload}
        return given | {"process_bytes": PROCESS_BYTES[self.limits.device]}

    def plan_in(self, dtype: str) -> Plan | None:
        """Return the plan in another dtype; None where the machine was not measured in it, or nothing fits the budgets."""
        from flexgen.plan.tell.forecast import make_plan
        from flexgen.session.lookup import spec_of

        machine = self.box or self._kept(dtype)
        if machine is None or dtype not in machine.dense:
            return None
        options = self.options
        spec = spec_of(
            self.model, device=self.limits.device, dtype=dtype, kv_format=options.kv_format, revision=options.revision
        )  # fmt: skip
        try:
            return make_plan(**self.job(spec, machine))
        except CapacityError:
            return None

    def _kept(self, dtype: str) -> Machine | None:
        from flexgen.profile.measure import kept_machine

        return kept_machine(self.limits.device, dtype, self._weights_folder)

    @property
    def _weights_folder(self) -> Path:
        """The folder from which weights stream; the current folder if the model is not a local folder."""
        return Path(self.model) if Path(self.model).is_dir() else Path()


@engine_command
@takes("lengths", Lengths)
@takes("reading", Reading)
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id (of which config and headers are read), or a name such as opt-175b.")
    ],
    options: EngineOptions,
    lengths: Lengths,
    reading: Reading,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A known machine (t4-gcp), or a file: of `flexgen profile -o`, or a few figures. Default: this one."
        ),
    ] = None,
    source: Annotated[Path | None, typer.Option("--input", metavar="FILE", help="Requests, as for `flexgen run`.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also show what shorter requests would cost.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: model, machine, limits, policy, forecast, faster_format, pareto if asked for.")
    ] = False,
) -> int:
    """Show how long a job would take, and what decides that.

    Where weights and KV cache would live, how fast it would go, and what
    would help. Nothing is run, and no weights are read.
    """
    if source is not None and lengths.given():
        raise OptionError(f"the lengths come from --input: leave out {lengths.given()[0]}")
    check_source(source, reading)

    def workload_of(context: int) -> Workload:
        return _equal_lengths(lengths, context, options) if source is None else lengths_of(source, reading, model, options)

    with showing("auto"):
        told = _told(model, options, machine, workload_of, pareto=pareto, as_json=as_json)
    print(told)
    return ExitCode.ALL_ANSWERED


def _told(
    model: str, options: EngineOptions, machine: str | None, workload_of: Callable[[int], Workload], *, pareto: bool, as_json: bool
) -> str:
    """Return the plan as text or JSON; `workload_of` makes the workload from the model's context."""
    from flexgen.plan.known.machines import beside_checkpoint
    from flexgen.plan.search.solve import space_of
    from flexgen.plan.tell.alternatives import faster_format
    from flexgen.plan.tell.alternatives import pareto as curve_of
    from flexgen.plan.tell.forecast import make_plan
    from flexgen.session.lookup import spec_of

    limits, box = _limits_and_machine(options, machine)
    step(f"reading config and headers of {model}")
    spec = spec_of(model, device=limits.device, dtype=options.dtype, kv_format=options.kv_format, revision=options.revision)
    if box is not None:
        limits = beside_checkpoint(limits, spec.checkpoint_bytes, options)
    context = min(spec.max_position_embeddings, options.max_model_len or spec.max_position_embeddings)
    question = _Question(model=model, options=options, limits=limits, box=box, workload=workload_of(context))
    job = question.job(spec, question.machine(spec.dtype))
    step("choosing a plan")
    planned = make_plan(**job)
    faster = faster_format(planned, question.plan_in)
    curve = curve_of(space_of(**job)) if pareto else []
    return _as_json(planned, limits, faster, curve) if as_json else _as_text(planned, faster, curve)


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


def _as_json(plan: Plan, limits: Limits, faster: FasterFormat | None, curve: Sequence[ParetoPoint]) -> str:
    values: dict[str, Any] = {
        "model": {"name": plan.spec.name, "number_format": plan.spec.number_format, "runs": runs(plan.spec.number_format)},
        "machine": json.loads(plan.machine.to_json()),
        "limits": dataclasses.asdict(limits),
        "policy": dataclasses.asdict(plan.policy),
        "forecast": dataclasses.asdict(plan.forecast),
        "faster_format": None if faster is None else dataclasses.asdict(faster),
    }
    if curve:
        values["pareto"] = [dataclasses.asdict(point) for point in curve]
    return json.dumps(values, indent=2)


_ORIGINS = {"measured": "measured {}", "datasheet": "by its datasheet", "paper": "by the rates of the FlexGen paper"}


def _as_text(plan: Plan, faster: FasterFormat | None, curve: Sequence[ParetoPoint]) -> str:
    from flexgen.report.format import format_curve, format_memory, format_plan

    origin = _ORIGINS[plan.machine.origin].format(plan.machine.date)
    lines = _what_does_not_run(plan)
    lines += [f"{plan.spec.name} on {plan.machine.name} ({origin})", format_plan(plan), *format_memory(plan.forecast)]
    if curve:
        lines += ["what shorter requests cost:", format_curve(curve)]
    if faster is not None:
        lines.append(
            f"note: in {faster.dtype} the job would go {faster.speedup:.1f} times as fast: --dtype {faster.dtype} (answers may differ)"
        )
    if plan.policy.device != "cpu" and plan.policy.weights.device == plan.policy.kv.device == 1:
        lines.append("note: weights and KV cache fit the device: an engine made for that (vLLM, SGLang) will be faster")
    return "\n".join(lines)


def _what_does_not_run(plan: Plan) -> list[str]:
    """Return a line that says that this model cannot run, if so."""
    if runs(plan.spec.number_format):
        return []
    what = f"its weights are in {plan.spec.number_format}, a low-bit format"
    return [f"this version of flexgen cannot run {plan.spec.name}: {what}; the plan is for the weights as shipped, for comparison"]
