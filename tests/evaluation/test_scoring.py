"""Scores of continuations: lines that share what they can, cut as lm-eval cuts, resumed, and equal to those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation.oracle import StopAfterPasses, Subject, num_done

from flexgen import LLM
from flexgen.errors import JobError, RequestError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.scoring import score, scoring_lines
from flexgen.jobs.interrupt import Stopped
from flexgen.request import TokenRequest
from flexgen.session.served import ServedModel

CONTEXT = "The old house stood upon the hill, and "
CHOICES = ["the wind", "the wind blew", "a", "zebra", " the wind"]


def test_pairs_of_one_context_share_a_line() -> None:
    lines, places = scoring_lines([([1, 2], [3]), ([7, 8], [9]), ([1, 2], [4, 5]), ([1, 2], [3])], 10)
    assert lines == [{"prompt": [1, 2], "choices": [[3], [4, 5]]}, {"prompt": [7, 8], "choices": [[9]]}]
    assert places == [(0, 0), (1, 0), (0, 1), (0, 0)]


def test_a_line_has_a_bounded_number_of_choices() -> None:
    lines, places = scoring_lines([([1, 2], [number]) for number in range(150)], 10)
    assert [len(line["choices"]) for line in lines] == [64, 64, 22]
    assert [lines[line]["choices"][choice] for line, choice in places] == [[number] for number in range(150)]


def test_a_context_of_one_token_is_not_shared() -> None:
    lines, _ = scoring_lines([([1], [2]), ([1], [3]), ([1], [2])], 10)
    assert lines == [{"prompt": [1], "choices": [[2]]}, {"prompt": [1], "choices": [[3]]}]


def test_what_is_too_long_is_cut_at_the_beginning() -> None:
    lines, _ = scoring_lines([(list(range(20)), [90, 91])], 10)
    assert lines == [{"prompt": list(range(11, 20)), "choices": [[90, 91]]}]  # the last token needs no place
    lines, _ = scoring_lines([([1, 2], list(range(10)))], 10)
    assert lines[0]["prompt"] == [2]


@pytest.mark.parametrize(("pair", "said"), [(([1], []), "has nothing to score"), (([1], list(range(11))), "has 11 tokens to score")])
def test_what_cannot_be_scored(pair: Any, said: str) -> None:
    """It is refused as a whole before anything runs, by its number from 1."""
    with pytest.raises(JobError, match=f"^passage 2 {said}"):
        scoring_lines([([1], [2]), pair], 10, "passage")


def pairs_of(subject: Subject) -> list[Any]:
    """Choices, an empty context, a long text, and one that is cut."""
    encoding = Encoding(subject.llm.get_tokenizer())
    pairs = encoding.pairs([*((CONTEXT, choice) for choice in CHOICES), ("", "It was a dark and stormy night.")])
    whole = encoding.encode(" ".join(["The old house stood upon the hill, and the wind blew."] * 60))
    most = subject.llm.max_model_len
    assert len(whole) > most + 1
    return [*pairs, (whole[:3], whole[3:400]), (whole[:-7], whole[-7:]), (whole[:1], whole[1 : most + 1])]


def test_scores_are_those_of_transformers(subject: Subject) -> None:
    pairs, most = pairs_of(subject), subject.llm.max_model_len
    found = score(Answers(llm=subject.llm), "test", pairs)
    for (context, continuation), each in zip(pairs, found, strict=True):
        logprob, is_greedy = subject.oracle.score(context[-(most + 1 - len(continuation)) :], continuation)
        assert each.logprob == pytest.approx(logprob, abs=1e-4 * max(1, len(continuation) / 10))
        assert each.is_greedy == is_greedy


def test_the_likeliest_continuation_is_greedy(subject: Subject) -> None:
    prompt = Encoding(subject.llm.get_tokenizer()).encode(CONTEXT.rstrip())
    tokens = subject.oracle.generate(prompt, 4)
    other = [*tokens[:-1], (tokens[-1] + 1) % 100]
    assert [each.is_greedy for each in score(Answers(llm=subject.llm), "test", [(prompt, tokens), (prompt, other)])] == [True, False]


def test_an_interrupted_evaluation_goes_on_and_scores_nothing_twice(novels_opt: Path, tmp_path: Path, streamed: list[int]) -> None:
    """It is stopped in its middle; what the second run computes is exactly what the first one left."""
    with LLM(novels_opt, dtype="float32", max_num_seqs=4, max_model_len=64) as llm:
        encoding, state = Encoding(llm.get_tokenizer()), tmp_path / "state"
        pairs = encoding.pairs((f"Chapter {number}. The old", " house stood") for number in range(40))
        with pytest.raises(Stopped):
            score(Answers(llm=llm, state=state, stop=StopAfterPasses(6)), "test", pairs)
        (folder,) = state.iterdir()
        done = num_done(folder)
        assert 0 < done < 40
        found = score(Answers(llm=llm, state=state), "test", pairs)
        assert found == score(Answers(llm=llm, state=state), "test", pairs)
        assert streamed == [40, 40 - done], "one continuation after a context is one request"
        assert found == score(Answers(llm=llm), "test", pairs)
    assert [folder] == list(state.iterdir()), "one folder for the same requests"


def test_failed_lines_are_tried_again(novels_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line fails for a reason that is gone later; the other one is not scored again."""
    real = ServedModel.choice_requests

    def refuse(self: ServedModel, index: int, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
        if list(prompt) == [2, 7]:
            raise RequestError("no room today", code="kv_cache_too_small")
        return real(self, index, prompt, choices)

    pairs = [([2, 5], [6]), ([2, 7], [6])]
    with LLM(novels_opt, dtype="float32") as llm:
        answers = Answers(llm=llm, state=tmp_path / "state")
        with monkeypatch.context() as patched:
            patched.setattr(ServedModel, "choice_requests", refuse)
            with pytest.raises(RequestError, match=r"1 of 2 lines of test .* line 2: no room today"):
                score(answers, "test", pairs)
        assert len(score(answers, "test", pairs)) == 2
        assert llm.report().num_requests == 1


def test_another_model_is_another_job(novels_opt: Path, tmp_path: Path) -> None:
    for length in (64, 32):
        with LLM(novels_opt, dtype="float32", max_model_len=length) as llm:
            score(Answers(llm=llm, state=tmp_path / "state"), "test", [([2, 5], [6])])
    assert len(list((tmp_path / "state").iterdir())) == 2
