"""Structured output end to end: the bundled models, llguidance, and jsonschema as the judge of every answer that is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chat.jinja import CHATML, TOOLS
from machines import machine_of
from openai.types.chat import ChatCompletion

from flexgen import LLM, RequestError, SamplingParams, StructuredOutputsParams
from flexgen.jobs.durable import answer_lines
from flexgen.jobs.interrupt import Stopped, StopRequest
from flexgen.session import prepare

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}},
    "required": ["x"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, 2]}}]},
    {
        "$defs": {"point": POINT},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"host": {"type": "string", "format": "ipv4"}, "id": {"type": "string", "pattern": "^[A-F]{2}-[0-9]{3}$"}},
        "required": ["host", "id"],
        "additionalProperties": False,
    },
]
COMPACT = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
ADD = {"type": "function", "function": {"name": "add", "parameters": {**PERSON, "x-guidance": {"whitespace_flexible": False}}}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
# That of Qwen 2.5 and 3, without special tokens.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*</s>", "content": "text"},
    },
}


@pytest.fixture(scope="module")
def llm(novels_opt: Path) -> Iterator[LLM]:
    machine = machine_of(decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
    with pytest.MonkeyPatch.context() as patch, LLM(novels_opt, dtype="float32", device="cpu", chat_template=TOOLS) as llm:
        patch.setattr(prepare, "cached_machine", lambda *_, **__: machine)
        assert llm.tokenizer is not None
        llm.tokenizer.hf.response_template = RESPONSE_TEMPLATE  # pyright: ignore[reportAttributeAccessIssue]
        yield llm


def lines() -> list[dict[str, Any]]:
    """Schemas, greedy and sampled, in every form of lines; between them lines without any."""
    found: list[dict[str, Any]] = []
    for place in range(10):
        schema = {**SCHEMAS[place % len(SCHEMAS)], "x-guidance": {"whitespace_flexible": False}}
        how: dict[str, Any] = {"max_tokens": 200, "temperature": [0, 1.0][place % 2], "seed": place}
        constraint = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
        if place % 4 == 0:
            constraint = {"structured_outputs": {"json": schema}}
        if place % 4 == 3:
            body = {"messages": [{"role": "user", "content": f"Number {place}"}], **constraint, **how}
            found.append({"custom_id": str(place), "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            found.append({"id": str(place), "prompt": f"The {place} of them", **constraint, **how})
        found.append(
            {"id": f"free {place}", "prompt": f"It was {place}", "max_tokens": 12, "temperature": how["temperature"], "seed": place}
        )
    return found


def text_of(record: dict[str, Any]) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    if "custom_id" in record:
        choice = record["response"]["body"]["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    assert record["stop_reason"] is None
    return record["text"], record["finish_reason"]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the time at which its job was begun."""
    return json.loads(re.sub(r'"created": \d+', '"created": 0', json.dumps(record)))


