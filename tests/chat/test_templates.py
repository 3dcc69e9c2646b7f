"""Which template renders: as transformers chooses it, unless another is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import write_model_folder
from transformers import AutoTokenizer

from flexgen.chat import Chat, Templates
from flexgen.chat.templates import choose_template, default_template
from flexgen.errors import OptionError, RequestError
from flexgen.text.tokenizer import Tokenizer

HELLO = Chat(messages=({"role": "user", "content": "Hello"},))


def folder_with(path: Path, files: dict[str, str], config_template: object = None) -> Path:
    folder = write_model_folder(path / "model")
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if config_template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": config_template}))
    return folder


@pytest.mark.parametrize(
    ("files", "config_template", "wanted"),
    [
        ({}, None, None),
        ({}, "config", "config"),
        ({"chat_template.jinja": "file"}, None, "file"),
        ({"chat_template.jinja": "file"}, "config", "file"),
        ({"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "more"}, None, "file"),
        ({}, [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}], "one"),
        ({}, [{"name": "rag", "template": "one"}, {"name": "tool_use", "template": "two"}], None),
        ({"additional_chat_templates/rag.jinja": "more"}, "config", None),
    ],
    ids=str,
)
def test_the_default_is_transformers_s(tmp_path: Path, files: dict[str, str], config_template: object, wanted: str | None) -> None:
    folder = folder_with(tmp_path, files, config_template)
    assert default_template(Tokenizer.load(folder).chat_template) == wanted
    reference = AutoTokenizer.from_pretrained(str(folder))
    if wanted is None:
        with pytest.raises(ValueError, match="chat template"):
            reference.get_chat_template()
    else:
        assert reference.get_chat_template() == wanted


def test_a_template_may_be_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "more"})
    own = Tokenizer.load(folder).chat_template
    assert choose_template("rag", own) == AutoTokenizer.from_pretrained(str(folder)).get_chat_template("rag") == "more"


def test_a_template_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ 'ü' }}", encoding="utf-8")
    assert choose_template(path, None) == choose_template(str(path), "own") == "{{ 'ü' }}"
    assert choose_template("{{ messages }}", "own") == "{{ messages }}"
    assert choose_template("line\nline", {}) == "line\nline"
    for given in (5, [], None):
        with pytest.raises(OptionError, match=rf"chat_template must be a template, or a file, not {re.escape(repr(given))}"):
            choose_template(given, "own")


@pytest.mark.parametrize("given", ["nowhere.jinja", "", ".", "a\0b"])
def test_what_is_no_template(given: str) -> None:
    with pytest.raises(OptionError, match="the chat template"):
        choose_template(given, None)
    with pytest.raises(OptionError, match="rag"):
        choose_template(given, {"rag": "x"})


def test_without_a_template_every_chat_says_so() -> None:
    templates = Templates("org/base", None, {})
    assert templates.text is None
    first, second = templates.render([HELLO, HELLO])
    assert isinstance(first, RequestError)
    assert isinstance(second, RequestError)
    assert "org/base has no chat template" in str(first)
    assert first.code == "no_chat_template"
    templates.close()


def test_variables_from_the_tokenizer_the_owner_and_the_chat() -> None:
    """The later win."""
    text = "{{ bos_token }} {{ eos_token }} {{ mode }} {{ extra }}"
    templates = Templates("m", text, {"bos_token": "<s>", "eos_token": "</s>"}, kwargs={"mode": "owner", "extra": 1, "eos_token": "<e>"})
    chat = Chat(messages=HELLO.messages, chat_template_kwargs={"mode": "chat"})
    assert list(templates.render([HELLO, chat])) == ["<s> <e> owner 1", "<s> <e> chat 1"]
    assert templates.prompts([chat], "{{ bos_token }}+{{ mode }}") == ["<s>+chat"]
    templates.close()


@pytest.mark.parametrize("kwargs", [{"messages": []}, {"x": object()}, {"x": 10**5000}, {1: 2}])
def test_variables_that_cannot_be_are_an_option_error(kwargs: dict[Any, Any]) -> None:
    for own in (None, "x"):
        with pytest.raises(OptionError, match="chat_template_kwargs"):
            Templates("m", own, {}, kwargs=kwargs)


def test_the_first_conversation_without_a_prompt_is_named() -> None:
    templates = Templates("m", "{{ raise_exception('no ' + messages[0].content) if messages[0].content != 'Hello' }}", {})
    bad = Chat(messages=({"role": "user", "content": "way"},))
    with pytest.raises(RequestError, match=r"conversation 1: .*no way"):
        templates.prompts([HELLO, bad, bad], None)
    templates.close()
