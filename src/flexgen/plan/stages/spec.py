"""The part of a model that a pipeline stage holds, as numbers."""

from __future__ import annotations

import dataclasses
import math
import re

from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec

_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.| |$)")


def stage_spec(spec: ModelSpec, layers: range, num_layers: int) -> ModelSpec:
    """Return the part of a model that a stage holds: its layers, in the first stage the embedding as well, in the last one the head.

    Groups of KV are in the order of their first layers in the stage, as everywhere.

    Args:
        spec: The whole model.
        layers: The decoder layers of the stage.
        num_layers: The number of decoder layers of the model.
    """
    is_first, is_last = layers.start == 0, layers.stop == num_layers
    units = _units(spec, layers, is_first=is_first, is_last=is_last)
    groups = [group for each in spec.kv_groups if (group := _group(each, layers)).num_layers]
    share = len(layers) / num_layers
    decoded = sum(unit.decoded_bytes for unit in units if not unit.plain) / max(
        sum(unit.decoded_bytes for unit in spec.units if not unit.plain), 1
    )
    embedding_bytes = spec.embedding_bytes
    if not embedding_bytes and not is_last:  # no longer tied to units of the same stage
        embedding_bytes = sum(unit.decoded_bytes for unit in spec.units if unit.head)
    return dataclasses.replace(
        spec,
        units=units,
        kv_groups=tuple(sorted(groups, key=lambda group: group.decoder_layers[0])),
        resident_bytes=math.ceil(spec.resident_bytes * share),
        embedding_bytes=embedding_bytes if is_first else 0,
        embedding_row_bytes=spec.embedding_row_bytes if is_first else 0,
        decoded_from={name: round(size * decoded) for name, size in spec.decoded_from.items()},
        operations=math.ceil(spec.operations * share),
    )


def _units(spec: ModelSpec, layers: range, *, is_first: bool, is_last: bool) -> tuple[UnitSpec, ...]:
    """Return the units of a stage: those that belong to no layer precede all layers, or follow them."""
    found: list[UnitSpec] = []
    begun = False
    for unit in spec.units:
        number = _LAYER_NUMBER.search(unit.name)
        begun = begun or number is not None
        if number is None:
            held = is_last if begun or unit.head else is_first
        else:
            held = int(number[1]) in layers
        if held:
            found.append(unit)
    return tuple(found)


def _group(group: KVGroupSpec, layers: range) -> KVGroupSpec:
    """Return the layers of a group that a stage has."""
    kept = tuple(layer for layer in group.decoder_layers if layer in layers)
    return dataclasses.replace(group, num_layers=len(kept), layers=() if kept == tuple(range(len(kept))) else kept)
