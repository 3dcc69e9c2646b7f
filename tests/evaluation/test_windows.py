"""Rolling windows: every token is predicted once, with as much context as fits, as lm-evaluation-harness's own code has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.evaluation.windows import rolling_windows

PREFIX = -1


def test_the_example_of_lm_eval() -> None:
    """From the docstring of `LM.loglikelihood_rolling`: ten tokens in a context of four."""
    assert list(rolling_windows(range(10), PREFIX, 4)) == [
        ([PREFIX], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]


@given(num_tokens=st.integers(0, 60), max_length=st.integers(1, 20))
def test_every_token_is_predicted_once_behind_its_predecessors(num_tokens: int, max_length: int) -> None:
    tokens = list(range(num_tokens))
    windows = list(rolling_windows(tokens, PREFIX, max_length))
    assert [token for _, predicted in windows for token in predicted] == tokens
    padded = [PREFIX, *tokens]
    for context, predicted in windows:
        end = padded.index(predicted[0])
        assert context == padded[end - len(context) : end]
        assert context
        assert len(context) + len(predicted) <= max_length + 1  # the last token is only predicted
        assert len(context) == 1 or len(context) + len(predicted) == max_length + 1  # as much context as fits


@given(num_tokens=st.integers(0, 60), max_length=st.integers(1, 20))
def test_windows_are_those_of_lm_eval(num_tokens: int, max_length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-evaluation-harness (the extra eval) is not installed")
    theirs = utils.get_rolling_token_windows(list(range(num_tokens)), PREFIX, max_length, 1)
    assert list(rolling_windows(range(num_tokens), PREFIX, max_length)) == list(map(utils.make_disjoint_window, theirs))
