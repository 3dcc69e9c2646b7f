"""Requests to generate: keywords, cut prompts, where answers end; greedy texts are those of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from evaluation.oracle import Subject

from flexgen.errors import OptionError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.generation import Generation

WORDS = SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens)))


def text(tokens: list[int], *until: str, think: str | int | None = None) -> str:
    tokenizer: Any = WORDS
    return Generation.of(until, 8, {}).text({"token_ids": tokens}, tokenizer, think)


def test_keywords() -> None:
    line = Generation.of(["\n", "", "Q:"], 8, {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}).line([1, 2], 64)
    assert line == {
        "prompt": [1, 2], "max_tokens": 8, "temperature": 0.5, "stop": ["\n", "Q:"], "skip_special_tokens": False, "top_p": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize(("kwargs", "temperature"), [
    ({}, 0), ({"do_sample": False, "temperature": 0.7}, 0), ({"temperature": 0.7}, 0.7), ({"do_sample": True, "temperature": 0.7}, 0.7),
])  # fmt: skip
def test_temperature(kwargs: dict[str, Any], temperature: float) -> None:
    assert Generation.of([], 8, kwargs).temperature == temperature


@pytest.mark.parametrize(("kwargs", "said"), [({"num_beams": 4}, "num_beams=4"), ({"max_length": 9}, "max_gen_toks"), ({"x": 1}, "x=1")])
def test_keywords_that_are_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Generation.of([], 8, kwargs)


def test_a_long_prompt_is_cut_at_its_beginning() -> None:
    generation = Generation.of([], 8, {})
    assert generation.line(range(100), 20)["prompt"] == list(range(88, 100))
    with pytest.raises(OptionError, match="leaves no room"):
        generation.line([1], 8)


def test_texts_are_cut_at_the_first_stop() -> None:
    assert text([1, 2, 3, 4], "4", " 3") == "1 2"
    assert text([1, 2, 3, 4], "") == "1 2 3 4"


def test_thinking_is_left_out() -> None:
    assert text([1, 9, 2, 9, 3, 4], think=9) == "3 4"
    assert text([1, 2], think=9) == "1 2"
    assert text([1, 9, 2, 3], "3", think="9") == "2 "


def test_greedy_texts_are_those_of_transformers(subject: Subject) -> None:
    """Several stop strings, of which one comes first; one prompt is longer than the context leaves."""
    tokenizer: Any = subject.llm.get_tokenizer()
    encoding = Encoding(tokenizer)
    prompts = [encoding.prompt("The old house"), encoding.prompt("She said"), encoding.prompt("It was a dark night. " * 200)]
    room = subject.llm.max_model_len - 24
    assert len(prompts[-1]) > room
    whole = [tokenizer.decode(subject.oracle.generate(prompt[-room:], 24), skip_special_tokens=True) for prompt in prompts]
    for prompt, wanted in zip(prompts, whole, strict=True):
        until = [wanted[12:15], wanted[5:8], "\N{SNOWMAN}"]
        generation = Generation.of(until, 24, {"do_sample": False, "temperature": 0.0})
        (record,) = Answers(llm=subject.llm).of("test", [generation.line(prompt, subject.llm.max_model_len)])
        cut = min(wanted.find(each) for each in until if each in wanted)
        assert generation.text(record, tokenizer) == wanted[:cut]
        assert len(record["token_ids"]) < 24
