"""Content as text or as parts: what a template takes, and that it gets that, as transformers would hand it over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import pytest
from chat.jinja import TEMPLATES
from transformers import AutoTokenizer

from flexgen.chat import Chat, TemplateProcess, Templates, child, parse_messages
from flexgen.chat.content import EITHER, PARTS, TEXT, content_form
from flexgen.errors import RequestError

LOOP = "{% for m in messages %}<{{ m.role }}>{% for p in m['content'] %}{{ p['text'] }}|{% endfor %}{{ m.tool_calls }}{% endfor %}"
ASKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% elif content is iterable and content is not mapping %}"
    "{% for item in content %}{{ item.text if item is mapping else item }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}"
)
VARIABLE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message.get('content') or [] %}"
    "{% for part in content | list %}{{ part.text }};{% endfor %}{% endfor %}"
)
SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = [] %}{% set rest = messages %}{% endif %}[{% for p in system %}{{ p.text }}{% endfor %}]"
    "{% for m in rest %}{{ m.content | map(attribute='text') | join('/') }}{% endfor %}"
)
FORMS: dict[str, tuple[str, str]] = {
    "loop": (PARTS, LOOP),
    "loop over a variable": (PARTS, VARIABLE),
    "system apart": (PARTS, SYSTEM),
    "first part": (PARTS, "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"),
    "filter": (PARTS, "{% for m in messages %}{{ (m.content | selectattr('type', 'eq', 'text') | first).text }}{% endfor %}"),
    "macro that loops": (
        PARTS,
        "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(c=m.content) }}{% endfor %}",
    ),
    "namespace": (
        PARTS,
        "{% set ns = namespace(c=[]) %}"
        "{% for m in messages %}{% set ns.c = m.content %}{% for p in ns.c %}{{ p.text }}{% endfor %}{% endfor %}",
    ),
    "asks": (EITHER, ASKS),
    "macro that asks": (EITHER, MACRO),
    "asks in an expression": (
        EITHER,
        "{% for m in messages %}{{ m.content if m.content is string else m.content | map(attribute='text') | join('+') }}{% endfor %}",
    ),
    "text": (TEXT, "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"),
    "refuses parts": (
        TEXT,
        "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}",
    ),
    "loops over lines": (TEXT, "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }};{% endfor %}{% endfor %}"),
    "loops over calls": (TEXT, "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}"),
}
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": parts("Hello")}],
    [{"role": "system", "content": parts("Be ", "brief.")}, {"role": "user", "content": parts("a", "b ", " c")}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": "c"}],
    [
        {"role": "user", "content": parts("1 + 1?")},
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": parts("2", "!"), "tool_call_id": "c1"},
    ],
]


def shaped(messages: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """The messages with their content in the shape that a template takes."""
    result: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if form == TEXT and isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        elif form == PARTS and isinstance(content, str):
            content = parts(content)
        more = {} if content is None else {"content": content}
        result.append({name: value for name, value in message.items() if name != "content"} | more)
    return result


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model_folder))


@pytest.mark.parametrize("name", FORMS)
def test_what_a_template_takes(name: str) -> None:
    form, template = FORMS[name]
    assert content_form(jinja2.Environment().parse(template)) == form


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_text_models_take_text(name: str) -> None:
    environment = jinja2.Environment(extensions=[child.Generation, jinja2.ext.loopcontrols])
    assert content_form(environment.parse(TEMPLATES[name])) == TEXT


@pytest.mark.parametrize("name", FORMS)
def test_prompts_are_those_of_transformers(reference: Any, name: str) -> None:
    """Called with content in that shape; nothing of what was said is lost."""
    form, template = FORMS[name]
    with TemplateProcess(template, {}) as templates:
        prompts = templates.render([Chat(messages=parse_messages(messages)) for messages in CONVERSATIONS])
    for messages, prompt in zip(CONVERSATIONS, prompts, strict=True):
        try:
            wanted = reference.apply_chat_template(
                shaped(messages, form), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError:  # content that is null
            assert isinstance(prompt, RequestError)
            continue
        assert prompt == wanted, messages
        texts = [text for message in shaped(messages, PARTS) for text in message.get("content", ())]
        if name not in ("first part", "filter"):
            assert all(part["text"].strip() in wanted for part in texts)


@pytest.mark.parametrize("name", ["loop", "asks", "text"])
@pytest.mark.parametrize("content", ["a b ", parts("a", "b "), parts("a")], ids=str)
def test_the_last_message_is_continued(reference: Any, name: str, content: Any) -> None:
    form, template = FORMS[name]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    chat = Chat(messages=parse_messages(messages), add_generation_prompt=False, continue_final_message=True)
    with TemplateProcess(template, {}) as templates:
        (prompt,) = templates.render([chat])
    how: dict[str, Any] = {"chat_template": template, "tokenize": False, "continue_final_message": True}
    assert prompt == reference.apply_chat_template(shaped(messages, form), **how)


def test_no_parts_are_no_text(reference: Any) -> None:
    chat = Chat(messages=parse_messages([{"role": "user", "content": []}]))
    for name, wanted in (("loop", "<user>"), ("text", "user: \n")):
        with TemplateProcess(FORMS[name][1], {}) as templates:
            assert templates.render([chat]) == [wanted]


def test_parts_that_are_written_as_they_are_are_their_text() -> None:
    """A template that goes through the parts of users and takes those of the system for text."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ 'S' + m.content + '.' }}{{ m.content | trim }}"
        "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    chats = [
        Chat(messages=parse_messages([{"role": "system", "content": content}, {"role": "user", "content": "u"}]))
        for content in ("a", parts("a"), parts("a", "b"))
    ]
    with TemplateProcess(template, {}) as templates:
        assert templates.render(chats) == ["Sa.au", "Sa.au", "Sa\nb.a\nbu"]


def test_each_of_several_templates_takes_its_own() -> None:
    own = {"default": FORMS["text"][1], "vision": LOOP}
    chat = Chat(messages=parse_messages([{"role": "user", "content": parts("a", "b")}]))
    for given, wanted in ((None, "user: a\nb\n"), ("vision", "<user>a|b|")):
        templates = Templates("m", own, {}, given=given)
        assert list(templates.render([chat])) == [wanted]
        templates.close()
    templates = Templates("m", own, {})
    assert templates.prompts([chat], "vision") == ["<user>a|b|"]
    templates.close()
