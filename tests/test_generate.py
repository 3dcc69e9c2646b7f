"""From text to text on a trained model: stop strings, several answers, logprobs, forbidden words, and all of it at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexgen import LLM, SamplingParams

PROMPTS = ["It was a dark and stormy night", "The old house stood", "She said"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(novels_opt: Path) -> Iterator[LLM]:
    with LLM(novels_opt, dtype="float32") as llm:
        yield llm


def answers(llm: LLM, params: SamplingParams) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(llm: LLM, include: bool) -> None:
    """Parts of words in the middle of each answer."""
    whole = answers(llm, GREEDY)
    stops = [text[len(text) // 2 : len(text) // 2 + 3] for text in whole]
    params = [dataclasses.replace(GREEDY, stop=[stop, "\N{SNOWMAN}"], include_stop_str_in_output=include) for stop in stops]
    for output, text, stop in zip(llm.generate(PROMPTS, params), whole, stops, strict=True):
        (answer,) = output.outputs
        assert answer.text == text[: text.index(stop) + len(stop) * include]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert len(answer.token_ids) < 24


def test_min_tokens_hold_stop_strings_back(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], dataclasses.replace(GREEDY, stop=["e", "a", "i", "o"], min_tokens=20))
    assert len(output.outputs[0].token_ids) > 20


def test_several_answers(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=12)
    several = llm.generate(PROMPTS, params)
    alone = llm.generate(PROMPTS, dataclasses.replace(params, n=1))
    for output, single in zip(several, alone, strict=True):
        assert [answer.index for answer in output.outputs] == [0, 1, 2]
        assert output.outputs[0] == single.outputs[0], "the first is the one that is alone"
        assert len({answer.token_ids for answer in output.outputs}) == 3
    assert [output.outputs for output in llm.generate(PROMPTS, params)] == [output.outputs for output in several]


@pytest.mark.parametrize("broken", ["flexgen.text.stop_strings.StopStrings.__call__", "flexgen.engine.sampling.token_logprobs"])
def test_an_exception_of_one_request_leaves_its_neighbours(llm: LLM, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """The second asks for a stop string, and for log probabilities."""
    alone = answers(llm, SamplingParams(seed=5, max_tokens=12))

    def breaks(*args: object) -> None:
        raise IndexError("broken")

    monkeypatch.setattr(broken, breaks)
    params = [SamplingParams(seed=5, max_tokens=12, stop=["\N{SNOWMAN}"] * place, logprobs=place or None) for place in (0, 1, 0)]
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    assert (outputs[1].finish_reason, outputs[1].stop_reason) == ("error", "internal_error")
    assert [outputs[0].text, outputs[2].text] == [alone[0], alone[2]]


def test_logprobs_are_those_of_the_model(llm: LLM, novels_opt: Path) -> None:
    from transformers import AutoModelForCausalLM

    params = dataclasses.replace(GREEDY, logprobs=3, repetition_penalty=1.4, max_tokens=8)
    (output,) = llm.generate(PROMPTS[0], params)
    (answer,) = output.outputs
    assert answer.logprobs is not None
    model = AutoModelForCausalLM.from_pretrained(novels_opt, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*output.prompt_token_ids, *answer.token_ids]])).logits[0]
    wanted = torch.log_softmax(logits.double(), -1)[len(output.prompt_token_ids) - 1 : -1]
    for token_id, shown, row in zip(answer.token_ids, answer.logprobs, wanted, strict=True):
        assert next(iter(shown)) == token_id
        assert set(shown) == {token_id, *row.topk(3).indices.tolist()}
        for each, logprob in shown.items():
            assert logprob.logprob == pytest.approx(row[each].item(), abs=1e-4)
            assert logprob.rank == int((row > row[each]).sum()) + 1
            assert logprob.decoded_token == llm.get_tokenizer().decode([each])
    assert answer.cumulative_logprob == pytest.approx(sum(next(iter(shown.values())).logprob for shown in answer.logprobs))


def test_forbidden_words_do_not_come(llm: LLM) -> None:
    whole = answers(llm, GREEDY)
    words = sorted({word for text in whole for word in text.split() if word.isalpha()}, key=len)
    params = dataclasses.replace(GREEDY, bad_words=words[:5])
    forbidden = {ids for request in llm.model.token_requests(0, [5], params) for ids in request.bad_words_token_ids}
    for output in llm.generate(PROMPTS, params):
        ids = output.outputs[0].token_ids
        assert not [word for word in forbidden for start in range(len(ids)) if ids[start : start + len(word)] == word]
    assert answers(llm, params) != whole


def test_only_allowed_tokens_come(llm: LLM) -> None:
    allowed = list(range(200, 260))
    for output in llm.generate(PROMPTS, SamplingParams(seed=1, max_tokens=20, ignore_eos=True, allowed_token_ids=allowed)):
        assert set(output.outputs[0].token_ids) <= set(allowed)
