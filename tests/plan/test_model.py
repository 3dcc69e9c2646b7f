"""ModelSpec as JSON: what is written comes back, compactly, and what is not understood is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import OptionError
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec

names = st.one_of(
    st.sampled_from(
        ["lm_head", "model.layers.3", "layers.3.mlp +2", "layers.03.mlp", "h.0", "a.{}.7.b", "{}", "a.12 +3", "model.7.8.9", ""]
    ),
    st.builds("model.layers.{}.mlp.{}".format, st.integers(0, 12), st.sampled_from(["gate", "up", "experts +1"])),
)
units = st.builds(
    UnitSpec,
    name=names,
    disk_bytes=st.integers(0, 3),
    decoded_bytes=st.integers(0, 2**60),
    flops_per_token=st.sampled_from([0.0, 1 / 3, 2e18]),
    head=st.booleans(),
    plain=st.sampled_from([None, True, False]),
    encoded_bytes=st.sampled_from([None, 0, 2**40]),
    int8_flops_per_token=st.sampled_from([0.0, 1 / 3]),
)

LAYERS = ((0, 1, 3), (2, 4))


def spec_with(units: list[UnitSpec]) -> ModelSpec:
    return ModelSpec(
        name="org/model", model_type="llama", units=tuple(units), resident_bytes=7, embedding_bytes=8, embedding_row_bytes=9,
        kv_groups=(
            KVGroupSpec(num_layers=3, bytes_per_token=10, attention_flops_per_pair=4.5, window=128),
            KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.5),
        ),
        hidden_size=8, intermediate_size=16, vocab_size=32, max_position_embeddings=64, number_format="mxfp4", dtype="float32",
    )  # fmt: skip


@given(st.lists(units, max_size=30))
def test_what_is_written_comes_back(units: list[UnitSpec]) -> None:
    spec = spec_with(units)
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_operations_come_back() -> None:
    spec = dataclasses.replace(spec_with([]), operations=1234)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "operations" not in spec_with([]).to_json(), "as in descriptions without them"


def test_a_low_bit_format_of_kv_comes_back() -> None:
    group = KVGroupSpec(
        num_layers=3, bytes_per_token=10, attention_flops_per_pair=4.5, exact_bytes_per_token=32, slot_bytes_per_token=12, window=7
    )
    spec = dataclasses.replace(spec_with([]), kv_groups=(group,), kv_format="int4")
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert (spec.kv_groups[0].disk_bytes_per_token, spec.disk_kv_growth) == (12, 1.2)
    assert spec_with([]).disk_kv_growth == 1


def test_a_sparse_model_comes_back() -> None:
    group = KVGroupSpec(
        num_layers=3, bytes_per_token=10, attention_flops_per_pair=4.5, value_bytes_per_token=5, queries_per_key=4, key_heads=8
    )
    spec = dataclasses.replace(spec_with([]), kv_groups=(group,), sparse_attention=0.1)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "sparse" not in spec_with([]).to_json()
    assert not {"queries_per_key", "key_heads"} & set(spec_with([]).to_json().split('"'))


def test_a_model_with_experts_comes_back() -> None:
    spec = dataclasses.replace(spec_with([]), expert_numbers_per_token=115_200, expert_bytes_per_token=7)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "expert" not in spec_with([]).to_json()


def test_the_layers_of_groups_come_back() -> None:
    windowed, full = (dataclasses.replace(group, layers=layers) for group, layers in zip(spec_with([]).kv_groups, LAYERS, strict=True))
    spec = dataclasses.replace(spec_with([]), kv_groups=(windowed, full))
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert [group.layers for group in spec.kv_groups] == list(LAYERS)
    assert '"layers":' not in spec_with([]).to_json()


def test_equal_layers_are_written_once() -> None:
    def layers(count: int) -> ModelSpec:
        unit = UnitSpec(name="", disk_bytes=4096, decoded_bytes=4096, flops_per_token=8.0)
        kinds = ("attn", "mlp", "mlp")
        return spec_with([dataclasses.replace(unit, name=f"layers.{layer}.{kind}") for layer in range(count) for kind in kinds])

    few, many = (layers(count).to_json() for count in (10, 99))
    assert len(few) == len(many)
    runs = json.loads(many)["unit_runs"]
    assert runs == [{"first": 0, "layers": 99, "kinds": [0, 1, 1]}]


@pytest.mark.parametrize("where", [(), ("kv_groups", 0), ("unit_kinds", 0), ("unit_runs", 0)])
def test_keys_are_all_known_and_all_there(make_spec: Callable[..., ModelSpec], where: tuple[str | int, ...]) -> None:
    def part(fields: dict) -> dict:
        for step in where:
            fields = fields[step]
        return fields

    text = make_spec().to_json()
    for key in part(json.loads(text)):
        fields = json.loads(text)
        del part(fields)[key]
        with pytest.raises(OptionError, match=f"missing keys: .*{key}"):
            ModelSpec.from_json(json.dumps(fields))
    fields = json.loads(text)
    part(fields)["surprise"] = 1
    with pytest.raises(OptionError, match=r"unknown keys: surprise"):
        ModelSpec.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"kv_groups": ["x"]}'])
def test_what_is_no_model(text: str) -> None:
    with pytest.raises(OptionError, match="model"):
        ModelSpec.from_json(text)


def test_runs_of_units_that_are_not_there(make_spec: Callable[..., ModelSpec]) -> None:
    fields = json.loads(make_spec().to_json())
    for runs in ([{"first": 0, "layers": 1, "kinds": [99]}], [{"first": "x", "layers": 1, "kinds": [0]}], 3):
        with pytest.raises(OptionError, match="model: "):
            ModelSpec.from_json(json.dumps(fields | {"unit_runs": runs}))
