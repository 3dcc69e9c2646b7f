"""How models write calls, as their templates show it; and what has another form."""

from __future__ import annotations

import json

import pytest
from chat.jinja import CHATML, HEADERS, TOOLS

from flexgen.chat import TemplateProcess
from flexgen.text.tool_syntax import ToolSyntax, find_syntax, probes

# Mistral: all calls in one list, whose items have ids.
LISTED = """\
{%- for message in messages %}
{%- if message.tool_calls is defined %}
{{- '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{{- {"name": call.function.name, "arguments": call.function.arguments} | tojson }}{{ ', ' if not loop.last }}
{%- endfor %}
{{- ']</s>' }}
{%- elif message.role == 'user' %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- else %}
{{- ' ' + message.content + '</s>' }}
{%- endif %}
{%- endfor %}{{ '' if tools }}"""
# Qwen 3.5: parameters as tags.
TAGGED = """\
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<function={{ call.function.name }}>
{%- for key, value in call.function.arguments.items() %}<parameter={{ key }}>{{ value }}</parameter>{% endfor %}</function>
{%- endfor %}{%- endfor %}{{ '' if tools }}"""


def syntax_of(template: str) -> ToolSyntax | None:
    with TemplateProcess(template, {"bos_token": "<s>", "eos_token": "</s>"}) as process:
        text, one, two = process.render(probes(), now=0)
    assert isinstance(text, str)
    assert isinstance(one, str)
    return find_syntax(text, one, two if isinstance(two, str) else None, ["</s>"])


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            TOOLS,
            ToolSyntax(
                before='<tool_call>\n{"name": "',
                between='", "arguments": ',
                joint='}\n</tool_call>\n<tool_call>\n{"name": "',
                after="}\n</tool_call>",
            ),
        ),
        (HEADERS, ToolSyntax(before='{"name": "', between='", "parameters": ', joint=None, after="}")),
        (LISTED, ToolSyntax(before='[TOOL_CALLS][{"name": "', between='", "arguments": ', joint='}, {"name": "', after="}]")),
        (TAGGED, None),
        (CHATML + "{{ tools | length and '' }}", None),
    ],
    ids=["qwen", "llama", "mistral", "tags", "none"],
)
def test_syntax(template: str, wanted: ToolSyntax | None) -> None:
    assert syntax_of(template) == wanted


def test_a_grammar() -> None:
    syntax = ToolSyntax(before="<a>", between=": ", joint="; ", after="</a>")
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": {}}}}}, {"function": {"name": "g"}}]
    one = syntax.grammar(tools, parallel=False, literal=json.dumps, json_options={"w": 1})
    assert one.splitlines() == [
        'start: "<a>" call "</a>"',
        'call: "f: " args_0 | "g: " args_1',
        'args_0: %json {"type": "object", "x-guidance": {"w": 1}, "properties": {"x": {}}}',
        'args_1: %json {"type": "object", "x-guidance": {"w": 1}}',
    ]
    several = syntax.grammar(tools, parallel=True, literal=json.dumps, json_options={})
    assert several.splitlines()[0] == 'start: "<a>" call ("; " call)* "</a>"'
