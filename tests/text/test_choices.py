"""Choices after a prompt: their tokens, the engine's requests for them, and their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import RequestError
from flexgen.request import TokenLogprobs, TokenRequest, TokenResult
from flexgen.text.choices import Choice, choice_requests, classified, texts_to_encode, tokens_at_seam

CONTEXT = (5, 6)


def encoded(text: str) -> list[int]:
    """Tokens of letters; a space belongs to the letter after it, and "th" is one token."""
    ids: list[int] = []
    while text:
        length = 2 if text[:2] in (" a", " b", "th") else 1
        ids.append(sum(map(ord, text[:length])) + 1000 * (length - 1))
        text = text[length:]
    return ids


def at_seam(prompt: str | Sequence[int], choices: Sequence[Choice]) -> tuple[Sequence[int], list[Sequence[int]]]:
    return tokens_at_seam(prompt, choices, [encoded(text) for text in texts_to_encode(prompt, choices)])


def encode_pair(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness's TemplateLM._encode_pair."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole, before = encoded(context + continuation), encoded(context)
    return before, whole[len(before) :]


@given(st.text("abth \n", min_size=1), st.lists(st.text("abth \n", min_size=1), min_size=1, max_size=3))
def test_texts_are_cut_as_the_harness_cuts_them(prompt: str, choices: list[str]) -> None:
    wanted = [encode_pair(prompt, choice) for choice in choices]
    if any(not choice for _, choice in wanted):
        with pytest.raises(RequestError, match="adds no token"):
            at_seam(prompt, choices)
        return
    context, found = at_seam(prompt, choices)
    assert [(context, choice) for choice in found] == wanted


def test_a_space_between_prompt_and_choice_may_be_in_either() -> None:
    assert at_seam("q ", ["a", "b"]) == at_seam("q", [" a", " b"])
    assert at_seam("q", ["a", "b"]) != at_seam("q", [" a", " b"])


def test_token_ids_stay_as_they_are() -> None:
    assert at_seam(CONTEXT, [(7,), (8, 9)]) == (CONTEXT, [(7,), (8, 9)])
    assert at_seam("a ", [(7,), (8, 9)]) == (encoded("a "), [(7,), (8, 9)])


@pytest.mark.parametrize(("prompt", "choices"), [(CONTEXT, ["a"]), ("a", ["a", (7,)]), (CONTEXT, [(7,), "a"])])
def test_texts_stand_after_a_text(prompt: str | Sequence[int], choices: Sequence[Choice]) -> None:
    with pytest.raises(RequestError, match="texts after a prompt that is text, or token ids") as caught:
        texts_to_encode(prompt, choices)
    assert caught.value.param == "choices"


# -- requests -----------------------------------------------------------------------------------------------------------------------------


def shape(request: TokenRequest) -> tuple[int, tuple[int, ...], int, tuple[int, ...]]:
    assert (request.max_tokens, request.num_prompt_logprobs) == (0, 1)
    return request.index, request.prompt_token_ids, request.first_scored, request.alternatives


@pytest.mark.parametrize(
    ("choices", "wanted"),
    [
        ([(7,), (8,), (7,)], [(40, (5, 6), 2, (7, 8, 7))]),
        ([(7,)], [(40, (5, 6), 2, (7,))]),
        ([(7, 8, 9)], [(40, (5, 6, 7, 8), 2, (9,))]),
        ([(7, 8), (7, 9)], [(40, (5, 6, 7), 2, (8, 9))]),
        ([(7, 8), (7, 8)], [(40, (5, 6, 7), 2, (8, 8))]),
        ([(7, 8), (9,)], [(40, (5, 6), 2, (7, 9)), (41, (5, 6, 7, 8), 3, ())]),
        ([(7,), (7, 8), (7, 8, 9)], [(40, (5, 6), 2, (7, 7, 7)), (42, (5, 6, 7, 8), 3, ()), (43, (5, 6, 7, 8, 9), 3, ())]),
        ([(1, 7, 8), (1, 9), (1, 9, 4)], [(40, (5, 6, 1), 2, (7, 9, 9)), (41, (5, 6, 1, 7, 8), 4, ()), (43, (5, 6, 1, 9, 4), 4, ())]),
    ],
)
def test_each_token_is_scored_once(choices: list[tuple[int, ...]], wanted: list[object]) -> None:
    """What all choices begin with, and then the next token of each, in the prompt's own request; the rest of longer ones in theirs."""
    assert [shape(each) for each in choice_requests(40, CONTEXT, choices)] == wanted


