"""How a traced model's parameters are cut into units: what streams, what is split, what stays whole.

Knows no tiers and no budgets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from flexgen.base.quantities import align_up
from flexgen.models.skeleton import ModulePlan
from flexgen.models.tracing import ModelTrace, is_experts, is_scored_experts

GRANULE_ROWS = 64  # matrix products over odd numbers of rows are slower


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterUse:
    """A module's streamed parameters: what the unit builder cuts.

    Attributes:
        kind: how they may be cut (see ModulePlan). rows: along dim 0.
        entered_with: the module whose forward needs them: mostly the same, else one that reads them from outside.
    """

    module: str
    parameters: tuple[str, ...]
    decoded_bytes: int
    kind: str
    rows: int
    flops_per_token: float
    head: bool
    entered_with: str


def streamed_uses(
    model: Any, trace: ModelTrace, itemsize: int, gathered: frozenset[str], sliceable: Callable[[str], bool]
) -> list[ParameterUse]:
    """Modules whose parameters stream, in the order of use.

    Vectors (norms, biases) stay resident, and so do position tables and what a forward comes back to.

    Args:
        sliceable: whether rows of a parameter (state-dict name) can be read apart.
    """
    modules = dict(model.named_modules())
    output_embeddings = model.get_output_embeddings()
    unsplit = {f"{name}.kv_b_proj" for name in modules}  # attention on latents needs it whole
    uses = []
    for name in trace.order:
        module = modules[name]
        names = tuple(own for own, p in module._parameters.items() if p is not None and p.ndim >= 2)
        if not names or name in gathered or name in trace.revisited or isinstance(module, nn.Embedding):
            continue
        numel = sum(module._parameters[own].numel() for own in names)  # type: ignore[union-attr]
        kind = "whole"
        if name in trace.read_by or not all(sliceable(f"{name}.{own}") for own in names):
            pass
        elif is_experts(module):
            kind = "experts"
        elif is_scored_experts(module):
            kind = "scored_experts"
        elif type(module) is nn.Linear and name not in unsplit:
            kind = "linear"
        share = 1.0
        if name in trace.experts_per_token:
            chosen, num_experts = trace.experts_per_token[name]
            share = chosen / num_experts
        uses.append(
            ParameterUse(
                module=name,
                parameters=names,
                decoded_bytes=numel * itemsize,
                kind=kind,
                rows=module._parameters[names[0]].shape[0],  # type: ignore[union-attr]
                flops_per_token=2.0 * numel * share,
                head=module is output_embeddings,
                entered_with=trace.read_by.get(name, name),
            )
        )
    return uses


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPart:
    """Rows of one module within a unit."""

    use: ParameterUse
    start: int
    stop: int


def cut_units(uses: list[ParameterUse], unit_bytes: int) -> list[list[UnitPart]]:
    """Consecutive modules share a unit up to `unit_bytes`; larger ones are cut by rows or by experts.

    A unit stays within one decoder layer, and never mixes the head with anything else.
    """
    units: list[list[UnitPart]] = []
    room, owner = 0, None
    for use in uses:
        layer = (_layer_of(use.module), use.head)
        for start, stop in pairwise(_bounds(use, unit_bytes)):
            size = use.decoded_bytes * (stop - start) // use.rows
            if not units or size > room or layer != owner:
                units.append([])
                room, owner = unit_bytes, layer
            units[-1].append(UnitPart(use=use, start=start, stop=stop))
            room -= size
    return units


def _bounds(use: ParameterUse, unit_bytes: int) -> list[int]:
    """Where a module is cut: about evenly, a linear layer at multiples of what matrix products like."""
    if use.kind == "whole":
        return [0, use.rows]
    most = max(unit_bytes * use.rows // use.decoded_bytes, 1)
    granule = GRANULE_ROWS if use.kind == "linear" and most >= 4 * GRANULE_ROWS else 1
    pieces = -(-use.rows // (most - most % granule))
    step = align_up(-(-use.rows // pieces), granule)
    return [*range(0, use.rows, step), use.rows]


def module_plans(units: Sequence[Sequence[UnitPart]]) -> list[ModulePlan]:
    """The hooks that these units need."""
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    uses: dict[str, ParameterUse] = {}
    for index, parts in enumerate(units):
        for part in parts:
            ranges.setdefault(part.use.module, []).append((index, part.start, part.stop))
            uses[part.use.module] = part.use
    return [
        ModulePlan(
            module=name,
            entered_with=uses[name].entered_with,
            parameters=uses[name].parameters,
            kind="whole" if len(spans) == 1 and uses[name].kind != "scored_experts" else uses[name].kind,
            ranges=tuple(spans),
        )
        for name, spans in ranges.items()
    ]


def _layer_of(module: str) -> str | None:
    """The decoder layer's number, as the first number in a module's name."""
    match = re.search(r"\.(\d+)\.", f".{module}.")
    return match[1] if match else None
