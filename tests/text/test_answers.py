"""Prompts and sampling parameters to the engine's requests, and results to answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import ids_of, make_tokenizer

from flexgen.errors import RequestError
from flexgen.outputs import Logprob
from flexgen.request import SamplingParams, TokenLogprobs, TokenResult
from flexgen.text.answers import RequestTranslator
from flexgen.text.defaults import choice_seed, derive_seed
from flexgen.text.stop_strings import StopStrings
from flexgen.text.tokenizer import UNFINISHED, Tokenizer

VOCAB, A, EOS = 300, 64, 256  # of the tokenizer of bytes: "a" is 64


@pytest.fixture(scope="module")
def translator(model_folder: Path) -> RequestTranslator:
    tokenizer = Tokenizer.load(model_folder)
    return RequestTranslator(tokenizer=tokenizer, vocab_size=VOCAB, max_model_len=64, eos_token_ids=frozenset({EOS}), seed=5)


@pytest.fixture
def bare(translator: RequestTranslator) -> RequestTranslator:
    return dataclasses.replace(translator, tokenizer=None)


# -- requests -------------------------------------------------------------------------------------------------------------------------


def test_every_parameter_reaches_the_engine(translator: RequestTranslator) -> None:
    params = SamplingParams(
        presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.3, temperature=0.4, top_p=0.5, top_k=6, min_p=0.07, seed=8,
        stop=["ab"], stop_token_ids=[9], bad_words=["b"], max_tokens=11, min_tokens=1, logprobs=2, logit_bias={"3": 4},
        allowed_token_ids=[A, 9],
    )  # fmt: skip
    (request,) = translator.requests(40, [A, A + 1], params)
    assert (request.index, request.prompt_token_ids, request.max_tokens, request.min_tokens) == (40, (A, A + 1), 11, 1)
    assert (request.presence_penalty, request.frequency_penalty, request.repetition_penalty) == (0.1, 0.2, 1.3)
    assert (request.temperature, request.top_p, request.top_k, request.min_p, request.seed) == (0.4, 0.5, 6, 0.07, 8)
    assert request.stop_token_ids == {9, EOS}
    assert (request.logit_bias, request.allowed_token_ids, request.num_logprobs) == (((3, 4.0),), (A, 9), 2)
    assert request.bad_words_token_ids == ((A + 1,),)
    assert isinstance(request.stops, StopStrings)
    assert request.stops([A, A + 1]) == "ab"
    assert request.generated.token_ids == ()


def test_defaults_ask_for_nothing(translator: RequestTranslator) -> None:
    (request,) = translator.requests(0, [A], SamplingParams(top_k=-1, ignore_eos=True))
    assert (request.top_k, request.stop_token_ids, request.stops, request.num_logprobs) == (0, frozenset(), None, None)


def test_several_answers_have_seeds_of_their_own(translator: RequestTranslator) -> None:
    named = translator.requests(10, [A], SamplingParams(n=3, seed=7, stop="x"))
    assert [request.index for request in named] == [10, 11, 12]
    assert [request.seed for request in named] == [7, choice_seed(7, 1), choice_seed(7, 2)]
    assert len({request.seed for request in named}) == 3
    assert len({id(request.stops) for request in named}) == 3, "each watches its own text"
    unnamed = translator.requests(10, [A], SamplingParams(n=3))
    assert [request.seed for request in unnamed] == [derive_seed(5, index) for index in (10, 11, 12)]


def test_seeds_of_answers_are_fixed_for_ever() -> None:
    """Answers of past runs depend on them; and another answer is not another request."""
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 1) != derive_seed(7, 1)
    assert len({choice_seed(seed, choice) for seed in range(-20, 20) for choice in range(20)}) == 800


@pytest.mark.parametrize("param", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_ids_outside_the_vocabulary_are_refused_by_name(translator: RequestTranslator, param: str) -> None:
    def given(token_id: int) -> Any:
        return {token_id: 1.0} if param == "logit_bias" else [token_id]

    translator.requests(0, [A], SamplingParams(**{param: given(VOCAB - 1)}))
    with pytest.raises(RequestError, match="vocabulary of 300") as caught:
        translator.requests(0, [A], SamplingParams(**{param: given(VOCAB)}))
    assert caught.value.param == param


def test_logprobs_are_capped(translator: RequestTranslator) -> None:
    assert translator.requests(0, [A], SamplingParams(logprobs=20))[0].num_logprobs == 20
    for asked, what in ((21, "is"), (-1, "is all 300 tokens of the vocabulary, which is")):
        with pytest.raises(RequestError, match=rf"logprobs {asked} {what} more than 20, which max_logprobs \(--max-logprobs\) can raise"):
            translator.requests(0, [A], SamplingParams(logprobs=asked))
        assert dataclasses.replace(translator, max_logprobs=-1).requests(0, [A], SamplingParams(logprobs=asked))[0].num_logprobs == asked


def test_bad_words_of_another_vocabulary_are_refused(translator: RequestTranslator) -> None:
    small = dataclasses.replace(translator, vocab_size=A + 1)
    assert small.requests(0, [1], SamplingParams(bad_words=["a"]))[0].bad_words_token_ids == ((A,),)
    with pytest.raises(RequestError, match="bad_words: 'b' has a token that the vocabulary of 65 does not"):
        small.requests(0, [1], SamplingParams(bad_words=["b"]))


@pytest.mark.parametrize(("param", "value"), [("stop", ["x"]), ("bad_words", ["x"])])
def test_texts_need_a_tokenizer(bare: RequestTranslator, param: str, value: list[str]) -> None:
    params: dict[str, Any] = {param: value}
    with pytest.raises(RequestError, match="tokenizer") as caught:
        bare.requests(0, [A], SamplingParams(**params))
    assert caught.value.param == param


# -- answers --------------------------------------------------------------------------------------------------------------------------

ABC = (A, A + 1, A + 2)


@pytest.mark.parametrize(
    ("result", "how", "text", "stop_reason"),
    [
        ({"finish_reason": "length"}, {}, "abc", None),
        ({"finish_reason": "stop"}, {"stop_token_ids": [A + 2]}, "ab", A + 2),
        ({"finish_reason": "stop"}, {"stop_token_ids": [A + 2], "include_stop_str_in_output": True}, "abc", A + 2),
        ({"finish_reason": "stop", "token_ids": (*ABC, EOS)}, {}, "abc", None),
        ({"finish_reason": "stop", "token_ids": (*ABC, EOS)}, {"stop_token_ids": [EOS], "ignore_eos": True}, "abc", EOS),
        ({"finish_reason": "stop", "stop_string": "bc"}, {"stop": "bc"}, "a", "bc"),
        ({"finish_reason": "stop", "stop_string": "bc"}, {"stop": "bc", "include_stop_str_in_output": True}, "abc", "bc"),
        ({"finish_reason": "length", "token_ids": (A, EOS)}, {"skip_special_tokens": False, "ignore_eos": True}, "a</s>", None),
    ],
)
def test_text_and_what_stopped_it(translator: RequestTranslator, result: dict, how: dict, text: str, stop_reason: object) -> None:
    (answer,) = translator.output([TokenResult(index=3, **({"token_ids": ABC} | result))], SamplingParams(**how), ()).outputs
    assert (answer.text, answer.stop_reason, answer.finish_reason) == (text, stop_reason, result["finish_reason"])
    assert answer.token_ids == result.get("token_ids", ABC)
    assert (answer.logprobs, answer.cumulative_logprob) == (None, None)


def test_answers_are_in_the_order_of_their_requests(translator: RequestTranslator) -> None:
    results = [TokenResult(index=index, token_ids=(A + index,)) for index in (9, 7, 8)]
    answers = translator.output(results, SamplingParams(n=3), (A,)).outputs
    assert [(each.index, each.text) for each in answers] == [(0, "h"), (1, "i"), (2, "j")]


def test_a_failed_answer_stands_among_the_others(translator: RequestTranslator) -> None:
    error = RequestError("no", code="non_finite_logits")
    results = [TokenResult(index=4, finish_reason="error", error=error), TokenResult(index=5, token_ids=(A,))]
    failed, fine = translator.output(results, SamplingParams(n=2), ()).outputs
    assert (failed.finish_reason, failed.stop_reason, failed.text) == ("error", "non_finite_logits", "")
    assert (fine.index, fine.text) == (1, "a")


LOGPROBS = (
    TokenLogprobs(token_ids=(A, A, A + 1), logprobs=(-0.5, -0.5, -1.5), rank=1),
    TokenLogprobs(token_ids=(A + 9, A + 1, EOS), logprobs=(-7.0, -0.25, -2.0), rank=40),
)


def test_logprobs_have_vllm_s_shape(translator: RequestTranslator) -> None:
    result = TokenResult(index=0, token_ids=(A, A + 9), logprobs=LOGPROBS)
    (answer,) = translator.output([result], SamplingParams(logprobs=2), ()).outputs
    assert answer.cumulative_logprob == -7.5
    assert answer.logprobs == [
        {A: Logprob(logprob=-0.5, rank=1, decoded_token="a"), A + 1: Logprob(logprob=-1.5, rank=2, decoded_token="b")},
        {
            A + 9: Logprob(logprob=-7.0, rank=40, decoded_token="j"),
            A + 1: Logprob(logprob=-0.25, rank=1, decoded_token="b"),
            EOS: Logprob(logprob=-2.0, rank=2, decoded_token="</s>"),
        },
    ]
    assert [next(iter(each)) for each in answer.logprobs] == [A, A + 9], "the generated token comes first"


# -- behind a prompt ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> RequestTranslator:
    tokenizer = make_tokenizer("llama2")
    return RequestTranslator(tokenizer=tokenizer, vocab_size=len(tokenizer.hf), max_model_len=64, eos_token_ids=frozenset({2}), seed=5)


def pieces(translator: RequestTranslator, *names: str) -> tuple[int, ...]:
    assert translator.tokenizer is not None
    return tuple(ids_of(translator.tokenizer, *names))


@pytest.mark.parametrize(
    ("result", "how", "text"),
    [
        ({}, {}, " stood stood"),
        ({"finish_reason": "stop", "stop_string": " stood"}, {"stop": " stood"}, ""),
        ({"finish_reason": "stop", "stop_string": " stood"}, {"stop": " stood", "include_stop_str_in_output": True}, " stood"),
        ({"finish_reason": "stop", "stop_string": "d s"}, {"stop": "d s"}, " stoo"),
        ({"finish_reason": "stop"}, {}, " stood"),
    ],
    ids=str,
)
def test_an_answer_keeps_the_space_behind_its_prompt(llama: RequestTranslator, result: dict, how: dict, text: str) -> None:
    prompt, ids = pieces(llama, "▁a", ":"), pieces(llama, "▁stood", "▁stood")
    given = ids[:1] if result.get("stop_string") == " stood" else ids
    (answer,) = llama.output([TokenResult(index=0, token_ids=given, **result)], SamplingParams(**how), prompt).outputs
    assert answer.text == text


def test_stop_strings_are_looked_for_behind_the_prompt(llama: RequestTranslator) -> None:
    for request in llama.requests(0, pieces(llama, "▁a", ":"), SamplingParams(n=2, stop=" stood")):
        assert request.stops is not None
        assert request.stops(pieces(llama, "▁stood")) == " stood"


def steps(*ids: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_ids=(each,), logprobs=(-1.0,), rank=1) for each in ids)


def test_names_of_tokens_make_the_text_and_bytes_are_their_own(llama: RequestTranslator) -> None:
    wave = ("<0xF0>", "<0x9F>", "<0x8C>", "<0x8A>")
    ids = pieces(llama, "▁stood", "stood", *wave, "▁a", "</s>", "▁")
    result = TokenResult(index=0, token_ids=ids, logprobs=steps(*ids))
    (answer,) = llama.output([result], SamplingParams(logprobs=0), pieces(llama, ":")).outputs
    assert answer.logprobs is not None
    shown = [step[token_id] for token_id, step in zip(ids, answer.logprobs, strict=True)]
    assert [each.decoded_token for each in shown] == [" stood", "stood", *[UNFINISHED] * 4, " a", "</s>", " "]
    assert [each.token_bytes for each in shown] == [None, None, b"\xf0", b"\x9f", b"\x8c", b"\x8a", None, None, None]
    assert answer.text == " stoodstood\N{WATER WAVE} a "
    assert answer.text_offsets == (0, 6, 11, 11, 11, 11, 12, 14, 14)


@pytest.mark.parametrize(
    ("names", "offsets"),
    [
        (("<0xF0>", "a", "▁a"), (0, 1, 2)),  # a byte that is no text stands for itself
        (("▁stood", "▁a"), (0, 5)),  # no text is in front of it, so its space is none
    ],
)
def test_offsets_are_places_in_the_text(llama: RequestTranslator, names: tuple[str, ...], offsets: tuple[int, ...]) -> None:
    ids = pieces(llama, *names)
    (answer,) = llama.output([TokenResult(index=0, token_ids=ids, logprobs=steps(*ids))], SamplingParams(logprobs=0), ()).outputs
    assert answer.text_offsets == offsets


def test_without_a_tokenizer_there_are_ids_only(bare: RequestTranslator) -> None:
    (answer,) = bare.output([TokenResult(index=0, token_ids=(A, A + 9), logprobs=LOGPROBS)], SamplingParams(logprobs=2), ()).outputs
    assert (answer.text, answer.token_ids) == ("", (A, A + 9))
    assert answer.logprobs is not None
    assert answer.logprobs[0][A] == Logprob(logprob=-0.5, rank=1)
    assert answer.text_offsets is None
