"""Constraints and tools in bodies: response_format, structured_outputs, tools and tool_choice; what is wrong with them is named."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen import RequestError, SamplingParams, StructuredOutputsParams
from flexgen.api.bodies import parse_chat, parse_completion
from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.chat import Chat

DEFAULTS = SamplingParams(max_tokens=None)
LINE = JobRequest(line_number=1, digest=1, form=PlainForm(defaults=DEFAULTS))
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "description": None, "strict": True}}


def completion(**fields: Any) -> JobRequest:
    return parse_completion(LINE, {"prompt": "p", **fields}, DEFAULTS)


def chat(**fields: Any) -> JobRequest:
    return parse_chat(LINE, {"messages": [{"role": "user", "content": "Hi"}], **fields}, DEFAULTS)


@pytest.fixture(params=[completion, chat], ids=["completion", "chat"])
def parse(request: pytest.FixtureRequest) -> Any:
    return request.param


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **fields}}


@pytest.mark.parametrize(
    ("fields", "wanted", "constrained_by"),
    [
        ({}, None, "structured_outputs"),
        ({"response_format": None}, None, "structured_outputs"),
        ({"response_format": {"type": "text"}}, None, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}, "response_format"),
        ({"response_format": json_schema()}, {"json": SCHEMA}, "response_format"),
        ({"response_format": json_schema(strict=True, description="d")}, {"json": SCHEMA}, "response_format"),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "text"}}, {"choice": ["a"]}, "structured_outputs"),
    ],
    ids=str,
)
def test_constraints(parse: Any, fields: dict[str, Any], wanted: dict[str, Any] | None, constrained_by: str) -> None:
    request = parse(**fields)
    assert request.params.structured_outputs == (None if wanted is None else StructuredOutputsParams(**wanted))
    assert request.constrained_by == constrained_by
    assert request.ignored == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema(name=None)}, "response_format.json_schema.name"),
        ({"response_format": json_schema(name="a b")}, "response_format.json_schema.name"),
        ({"response_format": json_schema(schema=None)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(other=1)}, "response_format.json_schema.other"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"choices": ["a"], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"choices": ["a"], "response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(parse: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_an_error_of_the_constraint_names_the_line_s_own_field() -> None:
    error = RequestError("structured_outputs: no", code="c", param="structured_outputs")
    refused = chat(response_format={"type": "json_object"}).refused(error).error
    assert refused is not None
    assert (str(refused), refused.code, refused.param) == ("response_format: no", "c", "response_format")
    assert chat(structured_outputs={"regex": "a"}).refused(error).error is error


# -- tools ------------------------------------------------------------------------------------------------------------------------------


def shown(request: JobRequest) -> list[str]:
    """The names of the tools that the template gets."""
    assert isinstance(request.prompt, Chat)
    return [tool["function"]["name"] for tool in request.prompt.tools]


@pytest.mark.parametrize(
    ("choice", "required"),
    [(None, []), ("auto", []), ("required", ["add", "now"]), ({"type": "function", "function": {"name": "now"}}, ["now"])],
)
def test_tools(choice: Any, required: list[str]) -> None:
    request = chat(tools=[ADD, NOW], tool_choice=choice)
    assert shown(request) == ["add", "now"]
    assert request.tools is not None
    assert request.tools.tools == (ADD, {"type": "function", "function": {"name": "now", "strict": True}})
    assert [tool["function"]["name"] for tool in request.tools.required] == required
    assert request.tools.parallel
    assert request.ignored == ()


def test_one_call_at_a_time() -> None:
    request = chat(tools=[ADD], parallel_tool_calls=False)
    assert request.tools is not None
    assert not request.tools.parallel


@pytest.mark.parametrize(
    "fields", [{"tools": []}, {"tools": None}, {"tools": [ADD], "tool_choice": "none"}, {"tool_choice": "auto"}], ids=str
)
def test_no_tools(fields: dict[str, Any]) -> None:
    request = chat(**fields)
    assert request.tools is None
    assert shown(request) == [], "a model that must not call tools is not shown them"


def test_choices_are_scored_after_a_prompt_with_tools() -> None:
    request = chat(tools=[ADD], choices=["Yes", "No"])
    assert shown(request) == ["add"]
    assert request.tools is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"), ({"tools": [5]}, "tools[0]"), ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [ADD, {"type": "function", "function": {}}]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "args": {}}}]}, "tools[0].function"),
        ({"tools": [ADD, ADD]}, "tools"), ({"tools": [ADD], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tools": [ADD], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [ADD], "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(("field", "value"), [("tools", [ADD]), ("tool_choice", "required")])
def test_completions_have_no_tools(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        completion(**{field: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_field", field)
