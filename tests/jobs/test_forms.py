"""Forms: how a line's is found, and what records look like in each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexgen.api.fields import Answer, Form, JobRequest, Origin
from flexgen.api.openai import OpenAIForm
from flexgen.api.plain import PlainForm
from flexgen.chat import Chat
from flexgen.errors import OptionError, RequestError
from flexgen.jobs.forms import Forms, Remarks
from flexgen.jobs.lines import Line
from flexgen.request import CompletionOutput, Logprob, SamplingParams

DEFAULTS = SamplingParams(temperature=0.7, max_tokens=None)
MESSAGES = [{"role": "user", "content": "Hi"}]
ORIGIN = Origin(line_number=7, digest=0xABC, id="x")
PLAIN = PlainForm(defaults=DEFAULTS)


def openai(url: object = "/v1/completions") -> OpenAIForm:
    return OpenAIForm(url=url, model="org/model", created=1234, defaults=DEFAULTS)


def batch_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "c1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "p", **body}}


def chat_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES, **body}}


def parsed(line: object, **options: Any) -> tuple[Origin, Form, JobRequest | RequestError]:
    content = line if isinstance(line, bytes) else json.dumps(line).encode()
    forms = Forms(**{"model": "org/model", "created": 1234, "defaults": DEFAULTS, **options})
    return forms.parse(Line(number=3, content=content, digest=9))


# -- which form ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "form", "identity"),
    [
        ({"id": "a", "prompt": "p"}, PlainForm, "a"),
        ({"id": "a", "messages": MESSAGES}, PlainForm, "a"),
        (batch_line(), OpenAIForm, "c1"),
        (chat_line(), OpenAIForm, "c1"),
        ({"custom_id": "c", "body": {}}, OpenAIForm, "c"),
        ({"custom_id": "c", "url": "/v1/embeddings"}, OpenAIForm, "c"),
        ({"custom_id": "c", "prompt": "p"}, PlainForm, "c"),
        (b"not JSON", PlainForm, None),
        ([1], PlainForm, None),
    ],
    ids=str,
)
def test_the_form_of_a_line(line: object, form: type, identity: str | None) -> None:
    origin, found, request = parsed(line)
    assert isinstance(found, form)
    assert origin == Origin(line_number=3, digest=9, id=identity)
    assert found.failure(origin, request if isinstance(request, RequestError) else RequestError("no"))


def test_text_is_a_prompt_whatever_it_looks_like() -> None:
    for text in ('{"prompt": "p"}', "  two spaces ", "ü\0\x0b"):
        origin, form, request = parsed(text.encode(), input_format="text")
        assert isinstance(request, JobRequest)
        assert (request.prompt, request.params, origin.id, form) == (text, DEFAULTS, None, PLAIN)
    _, _, error = parsed(b"\xff", input_format="text")
    assert isinstance(error, RequestError)
    assert error.code == "invalid_utf8"


def test_an_unknown_input_format() -> None:
    with pytest.raises(OptionError, match="jsonl, text"):
        parsed({}, input_format="csv")


# -- the model that a line names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("named", "strict_error"), [(None, False), ("org/model", False), ("model", False), ("gpt-4o-mini", True)])
@pytest.mark.parametrize("line", [batch_line, chat_line, lambda **body: {"prompt": "p", **body}])
def test_strict_refuses_another_model(line: Any, named: str | None, strict_error: bool) -> None:
    _, _, request = parsed(line(model=named))
    assert isinstance(request, JobRequest)
    origin, form, request = parsed(line(model=named), strict=True)
    assert isinstance(request, RequestError) == strict_error
    if isinstance(request, RequestError):
        assert (request.code, request.param) == ("model_not_found", "model")
        record = form.failure(origin, request)
        assert "response" not in record or record["response"]["status_code"] == 404


def test_remarks_are_made_once() -> None:
    remarks = Remarks("org/model")
    assert remarks.lines() == []
    for _ in range(1000):
        _, _, request = parsed({"prompt": "p", "user": "u", "stream": False, "model": "gpt-4o"})
        assert isinstance(request, JobRequest)
        remarks.note(request)
    _, _, request = parsed({"prompt": "p", "user": "u", "model": "model"})
    assert isinstance(request, JobRequest)
    remarks.note(request)
    assert remarks.lines() == [
        "fields that have no effect here, with the number of lines that have them: user 1,001, stream 1,000",
        "lines that name another model, and are answered by org/model all the same: gpt-4o 1,000",
    ]


def test_remarks_stay_short() -> None:
    remarks = Remarks("m")
    for number in range(10_000):
        _, _, request = parsed({"prompt": "p", "model": f"other {number}"})
        assert isinstance(request, JobRequest)
        remarks.note(request)
    (line,) = remarks.lines()
    assert len(line) < 400
    assert "others 9,992" in line


# -- bare lines -----------------------------------------------------------------------------------------------------------------------


def test_bare_lines_have_the_job_s_defaults() -> None:
    for line in ({"prompt": "p"}, {"messages": MESSAGES}):
        request = PLAIN.parse(line)
        assert request.params == DEFAULTS
        assert not request.states_max_tokens
    assert isinstance(PLAIN.parse({"messages": MESSAGES}).prompt, Chat)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"id": "a"}, "a"),
        ({"id": 7}, 7),
        ({"id": 7.0}, 7),
        ({"custom_id": "c"}, "c"),
        ({}, None),
        ({"id": None}, None),
        ({"id": "a", "custom_id": None}, "a"),
    ],
)
def test_bare_identity(fields: dict[str, Any], wanted: object) -> None:
    assert PLAIN.identity(fields) == wanted
    PLAIN.parse({"prompt": "p", **fields})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"id": [1]}, None), ({"id": True}, None), ({"id": 1.5}, None), ({"id": "a", "custom_id": "b"}, "a"), ({"id": [], "custom_id": 5}, 5)],
)
def test_a_bare_id_that_is_none(fields: dict[str, Any], wanted: object) -> None:
    """Its error is found by what there is, all the same."""
    assert PLAIN.identity(fields) == wanted
    with pytest.raises(RequestError, match="id must be"):
        PLAIN.parse({"prompt": "p", **fields})


def test_bare_lines_have_one_prompt() -> None:
    with pytest.raises(RequestError, match="no prompt"):
        PLAIN.parse({})
    with pytest.raises(RequestError, match="both"):
        PLAIN.parse({"prompt": "p", "messages": MESSAGES})
    assert PLAIN.parse({"prompt": "p", "messages": None}).prompt == "p"
    assert isinstance(PLAIN.parse({"prompt": None, "messages": MESSAGES}).prompt, Chat)


# -- records ------------------------------------------------------------------------------------------------------------------------------

LOGPROBS = [{1: Logprob(logprob=-0.5, decoded_token="A")}, {2: Logprob(logprob=-1.0, decoded_token="b")}]
FIRST = CompletionOutput(index=0, text="Antwort ☃", token_ids=(1, 2, 3), finish_reason="stop", stop_reason=3)
SECOND = CompletionOutput(index=1, text="Ab", token_ids=(1, 2), finish_reason="length", logprobs=LOGPROBS)


def answer(*completions: CompletionOutput, shows_ids: bool = False, has_text: bool = True, logprobs: int | None = None) -> Answer:
    params = SamplingParams(n=len(completions), logprobs=logprobs)
    return Answer(num_prompt_tokens=2, completions=list(completions), params=params, shows_ids=shows_ids, has_text=has_text)


def test_bare_records() -> None:
    assert PLAIN.success(ORIGIN, answer(FIRST, shows_ids=True)) == {
        "id": "x",
        "index": 7,
        "text": "Antwort ☃",
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "stop_reason": 3,
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    without = PLAIN.success(ORIGIN, answer(FIRST, has_text=False))
    assert without["text"] is None
    assert "token_ids" not in without
    assert "logprobs" not in without
    assert PLAIN.failure(ORIGIN, RequestError("no", code="c", param="p")) == {
        "id": "x",
        "index": 7,
        "error": {"code": "c", "message": "no", "param": "p"},
    }


def test_a_bare_record_of_several_choices_has_lists() -> None:
    record = PLAIN.success(ORIGIN, answer(FIRST, FIRST, shows_ids=True))
    assert record["text"] == ["Antwort ☃"] * 2
    assert record["token_ids"] == [[1, 2, 3]] * 2
    assert (record["finish_reason"], record["stop_reason"]) == (["stop"] * 2, [3] * 2)
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_log_probabilities_in_a_bare_record() -> None:
    record = PLAIN.success(ORIGIN, answer(SECOND, logprobs=1))
    assert [entry["token"] for entry in record["logprobs"]] == ["A", "b"]
    assert [len(entry["top_logprobs"]) for entry in record["logprobs"]] == [1, 1]


# -- OpenAI's lines -------------------------------------------------------------------------------------------------------------------


def test_openai_defaults() -> None:
    """As vLLM's server: the model's own values; 16 tokens for completions, up to the context for chats."""
    request = openai().parse(batch_line())
    assert request.params == SamplingParams(temperature=0.7, max_tokens=16)
    assert not request.states_max_tokens
    chat = openai("/v1/chat/completions").parse(chat_line())
    assert chat.params == DEFAULTS


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"url": "/v1/embeddings"}, "unsupported_url", "url"),
        ({"url": None}, "unsupported_url", "url"),
        ({"url": ["/v1/completions"]}, "unsupported_url", "url"),
        ({"method": "GET"}, "invalid_request", "method"),
        ({"custom_id": None}, "invalid_request", "custom_id"),
        ({"custom_id": 5}, "invalid_request", "custom_id"),
        ({"body": None}, "invalid_request", "body"),
        ({"body": []}, "invalid_request", "body"),
        ({"body": {}}, "invalid_request", "prompt"),
        ({"url": "/v1/chat/completions", "body": {}}, "invalid_request", "messages"),
        ({"url": "/v1/chat/completions"}, "unknown_field", "prompt"),
    ],
)
def test_bad_batch_lines(change: dict[str, Any], code: str, param: str) -> None:
    origin, form, error = parsed(batch_line() | change)
    assert isinstance(error, RequestError)
    assert (error.code, error.param) == (code, param)
    assert form.failure(origin, error)["response"]["status_code"] == (404 if code == "unsupported_url" else 400)


@pytest.mark.parametrize(("custom_id", "kept"), [(16, 16), (16.0, 16), ("x", "x"), (True, None), ([1], None), (1.5, None), (None, None)])
def test_the_error_of_a_batch_line_has_its_id(custom_id: object, kept: object) -> None:
    origin, form, error = parsed(batch_line(max_tokens=0) | {"custom_id": custom_id})
    assert isinstance(error, RequestError)
    assert form.failure(origin, error)["custom_id"] == kept


def test_a_line_that_finds_a_bug_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.api.plain.parse_completion", lambda body, defaults: {}["x"])
    origin, _, error = parsed({"id": 5, "prompt": "p"})
    assert isinstance(error, RequestError)
    assert (origin.id, error.code) == (5, "internal_error")


def test_an_internal_error_is_the_server_s() -> None:
    record = openai().failure(ORIGIN, RequestError("bug", code="internal_error"))
    assert (record["response"]["status_code"], record["response"]["body"]["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize("url", ["/chat/completions", "/completions"])
def test_azure_s_urls(url: str) -> None:
    line = (chat_line() if "chat" in url else batch_line()) | {"url": url}
    origin, form, request = parsed(line)
    assert isinstance(request, JobRequest)
    assert form.success(origin, answer(FIRST))["response"]["status_code"] == 200


def test_openai_completions() -> None:
    record = json.loads(json.dumps(openai().success(ORIGIN, answer(FIRST))))
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
    (choice,) = openai().success(ORIGIN, answer(FIRST, shows_ids=True))["response"]["body"]["choices"]
    assert choice["token_ids"] == [1, 2, 3]


def test_openai_chats() -> None:
    body = openai("/v1/chat/completions").success(ORIGIN, answer(FIRST))["response"]["body"]
    assert body.pop("id").startswith("chatcmpl-")
    message = {"role": "assistant", "content": "Antwort ☃", "refusal": None}
    assert body == {
        "object": "chat.completion",
        "created": 1234,
        "model": "org/model",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


def test_openai_choices_and_log_probabilities() -> None:
    both = answer(FIRST, SECOND, logprobs=1)
    text = openai().success(ORIGIN, both)["response"]["body"]["choices"]
    chat = openai("/v1/chat/completions").success(ORIGIN, both)["response"]["body"]["choices"]
    assert [choice["index"] for choice in text] == [choice["index"] for choice in chat] == [0, 1]
    assert [choice["finish_reason"] for choice in chat] == ["stop", "length"]
    assert text[1]["logprobs"]["tokens"] == [entry["token"] for entry in chat[1]["logprobs"]["content"]] == ["A", "b"]
    assert text[0]["logprobs"] is chat[0]["logprobs"] is None


def test_openai_ids_are_the_same_at_every_run_and_differ_by_line() -> None:
    form = openai()
    assert form.success(ORIGIN, answer(FIRST)) == form.success(ORIGIN, answer(FIRST))
    other = Origin(line_number=8, digest=ORIGIN.digest, id="x")
    assert form.success(other, answer(FIRST))["id"] != form.success(ORIGIN, answer(FIRST))["id"]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("non_finite_logits", 500, "server_error"), ("x", 400, "invalid_request_error"), ("model_not_found", 404, "invalid_request_error")],
)
def test_openai_failures(code: str, status: int, kind: str) -> None:
    record = openai(None).failure(ORIGIN, RequestError("no", code=code, param="p"))
    assert record["error"] is None
    assert record["response"]["status_code"] == status
    assert record["response"]["body"] == {"error": {"message": "no", "type": kind, "param": "p", "code": code}}
