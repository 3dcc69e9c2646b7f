"""Plans a job in every combination of formats that is allowed, and says what formats that are not allowed would gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen.errors import CapacityError, FlexGenError, ModelError, StorageError
from flexgen.options import ALLOWABLE_FORMATS, DTYPE_BYTES, EngineOptions
from flexgen.plan.formats import MARGIN, FormatChoice, FormatPrice, Formats, best_of
from flexgen.plan.machine import Machine, int8_name
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.weights import num_weights
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.space import Space
from flexgen.plan.tell.forecast import Plan, forecast_again, make_plan

# Format that plain weights can be converted to -> about the bytes of a number, scales included.
WEIGHT_BYTES = {"int8": 1.05, "int4": 0.59}
# Format of KV -> about the bytes of a number, scales included: of keys and values together, and of values.
KV_BYTES = {"int8": 8.5 / 8, "k8v4": 6.75 / 8, "int4": 5 / 8}
VALUE_BYTES = {"int8": 8.5 / 8, "k8v4": 5 / 8, "int4": 5 / 8}
# Weights that a core rounds in a second, with what a conversion computes besides, without reading and writing (docs/log.md).
ROUNDED_PER_CORE_SECOND = 400e6
# What may be in the way of some formats and not of others.
_PROBLEMS = (CapacityError, ModelError, StorageError)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatJob:
    """A job in certain formats.

    Attributes:
        arguments: The arguments of `make_plan`; not used where there is a problem.
        conversion_seconds: The expected time of converting the weights first.
        problem: Why the model cannot have these formats.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    conversion_seconds: float = 0.0
    problem: FlexGenError | None = None

    def plan(self) -> Plan:
        """Return the best plan of the job.

        Raises:
            FlexGenError: There is none; the message says why.
        """
        if self.problem is not None:
            raise self.problem
        return make_plan(**self.arguments)


def specs_of(
    options: EngineOptions, describe: Callable[[EngineOptions], ModelSpec]
) -> tuple[ModelSpec, dict[Formats, ModelSpec | ModelError]]:
    """Return the model as it is, and in every combination of formats that the options allow, or why it cannot be in it.

    Weights are described once per format, and so is KV, because neither depends on the other.

    Args:
        options: The options.
        describe: Returns the model in the formats of options, as a conversion would write it.

    Raises:
        FlexGenError: The model cannot be described as it is, or in a format of KV.
    """
    weights, kvs = options.choices("weight_format"), options.choices("kv_format")
    in_kv = {kv: describe(options.in_formats(weights[0], kv)) for kv in kvs}
    found: dict[Formats, ModelSpec | ModelError] = {}
    for name in weights:
        try:
            spec = in_kv[kvs[0]] if name == weights[0] else describe(options.in_formats(name, kvs[0]))
        except ModelError as problem:  # such as one without a matrix that can be rounded
            found |= {Formats(name, kv): problem for kv in kvs}
        else:
            found |= {Formats(name, kv): _with_kv_of(other, spec) for kv, other in in_kv.items()}
    return in_kv[kvs[0]], found


