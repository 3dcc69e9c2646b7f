"""Constraints as values: one of five, in one form, and refused by name where they are none."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest

from flexgen import RequestError, SamplingParams, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"b": {"const": "é"}, "a": {}}}


@pytest.mark.parametrize(
    "given",
    [{"json": SCHEMA}, {"regex": "a+"}, {"choice": ["a", "b"]}, {"grammar": "start: A"}, {"json_object": True}],
    ids=str,
)
def test_one_constraint(given: dict[str, Any]) -> None:
    params = StructuredOutputsParams(**given)
    assert params == dataclasses.replace(params) == pickle.loads(pickle.dumps(params))
    assert hash(params) == hash(StructuredOutputsParams(**given))
    assert SamplingParams(structured_outputs=params) == SamplingParams(structured_outputs=given)


def test_a_schema_is_kept_as_text_in_its_own_order() -> None:
    params = StructuredOutputsParams(json=SCHEMA)
    assert params == StructuredOutputsParams(json=json.dumps(SCHEMA, indent=2))
    assert isinstance(params.json, str)
    assert list(json.loads(params.json)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    "given", [{}, {"json": None}, {"json_object": False}, {"regex": "a", "choice": ["a"]}, {"json": {}, "json_object": True}]
)
def test_exactly_one_is_wanted(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="exactly one"):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"json": "{"}, "json"), ({"json": 5}, "json"), ({"json": True}, "json"), ({"json": "[1]"}, "json"),
        ({"json": {"const": float("nan")}}, "json"),
        ({"json": {"const": {1, 2}}}, "json"), ({"regex": ""}, "regex"), ({"regex": 5}, "regex"), ({"choice": []}, "choice"),
        ({"choice": "ab"}, "choice"), ({"choice": [""]}, "choice"), ({"choice": [1]}, "choice"), ({"grammar": ["a"]}, "grammar"),
        ({"json_object": "yes"}, "json_object"), ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern"), ({"jsn": {}}, "jsn"),
        ({"json": {}, "structural_tag": "x"}, "structural_tag"),
        ({"json": {}, "disable_additional_properties": True}, "disable_additional_properties"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_used_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        StructuredOutputsParams(**given)
    assert caught.value.param == param
    with pytest.raises(RequestError, match=f"structured_outputs: .*{param}") as caught:
        SamplingParams(structured_outputs=given)
    assert caught.value.param == f"structured_outputs.{param}"


def test_vllm_s_neutral_values_are_accepted() -> None:
    neutral: dict[str, Any] = {"disable_additional_properties": False, "structural_tag": None, "disable_fallback": False}
    assert StructuredOutputsParams(regex="a", **neutral) == StructuredOutputsParams(regex="a")


@pytest.mark.parametrize("value", ["json", 5, [{}], {1: 2}])
def test_only_constraints_are_constraints(value: Any) -> None:
    with pytest.raises(RequestError, match="structured_outputs must be an object"):
        SamplingParams(structured_outputs=value)
