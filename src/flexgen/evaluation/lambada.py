"""LAMBADA: how often a model predicts the last word of a passage, as lm-evaluation-harness's `lambada_openai` defines it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.errors import JobError
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.documents import read_lines
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
        JobError: A passage has no word to predict (see `split`), or one that is longer than the model's context.
        FlexGenError: See `scoring.score`.
    """
    pairs = encoding.pairs(split(index, passage) for index, passage in enumerate(passages))
    scores = score(answers, "lambada", pairs, "passage")
    count, num_right = len(scores), sum(each.is_greedy for each in scores)
    share = num_right / count
    return Lambada(
        num_passages=count,
        accuracy=share,
        accuracy_stderr=math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0,
        perplexity=exponential(-math.fsum(each.logprob for each in scores) / count),
    )


def read_passages(path: Path, limit: int | None = None) -> list[str]:
    """Return the passages of a file of JSON lines with the key `text`.

    Args:
        path: The file.
        limit: The most passages to read; None for all.

    Raises:
        JobError: A line is not such an object, or a passage has no word to predict; the message has its number.
        StorageError: The file cannot be read.
    """
    passages = read_lines(path, limit)
    for index, passage in enumerate(passages):
        try:
            split(index, passage)
        except JobError as error:
            raise JobError(f"{path}: {error}") from error
    return passages


def split(index: int, passage: str) -> tuple[str, str]:
    """Return a passage without its last word, and the space and the word.

    Raises:
        JobError: There is no space in the passage, or it ends in one; the message has its number.
    """
    context, _, word = passage.rpartition(" ")
    if context and not word.strip():
        raise JobError(f"passage {index + 1} ends in a space, {passage[-40:]!r}, so there is no last word to predict")
    if not context.strip():
        raise JobError(f"passage {index + 1} has a single word, {passage[:40]!r}, so there is nothing to predict it from")
    return context, " " + word
