"""The process that renders: prompts equal to transformers', and templates that attack it."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat.jinja import CHATML, TEMPLATES
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from flexgen.chat import Chat, Limits, TemplateProcess, child, parse_messages, process
from flexgen.errors import FlexGenError, RequestError

NOW = 1_741_089_600.0  # a day in March 2025
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü<&>'\""}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello"}],
    "four": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ],
    "spaces": [{"role": "user", "content": "  \n<b> & \"quotes\" 'here' \t\n\n"}, {"role": "assistant", "content": " so be it  "}],
    "unicode": [{"role": "user", "content": "Grüße 日本語 😀 \u2028 \x00 \ufeff"}],
    "template": [{"role": "user", "content": "{{ 7 * 7 }} {% raw %} <|im_end|>"}],
    "twice": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "tools": [
        {"role": "user", "content": "1 + ü?"},
        {"role": "assistant", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "[1]", "tool_call_id": "c1"},
    ],
    "reasoning": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because.", "reasoning_content": "\nLet me see.\n"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."},
    ],
    "developer": [{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}],
    "name": [{"role": "user", "content": "u", "name": "Ada", "weight": None}],
}


def chat(*contents: str, **fields: Any) -> Chat:
    roles = ("user", "assistant")
    return Chat(messages=tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents)), **fields)


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Any:
    """transformers' tokenizer, with the tokens of our templates, at our time."""
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder), **TOKENS)
    assert tokenizer.special_tokens_map == TOKENS

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(NOW)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Fixed)
        yield tokenizer


def same(ours: str | RequestError, theirs: str | Exception) -> bool:
    return isinstance(ours, RequestError) and str(theirs)[:60] in str(ours) if isinstance(theirs, Exception) else ours == theirs


def applied(reference: Any, template: str, messages: list[dict[str, Any]], **fields: Any) -> str | Exception:
    try:
        return reference.apply_chat_template(messages, chat_template=template, tokenize=False, **fields)
    except Exception as error:  # noqa: BLE001
        return error


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_prompts_are_those_of_transformers(reference: Any, name: str) -> None:
    """Every conversation, with and without a generation prompt, and continued; refusals are refusals, for the same reason."""
    ends = (
        {"add_generation_prompt": True, "continue_final_message": False},
        {"add_generation_prompt": False, "continue_final_message": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    )
    cases = [(messages, end) for messages in CONVERSATIONS.values() for end in ends if "content" in messages[-1]]
    chats = [Chat(messages=parse_messages(messages), **end) for messages, end in cases]
    with TemplateProcess(TEMPLATES[name], TOKENS) as templates:
        prompts = templates.render(chats, now=NOW)
    rendered = 0
    for (messages, end), prompt in zip(cases, prompts, strict=True):
        wanted = applied(reference, TEMPLATES[name], messages, **end)
        if end["continue_final_message"] and isinstance(wanted, ValueError):
            assert isinstance(prompt, RequestError)  # in words of our own
        else:
            assert same(prompt, wanted), (messages, end)
        rendered += isinstance(prompt, str)
    assert rendered >= len(cases) // 2


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, {"enable_thinking": True}, {"bos_token": "!", "tools": [{"a": 1}]}])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_variables_reach_the_template(reference: Any, name: str, kwargs: dict[str, Any]) -> None:
    with TemplateProcess(TEMPLATES[name], TOKENS) as templates:
        (prompt,) = templates.render([chat("Hello", chat_template_kwargs=kwargs)], now=NOW)
    assert prompt == applied(reference, TEMPLATES[name], CONVERSATIONS["one"], add_generation_prompt=True, **kwargs)


def test_the_time_is_the_caller_s_or_the_clock_s() -> None:
    with TemplateProcess("{{ strftime_now('%Y') }}", {}) as templates:
        assert templates.render([chat("a")], now=0.0) == [str(datetime.fromtimestamp(0).year)]
        before = datetime.now().year
        (prompt,) = templates.render([chat("a")])
        assert isinstance(prompt, str)
        assert before <= int(prompt) <= datetime.now().year


@pytest.fixture(scope="module")
def echo() -> Iterator[TemplateProcess]:
    with TemplateProcess("{% for m in messages %}{{ m.content }}{% endfor %}", {}) as templates:
        yield templates


@given(st.text())
def test_any_text_arrives_whole(echo: TemplateProcess, text: str) -> None:
    assert echo.render([chat(text)]) == [text]


