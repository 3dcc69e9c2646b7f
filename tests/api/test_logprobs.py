"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexgen.api.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs, vllm_prompt_logprobs
from flexgen.outputs import CompletionOutput, Logprob, RequestOutput


def logprob(value: float, text: str | None) -> Logprob:
    return Logprob(logprob=value, decoded_token=text)


# Two likeliest and the generated one, which comes first: the likeliest, the third, and one whose text is that of another.
STEPS = [
    {1: logprob(-0.1, "a"), 2: logprob(-2.0, "ü")},
    {3: logprob(-3.0, "c"), 1: logprob(-0.5, "a"), 2: logprob(-1.0, "ü")},
    {4: logprob(float("-inf"), "a"), 1: logprob(-0.5, "a"), 6: logprob(-0.7, "a"), 5: logprob(-1.0, None)},
]
COMPLETION = CompletionOutput(index=0, text="aca", token_ids=(1, 3, 4), finish_reason="length", logprobs=STEPS)


def test_completions() -> None:
    found = completion_logprobs(COMPLETION)
    assert found == {
        "tokens": ["a", "c", "a"],
        "token_logprobs": [-0.1, -3.0, -9999.0],
        "top_logprobs": [
            {"a": -0.1, "ü": -2.0},
            {"a": -0.5, "ü": -1.0, "c": -3.0},
            {"token_id:1": -0.5, "token_id:6": -0.7, "token_id:5": -1.0, "a": -9999.0},
        ],
        "text_offset": [0, 1, 2],
    }
    assert found is not None
    assert [list(step) for step in found["top_logprobs"][:2]] == [["a", "ü"], ["a", "ü", "c"]]
    assert list(found["top_logprobs"][2]) == ["token_id:1", "token_id:6", "token_id:5", "a"], "best first"
    json.dumps(found, allow_nan=False)


def test_chats() -> None:
    def entry(token: str, value: float) -> dict[str, object]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    found = chat_logprobs(COMPLETION, 2)
    assert found == {
        "content": [
            {**entry("a", -0.1), "top_logprobs": [entry("a", -0.1), entry("ü", -2.0)]},
            {**entry("c", -3.0), "top_logprobs": [entry("a", -0.5), entry("ü", -1.0)]},
            {**entry("a", -9999.0), "top_logprobs": [entry("a", -0.5), entry("a", -0.7), entry("token_id:5", -1.0)]},
        ],
        "refusal": None,
    }
    json.dumps(found, allow_nan=False)


def test_of_likely_tokens_with_one_text_the_best_has_it_as_its_name() -> None:
    step = {9: logprob(-0.1, "b"), 1: logprob(-0.5, "a"), 2: logprob(-0.4, "a"), 3: logprob(-0.6, "a")}
    found = completion_logprobs(CompletionOutput(index=0, text="b", token_ids=(9,), finish_reason="length", logprobs=[step]))
    assert found is not None
    assert found["top_logprobs"] == [{"b": -0.1, "a": -0.4, "token_id:1": -0.5, "token_id:3": -0.6}]


def test_parts_of_a_character_have_their_own_bytes() -> None:
    wave = "\N{WATER WAVE}".encode()
    parts = {token_id: Logprob(logprob=-1.0, decoded_token="\ufffd", token_bytes=wave[token_id : token_id + 1]) for token_id in range(4)}
    answer = CompletionOutput(
        index=0, text="\N{WATER WAVE}", token_ids=(0, 1, 2, 3), finish_reason="length", logprobs=[parts] * 4, text_offsets=(0,) * 4
    )  # fmt: skip
    chat, completion = chat_logprobs(answer, 3), completion_logprobs(answer)
    assert chat is not None
    assert completion is not None
    assert [each["bytes"] for each in chat["content"]] == [[240], [159], [140], [138]]
    assert [each["bytes"] for each in chat["content"][3]["top_logprobs"]] == [[240], [159], [140]]
    assert completion["text_offset"] == [0] * 4
    assert completion["top_logprobs"][1] == {"token_id:0": -1.0, "\ufffd": -1.0, "token_id:2": -1.0, "token_id:3": -1.0}


def test_chats_without_or_with_all_others() -> None:
    alone = CompletionOutput(index=0, text="a", token_ids=(1,), finish_reason="length", logprobs=[{1: logprob(-0.1, "a")}])
    none, all_of_them = chat_logprobs(alone, 0), chat_logprobs(COMPLETION, -1)
    assert none is not None
    assert none["content"][0]["top_logprobs"] == []
    assert all_of_them is not None
    assert [len(entry["top_logprobs"]) for entry in all_of_them["content"]] == [2, 3, 4]


def test_nothing_asked_and_nothing_generated() -> None:
    plain = CompletionOutput(index=0, text="a", token_ids=(1,), finish_reason="stop")
    assert completion_logprobs(plain) is None
    assert chat_logprobs(plain, 0) is None
    empty = CompletionOutput(index=0, text="", token_ids=(), finish_reason="stop", logprobs=[])
    assert completion_logprobs(empty) == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert chat_logprobs(empty, 5) == {"content": [], "refusal": None}


