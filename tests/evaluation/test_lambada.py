"""LAMBADA: the last word of each passage, scored by its tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
from evaluation.oracle import Subject

from flexgen.errors import JobError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.lambada import lambada, split

PASSAGES = ["The old house stood upon the hill", "It was a dark and stormy night", "She said that she did not know"]


def test_the_last_word_is_split_off() -> None:
    assert split(0, "a b  c") == ("a b ", " c")
    with pytest.raises(JobError, match="passage 5"):
        split(4, "alone")
    with pytest.raises(JobError, match="passage 5 ends in a space"):
        split(4, "not alone ")


def test_figures(subject: Subject) -> None:
    """A passage that goes on greedily is right, by whatever words."""
    tokenizer: Any = subject.llm.get_tokenizer()
    encoding = Encoding(tokenizer)
    prompt = encoding.encode("The old house stood")
    tokens = subject.oracle.generate(prompt, 12)
    sure = "The old house stood" + tokenizer.decode(tokens)
    sure = sure[: sure.rindex(" ")]
    passages = [*PASSAGES, sure]
    found = lambada(Answers(llm=subject.llm), encoding, passages)
    scores = [subject.oracle.score(*encoding.pair(*split(0, passage))) for passage in passages]
    assert scores[-1][1]
    right = sum(is_greedy for _, is_greedy in scores)
    assert (found.num_passages, found.accuracy) == (4, right / 4)
    assert found.accuracy_stderr == pytest.approx(math.sqrt(right / 4 * (1 - right / 4) / 3))
    assert math.log(found.perplexity) == pytest.approx(-sum(logprob for logprob, _ in scores) / 4, abs=1e-4)
