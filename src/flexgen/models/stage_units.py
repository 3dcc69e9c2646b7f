"""Cuts a pipeline stage out of a model that was cut into units: the same units, but only those that the stage computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexgen.models.parts import Part
from flexgen.models.stage import Stage
from flexgen.models.units import ModelUnits
from flexgen.weights.unit import UnitLayout, WantedTensor


def units_of(stage: Stage, units: ModelUnits) -> ModelUnits:
    """Return the units of a stage, numbered from 0, its tensors that stay where computing happens, its embeddings and its KV.

    Of what belongs to no layer, vectors and buffers stay in every stage, because the code that uses them runs in every stage.
    """
    decoder, layers = units.decoder, stage.layers
    kept = [index for index, parts in enumerate(units.parts) if decoder.needed_by(layers, parts[0].use.module)]
    trace = units.trace
    stored = {index for index, layer in decoder.of_kv.items() if layer in layers}
    return replace(
        units,
        trace=replace(
            trace,
            layers=tuple(each for each in trace.layers if each.layer in stored),
            calls=tuple(each for each in trace.calls if each.layer in stored),
            experts_per_token={name: each for name, each in trace.experts_per_token.items() if decoder.layer_of(name) in layers},
        ),
        parts=[_numbered(units.parts[index], number) for number, index in enumerate(kept)],
        layouts=tuple(replace(units.layouts[index], index=number) for number, index in enumerate(kept)),
        residents=_residents(stage, units),
        tables=tuple(table for table in units.tables if decoder.needed_by(layers, table.module)),
    )


def _numbered(parts: Sequence[Part], unit: int) -> list[Part]:
    return [Part(use=part.use, unit=unit, start=part.start, stop=part.stop) for part in parts]


def _residents(stage: Stage, units: ModelUnits) -> UnitLayout:
    buffers = {name for name, _ in units.model.named_buffers()}
    kept: list[WantedTensor] = []
    for tensor in units.residents.tensors:
        outside = units.decoder.layer_of(tensor.module) is None
        small = len(tensor.shape) < 2 or f"{tensor.module}.{tensor.parameter}".removeprefix(".") in buffers
        if (outside and small) or units.decoder.needed_by(stage.layers, tensor.module):
            kept.append(WantedTensor(module=tensor.module, parameter=tensor.parameter, source=tensor.source, dtype=tensor.dtype))
    return UnitLayout.of(units.residents.index, units.residents.name, kept)
