"""What `flexgen plan` answers: a plan, and what is told beside it, as text or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexgen.formats.table import runs

if TYPE_CHECKING:
    from flexgen.plan.machine import Limits
    from flexgen.plan.tell.alternatives import FasterFormat, ParetoPoint
    from flexgen.plan.tell.forecast import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan and what is told beside it; `allowed` are the formats that the weights might have been converted to."""

    plan: Plan
    limits: Limits
    weight_format: str
    allowed: Sequence[str]
    faster: FasterFormat | None
    faster_weights: FasterFormat | None
    curve: Sequence[ParetoPoint]


def as_json(answer: Answer) -> str:
    """Return the answer as JSON."""
    plan, faster, rounded = answer.plan, answer.faster, answer.faster_weights
    values: dict[str, Any] = {
        "model": {"name": plan.spec.name, "number_format": plan.spec.number_format, "runs": runs(plan.spec.number_format)},
        "machine": json.loads(plan.machine.to_json()),
        "limits": dataclasses.asdict(answer.limits),
        "policy": dataclasses.asdict(plan.policy),
        "forecast": dataclasses.asdict(plan.forecast),
        "weight_format": answer.weight_format,
        "faster_format": None if faster is None else {"dtype": faster.dtype, "speedup": faster.speedup},
        "faster_weights": None
        if (rounded := answer.faster_weights) is None
        else {"format": rounded.weight_format, "speedup": rounded.speedup},
    }
    if answer.curve:
        values["pareto"] = [dataclasses.asdict(point) for point in answer.curve]
    return json.dumps(values, indent=2)


_ORIGINS = {"measured": "measured {}", "datasheet": "by its datasheet", "paper": "by the rates of the FlexGen paper"}


def as_text(answer: Answer) -> str:
    """Return the answer as text."""
    from flexgen.report.format import format_curve, format_memory, format_plan

    plan = answer.plan
    origin = _ORIGINS[plan.machine.origin].format(plan.machine.date)
    lines = [f"{plan.spec.name} on {plan.machine.name} ({origin})", format_plan(plan), *format_memory(plan.forecast)]
    if answer.curve:
        lines += ["what shorter requests cost:", format_curve(answer.curve)]
    lines += [f"note: {each}" for each in (*_about_formats(answer), *_about_devices(plan))]
    return "\n".join(lines)


def _about_formats(answer: Answer) -> Iterator[str]:
    """Yield what was chosen of several formats, and what others would gain."""
    if answer.weight_format in answer.allowed:
        yield f"of the formats allowed {answer.weight_format} is the fastest: run this plan with --weight-format {answer.weight_format}"
    elif answer.allowed:
        yield f"in {' or '.join(answer.allowed)} the weights would gain nothing, so they stay as they are"
    if (faster := answer.faster) is not None:
        yield f"in {faster.dtype} the job would go {faster.speedup:.1f} times as fast: --dtype {faster.dtype} (answers may differ)"
    if (rounded := answer.faster_weights) is not None:
        allow = ",".join((*answer.allowed, rounded.weight_format or ""))
        yield (
            f"with weights rounded to {rounded.weight_format} tokens might come about {rounded.speedup:.1f} times as fast: --allow-formats "
            f"{allow} plans that (answers will differ)"
        )


def _about_devices(plan: Plan) -> Iterator[str]:
    if plan.policy.device != "cpu" and plan.policy.weights.device == plan.policy.kv.device == 1:
        yield "weights and KV cache fit the device: an engine made for that (vLLM, SGLang) will be faster"
