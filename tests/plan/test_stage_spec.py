"""The costs of stages add up to those of the model, and each stage has what it computes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.stages.spec import num_layers_of, stage_spec


def stages_of(spec: ModelSpec, *cuts: int) -> list[ModelSpec]:
    number = num_layers_of(spec)
    return [stage_spec(spec, range(start, stop), number) for start, stop in pairwise((0, *cuts, number))]


@pytest.mark.parametrize(
    ("name", "cuts"), [("opt-175b", (1, 40)), ("opt-350m", (8, 16)), ("gpt-oss-120b", (5, 6, 30)), ("deepseek-v3", (3,))]
)
def test_stages_add_up_to_the_model(name: str, cuts: tuple[int, ...]) -> None:
    spec = catalogue_spec(name)
    stages = stages_of(spec, *cuts)
    assert [unit for stage in stages for unit in stage.units] == list(spec.units)
    for value in ("kv_bytes_per_token", "resident_bytes", "operations", "decoded_bytes"):
        assert sum(getattr(stage, value) for stage in stages) == getattr(spec, value), value
    tied = sum(unit.decoded_bytes for unit in spec.units if unit.head)  # the first stage has no head that would bring these bytes
    assert [stage.embedding_bytes for stage in stages] == [spec.embedding_bytes or tied] + [0] * len(cuts)
    assert sum(stage.flops_per_token for stage in stages) == pytest.approx(spec.flops_per_token)
    assert [stage.has_head for stage in stages] == [False] * len(cuts) + [True]
    assert [stage.embedding_row_bytes for stage in stages] == [spec.embedding_row_bytes] + [0] * len(cuts)
    for number, size in spec.decoded_from.items():
        assert sum(stage.decoded_from[number] for stage in stages) == pytest.approx(size, abs=len(stages))


def test_one_stage_is_the_model() -> None:
    spec = catalogue_spec("opt-125m")
    assert stage_spec(spec, range(12), 12) == spec
    assert num_layers_of(spec) == 12


def test_units_outside_of_layers_belong_to_the_ends(make_spec) -> None:
    def unit(name: str, *, head: bool = False) -> UnitSpec:
        return UnitSpec(name=name, disk_bytes=1, decoded_bytes=1, flops_per_token=2.0, head=head)

    units = [unit("model.project_in"), unit("model.layers.0.mlp"), unit("model.layers.1.mlp"), unit("model.project_out")]
    spec = make_spec(layers=2, units=(*units, unit("lm_head", head=True)))
    names = [[each.name for each in stage.units] for stage in stages_of(spec, 1)]
    assert names == [["model.project_in", "model.layers.0.mlp"], ["model.layers.1.mlp", "model.project_out", "lm_head"]]


def test_kv_of_known_layers_goes_with_them_and_other_kv_is_spread(make_spec) -> None:
    full = KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0, layers=(0, 3))
    windowed = KVGroupSpec(num_layers=3, bytes_per_token=10, attention_flops_per_pair=4.0, window=8, layers=(1, 2, 5))
    spec = make_spec(layers=6, groups=(full, windowed))  # layer 4 has none
    first, second, third = stages_of(spec, 1, 3)
    assert first.kv_groups == (dataclasses.replace(full, num_layers=1, layers=(0,)),)
    assert second.kv_groups == (dataclasses.replace(windowed, num_layers=2, layers=(1, 2)),)
    assert [group.layers for group in third.kv_groups] == [(3,), (5,)]
    unknown = [dataclasses.replace(group, layers=()) for group in (full, windowed)]
    stages = stages_of(make_spec(layers=6, groups=tuple(unknown)), 1, 2, 3, 4, 5)
    assert [sum(group.num_layers for group in stage.kv_groups) for stage in stages].count(0) == 1
    assert [sum(group.num_layers for stage in stages for group in stage.kv_groups if group.window == window) for window in (None, 8)] == [
        2,
        3,
    ]


def test_layers_of_groups_come_back_from_json(make_spec) -> None:
    group = KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0, layers=(0, 2))
    spec = make_spec(groups=(group,))
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert '"layers": [0, 2]' in spec.to_json()
    assert '"layers": [' not in make_spec().to_json().split("unit_kinds")[0]
