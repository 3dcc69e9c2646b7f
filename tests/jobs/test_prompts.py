"""Prompts to ids: each request's own, whatever its neighbours are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import byte_id

from flexgen import LLM, RequestError, SamplingParams
from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.chat import Chat
from flexgen.jobs.reading import encode_prompts

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('never') if messages[0].content == 'bad' }}"


def request(prompt: str | tuple[int, ...] | Chat) -> JobRequest:
    return JobRequest(line_number=1, digest=1, form=PlainForm(defaults=SamplingParams()), prompt=prompt)


def chat(content: str) -> JobRequest:
    return request(Chat(messages=({"role": "user", "content": content},)))


def encoded(llm: LLM, requests: Sequence[JobRequest], **how: Any) -> list[Sequence[int] | RequestError]:
    """The prompt of each request, none of which has choices."""
    return [each if isinstance(each, RequestError) else each[0] for each in encode_prompts(llm.model, requests, **how)]


def ids(text: str) -> list[int]:
    return [byte_id(character) for character in text]


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(model_folder, chat_template=TEMPLATE) as llm:
        yield llm


def test_each_request_has_its_own(llm: LLM) -> None:
    error = RequestError("was bad before")
    bad = request("e").refused(error)
    found = encoded(llm, [chat("a"), request("bc"), bad, request((7, 8)), chat("bad"), chat("d"), request("")])
    refused = found.pop(4)
    assert isinstance(refused, RequestError)
    assert "never" in str(refused)
    assert found == [ids("a"), ids("bc"), error, (7, 8), ids("d"), []]


def test_nothing(llm: LLM) -> None:
    assert encoded(llm, []) == []


def test_texts_that_cannot_be_encoded_fail_alone(llm: LLM) -> None:
    first, second, third = encoded(llm, [request("a"), request("\ud800"), request("b")])
    assert isinstance(second, RequestError)
    assert (first, third) == (ids("a"), ids("b"))


def test_special_tokens_are_those_of_the_template(novels_opt: Path) -> None:
    """Its tokenizer begins texts with one; a chat has what its template writes, and not one more."""
    with LLM(novels_opt, chat_template="{{ messages[0].content }}") as plain, LLM(novels_opt, chat_template="{{ bos_token }}x") as marked:
        (text,) = encoded(plain, [request("x")])
        (bare,) = encoded(plain, [chat("x")])
        (once,) = encoded(marked, [chat("x")])
        bos = plain.get_tokenizer().bos_token_id
    assert not isinstance(bare, RequestError)
    assert bare[0] != bos
    assert text == once == [bos, *bare]


def test_texts_that_no_context_holds_fail_alone(llm: LLM) -> None:
    """Those of prompts, of conversations, and of conversations that the template makes long; of both Unicode's and JSON's sizes."""
    long = "a" * (llm.max_model_len * 1000)
    found = encoded(llm, [request(long), chat(long), request("a"), chat("é" * 10**6), chat("b")])
    assert found[2::2] == [ids("a"), ids("b")]
    for refused in (found[0], found[1], found[3]):
        assert isinstance(refused, RequestError)
        assert refused.code == "context_length_exceeded"


def test_conversations_are_encoded_as_they_are_rendered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few of them are held."""
    monkeypatch.setattr("flexgen.chat.process._BATCH_CHARS", 1)
    monkeypatch.setattr("flexgen.text.tokenizer._BATCH_BYTES", 100)
    steps: list[str] = []
    render, encode = llm.model.render_chats, llm.get_tokenizer().__class__.__call__

    def rendered(*arguments: Any, **how: Any) -> Iterator[Any]:
        for each in render(*arguments, **how):
            steps.append("render")
            yield each

    def tokenized(self: Any, *arguments: Any, **how: Any) -> Any:
        steps.append("encode")
        return encode(self, *arguments, **how)

    monkeypatch.setattr(llm.model, "render_chats", rendered)
    monkeypatch.setattr(llm.get_tokenizer().__class__, "__call__", tokenized)
    assert encoded(llm, [chat("a" * 60) for _ in range(3)]) == [ids("a" * 60)] * 3
    assert steps == ["render", "render", "encode", "render", "encode", "encode"]