def _with_kv_of(other: ModelSpec, spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(spec, kv_groups=other.kv_groups, kv_format=other.kv_format)


def jobs_in_formats(
    stored: ModelSpec,
    specs: Mapping[Formats, ModelSpec | ModelError],
    arguments: Callable[[Formats, ModelSpec], Mapping[str, Any]],
    left_to_convert: Callable[[Formats, ModelSpec], float],
) -> dict[Formats, FormatJob]:
    """Return a job in every combination of formats; what is in the way of a combination is its problem.

    Args:
        stored: The model as it is.
        specs: The model in every combination, or why it cannot be in it, as `specs_of` returns them.
        arguments: Returns the arguments of `make_plan` for a model in certain formats.
        left_to_convert: Returns the share of a conversion to these formats that is still to be done, 0 where there is none.
    """

    def job(formats: Formats, spec: ModelSpec | ModelError) -> FormatJob:
        if isinstance(spec, ModelError):
            return FormatJob(problem=spec)
        try:
            given = arguments(formats, spec)
            left = left_to_convert(formats, spec)
        except _PROBLEMS as problem:
            return FormatJob(problem=problem)
        return FormatJob(arguments=given, conversion_seconds=left and left * conversion_seconds(stored, spec, given["machine"]))

    return {formats: job(formats, spec) for formats, spec in specs.items()}


def plan_in_formats(jobs: Mapping[Formats, FormatJob]) -> Plan:
    """Return the plan in the formats that `best_of` chooses.

    Args:
        jobs: The same job in every combination of formats that is allowed.

    Raises:
        FlexGenError: The job is possible in none of them; this is the problem of the first.
    """
    plans: dict[Formats, Plan] = {}
    prices: list[FormatPrice] = []
    problems: list[FlexGenError] = []
    for formats, job in jobs.items():
        try:
            plan = plans[formats] = job.plan()
        except _PROBLEMS as problem:
            problems.append(problem)
            prices.append(FormatPrice(formats=formats, problem=str(problem)))
        else:
            seconds, refused = plan.forecast.seconds, plan.forecast.num_refused
            prices.append(FormatPrice(formats=formats, seconds=seconds, conversion_seconds=job.conversion_seconds, num_refused=refused))
    if not plans:
        raise problems[0]
    chosen = best_of(prices)
    return dataclasses.replace(plans[chosen], formats=FormatChoice(chosen=chosen, prices=tuple(prices)))


def conversion_seconds(stored: ModelSpec, converted: ModelSpec, machine: Machine) -> float:
    """Return the expected time of a whole conversion: all is read, what is not the head is rounded, and what that becomes is written."""
    rounded = sum(num_weights(unit, stored.dtype) for unit in stored.units if not unit.head)
    moving = stored.checkpoint_bytes / machine.disk_read.typical + converted.checkpoint_bytes / machine.disk_write.typical
    return rounded / (ROUNDED_PER_CORE_SECOND * machine.cores) + moving


# -- formats that are not allowed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatGain:
    """What a format would gain.

    Attributes:
        name: Its name in `allow_formats`.
        speedup: How many times as fast the job would be, without the time of a conversion.
    """

    name: str
    speedup: float


def format_gains(plan: Plan, space: Space, names: Iterable[str], space_of: Callable[[ModelSpec], Space]) -> list[FormatGain]:
    """Return what formats would gain, each by itself; those that gain less than MARGIN are left out.

    No other plan is made: the gain is that of this plan's policy with fewer bytes, or of steady states if that is more.

    Args:
        plan: The plan for the model as it is; weights and KV in low-bit formats stay as they are.
        space: The policies that it was chosen from.
        names: The names in `allow_formats` to compare.
        space_of: Returns the policies for another model and the same job.
    """
    own_rate = Search(space).steady_rate()
    gains: list[FormatGain] = []
    for name in names:
        if (spec := _about(plan.spec, *ALLOWABLE_FORMATS[name])) is None:
            continue
        other = space_of(spec)
        steady = Search(other).steady_rate() / own_rate if own_rate else 0.0
        gains.append(FormatGain(name=name, speedup=max(_speedup(plan, spec, space), steady)))
    return [gain for gain in gains if gain.speedup >= 1 + MARGIN]


def _speedup(plan: Plan, spec: ModelSpec, space: Space) -> float:
    expectation = Expectation(spec, plan.machine, plan.policy.dtype)
    again = forecast_again(plan.forecast, plan.policy, expectation, space.workload)
    return plan.forecast.seconds / max(again.seconds, 1e-9)


def _about(spec: ModelSpec, option: str, name: str) -> ModelSpec | None:
    """Return about what a model is in a format; None where it is in a low-bit format already."""
    if option == "kv_format":
        return in_kv_format(spec, name) if spec.kv_format is None else None
    return converted(spec, name) if spec.number_format in DTYPE_BYTES else None


def converted(spec: ModelSpec, weight_format: str) -> ModelSpec:
    """Return a model of plain weights about as a conversion would store it: all units but the head are encoded."""

    def unit_in(unit: UnitSpec) -> UnitSpec:
        stored = int(num_weights(unit, spec.dtype) * WEIGHT_BYTES[weight_format])
        return unit if unit.head else dataclasses.replace(unit, disk_bytes=stored, encoded_bytes=stored, plain=False)

    units = tuple(map(unit_in, spec.units))
    decoded: dict[str, int] = {}
    for unit in (unit for unit in units if not unit.head):
        name = int8_name(weight_format) if unit.int8_flops_per_token else weight_format
        decoded[name] = decoded.get(name, 0) + unit.decoded_bytes
    return dataclasses.replace(spec, units=units, number_format=weight_format, decoded_from=decoded)


def in_kv_format(spec: ModelSpec, kv_format: str) -> ModelSpec:
    """Return a model of plain KV about as a format would store it."""

    size = DTYPE_BYTES[spec.dtype]

    def group_in(group: KVGroupSpec) -> KVGroupSpec:
        return dataclasses.replace(
            group,
            bytes_per_token=int(group.bytes_per_token / size * KV_BYTES[kv_format]),
            value_bytes_per_token=int(group.value_bytes_per_token / size * VALUE_BYTES[kv_format]),
            exact_bytes_per_token=group.bytes_per_token,
        )

    return dataclasses.replace(spec, kv_groups=tuple(map(group_in, spec.kv_groups)), kv_format=kv_format)
