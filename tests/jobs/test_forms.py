"""Both forms of lines: what is accepted, refused by name, and what records look like."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexgen.errors import RequestError
from flexgen.jobs.fields import Answer, Origin
from flexgen.jobs.openai import OpenAIForm, is_batch_line
from flexgen.jobs.plain import PlainForm
from flexgen.request import CompletionOutput, SamplingParams

PLAIN = PlainForm(defaults=SamplingParams(temperature=0.7, max_tokens=None))
OPENAI = OpenAIForm(model="org/model", created=1234)


def batch_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "c1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "p", **body}}


# -- fields, the same in both forms ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "openai"])
def parse(request: pytest.FixtureRequest) -> Any:
    """A request from fields beside a prompt."""
    if request.param == "plain":
        return lambda **fields: PLAIN.parse({"id": 1, "prompt": "p", **fields})
    return lambda **fields: OPENAI.parse(batch_line(**fields))


def test_sampling_fields(parse: Any) -> None:
    given = {
        "max_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": -1, "seed": -3, "ignore_eos": True, "stop_token_ids": [1, 2],
        "skip_special_tokens": False,
    }  # fmt: skip
    request = parse(**given)
    assert request.params == SamplingParams(**given)
    assert request.states_max_tokens


def test_harmless_fields_are_accepted(parse: Any) -> None:
    plain = parse()
    assert plain == parse(user="u", metadata={"a": [1]}, store=True, service_tier="flex", stream=False, model="any")


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"best_of": 1},
        {"echo": False},
        {"logprobs": None},
        {"presence_penalty": 0.0},
        {"repetition_penalty": 1},
        {"stop": []},
        {"stop": ""},
        {"stop": None},
        {"logit_bias": {}},
        {"suffix": ""},
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"min_tokens": 0},
        dict.fromkeys(("n", "temperature", "max_tokens", "stop_token_ids", "return_token_ids", "ignore_eos")),
    ],
    ids=str,
)
def test_values_that_ask_for_nothing_are_accepted(parse: Any, fields: dict) -> None:
    assert parse(**fields) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("n", True), ("n", 1.5), ("best_of", 3), ("echo", True), ("echo", 0), ("logprobs", 0), ("logprobs", False),
        ("stream", True),
        ("presence_penalty", 0.1), ("frequency_penalty", -1), ("repetition_penalty", 1.1), ("stop", ["x"]), ("stop", "x"), ("min_p", 0.1),
        ("logit_bias", {"1": 5}), ("suffix", "s"), ("tools", [{}]), ("response_format", {"type": "json_object"}), ("min_tokens", 1),
        ("prompt_logprobs", 1), ("allowed_token_ids", [1]), ("bad_words", ["x"]), ("structured_outputs", {}),
    ],
)  # fmt: skip
def test_effects_that_are_not_there_are_refused_by_name(parse: Any, field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(**{field: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_field", field)


def test_an_unknown_field_is_refused_by_name(parse: Any) -> None:
    with pytest.raises(RequestError, match="'max_length'") as caught:
        parse(max_length=5)
    assert (caught.value.code, caught.value.param) == ("unknown_field", "max_length")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.0), ("max_tokens", "5"), ("max_tokens", True), ("temperature", -0.1),
        ("temperature", "0"), ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.0), ("seed", 2**64),
        ("seed", 0.5), ("ignore_eos", 1), ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]),
        ("skip_special_tokens", "yes"), ("return_token_ids", 1), ("max_tokens", 10**400), ("temperature", 10**400),
    ],
    ids=lambda value: str(value)[:10],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(parse: Any, field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("p", "p"), ("", ""), ([1, 2], (1, 2)), ([], ()), (["p"], "p"), ([[1, 2]], (1, 2)), ([10**400], (10**400,))],
)
def test_prompts(parse: Any, prompt: object, wanted: object) -> None:
    assert parse(prompt=prompt).prompt == wanted


@pytest.mark.parametrize("prompt", [None, 5, True, {}, {"text": "p"}, [1, "a"], [1.0], [True], ["a", "b"], [[1], [2]], [None]])
def test_what_is_no_prompt(parse: Any, prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse(prompt=prompt)
    assert caught.value.param == "prompt"


# -- bare lines -----------------------------------------------------------------------------------------------------------------------


def test_bare_defaults() -> None:
    request = PLAIN.parse({"prompt": "p"})
    assert request.params == PLAIN.defaults
    assert not request.states_max_tokens


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"id": "a"}, "a"),
        ({"id": 7}, 7),
        ({"custom_id": "c"}, "c"),
        ({}, None),
        ({"id": None}, None),
        ({"id": "a", "custom_id": None}, "a"),
    ],
)
def test_bare_identity(fields: dict, wanted: object) -> None:
    assert PLAIN.identity(fields) == wanted
    PLAIN.parse({"prompt": "p", **fields})


@pytest.mark.parametrize("fields", [{"id": [1]}, {"id": True}, {"id": 1.5}, {"id": "a", "custom_id": "b"}])
def test_a_bare_id_that_is_none(fields: dict) -> None:
    assert PLAIN.identity(fields) is None
    with pytest.raises(RequestError, match="id must be"):
        PLAIN.parse({"prompt": "p", **fields})


@pytest.mark.parametrize(("fields", "word"), [({}, "no prompt"), ({"messages": []}, "chat")])
def test_bare_lines_without_a_prompt(fields: dict, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        PLAIN.parse(fields)


COMPLETION = CompletionOutput(index=0, text="Antwort ☃", token_ids=(1, 2, 3), finish_reason="stop", stop_reason=3)
ORIGIN = Origin(line_number=7, digest=0xABC, id="x")


def test_bare_records() -> None:
    answer = Answer(num_prompt_tokens=2, completion=COMPLETION, shows_ids=True, has_text=True)
    assert PLAIN.success(ORIGIN, answer) == {
        "id": "x",
        "index": 7,
        "text": "Antwort ☃",
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "stop_reason": 3,
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    without = PLAIN.success(ORIGIN, Answer(num_prompt_tokens=2, completion=COMPLETION, shows_ids=False, has_text=False))
    assert without["text"] is None
    assert "token_ids" not in without
    assert PLAIN.failure(ORIGIN, RequestError("no", code="c", param="p")) == {
        "id": "x",
        "index": 7,
        "error": {"code": "c", "message": "no", "param": "p"},
    }


# -- OpenAI's lines -------------------------------------------------------------------------------------------------------------------


def test_openai_defaults_are_the_hosted_api_s() -> None:
    request = OPENAI.parse(batch_line())
    assert request.params == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=16)
    assert not request.states_max_tokens


def test_what_is_a_batch_line() -> None:
    assert is_batch_line(batch_line())
    assert is_batch_line({"body": {}})
    assert is_batch_line({"url": "/v1/chat/completions"})
    assert not is_batch_line({"prompt": "p", "custom_id": "c"})


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"url": "/v1/chat/completions"}, "unsupported_url", "url"),
        ({"url": "/v1/embeddings"}, "unsupported_url", "url"),
        ({"url": None}, "unsupported_url", "url"),
        ({"method": "GET"}, "invalid_request", "method"),
        ({"custom_id": None}, "invalid_request", "custom_id"),
        ({"custom_id": 5}, "invalid_request", "custom_id"),
        ({"body": None}, "invalid_request", "body"),
        ({"body": []}, "invalid_request", "body"),
        ({"body": {}}, "invalid_request", "prompt"),
    ],
)
def test_bad_batch_lines(change: dict, code: str, param: str) -> None:
    line = batch_line() | change
    with pytest.raises(RequestError) as caught:
        OPENAI.parse(line)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert OPENAI.failure(ORIGIN, caught.value)["response"]["status_code"] == (404 if code == "unsupported_url" else 400)


def test_openai_answers() -> None:
    answer = Answer(num_prompt_tokens=2, completion=COMPLETION, shows_ids=False, has_text=True)
    record = json.loads(json.dumps(OPENAI.success(ORIGIN, answer)))
    assert record["custom_id"] == "x"
    assert record["error"] is None
    assert record["response"]["status_code"] == 200
    assert record["response"]["request_id"]
    body = record["response"]["body"]
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": 1234,
        "model": "org/model",
        "choices": [{"index": 0, "text": "Antwort ☃", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    ids = Answer(num_prompt_tokens=2, completion=COMPLETION, shows_ids=True, has_text=True)
    assert OPENAI.success(ORIGIN, ids)["response"]["body"]["choices"][0]["token_ids"] == [1, 2, 3]


def test_openai_ids_are_the_same_at_every_run_and_differ_by_line() -> None:
    answer = Answer(num_prompt_tokens=2, completion=COMPLETION, shows_ids=False, has_text=True)
    assert OPENAI.success(ORIGIN, answer) == OPENAI.success(ORIGIN, answer)
    other = Origin(line_number=8, digest=ORIGIN.digest, id="x")
    assert OPENAI.success(other, answer)["id"] != OPENAI.success(ORIGIN, answer)["id"]


@pytest.mark.parametrize(("code", "status", "kind"), [("non_finite_logits", 500, "server_error"), ("x", 400, "invalid_request_error")])
def test_openai_failures(code: str, status: int, kind: str) -> None:
    record = OPENAI.failure(ORIGIN, RequestError("no", code=code, param="p"))
    assert record["error"] is None
    assert record["response"]["status_code"] == status
    assert record["response"]["body"] == {"error": {"message": "no", "type": kind, "param": "p", "code": code}}