@pytest.fixture(scope="module")
def records(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return list(answer_lines(llm, lines(), tmp_path_factory.mktemp("jobs") / "whole"))


def test_every_complete_answer_is_what_its_schema_asks_for(records: list[dict[str, Any]]) -> None:
    ended = {"stop": 0, "length": 0}
    for place, record in enumerate(records[::2]):
        text, finish_reason = text_of(record)
        ended[finish_reason] += 1
        if finish_reason == "stop":
            checker = jsonschema.FormatChecker()
            jsonschema.validate(json.loads(text), SCHEMAS[place % len(SCHEMAS)], format_checker=checker)
    assert ended == {"stop": 10, "length": 0}, "these schemas have no answers of 200 tokens"


def test_lines_without_a_constraint_are_answered_as_in_a_job_without_any(llm: LLM, records: list[dict[str, Any]], tmp_path: Path) -> None:
    free = lines()[1::2]
    alone = list(answer_lines(llm, free, tmp_path / "free"))
    unindexed = [{name: value for name, value in record.items() if name != "index"} for record in records[1::2]]
    assert unindexed == [{name: value for name, value in record.items() if name != "index"} for record in alone]


def test_a_job_that_was_stopped_in_the_middle_goes_on_to_the_same_answers(llm: LLM, records: list[dict[str, Any]], tmp_path: Path) -> None:
    """Twice or more, so that most answers are interrupted within their JSON."""

    class After(StopRequest):
        def __init__(self, num_passes: int) -> None:
            super().__init__()
            self.left = num_passes

        @property
        def asked(self) -> bool:
            self.left -= 1
            return self.left < 0

    num_stops = 0
    for _ in range(100):
        try:
            found = list(answer_lines(llm, lines(), tmp_path / "stopped", stop=After(9)))
            break
        except Stopped:
            num_stops += 1
    assert num_stops > 1
    assert list(map(timeless, found)) == list(map(timeless, records))


def test_an_answer_that_is_cut_off_says_so(llm: LLM, tmp_path: Path) -> None:
    """Whatever its beginning looks like."""
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 50}
    (record,) = answer_lines(
        llm, [{"prompt": "One", "structured_outputs": {"json": long}, "max_tokens": 20, "temperature": 0}], tmp_path / "j"
    )
    assert (record["finish_reason"], record["usage"]["completion_tokens"]) == ("length", 20)
    with pytest.raises(json.JSONDecodeError):
        json.loads(record["text"])


@pytest.mark.parametrize(
    ("line", "param", "named"),
    [
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs", "uniqueItems"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"if": {}, "then": {}}}}},
            "response_format",
            "response_format.*if",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs"),
    ],
    ids=["keyword", "response_format", "regex"],
)
def test_what_cannot_be_enforced_is_the_error_of_its_line(llm: LLM, tmp_path: Path, line: dict[str, Any], param: str, named: str) -> None:
    fine = {"prompt": "It", "structured_outputs": {"choice": ["was"]}, "max_tokens": 9}
    bad, good = answer_lines(llm, [{"prompt": "It", **line}, fine], tmp_path / "j")
    assert (bad["error"]["param"], bad["error"]["code"]) == (param, "unsupported_constraint")
    assert re.search(named, bad["error"]["message"])
    assert good["text"] == "was"


# -- from Python --------------------------------------------------------------------------------------------------------------------------


def generate(llm: LLM, prompt: str = "The house", *, max_tokens: int = 60, **how: Any) -> Any:
    values: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, **how}
    outputs = llm.generate([prompt], SamplingParams(**values))
    return outputs[0].outputs[0]


def test_every_kind_of_constraint(llm: LLM) -> None:
    def text(**constraint: Any) -> str:
        answer = generate(llm, structured_outputs=StructuredOutputsParams(**constraint))
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
        return answer.text

    assert text(choice=["of stone", "of wood"]) in ("of stone", "of wood")
    assert re.fullmatch(r"[a-f]{3}-\d{2}", text(regex=r"[a-f]{3}-\d{2}"))
    assert re.fullmatch(r"\((ab|c)\)", text(grammar='start: "(" ("ab" | "c") ")"'))
    assert re.fullmatch(r"x[yz]", text(grammar='root ::= "x" ("y" | "z")'))
    assert json.loads(text(json=SCHEMAS[1]))


def test_an_answer_ends_without_a_pass_for_its_end(llm: LLM) -> None:
    """Where nothing can follow, no token is generated to say so."""
    answer = generate(llm, structured_outputs={"regex": "a"})
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == ("a", 1, "stop")
    answer = generate(llm, structured_outputs={"regex": "a"}, max_tokens=1)
    assert (answer.text, answer.finish_reason) == ("a", "stop")


def test_several_answers_to_a_prompt(llm: LLM) -> None:
    params = SamplingParams(n=5, temperature=1.0, seed=1, max_tokens=60, structured_outputs=COMPACT)
    (output,) = llm.generate(["The house"], params)
    for answer in output.outputs:
        jsonschema.validate(json.loads(answer.text), PERSON)
    assert len({answer.text for answer in output.outputs}) > 1