def test_many_conversations_keep_their_order(echo: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [f"{n} {'x' * (n * 37 % 1000)}" for n in range(700)]
    assert echo.render([chat(content) for content in contents]) == contents
    monkeypatch.setattr(process, "_BATCH_BYTES", 2000)
    assert echo.render([chat(content) for content in contents[:100]]) == contents[:100]
    assert echo.render([]) == []


def test_few_prompts_are_held_where_they_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back at once, and nothing is rendered before it is asked for."""
    monkeypatch.setattr(process, "_BATCH_CHARS", 3000)
    sizes: list[int] = []
    exchange = TemplateProcess._exchange
    monkeypatch.setattr(TemplateProcess, "_exchange", lambda self, payloads: sizes.append(len(payloads)) or exchange(self, payloads))
    with TemplateProcess("{{ messages[0].content }}", {}, limits=Limits(output_chars=1000)) as templates:
        prompts = templates.render_each([chat(str(n)) for n in range(7)])
        assert [next(prompts), sizes] == ["0", [3]]
        assert list(prompts) == ["1", "2", "3", "4", "5", "6"]
    assert sizes == [3, 3, 1]


def test_a_prompt_beyond_the_limit_is_not_sent() -> None:
    with TemplateProcess("{{ messages[0].content * 100 }}", {}, limits=Limits(output_chars=200)) as templates:
        fits, refused, last = templates.render([chat("ab"), chat("abc"), chat("c")])
    assert (fits, last) == ("ab" * 100, "c" * 100)
    assert isinstance(refused, RequestError)
    assert (refused.code, refused.param) == ("context_length_exceeded", "messages")
    assert "more than 200 characters" in str(refused)


def test_a_long_conversation(echo: TemplateProcess) -> None:
    contents = ["ü" * 1000] * 2000
    assert echo.render([chat(*contents)]) == ["".join(contents)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (chat("a\ud800"), "surrogates not allowed"),
        (chat("a", chat_template_kwargs={"x": object()}), "JSON"),
        (chat("a", chat_template_kwargs={"x": 10**5000}), "JSON"),
    ],
)
def test_what_cannot_be_a_prompt_fails_alone(echo: TemplateProcess, bad: Chat, words: str) -> None:
    first, error, last = echo.render([chat("1"), bad, chat("2")])
    assert (first, last) == ("1", "2")
    assert isinstance(error, RequestError)
    assert words in str(error)


def test_a_template_that_is_none() -> None:
    with TemplateProcess("{% for %}", {}) as templates:
        for _ in range(2):
            first, second = templates.render([chat("a"), chat("b")])
            assert isinstance(first, RequestError)
            assert isinstance(second, RequestError)
            assert "not valid" in str(first)
            assert (first.code, first.param) == ("chat_template_error", "messages")


# -- attacks ----------------------------------------------------------------------------------------------------------------------------

COSTLY = {
    "loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "memory": ("{% set ns = namespace(x='a' * 1000) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
    "output": ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "characters"),
    "recursion": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    "reason": ("{{ raise_exception('no' * 99999) }}", "no"),
}
ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ strftime_now.__self__ }}{{ strftime_now.__func__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ dict.__call__.__globals__ }}{{ dict.__class__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ 1 / 0 }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '%s' | attr('__class__') }}{{ messages | map(attribute='__class__') | list }}",
    "{{ messages.append(1) }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__ }}{{ (1).__class__ }}{{ tojson }}",
]
SECRETS = ("<class", "<module", "<function", "<built-in", "os.environ", "root:", "Renderer")


def test_conversations_that_cost_too_much_fail_alone() -> None:
    """Each comes between two that are fine; the process that it ends is replaced."""
    branches = "".join(f"{{% elif messages[0].content == '{name}' %}}{attack}" for name, (attack, _) in COSTLY.items())
    limits = Limits(cpu_seconds=1, memory_bytes=64 << 20, output_chars=1 << 20)
    with TemplateProcess(f"{{% if messages[0].content == 'fine' %}}prompt{branches}{{% endif %}}", {}, limits=limits) as templates:
        prompts = templates.render([chat(content) for name in COSTLY for content in ("fine", name)] + [chat("fine")])
    assert prompts[::2] == ["prompt"] * (len(COSTLY) + 1)
    for (_, words), error in zip(COSTLY.values(), prompts[1::2], strict=True):
        assert isinstance(error, RequestError)
        assert words in str(error)
        assert len(str(error)) <= 500


def test_a_template_that_always_costs_too_much_is_refused_once() -> None:
    template = "{% set n = messages|length %}{{ (n + 9) ** (10 ** (n + 8)) }}"
    with TemplateProcess(template, {}, limits=Limits(cpu_seconds=1)) as templates:
        prompts = templates.render([chat("a")] * 1000)
    assert all(isinstance(prompt, RequestError) and "refused" in str(prompt) for prompt in prompts)


@pytest.mark.parametrize("attack", ESCAPES)
def test_escapes_lead_nowhere(attack: str, tmp_path: Path) -> None:
    """Of the sandbox alone: in our own process, where an escape would succeed."""
    canary = tmp_path / "canary"
    renderer = child.Renderer(attack.replace("CANARY", str(canary)), {}, 1000)
    reply = json.loads(child.answer(renderer, json.dumps(child.GREETING).encode()))
    said = reply.get("error") or reply["text"]
    assert not any(secret in said for secret in SECRETS)
    assert "error" in reply or not said.replace("Undefined", "").strip(" []")
    assert not canary.exists()


def limits_of(pid: int) -> dict[str, str]:
    """The hard limits of a process, by name."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:25].strip(): line[47:68].strip() for line in lines}


def test_an_escape_would_find_a_process_without_means(echo: TemplateProcess) -> None:
    echo.render([chat("a")])
    assert echo._child is not None
    found = limits_of(echo._child._process.pid)
    assert [found[name] for name in ("Max open files", "Max file size", "Max core file size", "Max processes")] == ["0"] * 4
    assert int(found["Max address space"]) < 2 << 30


def test_the_process_imports_jinja2_and_the_standard_library_only() -> None:
    tree = ast.parse(process._SCRIPT.read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names = plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"jinja2"}


# -- life and death -----------------------------------------------------------------------------------------------------------------------


def test_it_starts_late_and_ends_with_close() -> None:
    templates = TemplateProcess(CHATML, {})
    assert templates._child is None
    templates.render([chat("a")])
    assert templates._child is not None
    pid = templates._child._process.pid
    templates.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    templates.close()


def test_it_ends_when_its_owner_does() -> None:
    with TemplateProcess(CHATML, {}) as templates:
        templates.render([chat("a")])
        end = templates._child
        assert end is not None
        end._file.close()
        end._socket.close()  # as the kernel does for an owner that was killed
        assert end._process.wait(timeout=60) == 0


def test_a_process_that_was_killed_is_replaced(echo: TemplateProcess) -> None:
    echo.render([chat("a")])
    assert echo._child is not None
    echo._child._process.kill()
    echo._child._process.wait()
    assert echo.render([chat("b"), chat("c")]) == ["b", "c"]


def test_a_process_that_stalls_is_replaced(echo: TemplateProcess) -> None:
    echo.render([chat("a")])
    assert echo._child is not None
    echo._child._process.send_signal(signal.SIGSTOP)
    echo._child._socket.settimeout(0.05)
    assert echo.render([chat("b"), chat("c")]) == ["b", "c"]


PRETENDER = """
import json, os, struct, sys
def read():
    head = sys.stdin.buffer.read(4)
    return struct.unpack("<I", head)[0] if head else sys.exit(0)
def write(value):
    data = json.dumps(value).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
    sys.stdout.buffer.flush()
opening = json.loads(sys.stdin.buffer.read(read()))
exec(opening["template"])
write({})
while True:
    for frame in [sys.stdin.buffer.read(read()) for _ in range(read())]:
        content = json.loads(frame)["messages"][0]["content"]
        if content == "die":
            os.kill(os.getpid(), 11)
        if content == "flood":
            sys.stdout.buffer.write(b"\\xff" * 4)
            sys.stdout.buffer.flush()
        write({"text": content})
"""


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a sandbox: its template is Python."""
    script = tmp_path / "pretender.py"
    script.write_text(PRETENDER)
    monkeypatch.setattr(process, "_SCRIPT", script)


@pytest.mark.parametrize(("bad", "words"), [("die", "SIGSEGV"), ("flood", "SIGKILL")])
def test_a_conversation_that_crashes_the_process_fails_alone(pretender: None, bad: str, words: str) -> None:
    with TemplateProcess("", {}) as templates:
        prompts = templates.render([chat(content) for content in ("a", bad, "b", bad, bad, "c")])
    assert [prompt for prompt in prompts if isinstance(prompt, str)] == ["a", "b", "c"]
    for place in (1, 3, 4):
        assert isinstance(prompts[place], RequestError)
        assert words in str(prompts[place])


def test_a_template_that_crashes_the_process_is_refused(pretender: None) -> None:
    with TemplateProcess("os.kill(os.getpid(), 6)", {}) as templates:
        prompts = templates.render([chat("a")] * 500)
    assert all(isinstance(prompt, RequestError) and "SIGABRT" in str(prompt) for prompt in prompts)


def test_a_process_that_does_not_start_is_no_fault_of_a_conversation(pretender: None) -> None:
    with TemplateProcess("sys.exit(1)", {}) as templates, pytest.raises(FlexGenError, match="does not start") as caught:
        templates.render([chat("a")])
    assert not isinstance(caught.value, RequestError)


def test_a_failure_is_named() -> None:
    with TemplateProcess("{{ messages[0].content.nothing.at.all }}", {}) as templates:
        (error,) = templates.render([chat("a")])
    assert isinstance(error, RequestError)
    assert "nothing" in str(error)
