"""Messages: what is accepted, what becomes of it, and how what is not is named."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.chat import Chat, make_chats, parse_messages
from flexgen.errors import RequestError

A, B = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (USER, USER),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": [A, B]}),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}, "b"]}, {"role": "user", "content": [A, B]}),
        ({"role": "user", "content": [{**A, "cache": 1, "image": None}]}, {"role": "user", "content": [{**A, "cache": 1}]}),
        ({"role": "user", "content": []}, {"role": "user", "content": []}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}]}, {"role": "assistant", "content": [A]}),
        ({"role": "tool", "content": "1", "tool_call_id": "c"}, {"role": "tool", "content": "1", "tool_call_id": "c"}),
        ({**USER, "name": "Ada", "weight": 0, "refusal": None, "tool_calls": None}, {**USER, "name": "Ada", "weight": 0}),
        ({"role": "assistant", "content": "a", "tool_calls": []}, {"role": "assistant", "content": "a"}),
        ({"role": "critic", "content": "a"}, {"role": "critic", "content": "a"}),
    ],
    ids=str,
)
def test_messages(message: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert parse_messages([message]) == (wanted,)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}), ("", {}), (None, {}), ({"a": 1}, {"a": 1}), ("[]", [])],
)
def test_arguments_of_tool_calls_become_objects(arguments: object, wanted: object) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (parsed,) = parse_messages([message])
    assert parsed == {"role": "assistant", "tool_calls": [{**call, "function": {"name": "f", "arguments": wanted}}]}
    assert call["function"]["arguments"] is arguments  # the caller's objects are the caller's


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_every_name(name: str) -> None:
    (parsed,) = parse_messages([{"role": "assistant", "content": "a", name: "r"}])
    assert parsed["thinking"] == parsed["reasoning_content"] == "r"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ({}, "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([USER, None], "messages[1]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": 5, "content": "Hi"}], "messages[0].role"),
        ([{"role": "", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "tool_calls": [{}]}], "messages[0].content"),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "messages[0].content"),
        ([USER, {"role": "user", "content": ["a", 5]}], "messages[1].content[1]"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": [], "text": "a"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 10**5}}]}], "messages[0].tool_calls[0].function.arguments"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_message(messages: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages(messages)
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": [{"type": "file", "file": {}}]},
        {"role": "assistant", "content": "a", "audio": {"id": "x"}},
    ],
    ids=str,
)
def test_what_is_not_text_is_refused_by_name(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\].*not supported") as caught:
        parse_messages([USER, message])
    assert caught.value.code == "unsupported_field"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs"),
    ],
)
def test_chats_that_contradict_themselves(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        Chat(messages=(USER,), **fields)
    assert caught.value.param == param


def test_only_a_content_can_be_continued() -> None:
    call = parse_messages([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}])
    with pytest.raises(RequestError, match="no content"):
        Chat(messages=call, add_generation_prompt=False, continue_final_message=True)


def test_one_conversation_or_several() -> None:
    one = make_chats([USER], add_generation_prompt=False)
    assert one == [Chat(messages=(USER,), add_generation_prompt=False)]
    assert make_chats([[USER], [USER, USER]]) == [Chat(messages=(USER,)), Chat(messages=(USER, USER))]
    assert make_chats([]) == []
    with pytest.raises(RequestError, match=r"conversation 1: messages\[0\]\.role"):
        make_chats([[USER], [{"content": "x"}]])
    with pytest.raises(RequestError, match="list"):
        make_chats("Hi")
