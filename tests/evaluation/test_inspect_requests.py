"""inspect-ai's messages and configuration become lines, and records become its choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexgen import RequestError
from flexgen.api.bodies import parse_chat
from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.chat import Chat
from flexgen.evaluation.inspect_requests import Seeds, choices_of, line_of, stop_reason_of
from flexgen.request import SamplingParams

DEFAULTS = SamplingParams()
LINE = JobRequest(line_number=1, digest=1, form=PlainForm(defaults=DEFAULTS))


def message(role: str, content: object, **more: object) -> Any:
    return SimpleNamespace(role=role, content=content, **more)


HELLO = [message("user", "Hello")]


def parsed(line: dict[str, Any]) -> JobRequest:
    return parse_chat(LINE, line, DEFAULTS)


def test_the_configuration_has_its_place_in_the_line() -> None:
    config = {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "stop_seqs": ["\n"], "num_choices": 2, "logprobs": True,
        "top_logprobs": 4, "frequency_penalty": 0.1, "presence_penalty": 0.2, "logit_bias": {5: 1.0}, "prompt_logprobs": 1,
    }  # fmt: skip
    params = parsed(line_of(HELLO, config)).params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (7, 0.5, 0.9, 5, 3)
    assert (params.stop, params.n, params.logprobs, params.prompt_logprobs) == (("\n",), 2, 4, 1)
    assert (params.frequency_penalty, params.presence_penalty, params.logit_bias) == (0.1, 0.2, {5: 1.0})


def test_other_fields_of_the_engine_are_given_as_extra_body() -> None:
    assert parsed(line_of(HELLO, {"extra_body": {"min_p": 0.1}})).params.min_p == 0.1


def test_what_inspect_ai_does_itself_is_no_concern_of_the_engine() -> None:
    assert line_of(HELLO, {"max_connections": 5, "timeout": 10, "cache": True}) == line_of(HELLO, {})


@pytest.mark.parametrize("name", ["best_of", "response_schema", "reasoning_tokens", "something_new"])
def test_what_cannot_be_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        line_of(HELLO, {name: 1})


def test_messages_keep_their_roles_their_texts_and_their_calls() -> None:
    call = SimpleNamespace(id="c1", function="add", arguments={"x": 1})
    messages = [
        message("system", "Be kind."),
        message("user", [SimpleNamespace(type="text", text="one"), SimpleNamespace(type="text", text="two")]),
        message("assistant", "", tool_calls=[call]),
        message("tool", "2", tool_call_id="c1", function="add"),
    ]
    chat = parsed(line_of(messages, {})).prompt
    assert isinstance(chat, Chat)
    assert [each["role"] for each in chat.messages] == ["system", "user", "assistant", "tool"]
    assert chat.messages[1]["content"] == "one\ntwo"
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": 1}}
    assert (chat.messages[3]["tool_call_id"], chat.messages[3]["name"]) == ("c1", "add")


def test_images_are_refused() -> None:
    with pytest.raises(RequestError, match="image"):
        line_of([message("user", [SimpleNamespace(type="image", image="x.png")])], {})


def test_the_end_of_an_answer_is_told_in_inspect_ais_words() -> None:
    usage = {"total_tokens": 10}
    assert stop_reason_of("stop", usage, 100) == "stop"
    assert stop_reason_of("length", usage, 100) == "max_tokens"
    assert stop_reason_of("length", usage, 10) == "model_length"


def test_a_record_has_as_many_choices_as_answers() -> None:
    one = {"text": "a", "finish_reason": "stop", "stop_reason": None}
    assert choices_of(one) == [{"text": "a", "finish_reason": "stop"}]
    several = {"text": ["a", "b"], "finish_reason": ["stop", "length"], "stop_reason": [None, None], "logprobs": [[1], [2]]}
    assert choices_of(several) == [
        {"text": "a", "finish_reason": "stop", "logprobs": [1]},
        {"text": "b", "finish_reason": "length", "logprobs": [2]},
    ]


def test_epochs_have_different_seeds_and_runs_the_same() -> None:
    line = line_of(HELLO, {})
    first, second = ([seeds.with_seed(line)["seed"] for _ in range(3)] for seeds in (Seeds(0), Seeds(0)))
    assert first == second
    assert len({*first, Seeds(1).with_seed(line)["seed"]}) == 4
    assert Seeds(0).with_seed({**line, "seed": 5})["seed"] == 5
    assert all(parsed({**line, "seed": seed}).params.seed == seed for seed in first)
