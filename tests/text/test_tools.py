"""Calls of tools in answers: parsed from their tokens, required by a grammar of the template's own syntax, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from chat.jinja import CHATML, HEADERS, TOOLS
from fakes import EOS

from flexgen.base.tool_calls import AnswerMessage, ToolCall
from flexgen.chat import Templates, parse_tool_use
from flexgen.chat.tools import ToolUse
from flexgen.errors import RequestError
from flexgen.outputs import CompletionOutput, RequestOutput
from flexgen.request import SamplingParams, StructuredOutputsParams
from flexgen.text.guides import Guides
from flexgen.text.tokenizer import Tokenizer
from flexgen.text.tools import Tools

PROMPT = "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
NOW = {"type": "function", "function": {"name": "now"}}


@contextmanager
def made(tokenizer: Tokenizer, guides: Guides, template: str, model_type: str = "qwen3") -> Iterator[Tools]:
    """transformers knows how Qwen's answers are parsed; the tokenizer says nothing."""
    templates = Templates("m", template, {"bos_token": "<s>", "eos_token": "</s>"})
    yield Tools("m", model_type, tokenizer, templates, guides, frozenset({EOS}))
    templates.close()


@pytest.fixture(scope="module")
def tools(tokenizer: Tokenizer, guides: Guides) -> Iterator[Tools]:
    with made(tokenizer, guides, TOOLS) as tools:
        yield tools


def use(choice: Any = None, parallel: bool | None = None) -> ToolUse:
    found = parse_tool_use([ADD, NOW], choice, parallel)
    assert found is not None
    return found


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode([text], add_special_tokens=False)[0])


def parsed(
    tools: Tools,
    tokenizer: Tokenizer,
    text: str,
    finish_reason: str = "stop",
    how: ToolUse | None = None,
    stop_reason: int | str | None = None,
) -> AnswerMessage | None:
    token_ids = ids(tokenizer, text)
    completion = CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason=finish_reason, stop_reason=stop_reason)
    output = RequestOutput(request_id="0", prompt=PROMPT, prompt_token_ids=ids(tokenizer, PROMPT), outputs=[completion])
    return tools.with_messages(output, how or use()).outputs[0].message


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
ADDED = ToolCall(name="add", arguments='{"a": 1, "b": "é"}')


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Two.", AnswerMessage(content="Two.")),
        ("", AnswerMessage(content="")),
        (CALL, AnswerMessage(content=None, tool_calls=(ADDED,))),
        (f"Wait.\n{CALL}\n{CALL}", AnswerMessage(content="Wait.", tool_calls=(ADDED, ADDED))),
        (f"<think>\nHm.\n</think>\n\n{CALL}", AnswerMessage(content=None, reasoning="Hm.", tool_calls=(ADDED,))),
        ("<tool_call>\n{nonsense}\n</tool_call>", None),
        ('<tool_call>\n{"arguments": {}}\n</tool_call>', None),
        (CALL[:30], None),
    ],
    ids=["text", "empty", "call", "calls", "thought", "nonsense", "nameless", "cut"],
)
def test_answers_are_parsed(tools: Tools, tokenizer: Tokenizer, text: str, wanted: AnswerMessage | None) -> None:
    assert parsed(tools, tokenizer, text) == wanted


def test_an_answer_without_the_call_that_is_required(tools: Tools, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="none can be read") as caught:
        parsed(tools, tokenizer, "Two.", how=use("required"))
    assert (caught.value.code, caught.value.param) == ("no_tool_call", "tool_choice")
    assert parsed(tools, tokenizer, CALL[:30], "length", use("required")) is None
    with pytest.raises(RequestError, match=r'none can be read in the answer, which "arguments" stopped'):
        parsed(tools, tokenizer, CALL[:30], how=use("required"), stop_reason="arguments")
    assert parsed(tools, tokenizer, CALL, how=use("required")) is not None


CALL_IN_TAGS = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("model_type", "call", "opening"),
    [("qwen3", CALL, "<tool_call>"), ("qwen3_5", CALL_IN_TAGS, "<tool_call>\n<function=add>")],
    ids=["JSON", "tags"],
)
def test_a_call_that_was_cut_off_stays_text(tokenizer: Tokenizer, guides: Guides, model_type: str, call: str, opening: str) -> None:
    """Wherever it was cut, also behind its arguments; what was whole before the cut is called."""
    with made(tokenizer, guides, TOOLS, model_type) as tools:
        cuts: list[dict[str, Any]] = [{"finish_reason": "length"}, {"stop_reason": "l"}]
        for how in cuts:
            for end in range(len(opening), len(call)):
                assert parsed(tools, tokenizer, call[:end], **how) is None, call[:end]
                assert parsed(tools, tokenizer, f"{call}\n{call[:end]}", **how) is None, call[:end]
            for text in (call, f"{call}\nWait"):
                message = parsed(tools, tokenizer, text, **how)
                assert message is not None
                assert [each.name for each in message.tool_calls] == ["add"]
            assert parsed(tools, tokenizer, "Two and", **how) == AnswerMessage(content="Two and")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=["required", "named"])
