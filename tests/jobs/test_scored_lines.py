"""Lines that are scored: their records, and that a line with choices ends in the same record wherever it was interrupted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTEXT, POISON, FakeEngine, byte_id, fake_logprob, fake_text

from flexgen import LLM, SamplingParams
from flexgen.jobs.durable import answer_lines
from flexgen.jobs.folder import JobPaths
from flexgen.jobs.status import read_status
from flexgen.request import TokenRequest, TokenResult

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def llm(model_folder: Path, engines: list[FakeEngine]) -> Iterator[LLM]:
    with LLM(model_folder, chat_template=TEMPLATE) as llm:
        yield llm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "job"


def answered(llm: LLM, lines: Sequence[dict[str, Any]], folder: Path, **how: Any) -> list[dict[str, Any]]:
    return list(answer_lines(llm, lines, folder, defaults=GREEDY, **how))


def error_of(llm: LLM, line: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The error of a line, between two others that are answered."""
    first, bad, last = answered(llm, [{"prompt": "ab", "max_tokens": 3}, line, {"prompt": "ab", "max_tokens": 3}], folder)
    assert first["text"] == last["text"] == fake_text("ab", 3)
    return bad["error"]


def ids(text: str) -> list[int]:
    return [byte_id(character) for character in text]


def score(before: Sequence[int], choice: Sequence[int]) -> float:
    """The log probability of a choice in the fake engine."""
    return sum(fake_logprob(one, other) for one, other in zip([before[-1], *choice[:-1]], choice, strict=True))


