"""The costs of a stage: a contiguous range of a model's decoder layers, what comes before them on the first, and after them on the last."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.unit_names import split_name


def num_layers_of(spec: ModelSpec) -> int:
    """Return the number of decoder layers, by the names of the units."""
    return 1 + max((layer for unit in spec.units if (layer := split_name(unit.name)[0]) is not None), default=0)


def stage_spec(spec: ModelSpec, layers: range, num_layers: int) -> ModelSpec:
    """Return the costs of a stage of a model.

    What is known of the whole model only (small tensors, operations) is divided evenly among its layers, and so is KV whose layers are not
    known.

    Args:
        spec: The whole model.
        layers: The decoder layers of the stage.
        num_layers: The number of decoder layers of the model.
    """
    is_first, is_last = layers.start == 0, layers.stop == num_layers
    if is_first and is_last:
        return spec
    units = tuple(_units(spec.units, layers, is_first=is_first, is_last=is_last))
    decoded = sum(unit.decoded_bytes for unit in units) / max(spec.decoded_bytes, 1)
    return dataclasses.replace(
        spec,
        units=units,
        kv_groups=_groups(spec.kv_groups, layers, num_layers),
        resident_bytes=_part(spec.resident_bytes, layers, num_layers),
        embedding_bytes=_embedding_bytes(spec) if is_first else 0,
        embedding_row_bytes=spec.embedding_row_bytes * is_first,
        decoded_from={name: round(size * decoded) for name, size in spec.decoded_from.items()},
        operations=_part(spec.operations, layers, num_layers),
        expert_bytes_per_token=_part(spec.expert_bytes_per_token, layers, num_layers),
        expert_numbers_per_token=spec.expert_numbers_per_token,  # of the layer where they are most, which any stage may have
    )


def _embedding_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the input embedding in a stage without the head, which it may be tied to."""
    tied = sum(unit.decoded_bytes for unit in spec.units if unit.head) if spec.embedding_row_bytes else 0
    return spec.embedding_bytes or tied


def _units(units: Sequence[UnitSpec], layers: range, *, is_first: bool, is_last: bool) -> Iterator[UnitSpec]:
    """Yield the units of these layers; those before all layers are the first stage's, those after the layers the last one's."""
    before = True
    for unit in units:
        layer, _ = split_name(unit.name)
        before = before and layer is None and not unit.head
        if (is_first if before else is_last) if layer is None else layer in layers:
            yield unit


def _part(whole: int, layers: range, num_layers: int) -> int:
    """Return the part of a whole that is divided evenly among layers; the parts of all stages add up to it."""
    return whole * layers.stop // num_layers - whole * layers.start // num_layers


def _groups(groups: Sequence[KVGroupSpec], layers: range, num_layers: int) -> tuple[KVGroupSpec, ...]:
    """Return the groups with those of their layers that are the stage's, without the groups that have none."""
    if all(group.layers for group in groups):
        members = [tuple(layer for layer in group.layers if layer in layers) for group in groups]
        found = [dataclasses.replace(group, num_layers=len(some), layers=some) for group, some in zip(groups, members, strict=True) if some]
        found.sort(key=lambda group: group.layers[0])  # as a stage finds them, whose first layer may be another kind than the model's
    else:
        counts = _spread([group.num_layers for group in groups], layers, num_layers)
        found = [dataclasses.replace(group, num_layers=count, layers=()) for group, count in zip(groups, counts, strict=True) if count]
    return tuple(found)


def _spread(numbers: Sequence[int], layers: range, num_layers: int) -> list[int]:
    """Return how many of these layers belong to each of several groups that have so many of all, spread as evenly as possible."""
    others = num_layers - sum(numbers)  # layers without KV
    if others < 0:
        return [_part(number, layers, num_layers) for number in numbers]
    shares, due, counts = [*numbers, others], [0] * (len(numbers) + 1), [0] * (len(numbers) + 1)
    for layer in range(layers.stop):
        due = [credit + share for credit, share in zip(due, shares, strict=True)]
        taker = max(range(len(due)), key=due.__getitem__)
        due[taker] -= num_layers
        counts[taker] += layer in layers
    return counts[: len(numbers)]
