"""Forms: how a line's is found, and what records look like in each."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from flexgen.api.job_request import JobRequest, LineForm
from flexgen.api.openai import OpenAIForm
from flexgen.api.plain import PlainForm
from flexgen.chat import Chat
from flexgen.errors import OptionError, RequestError
from flexgen.jobs.forms import Forms, Remarks
from flexgen.jobs.lines import Line
from flexgen.outputs import ClassificationOutput, ClassificationRequestOutput, CompletionOutput, Logprob, RequestOutput
from flexgen.request import SamplingParams

DEFAULTS = SamplingParams(temperature=0.7, max_tokens=None)
MESSAGES = [{"role": "user", "content": "Hi"}]
PLAIN = PlainForm(defaults=DEFAULTS)
BARE = JobRequest(line_number=7, digest=0xABC, form=PLAIN)


def openai(url: object = "/v1/completions") -> OpenAIForm:
    return OpenAIForm(url=url, model="org/model", created=1234, defaults=DEFAULTS)


def batch_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "c1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "p", **body}}


def chat_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES, **body}}


def parsed(line: object, **options: Any) -> JobRequest:
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
    request = parsed(line)
    assert isinstance(request.form, form)
    assert (request.line_number, request.digest, request.id) == (3, 9, identity)
    assert request.form.failure(request, request.error or RequestError("no"))


def test_text_is_a_prompt_whatever_it_looks_like() -> None:
    for text in ('{"prompt": "p"}', "  two spaces ", "ü\0\x0b"):
        request = parsed(text.encode(), input_format="text")
        assert (request.prompt, request.params, request.id, request.form) == (text, DEFAULTS, None, PLAIN)
    error = parsed(b"\xff", input_format="text").error
    assert isinstance(error, RequestError)
    assert error.code == "invalid_utf8"


def test_an_unknown_input_format() -> None:
    with pytest.raises(OptionError, match="jsonl, text"):
        parsed({}, input_format="csv")


# -- the model that a line names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("named", "strict_error"), [(None, False), ("org/model", False), ("model", False), ("gpt-4o-mini", True)])
@pytest.mark.parametrize("line", [batch_line, chat_line, lambda **body: {"prompt": "p", **body}])
def test_strict_refuses_another_model(line: Any, named: str | None, strict_error: bool) -> None:
    assert parsed(line(model=named)).error is None
    request = parsed(line(model=named), strict=True)
    error = request.error
    assert isinstance(error, RequestError) == strict_error
    if isinstance(error, RequestError):
        assert (error.code, error.param) == ("model_not_found", "model")
        record = request.form.failure(request, error)
        assert "response" not in record or record["response"]["status_code"] == 404


def test_remarks_are_made_once() -> None:
    remarks = Remarks("org/model")
    assert remarks.lines() == []
    for _ in range(1000):
        remarks.note(parsed({"prompt": "p", "user": "u", "stream": False, "model": "gpt-4o"}))
    remarks.note(parsed({"prompt": "p", "user": "u", "model": "model"}))
    assert remarks.lines() == [
        "fields that have no effect here, with the number of lines that have them: user 1,001, stream 1,000",
        "lines that name another model, and are answered by org/model all the same: gpt-4o 1,000",
    ]


def test_remarks_stay_short() -> None:
    remarks = Remarks("m")
    for number in range(10_000):
        remarks.note(parsed({"prompt": "p", "model": f"other {number}"}))
    (line,) = remarks.lines()
    assert len(line) < 400
    assert "others 9,992" in line


# -- bare lines -----------------------------------------------------------------------------------------------------------------------


def test_bare_lines_have_the_job_s_defaults() -> None:
    for fields in ({"prompt": "p"}, {"messages": MESSAGES}):
        request = PLAIN.parse(BARE, fields)
        assert request.params == DEFAULTS
        assert not request.states_max_tokens
    assert isinstance(PLAIN.parse(BARE, {"messages": MESSAGES}).prompt, Chat)


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
    PLAIN.parse(BARE, {"prompt": "p", **fields})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"id": [1]}, None), ({"id": True}, None), ({"id": 1.5}, None), ({"id": "a", "custom_id": "b"}, "a"), ({"id": [], "custom_id": 5}, 5)],
)
def test_a_bare_id_that_is_none(fields: dict[str, Any], wanted: object) -> None:
    """Its error is found by what there is, all the same."""
    assert PLAIN.identity(fields) == wanted
    with pytest.raises(RequestError, match="id must be"):
        PLAIN.parse(BARE, {"prompt": "p", **fields})


def test_bare_lines_have_one_prompt() -> None:
    with pytest.raises(RequestError, match="no prompt"):
        PLAIN.parse(BARE, {})
    with pytest.raises(RequestError, match="both"):
        PLAIN.parse(BARE, {"prompt": "p", "messages": MESSAGES})
    assert PLAIN.parse(BARE, {"prompt": "p", "messages": None}).prompt == "p"
    assert isinstance(PLAIN.parse(BARE, {"prompt": None, "messages": MESSAGES}).prompt, Chat)


# -- records ------------------------------------------------------------------------------------------------------------------------------

LOGPROBS = [{1: Logprob(logprob=-0.5, decoded_token="A")}, {2: Logprob(logprob=-1.0, decoded_token="b")}]
FIRST = CompletionOutput(index=0, text="Antwort ☃", token_ids=(1, 2, 3), finish_reason="stop", stop_reason=3)
SECOND = CompletionOutput(index=1, text="Ab", token_ids=(1, 2), finish_reason="length", logprobs=LOGPROBS)


def line(form: LineForm, **fields: Any) -> JobRequest:
    return dataclasses.replace(BARE, id="x", form=form, **fields)


def success(form: LineForm, *completions: CompletionOutput, shows_ids: bool = False, logprobs: int | None = None, **of_line: Any) -> Any:
    """The record of an answer to a prompt of two tokens."""
    params = SamplingParams(n=len(completions), logprobs=logprobs)
    return form.success(line(form, prompt="p", params=params, return_token_ids=shows_ids, **of_line), [output(*completions)])


def output(*completions: CompletionOutput, **how: Any) -> RequestOutput:
    return RequestOutput(**({"request_id": "0", "prompt": "p", "prompt_token_ids": (5, 6), "outputs": list(completions)} | how))


def failure(form: LineForm, error: RequestError) -> Any:
    return form.failure(line(form, error=error), error)


def test_bare_records() -> None:
    assert success(PLAIN, FIRST, shows_ids=True) == {
        "id": "x",
        "index": 7,
        "text": "Antwort ☃",
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "stop_reason": 3,
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    assert not {"token_ids", "logprobs"} & set(success(PLAIN, FIRST))
    without = success(dataclasses.replace(PLAIN, has_text=False), FIRST)
    assert (without["text"], without["token_ids"]) == (None, [1, 2, 3])
    assert failure(PLAIN, RequestError("no", code="c", param="p")) == {
        "id": "x",
        "index": 7,
        "error": {"code": "c", "message": "no", "param": "p"},
    }


def test_a_bare_record_of_several_choices_has_lists() -> None:
    record = success(PLAIN, FIRST, FIRST, shows_ids=True)
    assert record["text"] == ["Antwort ☃"] * 2
    assert record["token_ids"] == [[1, 2, 3]] * 2
    assert (record["finish_reason"], record["stop_reason"]) == (["stop"] * 2, [3] * 2)
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_log_probabilities_in_a_bare_record() -> None:
    record = success(PLAIN, SECOND, logprobs=1)
    assert [entry["token"] for entry in record["logprobs"]] == ["A", "b"]
    assert [len(entry["top_logprobs"]) for entry in record["logprobs"]] == [1, 1]


# -- OpenAI's lines -------------------------------------------------------------------------------------------------------------------


def test_openai_defaults() -> None:
    """As vLLM's server: the model's own values; 16 tokens for completions, up to the context for chats."""
    request = openai().parse(BARE, batch_line())
    assert request.params == SamplingParams(temperature=0.7, max_tokens=16)
    assert not request.states_max_tokens
    chat = openai("/v1/chat/completions").parse(BARE, chat_line())
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
    request = parsed(batch_line() | change)
    error = request.error
    assert isinstance(error, RequestError)
    assert (error.code, error.param) == (code, param)
    assert request.form.failure(request, error)["response"]["status_code"] == (404 if code == "unsupported_url" else 400)


@pytest.mark.parametrize(("url", "said"), [(None, "null"), ([True], "[true]"), ("/v1/embeddings", "the text '/v1/embeddings'")])
def test_a_url_that_is_not_served_is_shown_as_it_was_written(url: object, said: str) -> None:
    error = parsed(batch_line() | {"url": url}).error
    assert str(error) == f"url must be /v1/completions or /v1/chat/completions, not {said}"


@pytest.mark.parametrize(("custom_id", "kept"), [(16, 16), (16.0, 16), ("x", "x"), (True, None), ([1], None), (1.5, None), (None, None)])
def test_the_error_of_a_batch_line_has_its_id(custom_id: object, kept: object) -> None:
    request = parsed(batch_line(max_tokens=-1) | {"custom_id": custom_id})
    assert isinstance(request.error, RequestError)
    assert request.form.failure(request, request.error)["custom_id"] == kept


def test_a_line_that_finds_a_bug_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.api.plain.parse_completion", lambda line, body, defaults: {}["x"])
    request = parsed({"id": 5, "prompt": "p"})
    assert isinstance(request.error, RequestError)
    assert (request.id, request.error.code) == (5, "internal_error")


def test_an_internal_error_is_the_server_s() -> None:
    record = failure(openai(), RequestError("bug", code="internal_error"))
    assert (record["response"]["status_code"], record["response"]["body"]["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize("url", ["/chat/completions", "/completions"])
def test_azure_s_urls(url: str) -> None:
    request = parsed((chat_line() if "chat" in url else batch_line()) | {"url": url})
    assert request.form.success(request, [output(FIRST)])["response"]["status_code"] == 200


def test_openai_completions() -> None:
    record = json.loads(json.dumps(success(openai(), FIRST)))
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
    (choice,) = success(openai(), FIRST, shows_ids=True)["response"]["body"]["choices"]
    assert choice["token_ids"] == [1, 2, 3]


def test_openai_chats() -> None:
    body = success(openai("/v1/chat/completions"), FIRST)["response"]["body"]
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
    forms = (openai(), openai("/v1/chat/completions"))
    text, chat = (success(form, FIRST, SECOND, logprobs=1)["response"]["body"]["choices"] for form in forms)
    assert [choice["index"] for choice in text] == [choice["index"] for choice in chat] == [0, 1]
    assert [choice["finish_reason"] for choice in chat] == ["stop", "length"]
    assert text[1]["logprobs"]["tokens"] == [entry["token"] for entry in chat[1]["logprobs"]["content"]] == ["A", "b"]
    assert text[0]["logprobs"] is chat[0]["logprobs"] is None


def test_openai_ids_are_the_same_at_every_run_and_differ_by_line() -> None:
    form = openai()
    assert success(form, FIRST) == success(form, FIRST)
    assert success(form, FIRST, line_number=8)["id"] != success(form, FIRST)["id"]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("non_finite_logits", 500, "server_error"), ("x", 400, "invalid_request_error"), ("model_not_found", 404, "invalid_request_error")],
)
def test_openai_failures(code: str, status: int, kind: str) -> None:
    record = failure(openai(None), RequestError("no", code=code, param="p"))
    assert record["error"] is None
    assert record["response"]["status_code"] == status
    assert record["response"]["body"] == {"error": {"message": "no", "type": kind, "param": "p", "code": code}}


# -- scores -------------------------------------------------------------------------------------------------------------------------------

PROMPT_LOGPROBS = [None, {6: Logprob(logprob=-0.25, decoded_token="q"), 7: Logprob(logprob=-0.125, rank=1, decoded_token="r")}]
SCORED = output(SECOND, prompt="pq", prompt_logprobs=PROMPT_LOGPROBS)
SCORES = ClassificationOutput(probs=[0.25, 0.75], logprobs=[-2.0, -1.0], num_tokens=[2, 1], is_greedy=[False, True])


def scored(form: LineForm, *choices: str | tuple[int, ...]) -> Any:
    request = line(form, prompt="p" if isinstance(choices[0], str) else (5, 6), choices=choices)
    return form.scored(request, ClassificationRequestOutput(request_id="0", prompt=None, prompt_token_ids=(5, 6, 7), outputs=SCORES))


def label(choice: str | list[int], place: int) -> dict[str, Any]:
    name = "text" if isinstance(choice, str) else "token_ids"
    values = {"logprob": (-2.0, -1.0), "probability": (0.25, 0.75), "num_tokens": (2, 1), "is_greedy": (False, True)}
    return {name: choice, **{name: both[place] for name, both in values.items()}}


USAGE_OF_CHOICES = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_bare_records_of_choices() -> None:
    labels = [label("No", 0), label("Yes", 1)]
    assert scored(PLAIN, "No", "Yes") == {"id": "x", "index": 7, "text": "Yes", "labels": labels, "usage": USAGE_OF_CHOICES}
    record = json.loads(json.dumps(scored(PLAIN, (1, 2), (3,))))
    assert record == {
        "id": "x",
        "index": 7,
        "text": None,
        "token_ids": [3],
        "labels": [label([1, 2], 0), label([3], 1)],
        "usage": USAGE_OF_CHOICES,
    }


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_openai_records_of_choices(url: str) -> None:
    body = scored(openai(url), "No", "Yes")["response"]["body"]
    (choice,) = body["choices"]
    answer = {"message": {"role": "assistant", "content": "Yes", "refusal": None}} if "chat" in url else {"text": "Yes"}
    assert choice == {"index": 0, **answer, "logprobs": None, "finish_reason": "stop", "labels": [label("No", 0), label("Yes", 1)]}
    assert body["usage"] == USAGE_OF_CHOICES
    (choice,) = scored(openai(url), (1, 2), (3,))["response"]["body"]["choices"]
    assert choice["token_ids"] == [3]
    assert (choice["message"]["content"] if "chat" in url else choice["text"]) is None


def record_of(form: LineForm, *outputs: RequestOutput, **of_line: Any) -> Any:
    params = SamplingParams(n=len(outputs[0].outputs), logprobs=0, prompt_logprobs=1)
    return form.success(line(form, **({"prompt": "pq", "params": params} | of_line)), outputs)


def test_a_bare_record_of_a_scored_prompt() -> None:
    record = record_of(PLAIN, SCORED)
    assert record["text"] == "Ab"
    assert record["prompt_logprobs"][0] is None
    assert [(entry["token"], len(entry["top_logprobs"])) for entry in record["prompt_logprobs"][1:]] == [("q", 1)]
    echoed = record_of(PLAIN, SCORED, echo=True)
    assert echoed == record | {"text": "pqAb"}
    assert record_of(dataclasses.replace(PLAIN, has_text=False), SCORED, echo=True)["text"] is None


def test_several_answers_after_an_echo() -> None:
    both = output(SECOND, dataclasses.replace(SECOND, index=1, text="Ac"), prompt="pq", prompt_logprobs=PROMPT_LOGPROBS)
    record = record_of(PLAIN, both, echo=True)
    assert record["text"] == ["pqAb", "pqAc"]
    assert len(record["prompt_logprobs"]) == 2
    choices = record_of(openai(), both, echo=True)["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == ["pqAb", "pqAc"]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["p", "q", "A", "b"]] * 2


def test_openai_s_echo() -> None:
    (choice,) = record_of(openai(), SCORED, echo=True)["response"]["body"]["choices"]
    assert choice == {
        "index": 0,
        "text": "pqAb",
        "logprobs": {
            "tokens": ["p", "q", "A", "b"],
            "token_logprobs": [None, -0.25, -0.5, -1.0],
            "top_logprobs": [None, {"r": -0.125, "q": -0.25}, {"A": -0.5}, {"b": -1.0}],
            "text_offset": [0, 1, 2, 3],
        },
        "finish_reason": "length",
    }
    (plain,) = record_of(openai(), output(FIRST, prompt="pq"), echo=True)["response"]["body"]["choices"]
    assert (plain["text"], plain["logprobs"]) == ("pqAntwort ☃", None)


def test_vllm_s_prompt_logprobs() -> None:
    """In each choice of a completion, and beside the choices of a chat, if the line itself asks for them."""
    wanted = [
        None,
        {"6": {"logprob": -0.25, "rank": None, "decoded_token": "q"}, "7": {"logprob": -0.125, "rank": 1, "decoded_token": "r"}},
    ]
    for how in ({}, {"echo": True}):
        body = record_of(openai(), SCORED, states_prompt_logprobs=True, **how)["response"]["body"]
        assert [choice["prompt_logprobs"] for choice in body["choices"]] == [wanted]
    body = record_of(openai("/v1/chat/completions"), SCORED, states_prompt_logprobs=True)["response"]["body"]
    assert body["prompt_logprobs"] == wanted
    assert "prompt_logprobs" not in body["choices"][0]
    assert "prompt_logprobs" not in success(openai("/v1/chat/completions"), SECOND)["response"]["body"]


def test_several_prompts_of_one_line() -> None:
    """The choices of each prompt follow those of the one before it, and usage counts all."""
    outputs = [output(FIRST, SECOND, prompt=prompt) for prompt in ("pq", "r")]
    body = record_of(openai(), *outputs, more_prompts=("r",), echo=True)["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["pqAntwort ☃", "pqAb", "rAntwort ☃", "rAb"]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14}
    assert parsed(batch_line(prompt=["a", "b"])).more_prompts == ("b",)
    error = parsed({"prompt": ["a", "b"]}).error
    assert error is not None
    assert (error.code, error.param) == ("unsupported_field", "prompt")
    assert "write a line for each" in str(error)
