"""LLM.classify over a fake engine: every form of choices, an output for every prompt, and what is refused before anything runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CONTEXT, POISON, FakeEngine, byte_id, fake_logprob

from flexgen import LLM, OptionError, RequestError, SamplingParams


@pytest.fixture
def llm(model_folder: Path, engines: list[FakeEngine]) -> LLM:
    return LLM(model_folder)


def score(before: str, choice: str) -> float:
    ids = [byte_id(character) for character in before[-1] + choice]
    return sum(fake_logprob(one, other) for one, other in itertools.pairwise(ids))


def test_the_same_choices_for_all_prompts(llm: LLM) -> None:
    outputs = llm.classify(["ab", "c"], ["d", "ef"])
    for prompt, output in zip(("ab", "c"), outputs, strict=True):
        assert output.outputs.logprobs == pytest.approx([score(prompt, "d"), score(prompt, "ef")])
        assert output.outputs.num_tokens == [1, 2]
        assert sum(output.outputs.probs) == pytest.approx(1)
        assert (output.prompt, output.finished, output.error) == (prompt, True, None)
        assert output.prompt_token_ids == tuple(map(byte_id, prompt))


def test_choices_of_their_own(llm: LLM) -> None:
    outputs = llm.classify(["ab", "c"], [["d", "ef", "g"], ["h"]])
    assert [output.outputs.num_classes for output in outputs] == [3, 1]
    assert outputs[1].outputs.logprobs == pytest.approx([score("c", "h")])
    assert outputs[1].outputs.probs == [1.0]


@pytest.mark.parametrize(
    "choices",
    [
        [[66], [67, 68]], [[[66], [67, 68]]], ([66], (67, 68)), [np.array([66]), torch.tensor([67, 68])],
        (each for each in [[66], [67, 68]]), [range(66, 67), range(67, 69)], [[66.0], [67, 68]],
    ],
)  # fmt: skip
def test_token_ids_of_any_kind(llm: LLM, choices: Any) -> None:
    (output,) = llm.classify([[64, 65]], choices)
    assert output.outputs.logprobs == pytest.approx([score("ab", "c"), score("ab", "de")])
    assert output.prompt is None


@pytest.mark.parametrize("choices", [("d", "e"), (each for each in "de"), np.array(["d", "e"]), {"d": 1, "e": 2}.keys()])
def test_texts_of_any_kind(llm: LLM, choices: Any) -> None:
    (output,) = llm.classify("ab", choices)
    assert output.outputs.logprobs == pytest.approx([score("ab", "d"), score("ab", "e")])


def test_spaces_at_the_end_of_a_prompt_belong_to_the_choices(llm: LLM) -> None:
    with_space, with_spaces, in_choices = llm.classify(["ab ", "ab  ", "ab"], [["c"], ["c"], [" c"]])
    assert with_space.outputs == in_choices.outputs
    assert with_spaces.outputs.num_tokens == [3]
    assert with_space.prompt == "ab "
    assert with_space.prompt_token_ids == with_spaces.prompt_token_ids == (64, 65)


def test_no_prompts_open_no_engine(llm: LLM, engines: list[FakeEngine]) -> None:
    assert llm.classify([], ["a"]) == []
    assert engines == []


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ("Yes", "a list of texts, or such a list for each prompt"),
        (5, "a list of texts"),
        ([], "a list of texts"),
        (None, "a list of texts"),
        ([["d"]], "1 list of choices for 2 prompts"),
        ([["d"], ["e"], ["f"]], "3 lists of choices for 2 prompts"),
        ([["d"], []], "texts, or lists of token ids"),
        (["d", ""], "texts, or lists of token ids"),
        (["d", 5], "texts, or lists of token ids"),
        ([[1.5]], "texts, or lists of token ids"),
        (["d", None], "texts, or lists of token ids"),
    ],
)
def test_what_is_no_list_of_choices(llm: LLM, engines: list[FakeEngine], choices: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        llm.classify(["a", "b"], choices)
    assert engines == []


@pytest.mark.parametrize(
    ("prompt", "choices", "said"),
    [
        ([64], ["a"], "choices are texts after a prompt that is text"),
        ("a", ["a", [64]], "choices are texts after a prompt that is text"),
        ([64], [[300]], r"choices\[0\] has token ids outside the vocabulary"),
        ([64] * CONTEXT, [[64], [64, 65]], r"the prompt and choices\[1\] have 66 tokens, and the context is 64"),
        ("a" * CONTEXT, ["b", "bc"], r"with choices\[1\]: the prompt has 66 tokens"),
        ("", ["b"], "the prompt has no tokens"),
        ("a", ["b", "\ud800"], r"with choices\[1\]: the prompt has a lone surrogate"),
        (3.5, ["b"], "a prompt is text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_prompt_that_cannot_be_scored_is_named(llm: LLM, engines: list[FakeEngine], prompt: Any, choices: Any, said: str) -> None:
    with pytest.raises(RequestError, match=f"^prompt 1: {said}"):
        llm.classify([[64] if isinstance(choices[0], list) else "a", prompt], [[[65]] if isinstance(choices[0], list) else ["b"], choices])
    assert engines == []


def test_a_prompt_that_fails_alone(llm: LLM) -> None:
    good, bad = llm.classify([[64], [POISON]], [[65], [66, 67]])
    assert good.error is None
    assert bad.error is not None
    assert bad.error.code == "non_finite_logits"
    assert bad.outputs.probs == []


def test_a_model_without_a_tokenizer(bare_model_folder: Path, engines: list[FakeEngine]) -> None:
    with LLM(bare_model_folder) as llm:
        (output,) = llm.classify([[64, 65]], [[66], [67]])
        assert output.outputs.num_tokens == [1, 1]
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.classify(["ab"], ["c"])


def test_requests_of_all_calls_have_numbers_of_their_own(llm: LLM) -> None:
    numbers = [output.request_id for output in llm.classify(["a", "b"], ["cd", "ef", "g"])]
    numbers += [output.request_id for output in llm.generate(["a", "b"], SamplingParams(max_tokens=1, n=2))]
    numbers += [output.request_id for output in llm.classify(["a"], ["c"])]
    assert len(set(numbers)) == 5


def test_what_prompts_and_choices_have_in_common_is_found(llm: LLM, engines: list[FakeEngine]) -> None:
    llm.classify(["x" * 40 + "a", "x" * 40 + "b"], ["cd", "e"])
    assert [(point.length, point.num_requests) for point in engines[0].prefixes.path((byte_id("x"),) * 40)] == [(32, 4)]


def test_a_bar_is_drawn_if_asked_for(llm: LLM) -> None:
    totals: list[int] = []

    def bar(results: Any, total: int, **how: Any) -> Any:
        totals.append(total)
        return results

    llm.classify(["a"], ["bc", "d"], use_tqdm=bar)
    assert totals == [2]


def test_scored_prompts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    one, two, plain = llm.generate(["a", "abc", "abc"], [params, params, SamplingParams(max_tokens=1)])
    assert one.prompt_logprobs == [None]
    assert two.prompt_logprobs is not None
    assert [next(iter(step)) for step in two.prompt_logprobs[1:] if step is not None] == [65, 66]
    assert plain.prompt_logprobs is None
    assert (two.outputs[0].text, two.outputs[0].token_ids, two.outputs[0].finish_reason) == ("", (), "length")


def test_only_the_first_of_several_answers_scores_the_prompt(llm: LLM) -> None:
    (output,) = llm.generate("abc", SamplingParams(n=3, max_tokens=2, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    assert [step and next(iter(step.values())).logprob for step in output.prompt_logprobs] == [
        None, fake_logprob(64, 65), fake_logprob(65, 66)
    ]  # fmt: skip
    assert len(output.outputs) == 3
