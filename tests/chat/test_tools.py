"""Tools in conversations: templates that read them get them as transformers gives them, others are refused."""

from __future__ import annotations

from typing import Any

import pytest
from chat.jinja import CHATML, HEADERS, TOOLS

from flexgen.chat import Chat, TemplateProcess, parse_tools
from flexgen.errors import RequestError

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <a> & <b>.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
HELLO = ({"role": "user", "content": "1 + 1?"},)


def test_a_template_that_reads_tools_gets_them(model_folder: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    wanted = tokenizer.apply_chat_template(list(HELLO), tools=[ADD], chat_template=TOOLS, tokenize=False, add_generation_prompt=True)
    without = tokenizer.apply_chat_template(list(HELLO), chat_template=TOOLS, tokenize=False, add_generation_prompt=True)
    with TemplateProcess(TOOLS, {}) as process:
        assert process.render([Chat(messages=HELLO, tools=(ADD,)), Chat(messages=HELLO)]) == [wanted, without]
    assert "Adds <a> & <b>." in str(wanted)


def test_a_template_without_tools_refuses_them_alone() -> None:
    with TemplateProcess(CHATML, {}) as process:
        first, second = process.render([Chat(messages=HELLO, tools=(ADD,)), Chat(messages=HELLO)])
    assert isinstance(first, RequestError)
    assert (str(first), first.code, first.param) == ("the chat template has no place for tools", "unsupported_field", "tools")
    assert second == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_only_asks_whether_there_are_tools_reads_them() -> None:
    with TemplateProcess(HEADERS, {"bos_token": "", "eos_token": ""}) as process:
        with_tools, without = process.render([Chat(messages=HELLO, tools=(ADD,)), Chat(messages=HELLO)], now=0)
    assert "Environment" in str(with_tools)
    assert "Environment" not in str(without)


def test_tools_are_the_conversation_s_or_the_template_s() -> None:
    """Variables of the template may hold tools in any form, as before."""
    with TemplateProcess("{{ tools }}", {}) as process:
        assert process.render([Chat(messages=HELLO, chat_template_kwargs={"tools": "mine"})]) == ["mine"]
    with pytest.raises(RequestError, match="give them once"):
        Chat(messages=HELLO, tools=(ADD,), chat_template_kwargs={"tools": []})


@pytest.mark.parametrize(
    ("tool", "param", "said"),
    [
        (
            {"name": "add"},
            "tools[0]",
            'tools[0] must be {"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON',
        ),
        ("add", "tools[0]", "not the text 'add'"),
        ({"type": "function"}, "tools[0].function", "its function is null"),
        ({"type": "web"}, "tools[0].type", "a tool of type the text 'web' is not supported"),
        ({"type": "function", "function": {"name": None}}, "tools[0].function.name", "not null"),
        ({"type": "function", "function": {"name": "a", "parameters": [True]}}, "tools[0].function.parameters", "an object, not [true]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_tool(tool: Any, param: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tools([tool])
    assert caught.value.param == param
    assert said in str(caught.value)


def test_tools_from_python() -> None:
    assert parse_tools(None) == ()
    assert parse_tools([{**ADD, "function": {**ADD["function"], "strict": None}}]) == (ADD,)
