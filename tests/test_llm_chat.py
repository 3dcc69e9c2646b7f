"""LLM.chat: vLLM's call over a fake engine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, byte_id, fake_text

from flexgen import LLM, FlexGenError, OptionError, RequestError, SamplingParams
from flexgen.chat import Chat

GREEDY = SamplingParams(temperature=0, max_tokens=5)
TEMPLATE = "{{ start | default('') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<to>' if add_generation_prompt }}"
HELLO = [{"role": "user", "content": "hello"}]
TALK = [*HELLO, {"role": "assistant", "content": "hi"}]


@pytest.fixture
def llm(model_folder: Path, engines: list[FakeEngine]) -> Iterator[LLM]:
    with LLM(model_folder, chat_template=TEMPLATE) as llm:
        yield llm


def test_a_conversation(llm: LLM) -> None:
    (output,) = llm.chat(HELLO, GREEDY)
    assert output.prompt == "<user>hello<to>"
    assert list(output.prompt_token_ids) == [byte_id(character) for character in "<user>hello<to>"]
    assert output.outputs[0].text == fake_text("<user>hello<to>", 5)


def test_conversations_of_any_kind(llm: LLM) -> None:
    messages = [{"role": "user", "content": "a"}]
    (one,) = llm.chat(iter(messages), SamplingParams(temperature=0, max_tokens=3))
    several = llm.chat((tuple(messages) for _ in range(2)), SamplingParams(temperature=0, max_tokens=3))
    assert [output.prompt for output in several] == [one.prompt] * 2


def test_several_conversations(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 4)]
    outputs = llm.chat([TALK, HELLO], params)
    assert [output.prompt for output in outputs] == ["<user>hello<assistant>hi<to>", "<user>hello<to>"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 4]
    assert llm.chat([]) == []


@pytest.mark.parametrize(
    ("keywords", "prompt"),
    [
        ({"add_generation_prompt": False}, "<user>hello<assistant>hi"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "<user>hello<assistant>hi"),
        ({"chat_template_kwargs": {"start": "!"}}, "!<user>hello<assistant>hi<to>"),
        ({"chat_template": "{{ messages[0].content }}"}, "hello"),
    ],
)
def test_keywords(llm: LLM, keywords: dict[str, Any], prompt: str) -> None:
    (output,) = llm.chat(TALK, GREEDY, **keywords)
    assert output.prompt == prompt


def test_the_model_s_template_or_the_owner_s(model_folder: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ start }}{{ end }}")
    with LLM(model_folder, chat_template=path, chat_template_kwargs={"start": "a", "end": "b"}) as llm:
        assert llm.chat_template == "{{ start }}{{ end }}"
        assert llm.chat(HELLO, GREEDY, chat_template_kwargs={"end": "c"})[0].prompt == "ac"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages must be"),
        ([HELLO, [{"role": "user"}]], r"conversation 1: messages\[0\]"),
        ([HELLO, []], "conversation 1: messages must be"),
        ([*HELLO, {"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
    ],
)
def test_what_is_no_conversation(llm: LLM, engines: list[FakeEngine], messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.chat(messages, GREEDY)
    assert engines == []


def test_what_the_template_refuses(llm: LLM, engines: list[FakeEngine]) -> None:
    with pytest.raises(RequestError, match=r"conversation 1: .*too long") as caught:
        llm.chat([HELLO, TALK], GREEDY, chat_template="{{ raise_exception('too long') if messages|length > 1 else 'a' }}")
    assert caught.value.code == "chat_template_error"
    assert engines == []


def test_a_base_model_has_no_template(model_folder: Path, engines: list[FakeEngine]) -> None:
    llm = LLM(model_folder)
    assert llm.chat_template is None
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat(HELLO, GREEDY)
    assert llm.chat(HELLO, GREEDY, chat_template="abc\n")[0].prompt == "abc"


def test_options_that_cannot_be_honoured(model_folder: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.jinja"):
        LLM(model_folder, chat_template="nowhere.jinja")
    with pytest.raises(OptionError, match="chat_template_kwargs"):
        LLM(model_folder, chat_template_kwargs={"messages": []})


def test_unsupported_keywords_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"tools\[0\]: a tool of type"):
        llm.chat(HELLO, GREEDY, tools=[{"type": "custom"}])
    with pytest.raises(RequestError, match="no place for tools"):
        llm.chat(HELLO, GREEDY, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(OptionError, match="chat has no option 'chat_templat'; did you mean chat_template"):
        llm.chat(HELLO, GREEDY, chat_templat="x")  # pyright: ignore[reportCallIssue]
    assert llm.chat(HELLO, GREEDY, tools=None, chat_template_content_format="auto", lora_request=None)


def test_render_chats_answers_each(llm: LLM) -> None:
    chats = [Chat(messages=({"role": "user", "content": content},)) for content in ("a", "\ud800", "b")]
    first, error, last = llm.model.render_chats(chats)
    assert (first, last) == ("<user>a<to>", "<user>b<to>")
    assert isinstance(error, RequestError)


def test_the_process_ends_with_the_llm(model_folder: Path, engines: list[FakeEngine]) -> None:
    for forget in (False, True):
        llm = LLM(model_folder, chat_template=TEMPLATE)
        llm.chat(HELLO, GREEDY)
        assert llm.model.templates._process is not None
        assert llm.model.templates._process._child is not None
        pid = llm.model.templates._process._child._process.pid
        if forget:
            del llm
            gc.collect()
        else:
            llm.close()
            with pytest.raises(FlexGenError, match="closed"):
                llm.chat(HELLO, GREEDY)
            with pytest.raises(FlexGenError, match="closed"):
                llm.model.render_chats([])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
