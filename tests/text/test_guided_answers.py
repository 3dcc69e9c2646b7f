"""Constraints on the way to the engine and back: guides, lengths, and the text of an answer that its constraint ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fakes import EOS, VOCAB

from flexgen.errors import RequestError
from flexgen.request import SamplingParams, TokenResult
from flexgen.text.answers import RequestTranslator
from flexgen.text.guides import Guides
from flexgen.text.tokenizer import Tokenizer

A = 64  # "a" of the tokenizer of bytes


@pytest.fixture(scope="module")
def translator(tokenizer: Tokenizer, guides: Guides) -> RequestTranslator:
    return RequestTranslator(tokenizer=tokenizer, vocab_size=VOCAB, max_model_len=64, eos_token_ids=frozenset({EOS}), seed=5, guides=guides)


def test_one_of_given_texts_has_a_length(translator: RequestTranslator) -> None:
    """What the plan must make room for: a token for each byte, and one for the end."""
    choice = {"choice": ["a", "é"]}
    assert translator.requests(0, [A], SamplingParams(max_tokens=None, structured_outputs=choice))[0].max_tokens == 3
    assert translator.requests(0, [A], SamplingParams(max_tokens=2, structured_outputs=choice))[0].max_tokens == 2
    assert translator.requests(0, [A], SamplingParams(max_tokens=None, structured_outputs={"regex": "a"}))[0].max_tokens == 63


def test_each_answer_has_a_guide_of_its_own(translator: RequestTranslator) -> None:
    requests = translator.requests(0, [A], SamplingParams(n=3, structured_outputs={"choice": ["a"]}))
    assert len({id(request.guide) for request in requests}) == 3
    assert translator.requests(0, [A], SamplingParams())[0].guide is None


def test_without_guides_a_constraint_is_refused(translator: RequestTranslator) -> None:
    with pytest.raises(RequestError, match="not supported here"):
        dataclasses.replace(translator, guides=None).requests(0, [A], SamplingParams(structured_outputs={"choice": ["a"]}))


@pytest.mark.parametrize(
    ("token_ids", "how", "text", "stop_reason"),
    [
        ((A, A + 1), {}, "ab", None),
        ((A, A + 1, EOS), {}, "ab", None),
        ((A, A + 1, EOS), {"include_stop_str_in_output": True, "skip_special_tokens": False}, "ab</s>", None),
        ((A, A + 1), {"stop_token_ids": [A + 1]}, "a", A + 1),
    ],
)
def test_an_answer_that_its_constraint_ended_is_whole(
    translator: RequestTranslator, token_ids: tuple[int, ...], how: dict[str, Any], text: str, stop_reason: int | None
) -> None:
    params = SamplingParams(structured_outputs={"choice": ["ab"]}, **how)
    (answer,) = translator.output([TokenResult(index=0, token_ids=token_ids, finish_reason="stop")], params, [A]).outputs
    assert (answer.text, answer.stop_reason) == (text, stop_reason)