def logprob(before: Sequence[int], token_id: int) -> float:
    return -1 - (sum(before) * 7 + token_id) % 11


def likeliest(before: Sequence[int]) -> int:
    return max(range(12), key=lambda token_id: logprob(before, token_id))


def result_of(request: TokenRequest) -> TokenResult:
    """What an engine answers, whose log probabilities depend on all tokens before."""
    prompt, first = request.prompt_token_ids, request.first_scored
    known = [(prompt[:place], prompt[place]) for place in range(first, len(prompt))] + [(prompt, each) for each in request.alternatives]
    entries = tuple(
        TokenLogprobs(
            token_ids=(token_id, best := likeliest(before)), logprobs=(logprob(before, token_id), logprob(before, best)), rank=None
        )
        for before, token_id in known
    )
    return TokenResult(index=request.index, prompt_logprobs=entries)


CHOICES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


@given(CHOICES)
def test_scores_are_sums_over_tokens(choices: list[tuple[int, ...]]) -> None:
    """Whatever the choices have in common, duplicates and beginnings of each other included."""
    requests = choice_requests(40, CONTEXT, choices)
    output = classified(requests, {each.index: result_of(each) for each in requests}, "text")
    scores = output.outputs
    wanted = [sum(logprob((*CONTEXT, *choice[:place]), choice[place]) for place in range(len(choice))) for choice in choices]
    assert scores.logprobs == pytest.approx(wanted)
    assert scores.num_tokens == [len(choice) for choice in choices]
    assert scores.is_greedy == [
        all(likeliest((*CONTEXT, *choice[:place])) == choice[place] for place in range(len(choice))) for choice in choices
    ]
    total = sum(math.exp(each) for each in wanted)
    assert scores.probs == pytest.approx([math.exp(each) / total for each in wanted])
    assert scores.num_classes == len(choices)
    assert scores.best == wanted.index(max(wanted))
    assert (output.request_id, output.prompt, output.prompt_token_ids, output.error) == ("40", "text", CONTEXT, None)


def test_probabilities_of_unlikely_choices_add_up() -> None:
    """Where the exponential of each is 0."""
    entries = tuple(TokenLogprobs(token_ids=(each, 0), logprobs=(value, -0.1), rank=None) for each, value in ((7, -2000.0), (8, -2001.0)))
    requests = choice_requests(0, CONTEXT, [(7,), (8,)])
    scores = classified(requests, {0: TokenResult(index=0, prompt_logprobs=entries)}).outputs
    assert sum(scores.probs) == pytest.approx(1)
    assert scores.probs[0] == pytest.approx(math.e * scores.probs[1])


def test_the_first_of_equals_is_the_best() -> None:
    requests = choice_requests(0, CONTEXT, [(7,), (7,)])
    scores = classified(requests, {0: result_of(requests[0])}).outputs
    assert (scores.best, scores.probs) == (0, [0.5, 0.5])


def test_a_request_that_failed_fails_its_prompt() -> None:
    requests = choice_requests(0, CONTEXT, [(7, 8), (9,)])
    error = RequestError("no", code="non_finite_logits")
    output = classified(requests, {0: result_of(requests[0]), 1: TokenResult(index=1, finish_reason="error", error=error)})
    assert output.error is error
    assert output.outputs.probs == output.outputs.logprobs == []
    with pytest.raises(RequestError, match="no scores"):
        _ = output.outputs.best