def test_other_ends_are_those_of_any_answer(llm: LLM) -> None:
    """Stop strings and tokens end it where they appear, whole or not; then they are named."""
    digits = {"regex": "[0-9]{30}"}
    whole = generate(llm, structured_outputs=digits).text
    stopped = generate(llm, structured_outputs=digits, stop=[whole[4:7]])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", whole[4:7])
    assert whole.startswith(stopped.text)
    assert stopped.text != whole


def test_masks_combine(llm: LLM) -> None:
    free = generate(llm, structured_outputs={"choice": ["a", "b", "c"]}).text
    other = generate(llm, structured_outputs={"choice": ["a", "b", "c"]}, bad_words=[free]).text
    assert other in {"a", "b", "c"} - {free}
    nothing = generate(llm, structured_outputs={"choice": ["a"]}, min_tokens=2)
    assert (nothing.finish_reason, nothing.stop_reason) == ("error", "no_token_allowed")
    long = generate(llm, structured_outputs={"regex": "a+"}, min_tokens=5, ignore_eos=True, max_tokens=8)
    assert (set(long.text), long.finish_reason) == ({"a"}, "length")


def test_a_bad_constraint_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompt 0: .*uniqueItems"):
        generate(llm, structured_outputs={"json": {"uniqueItems": True}})


# -- tools ------------------------------------------------------------------------------------------------------------------------------


def chat_line(**fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Add."}], "max_tokens": 150, "temperature": 0, "tools": [ADD, NOW], **fields}
    return {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, {"add", "now"}),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, {"add"}),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}, "temperature": 1.0, "seed": 3}, {"now"}),
    ],
    ids=["any", "one", "sampled"],
)
def test_required_calls(llm: LLM, tmp_path: Path, fields: dict[str, Any], names: set[str]) -> None:
    (record,) = answer_lines(llm, [chat_line(**fields, parallel_tool_calls=False)], tmp_path / "j")
    choice = record["response"]["body"]["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    ChatCompletion.model_validate(record["response"]["body"])
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] in names
    tool = {"add": ADD, "now": NOW}[call["function"]["name"]]
    jsonschema.validate(json.loads(call["function"]["arguments"]), tool["function"]["parameters"])


def test_calls_that_may_be_made(llm: LLM, tmp_path: Path) -> None:
    """This model makes none, and its answer is text; the record of a bare line has the same fields."""
    record, bare = answer_lines(llm, [chat_line(max_tokens=9), {"id": "b", **chat_line(max_tokens=5, n=2)["body"]}], tmp_path / "j")
    choice = record["response"]["body"]["choices"][0]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    assert bare["tool_calls"] == [[], []]
    assert len(bare["text"]) == 2


def test_a_call_that_is_cut_off_is_none(llm: LLM, tmp_path: Path) -> None:
    (record,) = answer_lines(llm, [chat_line(tool_choice="required", max_tokens=12)], tmp_path / "j")
    choice = record["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("<tool_call>")


def test_tools_that_cannot_be_served_are_the_error_of_their_line(llm: LLM, novels_opt: Path, tmp_path: Path) -> None:
    both = chat_line(response_format={"type": "json_object"})
    (record,) = answer_lines(llm, [both], tmp_path / "both")
    assert record["response"]["body"]["error"]["param"] == "tools"
    with LLM(novels_opt, chat_template=TOOLS) as unparsed:
        (record,) = answer_lines(unparsed, [chat_line()], tmp_path / "unparsed")
    assert "response template" in record["response"]["body"]["error"]["message"]
    with LLM(novels_opt, chat_template=CHATML) as toolless:
        (record,) = answer_lines(toolless, [chat_line()], tmp_path / "toolless")
    assert record["response"]["body"]["error"]["param"] == "tools"


def test_tools_in_python_are_shown_to_the_model(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "Add."}], SamplingParams(max_tokens=1), tools=[ADD])
    assert output.prompt is not None
    assert '"name": "add"' in output.prompt
