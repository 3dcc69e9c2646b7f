"""What `flexgen plan` answers: a plan, and what is told beside it, as text or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexgen.cli.spelling import in_flags
from flexgen.formats.table import runs

if TYPE_CHECKING:
    from flexgen.plan.formats import Formats
    from flexgen.plan.machine import Limits
    from flexgen.plan.tell.alternatives import FasterDtype, ParetoPoint
    from flexgen.plan.tell.forecast import Plan
    from flexgen.plan.tell.formats import FormatGain


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan and what is told beside it.

    Attributes:
        plan: The plan.
        limits: The budgets that it keeps.
        allowed: The formats that might have been chosen, as in EngineOptions.
        faster: A dtype of computing in which the job would be much faster.
        others: What formats that are not allowed would gain.
        curve: The plans with shorter requests, where they were asked for.
    """

    plan: Plan
    limits: Limits
    allowed: str | None
    faster: FasterDtype | None
    others: Sequence[FormatGain]
    curve: Sequence[ParetoPoint]


def as_json(answer: Answer) -> str:
    """Return the answer as JSON."""
    plan, faster = answer.plan, answer.faster
    values: dict[str, Any] = {
        "model": {"name": plan.spec.name, "number_format": plan.spec.number_format, "runs": runs(plan.spec.number_format)},
        "machine": json.loads(plan.machine.to_json()),
        "limits": {**dataclasses.asdict(answer.limits), "host_source": in_flags(answer.limits.host_source)},
        "policy": dataclasses.asdict(plan.policy),
        "forecast": dataclasses.asdict(plan.forecast),
        "formats": None if plan.formats is None else dataclasses.asdict(plan.formats),
        "faster_format": None if faster is None else {"dtype": faster.dtype, "speedup": faster.speedup},
        "other_formats": [dataclasses.asdict(gain) for gain in answer.others],
    }
    if answer.curve:
        values["pareto"] = [dataclasses.asdict(point) for point in answer.curve]
    return json.dumps(values, indent=2)


_ORIGINS = {"measured": "measured {}", "datasheet": "by its datasheet", "paper": "by the rates of the FlexGen paper"}


def as_text(answer: Answer) -> str:
    """Return the answer as text."""
    from flexgen.report.plans import format_curve, format_memory, format_plan

    plan = answer.plan
    origin = _ORIGINS[plan.machine.origin].format(plan.machine.date)
    source = f": {plan.machine.source}" if plan.machine.source else ""
    lines = [f"{plan.spec.name} on {plan.machine.name} ({origin}{source})", format_plan(plan), *format_memory(plan.forecast)]
    if answer.curve:
        lines += ["what shorter requests cost:", format_curve(answer.curve)]
    lines += [f"note: {each}" for each in (*_about_formats(answer), *_about_devices(plan))]
    return in_flags("\n".join(lines))


def _about_formats(answer: Answer) -> Iterator[str]:
    """Yield how to run in the formats that were chosen, and what others would gain."""
    allowed, formats = answer.allowed, answer.plan.formats
    if allowed is not None and formats is not None and (flags := _flags(formats.chosen)):
        yield f"`flexgen run` with --allow-formats {allowed} or with {flags} runs this plan (answers will differ)"
    if (faster := answer.faster) is not None:
        yield f"in {faster.dtype} the job would go {faster.speedup:.1f} times as fast: --dtype {faster.dtype} (answers may differ)"
    if answer.others:
        gains = ", ".join(f"{gain.name} {gain.speedup:.1f} times" for gain in answer.others)
        names = ",".join(gain.name for gain in answer.others)
        allow = names if allowed is None else f"{allowed},{names}"
        yield (
            f"in formats that are not allowed the job would go about so many times as fast, in each by itself: {gains}; --allow-formats "
            f"{allow} plans with all of them (answers will differ)"
        )


def _flags(formats: Formats) -> str:
    """Return the flags that ask for formats; empty where there are none to give."""
    named = (("--weight-format", formats.weights), ("--kv-format", formats.kv))
    return " ".join(f"{flag} {name}" for flag, name in named if name != "auto")


def _about_devices(plan: Plan) -> Iterator[str]:
    from flexgen.plan.price.pass_time import estimated_on_device

    policy = plan.policy
    if policy.device == "cpu":
        return
    if policy.weights.device < 1 and (estimated := estimated_on_device(plan.spec, plan.machine, policy.dtype)):
        yield f"how fast the device decodes {', '.join(estimated)} was not measured: it is estimated from the rate of its memory"
    if policy.weights.device == policy.kv.device == 1:
        yield "weights and KV cache fit the device: an engine made for that (vLLM, SGLang) will be faster"
