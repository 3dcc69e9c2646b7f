"""Sampling parameters: values in and out of range, keywords that are unknown or have no effect here, all by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from flexgen.errors import RequestError
from flexgen.request import Generated, SamplingParams, TokenLogprobs, TokenRequest

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 1.0), ("n", True), ("n", 16385), ("n", None),
        ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", "1"), ("presence_penalty", NAN),
        ("frequency_penalty", 2.1), ("frequency_penalty", -3), ("frequency_penalty", True),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", INFINITY), ("repetition_penalty", None),
        ("temperature", -0.1), ("temperature", NAN), ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("top_k", 5.0),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", NAN), ("seed", 2**63), ("seed", 1.0),
        ("stop", ""), ("stop", [""]), ("stop", ["a", 1]), ("stop", 5), ("stop", {"a": 1}),
        ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("stop_token_ids", "12"),
        ("bad_words", "word"), ("bad_words", [""]), ("bad_words", [1]),
        ("ignore_eos", 1), ("include_stop_str_in_output", "yes"), ("skip_special_tokens", None),
        ("max_tokens", 0), ("max_tokens", 1.5), ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", None), ("min_tokens", 1.0),
        ("logprobs", -2), ("logprobs", True), ("logprobs", 1.0),
        ("logit_bias", [1]), ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {1: "x"}), ("logit_bias", {1: NAN}),
        ("logit_bias", {1.5: 1}), ("logit_bias", {True: 1}), ("logit_bias", {"9" * 5000: 1}), ("logit_bias", {"²": 1}),
        ("allowed_token_ids", []), ("allowed_token_ids", [-1]), ("allowed_token_ids", 5), ("allowed_token_ids", ["1"]),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("stop", "x", ("x",)),
        ("stop", ["b", "a", "b"], ("b", "a")),
        ("stop", None, ()),
        ("stop_token_ids", [3, 1, 3], (3, 1)),
        ("stop_token_ids", None, ()),
        ("bad_words", ["b", "b"], ("b",)),
        ("bad_words", None, ()),
        ("logit_bias", {"5": 3, 6: -0.5}, {5: 3.0, 6: -0.5}),
        ("logit_bias", {5: 1e6, 6: -1e6}, {5: 100.0, 6: -100.0}),
        ("logit_bias", {}, None),
        ("allowed_token_ids", [7, 7, 8], (7, 8)),
    ],
)
def test_values_take_one_form(name: str, value: Any, wanted: Any) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == wanted
    assert params == dataclasses.replace(params), "a second pass changes nothing"


@pytest.mark.parametrize(
    "keywords",
    [
        {"prompt_logprobs": 1},
        {"structured_outputs": {"json": {}}},
        {"guided_decoding": {}},
        {"logits_processors": [print]},
        {"detokenize": False},
        {"detokenize": 1},
        {"best_of": 2},
        {"logprob_token_ids": [1]},
        {"flat_logprobs": True},
        {"truncate_prompt_tokens": 5},
        {"thinking_token_budget": 0},
        {"output_kind": "delta"},
        {"spaces_between_special_tokens": False},
    ],
    ids=str,
)
def test_keywords_without_effect_are_refused_by_name(keywords: dict[str, Any]) -> None:
    (name,) = keywords
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(temperature=0, **keywords)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", name)


def test_keywords_that_ask_for_no_effect_are_accepted() -> None:
    neutral: dict[str, Any] = {"prompt_logprobs": None, "detokenize": True, "best_of": 1, "structured_outputs": None}
    assert SamplingParams(top_k=3, **neutral) == SamplingParams(top_k=3)


def test_an_unknown_keyword_is_refused_with_the_near_one() -> None:
    wrong: dict[str, Any] = {"temprature": 1}
    with pytest.raises(RequestError, match="'temprature'; did you mean temperature") as caught:
        SamplingParams(**wrong)
    assert (caught.value.code, caught.value.param) == ("unknown_field", "temprature")


def test_it_is_a_value() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, allowed_token_ids=[5], seed=3)
    assert params == pickle.loads(pickle.dumps(params)) == copy.deepcopy(params)
    assert hash(params) == hash(copy.copy(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]


def test_its_signature_names_the_keywords() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == [field.name for field in dataclasses.fields(SamplingParams)]


def test_a_caller_s_lists_are_copied() -> None:
    stop, biases = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=biases)
    stop.append("b")
    biases[2] = 2.0
    assert (params.stop, params.logit_bias) == (("a",), {1: 1.0})


ENTRY = TokenLogprobs(token_ids=(5,), logprobs=(-1.0,), rank=1)


def test_logprobs_of_earlier_tokens_must_be_complete() -> None:
    with pytest.raises(ValueError, match="1 logprobs for 2"):
        Generated(token_ids=(5, 6), logprobs=(ENTRY,))
    with pytest.raises(ValueError, match="missing"):
        TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=3, num_logprobs=0, generated=Generated(token_ids=(5,)))
    TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=3, num_logprobs=0, generated=Generated(token_ids=(5,), logprobs=(ENTRY,)))
