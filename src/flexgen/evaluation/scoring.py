"""Scores continuations of contexts: lines with choices, one line for what shares a context, and the scores in their records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flexgen.errors import JobError
from flexgen.evaluation.answers import Answers, Line, Record
from flexgen.evaluation.encoding import Pair

_MAX_CHOICES = 64  # of a line, which is what a killed run may have to score again


class Score(NamedTuple):
    """The score of a continuation: the sum of its tokens' log probabilities, and whether each is the likeliest in its place."""

    logprob: float
    is_greedy: bool


def score(answers: Answers, kind: str, pairs: Sequence[Pair], each: str = "request") -> list[Score]:
    """Return the score of each continuation after its context.

    What does not fit the model's context is cut off at the beginning.  Equal pairs are scored once.

    Args:
        answers: The model and the state.
        kind: A word for the job's folder, see `Answers.of`.
        pairs: The tokens of each context, at least one, and of its continuation, at least one.
        each: What a pair is, for messages.

    Raises:
        JobError: See `scoring_lines`; nothing has run then.
        FlexGenError: See `Answers.of`.
    """
    lines, places = scoring_lines(pairs, answers.llm.max_model_len, each)
    scored = [_scores(record) for record in answers.of(kind, lines)]
    return [scored[line][choice] for line, choice in places]


def scoring_lines(pairs: Iterable[Pair], max_length: int, each: str = "request") -> tuple[list[Line], list[tuple[int, int]]]:
    """Return lines that score all pairs, and for each pair the index of its line and that of its choice.

    Args:
        pairs: See `score`.
        max_length: The most tokens that the model takes; the last token of a continuation is only predicted and needs no place.
        each: What a pair is, for messages.

    Raises:
        JobError: A continuation is empty or does not fit; the message has the number of its pair, from 1.
    """
    lines: list[Line] = []
    places: list[tuple[int, int]] = []
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int]] = {}  # pair -> its place
    latest: dict[tuple[int, ...], int] = {}  # context -> its newest line
    for number, (context, continuation) in enumerate(pairs, start=1):
        pair = tuple(_cut(f"{each} {number}", context, continuation, max_length)), tuple(continuation)
        if pair not in found:
            line = latest.get(pair[0])
            if line is None or len(pair[0]) == 1 or len(lines[line]["choices"]) == _MAX_CHOICES:  # one token is not worth sharing
                line = latest[pair[0]] = len(lines)
                lines.append({"prompt": list(pair[0]), "choices": []})
            choices: list[Any] = lines[line]["choices"]
            found[pair] = line, len(choices)
            choices.append(list(continuation))
        places.append(found[pair])
    return lines, places


def _cut(pair: str, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Sequence[int]:
    """Return what remains of the context of a pair."""
    if not continuation:
        raise JobError(f"{pair} has nothing to score: its end adds no token to what precedes it")
    if len(continuation) > max_length:
        raise JobError(f"{pair} has {len(continuation):,} tokens to score, and the model's context is {max_length:,}")
    return context[-(max_length + 1 - len(continuation)) :]


def _scores(record: Record) -> list[Score]:
    return [Score(label["logprob"], label["is_greedy"]) for label in record["labels"]]