# -- prompts ------------------------------------------------------------------------------------------------------------------------------

EMPTY = CompletionOutput(index=0, text="", token_ids=(), finish_reason="length", logprobs=[])


def prompt_of(text: str | None, *words: str | bytes | None) -> RequestOutput:
    """A prompt of tokens with these texts; bytes are a part of a character.  Nothing predicts the first, whose text is not known."""

    def scored(word: str | bytes | None) -> Logprob:
        own = word if isinstance(word, bytes) else None
        return Logprob(logprob=-0.5, decoded_token="\ufffd" if own is not None else word, token_bytes=own)  # pyright: ignore

    ids = tuple(range(100, 100 + len(words)))
    steps = [None, *({token_id: scored(word), 7: logprob(-0.25, "x")} for token_id, word in zip(ids[1:], words[1:], strict=True))]
    return RequestOutput(request_id="0", prompt=text, prompt_token_ids=ids, prompt_logprobs=steps)


def test_an_echo_begins_with_the_prompt() -> None:
    found = completion_logprobs(COMPLETION, prompt_of("One two", None, " two"))
    alone = completion_logprobs(COMPLETION)
    assert found is not None
    assert alone is not None
    assert found["tokens"] == ["One", " two", *alone["tokens"]]
    assert found["token_logprobs"] == [None, -0.5, *alone["token_logprobs"]]
    assert found["top_logprobs"] == [None, {"x": -0.25, " two": -0.5}, *alone["top_logprobs"]]
    assert found["text_offset"] == [0, 3, 7, 8, 9]


def test_an_echo_of_the_prompt_alone() -> None:
    found = completion_logprobs(EMPTY, prompt_of("One", None))
    assert found == {"tokens": ["One"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


WAVE = "\N{WATER WAVE}".encode()


@pytest.mark.parametrize(
    ("text", "words", "tokens", "offsets"),
    [
        ("ü two", [None, " two"], ["ü", " two"], [0, 1]),
        ("a\N{WATER WAVE}b", [None, WAVE[:1], WAVE[1:3], WAVE[3:], "b"], ["a", "\ufffd", "\ufffd", "\ufffd", "b"], [0, 1, 1, 1, 2]),
        ("\N{WATER WAVE}b", [None, WAVE[1:], "b"], ["\ufffd", "\ufffd", "b"], [0, 0, 1]),  # the first token is a part of a character
        ("ab", [None, "a", "b"], ["", "a", "b"], [0, 0, 1]),  # the first token is special, and not in the text
        ("Hello you", [None, " Hello", " you"], ["", " Hello", " you"], [0, 0, 5]),  # a decoder that strips the first space
        ("", [None, "a"], ["", "a"], [0, 0]),
        ("A<s>\ufffd", [None, "<s>", WAVE[:1]], ["A", "<s>", "\ufffd"], [0, 1, 4]),  # half a character, and no other half
        (
            "<s>\ufffd<s>\N{WATER WAVE}",
            [None, WAVE[:2], "<s>", WAVE[:2], WAVE[2:]],
            ["<s>", "\ufffd", "<s>", "\ufffd", "\ufffd"],
            [0, 3, 4, 7, 7],
        ),
        ("ü<s>\ufffd b", [None, "<s>", WAVE[:3], " b"], ["ü", "<s>", "\ufffd", " b"], [0, 1, 4, 5]),
        ("a\ufffd\ufffdb", [None, b"\xa9", b"\xff", "b"], ["a", "\ufffd", "\ufffd", "b"], [0, 1, 2, 3]),  # bytes that are no text
    ],
)
def test_offsets_of_an_echo_are_places_in_its_text(text: str, words: list[Any], tokens: list[str], offsets: list[int]) -> None:
    found = completion_logprobs(COMPLETION, prompt_of(text, *words))
    assert found is not None
    assert found["tokens"][: len(words)] == tokens
    assert found["text_offset"] == [*offsets, len(text), len(text) + 1, len(text) + 2]


def test_an_echo_without_a_tokenizer_has_ids() -> None:
    answer = CompletionOutput(index=0, text="", token_ids=(5,), finish_reason="length", logprobs=[{5: Logprob(logprob=-1.0)}])
    found = completion_logprobs(answer, prompt_of(None, None, None))
    assert found is not None
    assert found["tokens"] == ["token_id:100", "token_id:101", "token_id:5"]
    assert found["token_logprobs"] == [None, -0.5, -1.0]
    assert found["text_offset"] == [0, 12, 24]


def test_the_two_shapes_of_scored_prompts() -> None:
    output = prompt_of("One two", None, " two")
    entry = {"token": " two", "logprob": -0.5, "bytes": list(b" two")}
    likeliest = {"token": "x", "logprob": -0.25, "bytes": list(b"x")}
    assert prompt_logprobs(output, 1) == [None, {**entry, "top_logprobs": [likeliest]}]
    assert vllm_prompt_logprobs(output) == [
        None,
        {
            "101": {"logprob": -0.5, "rank": None, "decoded_token": " two"},
            "7": {"logprob": -0.25, "rank": None, "decoded_token": "x"},
        },
    ]
