"""HELM's requests become lines, and records become completions as HELM's other clients make them."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation.requests_of_helm import keyed, request

from flexgen.api.bodies import parse_chat, parse_completion
from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.evaluation.helm_requests import Echo, cache_key, completions_of, lead_of, line_of, num_hidden, refusal
from flexgen.request import SamplingParams

DEFAULTS = SamplingParams()
LINE = JobRequest(line_number=1, digest=1, form=PlainForm(defaults=DEFAULTS))


def parsed(line: dict[str, Any]) -> JobRequest:
    """A line as the job reads it; a field that it does not know is an error."""
    body = {name: value for name, value in line.items() if name != "id"}
    return (parse_chat if "messages" in body else parse_completion)(LINE, body, DEFAULTS)


def key_of(chat: bool = False, **fields: Any) -> dict[str, Any]:
    return cache_key(request(**fields), model="m", revision=None, chat=chat, seed=0)


def entry(token: str, logprob: float, raw: bytes | None = None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode() if raw is None else raw), "top_logprobs": []}


def record(*entries: dict[str, Any], text: str, finish_reason: str = "length", stop_reason: object = None, **more: Any) -> dict[str, Any]:
    fields = {"id": "i", "index": 1, "text": text, "logprobs": list(entries), "finish_reason": finish_reason, "stop_reason": stop_reason}
    return {**fields, **more}


def test_every_field_has_its_place_in_the_line() -> None:
    asked = request(
        prompt="Once", temperature=0.5, num_completions=3, max_tokens=7, stop_sequences=["\n"], top_p=0.9, presence_penalty=0.1,
        frequency_penalty=0.2,
    )  # fmt: skip
    line = parsed(line_of(asked, key_of(prompt="Once"), [5, 6]))
    params = line.params
    assert line.prompt == (5, 6)
    assert (params.temperature, params.n, params.max_tokens, params.top_p) == (0.5, 3, 7, 0.9)
    assert (params.presence_penalty, params.frequency_penalty, params.stop) == (0.1, 0.2, ("\n",))
    assert (params.logprobs, params.prompt_logprobs) == (0, None)


def test_a_prompt_that_is_echoed_is_scored() -> None:
    params = parsed(line_of(request(echo_prompt=True, max_tokens=0), key_of(echo_prompt=True, max_tokens=0), [5])).params
    assert (params.max_tokens, params.prompt_logprobs) == (0, 0)


def test_prompts_and_messages_of_chat_models_become_conversations() -> None:
    line = parsed(line_of(request(prompt="Hi"), key_of(chat=True, prompt="Hi"), "Hi"))
    assert line.prompt.messages == ({"role": "user", "content": "Hi"},)  # pyright: ignore[reportAttributeAccessIssue]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    line = parsed(line_of(request(messages=messages), key_of(chat=True, messages=messages), ""))
    assert list(line.prompt.messages) == messages  # pyright: ignore[reportAttributeAccessIssue]
    assert line.params.logprobs == 0


def test_seeds_depend_on_the_request_and_its_random_text_only() -> None:
    def seed(**fields: Any) -> int:
        return line_of(request(**fields), key_of(**fields), [1])["seed"]

    assert seed(prompt="a") == seed(prompt="a")
    assert len({seed(prompt="a"), seed(prompt="b"), seed(prompt="a", random="1"), seed(prompt="a", random="2")}) == 4


def test_keys_differ_in_what_changes_answers_and_in_nothing_else() -> None:
    base = key_of(prompt="a")
    assert key_of(prompt="a", top_k_per_token=5) == base
    other = [key_of(prompt="a", **{name: value}) for name, value in {"max_tokens": 1, "echo_prompt": True, "random": "x"}.items()]
    other += [cache_key(request(prompt="a"), model="m", revision=None, chat=False, seed=1)]
    other += [cache_key(request(prompt="a"), model="m", revision="main", chat=False, seed=0)]
    assert base not in other
    assert len({keyed(prompt="a").identity, keyed(prompt="b").identity, keyed(prompt="a").identity}) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"multimodal_prompt": object()}, "text only"),
        ({"response_format": object()}, "response_format"),
        ({"messages": [{}], "echo_prompt": True}, "echo"),
        ({"prompt": "a", "echo_prompt": True}, None),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], said: str | None) -> None:
    reason = refusal(request(**fields))
    assert reason is None if said is None else said in (reason or "")


@pytest.mark.parametrize(
    ("plain", "special", "lead"),
    [([7], [2, 7], (2,)), ([7], [7], ()), ([7, 8], [1, 2, 7, 8, 3], (1, 2)), ([7], [9], ())],
    ids=["one", "none", "with an end", "another tokenization"],
)
def test_the_lead_is_what_a_tokenizer_puts_before_a_text(plain: list[int], special: list[int], lead: tuple[int, ...]) -> None:
    assert lead_of(plain, special) == lead


def test_a_prompt_that_begins_with_the_lead_gets_no_second_one() -> None:
    assert num_hidden((2,), [7, 8]) == 1
    assert num_hidden((2,), [2, 7, 8]) == 0
    assert num_hidden((), [7]) == 0


def test_an_answer_has_its_tokens_and_their_log_probabilities() -> None:
    made = completions_of(record(entry(" a", -1.0), entry("b", -0.5), text=" ab"))
    assert made == [{"text": " ab", "tokens": [[" a", -1.0], ["b", -0.5]], "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("tokens", "stop", "kept"),
    [
        ([" a", "\n"], "\n", [" a"]),
        ([" a", "b\nc"], "\n", [" a", "b\nc"]),
        ([" a", "\n", "\n"], "\n\n", [" a"]),
        ([" a", "b\n", "\n"], "\n\n", [" a", "b\n"]),
        (["\n"], "\n", []),
    ],
    ids=["own token", "within a token", "two tokens", "from within a token", "at once"],
)
def test_a_stop_string_is_cut_off_the_tokens_as_off_the_text(tokens: list[str], stop: str, kept: list[str]) -> None:
    text = "".join(tokens).partition(stop)[0]
    made = completions_of(record(*(entry(each, -1.0) for each in tokens), text=text, finish_reason="stop", stop_reason=stop))
    assert made == [{"text": text, "tokens": [[each, -1.0] for each in kept], "finish_reason": "stop"}]


def test_the_end_of_the_text_is_no_token_of_the_answer() -> None:
    made = completions_of(record(entry(" a", -1.0), entry("</s>", -0.1), text=" a", finish_reason="stop"))
    assert made == [{"text": " a", "tokens": [[" a", -1.0]], "finish_reason": "endoftext"}]


def test_parts_of_a_character_are_written_as_helm_writes_them() -> None:
    parts = [entry("\ufffd", -1.0, b"\xe2\x80"), entry("\ufffd", -2.0, b"\x99")]
    assert completions_of(record(*parts, text="\u2019"))[0]["tokens"] == [["bytes:\\xe2\\x80", -1.0], ["bytes:\\x99", -2.0]]


def test_several_answers_are_several_completions() -> None:
    several = {
        "text": [" a", " b"], "logprobs": [[entry(" a", -1.0)], [entry(" b", -2.0), entry("\n", -3.0)]],
        "finish_reason": ["length", "stop"], "stop_reason": [None, "\n"],
    }  # fmt: skip
    made = completions_of(several)
    assert [(each["text"], each["tokens"], each["finish_reason"]) for each in made] == [
        (" a", [[" a", -1.0]], "length"),
        (" b", [[" b", -2.0]], "stop"),
    ]


@pytest.mark.parametrize(
    ("hidden", "tokens"),
    [
        (0, [["On", 0.0], ["ce", -1.5], [" a", -1.0]]),
        (1, [["ce", -1.5], [" a", -1.0]]),
    ],
    ids=["the first token has none", "special tokens are hidden"],
)
def test_an_echoed_prompt_comes_before_every_answer(hidden: int, tokens: list[list[object]]) -> None:
    scored = record(entry(" a", -1.0), text=" a", prompt_logprobs=[None, entry("ce", -1.5)])
    assert completions_of(scored, Echo(text="Once", first="On", hidden=hidden)) == [
        {"text": "Once a", "tokens": tokens, "finish_reason": "length"}
    ]
