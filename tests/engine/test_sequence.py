"""What finishes an answer, which end comes first, and what it amounts to."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.engine.sequence import Finish, LiveSequence
from flexgen.errors import CapacityError, EngineError, RequestError, StorageError
from flexgen.jobs.interrupt import Stopped
from flexgen.request import Generated, TokenLogprobs, TokenRequest


def stops_at_three(token_ids: Any) -> str | None:
    return "three" if len(token_ids) == 3 else None


def sequence(*generated: int, earlier: tuple[int, ...] = (), **how: Any) -> LiveSequence:
    made = LiveSequence(
        TokenRequest(index=7, prompt_token_ids=(1, 2), generated=Generated(token_ids=earlier), **({"max_tokens": 5} | how)), 5
    )
    for token_id in generated:
        made.append(token_id)
    return made


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (sequence(), None),
        (sequence(8, 9), None),
        (sequence(8, 9, 3, 4, 5), Finish(reason="length")),
        (sequence(8, 9, stop_token_ids=frozenset({9})), Finish(reason="stop")),
        (sequence(9, 8, stop_token_ids=frozenset({9})), None),
        (sequence(8, 9, 3, stops=stops_at_three), Finish(reason="stop", stop_string="three")),
        # A stop token is no part of the text; a stop string counts even where the length would have ended the answer, too.
        (sequence(8, 9, 3, stops=stops_at_three, stop_token_ids=frozenset({3})), Finish(reason="stop")),
        (sequence(8, 9, 3, stops=stops_at_three, max_tokens=3), Finish(reason="stop", stop_string="three")),
        (sequence(3, earlier=(8, 9), max_tokens=3), Finish(reason="length")),
        (sequence(earlier=(8, 9), stop_token_ids=frozenset({9})), Finish(reason="stop")),
    ],
)
def test_what_ends_an_answer(made: LiveSequence, wanted: Finish | None) -> None:
    assert made.finish() == wanted


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        ({}, [1, 2]),
        ({"num_prompt_logprobs": 0}, [1, 2]),
        ({"max_tokens": 0}, []),
        ({"max_tokens": 0, "num_prompt_logprobs": 0}, [1]),
        ({"max_tokens": 0, "num_prompt_logprobs": 0, "alternatives": (5,)}, [1, 2]),
    ],
    ids=str,
)
def test_what_nothing_depends_on_is_not_computed(how: dict[str, Any], tokens: list[int]) -> None:
    made = sequence(**how)
    assert made.tokens == tokens
    assert made.finish() == (None if tokens else Finish(reason="length"))


def test_an_answer_whose_text_cannot_be_told_ends() -> None:
    """The tokenizer fails on it, which is no reason to stop the others."""
    error = RequestError("the tokenizer fails on these tokens")

    def fail(token_ids: Any) -> str | None:
        raise error

    assert sequence(8, 9, stops=fail).finish() == Finish(reason="error", error=error)


def test_a_result_has_an_earlier_run_s_tokens() -> None:
    result = sequence(5, 6, earlier=(3, 4, 9)).result(Finish(reason="stop", stop_string="x"))
    assert (result.index, result.token_ids, result.finish_reason, result.stop_string) == (7, (3, 4, 9, 5, 6), "stop", "x")


def test_an_error_is_in_the_result() -> None:
    error = RequestError("no")
    assert sequence(5).result(Finish.failed(error)).error is error


def test_logprobs_go_on_after_an_earlier_run_s() -> None:
    first, second = (TokenLogprobs(token_ids=(i,), logprobs=(-1.0,), rank=1) for i in (3, 4))
    earlier = Generated(token_ids=(3,), logprobs=(first,))
    made = LiveSequence(TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=2, num_logprobs=0, generated=earlier), 2)
    made.append(4, second)
    assert made.so_far().generated == Generated(token_ids=(3, 4), logprobs=(first, second))


class PanicException(BaseException):
    """As PyO3 has it."""


def breaks(error: BaseException) -> Any:
    def stops(token_ids: Any) -> str | None:
        raise error

    return stops


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("decoder"), RecursionError(), AssertionError(), PanicException("x")])
def test_an_exception_ends_one_sequence(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    end = sequence(8, stops=breaks(error)).finish()
    assert end is not None
    assert end.error is not None
    assert (end.reason, end.error.code, type(error).__name__ in str(end.error)) == ("error", "internal_error", True)
    assert "Traceback" in caplog.text


def test_a_request_s_own_error_is_not_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    own = RequestError("own", code="mine")
    assert sequence(8, stops=breaks(own)).finish() == Finish.failed(own)
    assert not caplog.text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        StorageError("disk"),
        OSError("disk"),
        EngineError("pages"),
        CapacityError(),
        KeyboardInterrupt(),
        SystemExit(),
        Stopped(),
    ],
)
def test_what_concerns_all_stops_the_run(error: BaseException) -> None:
    with pytest.raises(type(error)):
        sequence(8, stops=breaks(error)).finish()