def test_parameters_that_nothing_meets_name_their_tool(tools: Tools, choice: Any) -> None:
    add = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}, "required": ["a"]},
        },
    }
    found = parse_tool_use([NOW, add], choice)
    assert found is not None
    with pytest.raises(RequestError, match=r"^tools\[1\]\.function\.parameters of 'add' cannot be met: ") as caught:
        tools.params(SamplingParams(), found)
    assert (caught.value.code, caught.value.param) == ("unsupported_constraint", "tools[1].function.parameters")
    free = parse_tool_use([NOW, add], {"type": "function", "function": {"name": "now"}})
    assert free is not None
    assert tools.params(SamplingParams(), free).structured_outputs is not None


def answers(params: SamplingParams, guides: Guides, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Those of the texts that are whole answers."""
    constraint = params.structured_outputs
    assert isinstance(constraint, StructuredOutputsParams)
    found: list[str] = []
    for text in texts:
        guide, token_ids = guides.guide(constraint), ids(tokenizer, text)
        if all(guide.allowed(token_ids[:place])[token_id] for place, token_id in enumerate(token_ids)) and (
            guide.is_complete(token_ids) or guide.allowed(token_ids)[EOS]
        ):
            found.append(text)
    return found


def test_required_calls(tools: Tools, guides: Guides, tokenizer: Tokenizer) -> None:
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    other = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    wrong = ["Two.", one.replace("1", '"x"'), one.replace("add", "sub"), one + " ", f"{one}{other}"]
    texts = [one, other, f"{one}\n{other}", *wrong]
    plain = SamplingParams(temperature=0)
    assert tools.params(plain, use()) is plain
    assert answers(tools.params(plain, use("required")), guides, tokenizer, texts) == texts[:3]
    assert answers(tools.params(plain, use("required", parallel=False)), guides, tokenizer, texts) == texts[:2]
    named = {"type": "function", "function": {"name": "now"}}
    assert answers(tools.params(plain, use(named)), guides, tokenizer, texts) == [other]


@pytest.mark.parametrize("start", ["", "\n"], ids=["template", "template after a line feed"])
def test_required_calls_behind_a_line_feed(tokenizer: Tokenizer, guides: Guides, start: str) -> None:
    """As a template writes them that ends the header of an answer in a line feed and begins each call with one."""
    header = "{{- '<|im_start|>' + message.role }}"
    assert TOOLS.count(header) == 1
    with made(tokenizer, guides, start + TOOLS.replace(header, header.replace("message.role", "message.role + '\\n'"))) as tools:
        call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        constrained = tools.params(SamplingParams(temperature=0), use("required"))
        assert answers(constrained, guides, tokenizer, [call, call[1:], f"{call}{call}"]) == [call, f"{call}{call}"]
        message = parsed(tools, tokenizer, call, how=use("required"))
        assert message is not None
        assert message.tool_calls == (ToolCall(name="add", arguments='{"a": 1}'),)


def test_special_tokens_in_a_grammar(guides: Guides) -> None:
    assert guides.literal('a"<pad>b</s>') == '"a\\"" <[257]> "b" <[256]>'
    assert guides.literal("") == '""'


@pytest.mark.parametrize(
    ("template", "model_type", "param", "said"),
    [
        (TOOLS, "opt", "tools", "no response template"),
        (CHATML, "qwen3", "tool_choice", "no place for tools"),
        (HEADERS, "qwen3", "tool_choice", "as a name and JSON"),
    ],
    ids=["unparsed", "toolless", "other syntax"],
)
def test_what_cannot_be_served_is_refused(
    tokenizer: Tokenizer, guides: Guides, template: str, model_type: str, param: str, said: str
) -> None:
    with made(tokenizer, guides, template, model_type) as tools, pytest.raises(RequestError, match=said) as caught:
        tools.params(SamplingParams(), use("required"))
    assert caught.value.param == param


def test_another_constraint_leaves_no_room_for_calls(tools: Tools) -> None:
    with pytest.raises(RequestError, match="leave out one of both") as caught:
        tools.params(SamplingParams(structured_outputs={"json_object": True}), use())
    assert caught.value.param == "tools"


def test_arguments_are_texts_of_json(tools: Tools, tokenizer: Tokenizer) -> None:
    message = parsed(tools, tokenizer, CALL)
    assert message is not None
    assert json.loads(message.tool_calls[0].arguments) == {"a": 1, "b": "é"}
