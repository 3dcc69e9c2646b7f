"""Perplexity of texts in rolling windows, as lm-evaluation-harness defines it (`loglikelihood_rolling`)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.errors import JobError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.scoring import score
from flexgen.evaluation.windows import rolling_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """The log likelihood of texts, and what it was counted over.

    Attributes:
        num_documents: The number of texts.
        num_tokens: The number of tokens that were predicted, those included that the tokenizer adds.
        num_words: The number of words, which white space separates.
        num_bytes: The number of bytes in UTF-8.
        loglikelihood: The sum of the log probabilities of all tokens.
    """

    num_documents: int
    num_tokens: int
    num_words: int
    num_bytes: int
    loglikelihood: float

    @property
    def word_perplexity(self) -> float:
        """The perplexity per word, which can be compared between tokenizers."""
        return exponential(-self.loglikelihood / self.num_words)

    @property
    def byte_perplexity(self) -> float:
        """The perplexity per byte of the text."""
        return exponential(-self.loglikelihood / self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        """The bits that an ideal code by this model needs per byte."""
        return -self.loglikelihood / self.num_bytes / math.log(2)

    @property
    def token_perplexity(self) -> float:
        """The perplexity per token, which depends on the tokenizer."""
        return exponential(-self.loglikelihood / self.num_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        figures = ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in figures}


def perplexity(answers: Answers, encoding: Encoding, documents: Sequence[str]) -> Perplexity:
    """Return the perplexity of texts; each is scored by itself.

    Args:
        answers: The model and the state.
        encoding: The rules by which texts become tokens.
        documents: The texts, none of them empty.

    Raises:
        JobError: There are no tokens.
        FlexGenError: See `scoring.score`.
    """
    tokens = [encoding.encode(text) for text in documents]
    if not any(tokens):
        raise JobError("the texts have no tokens")
    return Perplexity(
        num_documents=len(documents),
        num_tokens=sum(map(len, tokens)),
        num_words=sum(len(re.split(r"\s+", text)) for text in documents),
        num_bytes=sum(len(text.encode()) for text in documents),
        loglikelihood=math.fsum(rolling_loglikelihoods(answers, encoding, tokens)),
    )


def rolling_loglikelihoods(answers: Answers, encoding: Encoding, texts: Sequence[Sequence[int]]) -> list[float]:
    """Return the log likelihood of each text, given as its tokens; all windows of all texts are lines of one job.

    Raises:
        FlexGenError: See `scoring.score`.
    """
    windows = [list(rolling_windows(text, encoding.prefix_token_id, answers.llm.max_model_len)) for text in texts]
    scores = iter(score(answers, "loglikelihood_rolling", [window for each in windows for window in each]))
    return [math.fsum(next(scores).logprob for _ in each) for each in windows]


def exponential(value: float) -> float:
    """Return e to the power of a value; infinity where it is too large for a number."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
