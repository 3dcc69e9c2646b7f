"""LAMBADA: how often a model predicts the last word of a passage, as lm-evaluation-harness's `lambada_openai` defines it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.errors import JobError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.perplexity import exponential
from flexgen.evaluation.scoring import score


@dataclass(frozen=True, slots=True, kw_only=True)
class Lambada:
    """The result of LAMBADA.

    Attributes:
        num_passages: The number of passages.
        accuracy: The share of passages whose last word is, token by token, the likeliest one.
        accuracy_stderr: The standard error of that share; 0 for a single passage.
        perplexity: The perplexity of the last words.
    """

    num_passages: int
    accuracy: float
    accuracy_stderr: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return dataclasses.asdict(self)


def lambada(answers: Answers, encoding: Encoding, passages: Sequence[str]) -> Lambada:
    """Return how well the last word of each passage is predicted.

    Args:
        answers: The model and the state.
        encoding: The rules by which texts become tokens.
        passages: The passages, at least one.

    Raises:
        JobError: A passage has a single word.
        FlexGenError: See `scoring.score`.
    """
    scores = score(answers, "lambada", encoding.pairs(split(index, passage) for index, passage in enumerate(passages)))
    count, num_right = len(scores), sum(each.is_greedy for each in scores)
    share = num_right / count
    return Lambada(
        num_passages=count,
        accuracy=share,
        accuracy_stderr=math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0,
        perplexity=exponential(-math.fsum(each.logprob for each in scores) / count),
    )


def split(index: int, passage: str) -> tuple[str, str]:
    """Return a passage without its last word, and the space and the word.

    Raises:
        JobError: There is no space in the passage; the message has its index.
    """
    context, _, word = passage.rpartition(" ")
    if not context:
        raise JobError(f"passage {index + 1} has a single word, {passage[:40]!r}, so there is nothing to predict it from")
    return context, " " + word
