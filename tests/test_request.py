"""Sampling parameters: values in and out of range, keywords that are unknown or have no effect here, all by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.errors import RequestError
from flexgen.request import Generated, SamplingParams, TokenLogprobs, TokenRequest

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 1.5), ("n", "1"), ("n", True), ("n", 16385), ("n", None),
        ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", "1"), ("presence_penalty", NAN),
        ("frequency_penalty", 2.1), ("frequency_penalty", -3), ("frequency_penalty", True),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", INFINITY), ("repetition_penalty", None),
        ("repetition_penalty", 1e-320), ("repetition_penalty", 1e39), ("repetition_penalty", 10**400),
        ("presence_penalty", 1e308), ("stop", ["a"] * 4097), ("bad_words", ["a"] * 4097), ("allowed_token_ids", [1.5]),
        ("temperature", -0.1), ("temperature", NAN), ("top_p", 0), ("top_p", 1.01), ("top_k", -2),
        ("top_k", 5.5), ("top_k", 2**63), ("top_k", 1e300),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", NAN), ("seed", 2**63), ("seed", 1.5), ("seed", 2**70),
        ("stop", ""), ("stop", [""]), ("stop", ["a", 1]), ("stop", 5), ("stop", {"a": 1}),
        ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("stop_token_ids", "12"),
        ("bad_words", "word"), ("bad_words", [""]), ("bad_words", [1]),
        ("ignore_eos", 1), ("include_stop_str_in_output", "yes"), ("skip_special_tokens", None),
        ("max_tokens", -1), ("max_tokens", 1.5), ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", None), ("min_tokens", 1.5),
        ("max_tokens", 10**30), ("max_tokens", NAN),
        ("logprobs", -2), ("logprobs", True), ("logprobs", 1.5), ("prompt_logprobs", -2), ("prompt_logprobs", True),
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


class Scalar:
    """A number of numpy or torch, as far as anybody looks."""

    ndim = 0

    def __init__(self, value: object) -> None:
        self.value = value

    def item(self) -> object:
        return self.value


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("n", 2.0, 2), ("max_tokens", 16.0, 16), ("top_k", -1.0, -1), ("seed", 3.0, 3), ("seed", -(2**63), -(2**63)), ("logprobs", 0.0, 0),
        ("max_tokens", np.int64(16), 16), ("max_tokens", np.float64(16), 16), ("seed", torch.tensor(3), 3), ("n", np.array(2), 2),
        ("temperature", np.float64(0.5), 0.5), ("top_p", torch.tensor(0.5), 0.5), ("min_p", Scalar(0.25), 0.25),
        ("temperature", 2**62, 2.0**62),
        ("ignore_eos", np.bool_(True), True), ("ignore_eos", torch.tensor(True), True), ("stop", (each for each in ["a"]), ("a",)),
        ("stop", np.array(["a", "b"]), ("a", "b")), ("stop_token_ids", np.array([3, 4]), (3, 4)), ("stop_token_ids", {3}, (3,)),
        ("stop_token_ids", range(2), (0, 1)), ("allowed_token_ids", torch.tensor([7, 8]), (7, 8)), ("allowed_token_ids", [7.0], (7,)),
        ("logit_bias", {np.int64(5): np.float32(2), "6.0": 1, 7.0: 1}, {5: 2.0, 6: 1.0, 7: 1.0}),
        ("repetition_penalty", 1e-38, 1e-38), ("repetition_penalty", 1e38, 1e38), ("temperature", 1e-320, 1e-320),
        ("top_p", 5e-324, 5e-324),
    ],
)  # fmt: skip
def test_numbers_and_lists_of_others_become_plain(name: str, given: Any, wanted: object) -> None:
    value = getattr(SamplingParams(**{name: given}), name)
    assert (value, type(value)) == (wanted, type(wanted))
    assert all(type(each) is type(other) for each, other in zip(value, wanted, strict=True)) if isinstance(wanted, tuple) else True


@pytest.mark.parametrize(
    "given", [np.bool_(True), torch.tensor(True), np.array([1]), torch.tensor([1]), np.float64(1.5), "1", 1j, object()]
)
def test_what_is_no_integer(given: Any) -> None:
    with pytest.raises(RequestError, match=r"^max_tokens must be an integer"):
        SamplingParams(max_tokens=given)


def test_an_error_shows_what_was_given() -> None:
    with pytest.raises(RequestError, match="max_tokens must be an integer of at least 0, not the text '16'"):
        SamplingParams(max_tokens="16")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="not a value of type int"):
        SamplingParams(max_tokens=10**5000)


def test_no_nucleus_where_nothing_is_drawn() -> None:
    assert SamplingParams(temperature=0, top_p=0).top_p == 0
    with pytest.raises(RequestError, match="top_p must be a number above 0, unless temperature is 0"):
        SamplingParams(temperature=0.1, top_p=0)


def test_best_of_one_may_be_any_one() -> None:
    one: dict[str, Any] = {"best_of": np.float64(1)}
    assert SamplingParams(**one) == SamplingParams()


def test_params_that_are_assigned_to_say_how_to_change_them() -> None:
    params = SamplingParams(max_tokens=8)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"dataclasses\.replace\(params, max_tokens=50\)"):
        params.max_tokens = 50  # pyright: ignore[reportAttributeAccessIssue]
    assert dataclasses.replace(params, max_tokens=50) == SamplingParams(max_tokens=50)