def test_the_time_of_the_job(model_folder: Path) -> None:
    with LLM(model_folder, chat_template="{{ strftime_now('%Y') }}") as llm:
        (found,) = encoded(llm, [chat("a")], now=0.0)
    assert found == [byte_id(character) for character in str(datetime.fromtimestamp(0).year)]


def test_a_model_without_a_template(model_folder: Path) -> None:
    error, found = encoded(LLM(model_folder), [chat("a"), request("b")])
    assert isinstance(error, RequestError)
    assert error.code == "no_chat_template"
    assert found == ids("b")


def test_a_model_without_a_tokenizer(bare_model_folder: Path) -> None:
    with LLM(bare_model_folder, chat_template=TEMPLATE) as llm:
        first, second, third = encoded(llm, [chat("a"), request("b"), request((7,))])
    assert isinstance(first, RequestError)
    assert isinstance(second, RequestError)
    assert "no tokenizer" in str(first)
    assert third == (7,)


# -- choices ------------------------------------------------------------------------------------------------------------------------------


def with_choices(prompt: str | tuple[int, ...] | Chat, *choices: str | tuple[int, ...]) -> JobRequest:
    return dataclasses.replace(request(prompt), choices=choices)


def test_choices_have_their_own_tokens(llm: LLM) -> None:
    """Beside requests without any; spaces at the end of a prompt begin each choice; a template may write them, too."""
    conversation = Chat(messages=({"role": "user", "content": "d: "},))
    requests = [
        with_choices("ab", "c", " de"), request("e"), with_choices("ab \n", "c"), with_choices((7, 8), (9,), (9, 10)),
        with_choices("f", (9,), (8,)), with_choices(conversation, "x", "yz"), chat("g"),
    ]  # fmt: skip
    assert encode_prompts(llm.model, requests) == [
        (ids("ab"), [ids("c"), ids(" de")]), (ids("e"), []), (ids("ab"), [[*llm.encode(" \n")[0], *ids("c")]]), ((7, 8), [(9,), (9, 10)]),
        (ids("f"), [(9,), (8,)]), (ids("d:"), [ids(" x"), ids(" yz")]), (ids("g"), []),
    ]  # fmt: skip


def test_choices_that_cannot_be_encoded_fail_alone(llm: LLM) -> None:
    bad = [
        with_choices("a", "b", (7,)), with_choices((7,), "b"), with_choices("a", "\ud800", "b"), with_choices("\ud800", "b"),
        with_choices("a", "b" * 100_000, "c"), with_choices(Chat(messages=({"role": "user", "content": "bad"},)), "b"),
    ]  # fmt: skip
    for each in bad:
        *before, found, after = encode_prompts(llm.model, [with_choices("a", "b", "c"), request("a"), each, with_choices("d", "e")])
        assert before == [(ids("a"), [ids("b"), ids("c")]), (ids("a"), [])]
        assert isinstance(found, RequestError)
        assert after == (ids("d"), [ids("e")])


def test_a_choice_without_tokens_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer may drop what it does not know."""
    monkeypatch.setattr(llm.model, "encode_each", lambda texts, **how: (ids(str(each).replace("z", "")) for each in texts))
    (found,) = encode_prompts(llm.model, [with_choices("a", "b", "z")])
    assert isinstance(found, RequestError)
    assert str(found) == "choices[1] adds no token to the prompt"


def test_choices_of_token_ids_need_no_tokenizer(bare_model_folder: Path) -> None:
    with LLM(bare_model_folder) as llm:
        found, refused = encode_prompts(llm.model, [with_choices((7,), (8,), (9, 10)), with_choices("a", (8,))])
    assert found == ((7,), [(8,), (9, 10)])
    assert isinstance(refused, RequestError)
    assert "no tokenizer" in str(refused)
