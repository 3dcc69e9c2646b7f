"""Cuts a traced model: which modules stream, in the order of use, and how their rows are divided into units.

Knows sizes and names, and nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from flexgen.base.quantities import align_up
from flexgen.errors import UnsupportedModelError
from flexgen.formats.linear_names import is_linear_of_layer
from flexgen.models.parts import ParameterUse, Part
from flexgen.models.tracing import ModelTrace
from flexgen.models.weightless import is_experts, is_scored_experts

GRANULE_ROWS = 64  # matrix products over odd numbers of rows are slower


def streamed_uses(
    model: Any, trace: ModelTrace, itemsize: int, gathered: frozenset[str], sliceable: Callable[[str], bool]
) -> list[ParameterUse]:
    """Return the modules whose parameters stream, in the order of use.

    Vectors (norms, biases) stay resident, and so do position tables and modules that a forward returns to.

    Args:
        model: The skeleton.
        trace: The findings of the trace.
        itemsize: The bytes of a number in the dtype of computing.
        gathered: The names of the embeddings whose rows are gathered.
        sliceable: A function that returns whether rows of a parameter (by its name in the state dict) can be read separately.
    """
    modules = dict(model.named_modules())
    output_embeddings = model.get_output_embeddings()
    uses = []
    for name in trace.order:
        module = modules[name]
        names = tuple(own for own, p in module._parameters.items() if p is not None and p.ndim >= 2)
        if not names or name in gathered or name in trace.revisited or isinstance(module, nn.Embedding):
            continue
        numel = sum(module._parameters[own].numel() for own in names)  # type: ignore[union-attr]
        chosen, of = trace.experts_per_token.get(name, (1, 1))
        can_be_cut = name not in trace.read_by and all(sliceable(f"{name}.{own}") for own in names)
        uses.append(
            ParameterUse(
                module=name,
                parameters=names,
                decoded_bytes=numel * itemsize,
                kind=_kind(name, module) if can_be_cut else "whole",
                rows=module._parameters[names[0]].shape[0],  # type: ignore[union-attr]
                flops_per_token=2.0 * numel * (chosen / of),
                head=module is output_embeddings,
                entered_with=trace.read_by.get(name, name),
            )
        )
    return uses


def _kind(name: str, module: nn.Module) -> str:
    """Return how a module whose rows can be read separately may be cut (see ParameterUse)."""
    if is_experts(module):
        return "experts"
    if is_scored_experts(module):
        return "scored_experts"
    needed_whole = name.endswith(".kv_b_proj")  # attention on latents needs it whole
    return "linear" if type(module) is nn.Linear and not needed_whole else "whole"


def in_int8(uses: Sequence[ParameterUse], in_computed_dtype: Callable[[str], bool]) -> list[ParameterUse]:
    """Return the same uses, the linear layers of decoder layers computed in int8, except for routers and what is kept in float32.

    Raises:
        UnsupportedModelError: There is none.
    """

    def rounds(use: ParameterUse) -> bool:
        is_linear = use.kind == "linear" and not use.head and is_linear_of_layer(use.module)
        return is_linear and all(in_computed_dtype(f"{use.module}.{own}") for own in use.parameters)

    found = [replace(use, in_int8=rounds(use)) for use in uses]
    if not any(use.in_int8 for use in found):
        raise UnsupportedModelError(
            "cpu_compute='int8': this model has no linear layer whose rows are stored apart; experts, and matrices that are stored "
            "transposed, are computed in the dtype"
        )
    return found


def cut_units(uses: Sequence[ParameterUse], unit_bytes: int) -> list[list[Part]]:
    """Divide modules into units: consecutive modules share one of up to `unit_bytes`, and larger modules are cut by rows or by experts.

    A unit stays within one decoder layer, and never mixes the head with anything else.
    """
    units: list[list[Part]] = []
    room, owner = 0, None
    for use in uses:
        layer = (layer_named_in(use.module), use.head)
        for start, stop in pairwise(_bounds(use, unit_bytes)):
            size = use.decoded_bytes * (stop - start) // use.rows
            if not units or size > room or layer != owner:
                units.append([])
                room, owner = unit_bytes, layer
            units[-1].append(Part(use=use, unit=len(units) - 1, start=start, stop=stop))
            room -= size
    return units


def _bounds(use: ParameterUse, unit_bytes: int) -> list[int]:
    """Return the rows at which a module is cut: about evenly, a linear layer at multiples that suit matrix products."""
    if use.kind == "whole":
        return [0, use.rows]
    most = max(unit_bytes * use.rows // use.decoded_bytes, 1)
    granule = GRANULE_ROWS if use.kind == "linear" and most >= 4 * GRANULE_ROWS else 1
    pieces = -(-use.rows // (most - most % granule))
    step = align_up(-(-use.rows // pieces), granule)
    return [*range(0, use.rows, step), use.rows]


def layer_named_in(module: str) -> int | None:
    """Return the decoder layer's number, which is the first number in a module's name; None if there is none."""
    match = re.search(r"\.(\d+)\.", f".{module}.")
    return int(match[1]) if match else None
