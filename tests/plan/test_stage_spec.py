"""The part of a model that a stage holds: its layers, what precedes all layers in the first stage, what follows them in the last."""

from __future__ import annotations

import pytest

from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.model import ModelSpec
from flexgen.plan.stages.spec import stage_spec


@pytest.mark.parametrize(("name", "num_layers"), [("gpt-oss-20b", 24), ("opt-125m", 12), ("deepseek-v3", 61), ("llama-3.2-1b", 16)])
def test_stages_add_up_to_the_model(name: str, num_layers: int) -> None:
    whole = catalogue_spec(name)
    cuts = [range(5), range(5, 6), range(6, num_layers)]
    stages = [stage_spec(whole, layers, num_layers) for layers in cuts]
    assert [unit for stage in stages for unit in stage.units] == list(whole.units)
    assert sum(stage.kv_bytes_per_token for stage in stages) == whole.kv_bytes_per_token
    assert sum(stage.resident_bytes for stage in stages) == pytest.approx(whole.resident_bytes, abs=3)
    assert [bool(stage.embedding_bytes) for stage in stages] == [True, False, False]
    assert [any(unit.head for unit in stage.units) for stage in stages] == [False, False, True]
    assert stage_spec(whole, range(num_layers), num_layers) == whole
    for stage, layers in zip(stages, cuts, strict=True):
        assert sorted(layer for group in stage.kv_groups for layer in group.decoder_layers) == list(layers)
        assert ModelSpec.from_json(stage.to_json()) == stage


def test_groups_are_in_the_order_of_the_layers_of_the_stage() -> None:
    """gpt-oss begins with a windowed layer, its layer 1 sees all."""
    whole = catalogue_spec("gpt-oss-20b")
    assert [group.window for group in whole.kv_groups] == [128, None]
    assert [group.window for group in stage_spec(whole, range(1, 24), 24).kv_groups] == [None, 128]
    (alone,) = stage_spec(whole, range(3, 4), 24).kv_groups
    assert (alone.window, alone.num_layers, alone.layers) == (None, 1, (3,))


def test_units_that_belong_to_no_layer() -> None:
    """Projections around the layers of OPT-350M: the one before them is in the first stage, the other in the last."""
    whole = catalogue_spec("opt-350m")
    outside = [unit.name for unit in whole.units if "layers" not in unit.name]
    first, last = (stage_spec(whole, layers, 24) for layers in (range(12), range(12, 24)))
    assert [unit.name for unit in first.units if "layers" not in unit.name] == outside[:1]
    assert [unit.name for unit in last.units if "layers" not in unit.name] == outside[1:]


def test_a_tied_embedding_takes_memory_apart_from_the_head() -> None:
    whole = catalogue_spec("llama-3.2-1b")
    assert whole.embedding_bytes == 0
    first, last = (stage_spec(whole, layers, 16) for layers in (range(8), range(8, 16)))
    assert first.embedding_bytes == sum(unit.decoded_bytes for unit in whole.units if unit.head) > 0
    assert last.embedding_bytes == 0