def batch(kind: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": f"/v1/{kind}", "body": body}


def body_of(record: dict[str, Any]) -> dict[str, Any]:
    assert record["response"]["status_code"] == 200
    return record["response"]["body"]


# -- choices ------------------------------------------------------------------------------------------------------------------------------

CHOICES = ["c", " de", "cde", "c"]


@pytest.mark.parametrize("prompt", ["ab", "ab ", [64, 65]])
def test_a_bare_line(llm: LLM, folder: Path, prompt: Any) -> None:
    choices: list[Any] = CHOICES if isinstance(prompt, str) else [ids(choice) for choice in CHOICES]
    (record,) = answered(llm, [{"id": "x", "prompt": prompt, "choices": choices}], folder)
    seam = " " if prompt == "ab " else ""
    tokens = [ids(seam + choice) for choice in CHOICES]
    logprobs = [score(ids("ab"), choice) for choice in tokens]
    labels = record["labels"]
    assert [label["text" if isinstance(prompt, str) else "token_ids"] for label in labels] == choices
    assert [label["logprob"] for label in labels] == pytest.approx(logprobs)
    assert [label["num_tokens"] for label in labels] == [len(choice) for choice in tokens]
    assert sum(label["probability"] for label in labels) == pytest.approx(1)
    assert [label["probability"] * math.exp(logprobs[0]) for label in labels] == pytest.approx(
        [labels[0]["probability"] * math.exp(each) for each in logprobs]
    )
    best = choices[logprobs.index(max(logprobs))]
    assert (record["text"] if isinstance(prompt, str) else record["token_ids"]) == best
    assert (record["id"], record["index"]) == ("x", 1)
    scored = sum(map(len, tokens))
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": scored, "total_tokens": 2 + scored}


def test_every_form_has_the_same_scores(llm: LLM, folder: Path) -> None:
    messages = [{"role": "user", "content": "ab"}]
    lines = [{"prompt": "ab", "choices": CHOICES}, {"messages": messages, "choices": CHOICES}]
    lines += [batch("completions", prompt="ab", choices=CHOICES), batch("chat/completions", messages=messages, choices=CHOICES)]
    bare, chat, *others = answered(llm, lines, folder)
    assert chat["labels"] == bare["labels"]
    for record in others:
        (choice,) = body_of(record)["choices"]
        assert choice["labels"] == bare["labels"]
        assert choice.get("text", choice.get("message", {}).get("content")) == bare["text"]
        assert body_of(record)["usage"] == bare["usage"]


def test_the_likeliest_tokens_are_greedy(llm: LLM, folder: Path) -> None:
    def likeliest(before: int) -> int:
        return max(range(POISON), key=lambda token_id: fake_logprob(before, token_id))

    before = next(each for each in range(64, 90) if fake_logprob(likeliest(each), POISON) < fake_logprob(likeliest(each), 64))
    first, second = likeliest(before), likeliest(likeliest(before))
    other = next(token_id for token_id in range(64, 90) if token_id not in (first, second))
    choices = [[first, second], [first], [first, other], [other]]
    (record,) = answered(llm, [{"prompt": [64, before], "choices": choices}], folder)
    assert [label["is_greedy"] for label in record["labels"]] == [True, True, False, False]


def test_the_prompt_is_computed_once(llm: LLM, folder: Path, engines: list[FakeEngine]) -> None:
    """One request where the choices differ in their last tokens only, otherwise more that share its pages."""
    prompt = "x" * 33
    answered(llm, [{"prompt": prompt, "choices": ["the a", "the b", "the c"]}, {"prompt": prompt, "choices": ["ab", "c"]}], folder)
    assert engines[0].num_pulled == 1 + 2
    assert engines[0].workload.prompt_lens == (33 + 4, 33, 33 + 1), "the last token of a choice is only predicted"
    assert engines[0].workload.output_lens == (0, 0, 0)
    assert engines[0].workload.scored_lens == (4 + 1, 1, 1), "alternatives have one position"
    assert [(point.length, point.num_requests) for point in engines[0].prefixes.path(ids(prompt))] == [(32, 3)]


def test_a_choice_may_end_one_token_behind_the_context(llm: LLM, folder: Path) -> None:
    """Because the last token is only predicted."""
    prompt = [64] * (CONTEXT - 1)
    lines = [{"prompt": prompt, "choices": [[65, 66], [67]]}, {"prompt": [*prompt, 64], "choices": [[65], [66]]}]
    lines += [{"prompt": "a" * (CONTEXT - 1), "choices": ["bc"]}, {"prompt": "a" * CONTEXT, "choices": ["b"]}]
    for record in answered(llm, lines, folder):
        assert all(label["logprob"] < 0 for label in record["labels"])


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ({"prompt": [64] * CONTEXT, "choices": [[65], [65, 66]]}, "context_length_exceeded", "choices"),
        ({"prompt": [64] * (CONTEXT + 1), "choices": [[65]]}, "context_length_exceeded", "prompt"),
        ({"prompt": "a" * CONTEXT, "choices": ["b", "cd"]}, "context_length_exceeded", "prompt"),
        ({"prompt": "a", "choices": ["b", "c" * 1000]}, "context_length_exceeded", "prompt"),
        ({"prompt": "a", "choices": ["b", ""]}, "invalid_request", "choices"),
        ({"prompt": "a", "choices": []}, "invalid_request", "choices"),
        ({"prompt": "a", "choices": ["b", "\ud800"]}, "invalid_json", None),
        ({"prompt": "a", "choices": ["b", [65]]}, "invalid_request", "choices"),
        ({"prompt": [64], "choices": ["b"]}, "invalid_request", "choices"),
        ({"prompt": [64], "choices": [[300]]}, "invalid_request", "choices"),
        ({"prompt": [64], "choices": [[-1]]}, "invalid_request", "choices"),
        ({"prompt": [300], "choices": [[65]]}, "invalid_request", "prompt"),
        ({"prompt": [], "choices": [[65]]}, "invalid_request", "prompt"),
        ({"prompt": " ", "choices": ["b"]}, "invalid_request", "prompt"),
        ({"prompt": "a", "choices": ["b"], "temperature": 0}, "unsupported_field", "temperature"),
        ({"prompt": [64], "choices": [[65, 66], [POISON, 65]]}, "non_finite_logits", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_choices_that_cannot_be_scored(llm: LLM, folder: Path, line: dict[str, Any], code: str, param: str | None) -> None:
    error = error_of(llm, line, folder)
    assert (error["code"], error["param"]) == (code, param)


def test_a_long_choice_is_named(llm: LLM, folder: Path) -> None:
    error = error_of(llm, {"prompt": "a" * CONTEXT, "choices": ["b", "cd"]}, folder)
    assert error["message"].startswith("with choices[1]: the prompt has 66 tokens")


def test_choices_without_a_tokenizer(bare_model_folder: Path, folder: Path, engines: list[FakeEngine]) -> None:
    with LLM(bare_model_folder) as llm:
        lines = [{"prompt": [64, 65], "choices": [[66], [67, 68]]}, {"prompt": "ab", "choices": ["c"]}]
        lines += [batch("completions", prompt=[64, 65], choices=[[66], [67, 68]])]
        record, refused, openai = answered(llm, lines, folder)
    assert record["text"] is None
    assert record["token_ids"] in ([66], [67, 68])
    assert "no tokenizer" in refused["error"]["message"]
    assert body_of(openai)["choices"][0]["labels"] == record["labels"]


# -- interruptions ------------------------------------------------------------------------------------------------------------------------

SCORED: list[dict[str, Any]] = [
    {"prompt": "ab", "choices": ["cd", "efg", "h", "cd"]},
    {"prompt": "abab", "choices": ["c", "d"]},
    {"prompt": "x", "n": 3, "max_tokens": 2, "prompt_logprobs": 2, "logprobs": 1, "seed": 5, "temperature": 1.0},
    batch("completions", prompt=["ab", "cde"], max_tokens=0, echo=True, logprobs=1, n=2),
    {"messages": [{"role": "user", "content": "y"}], "choices": ["the a", "the b", "an"]},
    {"prompt": "one two", "echo": True, "logprobs": 0, "max_tokens": 0},
]
NUM_REQUESTS = 4 + 1 + 3 + 4 + 4 + 1


class Killed(BaseException):
    """What ends a run."""


@pytest.mark.parametrize("count", range(1, NUM_REQUESTS, 2))
def test_an_interrupted_line_ends_in_the_same_record(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Parts of a line that are finished are stored with their scores, and are not computed again."""
    wanted = answered(llm, SCORED, tmp_path / "whole")
    works, asked, stops = FakeEngine._answer, list[int](), [count]

    def answer(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        if len(asked) == stops[-1]:
            stops.append(stops[-1] + count)
            raise Killed
        asked.append(request.index)
        return works(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", answer)
    found: list[dict[str, Any]] = []
    while not found:
        with suppress(Killed):
            found = answered(llm, SCORED, tmp_path / "job")
    assert _without_times(found) == _without_times(wanted)
    assert len(asked) == len(set(asked)) == NUM_REQUESTS
    assert len(stops) > 1


def _without_times(records: Any) -> Any:
    """The records without the time at which their job began."""
    for record in records:
        if "response" in record:
            record["response"]["body"].pop("created", None)
    return records


def test_the_status_of_a_job_that_was_interrupted_within_a_line(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works, asked = FakeEngine._answer, []

    def answer(engine: FakeEngine, request: TokenRequest) -> TokenResult:
        if len(asked) == 2:
            raise Killed
        asked.append(request.index)
        return works(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", answer)
    with pytest.raises(Killed):
        answered(llm, SCORED[:1], folder)
    paths = JobPaths(folder=folder, output=None)
    status = read_status(paths)
    assert (status.lines, status.answered, status.in_progress, status.in_progress_tokens) == (1, 0, 1, 0)
    monkeypatch.setattr(FakeEngine, "_answer", works)
    answered(llm, SCORED[:1], folder)
    status = read_status(paths)
    assert (status.answered, status.in_progress, status.prompt_tokens, status.output_tokens) == (1, 0, 2, 0)


def test_a_line_with_choices_that_failed_is_tried_again(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [SCORED[0], {"prompt": [64], "choices": [[65, 66], [POISON, 65], [67]]}]
    first, failed = answered(llm, lines, folder)
    assert failed["error"]["code"] == "non_finite_logits"
    monkeypatch.setattr("fakes.POISON", -1)
    assert answered(llm, lines, folder) == [first, failed]
    again, mended = answered(llm, lines, folder, retry_errors=True)
    assert again == first
    assert [label["num_tokens"] for label in mended["labels"]] == [2, 2, 1]


# -- prompts ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["abc", [64, 65, 66]])
def test_a_prompt_is_echoed_and_scored(llm: LLM, folder: Path, prompt: Any) -> None:
    lines = [{"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": n} for n in (0, 2)]
    nothing, answer = answered(llm, lines, folder)
    assert (nothing["text"], answer["text"]) == ("abc", "abc" + fake_text("abc", 2))
    for record in (nothing, answer):
        first, *scores = record["prompt_logprobs"]
        assert first is None
        assert [(each["token"], each["logprob"]) for each in scores] == [("b", fake_logprob(64, 65)), ("c", fake_logprob(65, 66))]
        assert [len(each["top_logprobs"]) for each in scores] == [1, 1]
    assert [len(record["logprobs"]) for record in (nothing, answer)] == [0, 2]
    assert nothing["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_as_the_harness_reads_local_completions(llm: LLM, folder: Path) -> None:
    """lm-evaluation-harness sends contexts with their continuations and drops the one token that is generated."""
    context, continuation = [64, 65, 66], [67, 68]
    body = {
        "prompt": [[*context, *continuation], [*context, 70]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 7,
        "echo": True,
    }
    (record,) = answered(llm, [batch("completions", **body)], folder)
    for choice, wanted in zip(body_of(record)["choices"], (continuation, [70]), strict=True):
        logprobs = choice["logprobs"]
        assert sum(logprobs["token_logprobs"][len(context) : -1]) == pytest.approx(score(context, wanted))
        for value, likeliest in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert value <= max(likeliest.values())
            assert value in likeliest.values()
        assert logprobs["text_offset"] == list(range(len(context) + len(wanted) + 1))
    assert body_of(record)["usage"] == {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}


def test_prompt_logprobs_of_both_endpoints(llm: LLM, folder: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "ab"}], "prompt_logprobs": 0, "max_tokens": 1}
    text, message = map(
        body_of, answered(llm, [batch("completions", prompt="ab", prompt_logprobs=0), batch("chat/completions", **chat)], folder)
    )
    wanted = [None, {"65": {"logprob": fake_logprob(64, 65), "rank": None, "decoded_token": "b"}}]
    assert text["choices"][0]["prompt_logprobs"] == message["prompt_logprobs"] == wanted
    assert text["choices"][0]["logprobs"] is None


def test_a_prompt_that_fills_the_context_is_scored(llm: LLM, folder: Path) -> None:
    lines = [{"prompt": [64] * length, "max_tokens": 0, "prompt_logprobs": 0} for length in (1, CONTEXT)]
    records = answered(llm, [*lines, {"prompt": [64] * (CONTEXT + 1), "max_tokens": 0}], folder)
    assert [len(record["prompt_logprobs"]) for record in records[:2]] == [1, CONTEXT]
    assert records[2]["error"]["code"] == "context_length_exceeded"


def test_an_echo_without_a_tokenizer(bare_model_folder: Path, folder: Path, engines: list[FakeEngine]) -> None:
    line = {"prompt": [64, 65], "echo": True, "logprobs": 0, "max_tokens": 1}
    with LLM(bare_model_folder) as llm:
        bare, openai = answered(llm, [line, batch("completions", **line)], folder)
    assert bare["text"] is None
    assert [each and each["token"] for each in bare["prompt_logprobs"]] == [None, "token_id:65"]
    logprobs = body_of(openai)["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["token_id:64", "token_id:65"]
    assert logprobs["token_logprobs"][:2] == [None, fake_logprob(64, 65)]


def test_too_many_log_probabilities_of_a_prompt(llm: LLM, folder: Path) -> None:
    error = error_of(llm, {"prompt": "ab", "prompt_logprobs": 21}, folder)
    assert (error["param"], "--max-logprobs" in error["message"]) == ("prompt_logprobs", True)


# -- several prompts ----------------------------------------------------------------------------------------------------------------------


def test_several_prompts_are_answered_in_their_order(llm: LLM, folder: Path) -> None:
    body = {"prompt": ["ab", "c", "ab"], "n": 2, "max_tokens": 3, "temperature": 0}
    (record,) = answered(llm, [batch("completions", **body)], folder)
    choices = body_of(record)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == [fake_text(prompt, 3) for prompt in ("ab", "ab", "c", "c", "ab", "ab")]
    assert body_of(record)["usage"] == {"prompt_tokens": 5, "completion_tokens": 18, "total_tokens": 23}
    status = read_status(JobPaths(folder=folder, output=None))
    assert (status.prompt_tokens, status.output_tokens) == (5, 18)


def test_a_prompt_of_several_that_is_bad_is_named(llm: LLM, folder: Path) -> None:
    (record,) = answered(llm, [batch("completions", prompt=["ab", "c" * 100], max_tokens=3)], folder)
    assert record["response"]["status_code"] == 400
    assert record["response"]["body"]["error"]["message"].startswith("prompt[1]: ")
