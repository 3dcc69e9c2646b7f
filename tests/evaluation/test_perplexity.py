"""Perplexity: the figures by their definitions, and the sum over windows against transformers."""

from __future__ import annotations

import math

import pytest
from evaluation.oracle import Subject

from flexgen.errors import JobError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.perplexity import Perplexity, exponential, perplexity
from flexgen.evaluation.windows import rolling_windows

LONG = "The old house stood upon the hill, and the wind blew about it. " * 90


def test_the_figures() -> None:
    found = Perplexity(num_documents=1, num_tokens=20, num_words=10, num_bytes=40, loglikelihood=-60.0)
    assert found.word_perplexity == pytest.approx(math.exp(6))
    assert found.token_perplexity == pytest.approx(math.exp(3))
    assert found.byte_perplexity == pytest.approx(math.exp(1.5))
    assert found.bits_per_byte == pytest.approx(1.5 / math.log(2))
    assert found.to_json().keys() >= {"num_tokens", "word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"}
    assert exponential(1e6) == math.inf


def test_it_is_that_of_transformers(subject: Subject) -> None:
    encoding, most = Encoding(subject.llm.get_tokenizer()), subject.llm.max_model_len
    documents = [LONG, "Café\n\n noir"]
    found = perplexity(Answers(llm=subject.llm), encoding, documents)
    tokens = [encoding.encode(text) for text in documents]
    windows = [window for each in tokens for window in rolling_windows(each, encoding.prefix_token_id, most)]
    assert len(windows) > 2, "the first text takes several windows"
    assert found.num_tokens == sum(len(predicted) for _, predicted in windows)
    assert found.num_bytes == len(LONG) + 12
    assert found.num_words == len(LONG.split()) + 1 + 2  # lm-eval counts what follows the last space as a word
    wanted = sum(subject.oracle.score(*window)[0] for window in windows)
    assert found.loglikelihood / found.num_tokens == pytest.approx(wanted / found.num_tokens, abs=1e-5)


def test_a_text_without_tokens_is_refused(subject: Subject) -> None:
    with pytest.raises(JobError, match="no tokens"):
        perplexity(Answers(llm=subject.llm), Encoding(subject.llm.get_tokenizer(), add_bos_token=False), [])
