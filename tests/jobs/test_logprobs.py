"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import json

from flexgen.jobs.logprobs import chat_logprobs, completion_logprobs
from flexgen.request import CompletionOutput, Logprob


def logprob(value: float, text: str | None) -> Logprob:
    return Logprob(logprob=value, decoded_token=text)


# Two likeliest and the generated one, which comes first: the likeliest, the third, and one whose text is that of another.
STEPS = [
    {1: logprob(-0.1, "a"), 2: logprob(-2.0, "ü")},
    {3: logprob(-3.0, "c"), 1: logprob(-0.5, "a"), 2: logprob(-1.0, "ü")},
    {4: logprob(float("-inf"), "a"), 1: logprob(-0.5, "a"), 5: logprob(-1.0, None)},
]
COMPLETION = CompletionOutput(index=0, text="aca", token_ids=(1, 3, 4), finish_reason="length", logprobs=STEPS)


def test_completions() -> None:
    found = completion_logprobs(COMPLETION)
    assert found == {
        "tokens": ["a", "c", "a"],
        "token_logprobs": [-0.1, -3.0, -9999.0],
        "top_logprobs": [{"a": -0.1, "ü": -2.0}, {"a": -0.5, "ü": -1.0, "c": -3.0}, {"a": -0.5, "token_id:5": -1.0}],
        "text_offset": [0, 1, 2],
    }
    assert found is not None
    assert [list(step) for step in found["top_logprobs"]] == [["a", "ü"], ["a", "ü", "c"], ["a", "token_id:5"]]
    json.dumps(found, allow_nan=False)


def test_chats() -> None:
    def entry(token: str, value: float) -> dict[str, object]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    found = chat_logprobs(COMPLETION, 2)
    assert found == {
        "content": [
            {**entry("a", -0.1), "top_logprobs": [entry("a", -0.1), entry("ü", -2.0)]},
            {**entry("c", -3.0), "top_logprobs": [entry("a", -0.5), entry("ü", -1.0)]},
            {**entry("a", -9999.0), "top_logprobs": [entry("a", -0.5), entry("token_id:5", -1.0)]},
        ],
        "refusal": None,
    }
    json.dumps(found, allow_nan=False)


def test_chats_without_or_with_all_others() -> None:
    alone = CompletionOutput(index=0, text="a", token_ids=(1,), finish_reason="length", logprobs=[{1: logprob(-0.1, "a")}])
    none, all_of_them = chat_logprobs(alone, 0), chat_logprobs(COMPLETION, -1)
    assert none is not None
    assert none["content"][0]["top_logprobs"] == []
    assert all_of_them is not None
    assert [len(entry["top_logprobs"]) for entry in all_of_them["content"]] == [2, 3, 3]


def test_nothing_asked_and_nothing_generated() -> None:
    plain = CompletionOutput(index=0, text="a", token_ids=(1,), finish_reason="stop")
    assert completion_logprobs(plain) is None
    assert chat_logprobs(plain, 0) is None
    empty = CompletionOutput(index=0, text="", token_ids=(), finish_reason="stop", logprobs=[])
    assert completion_logprobs(empty) == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert chat_logprobs(empty, 5) == {"content": [], "refusal": None}
