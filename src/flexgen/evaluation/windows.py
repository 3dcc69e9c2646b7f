"""The windows in which a text that is longer than the context is scored, as lm-evaluation-harness defines them.  Knows token ids only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexgen.evaluation.encoding import Pair


def rolling_windows(tokens: Sequence[int], prefix_token_id: int, max_length: int) -> Iterator[Pair]:
    """Yield windows that together predict every token of a text once, each with its context before it.

    The first window predicts `max_length` tokens after the prefix token.  Every other one predicts as many after a single token of
    context, and the last one, which has fewer to predict, has as much context as the model takes
    (lm-eval's `get_rolling_token_windows` with `context_len=1`, then `make_disjoint_window`).

    Args:
        tokens: The tokens of the text.
        prefix_token_id: The token that stands before the first one.
        max_length: The most tokens that the model takes.
    """
    padded = [prefix_token_id, *tokens]  # token i of the text is padded[i + 1]
    for begin in range(0, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        yield padded[max(0, end - max_length) : begin + 1], list(tokens[begin:end])
