"""Requests from Python in a durable job: the same call again goes on, answers nothing twice, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import POISON, FakeEngine, fake_text

from flexgen import LLM, EngineError, JobError, OutOfMemoryError, RequestError, SamplingParams, StorageError
from flexgen.jobs.durable import answer_lines
from flexgen.jobs.folder import JobFolder, JobPaths
from flexgen.jobs.interrupt import Stopped, StopRequest
from flexgen.jobs.status import read_status
from flexgen.request import TokenRequest, TokenResult

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)
LINES: list[dict[str, Any]] = [{"id": n, "prompt": "ab" * (1 + n), "max_tokens": 1 + n % 5} for n in range(20)]
TEXTS = [fake_text(line["prompt"], line["max_tokens"]) for line in LINES]


@pytest.fixture
def llm(model_folder: Path, engines: list[FakeEngine]) -> Iterator[LLM]:
    with LLM(model_folder) as llm:
        yield llm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "job"


def answered(llm: LLM, lines: Any, folder: Path, **how: Any) -> list[dict[str, Any]]:
    keywords: dict[str, Any] = {"defaults": GREEDY, **how}
    return list(answer_lines(llm, lines, folder, **keywords))


def texts(records: list[dict[str, Any]]) -> list[str]:
    return [record["text"] for record in records]


def paths(folder: Path) -> JobPaths:
    return JobPaths(folder=folder, output=None)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[int]]:
    """Has the fake engine raise an error instead of its next answers from a number on; returns the indices of what it was asked."""
    works = FakeEngine._answer

    def fail_after(count: int, error: BaseException) -> list[int]:
        asked: list[int] = []

        def answer(engine: FakeEngine, request: TokenRequest) -> TokenResult:
            if len(asked) == count:
                raise error
            asked.append(request.index)
            return works(engine, request)

        monkeypatch.setattr(FakeEngine, "_answer", answer)
        return asked

    return fail_after


def test_records_are_in_the_order_of_the_lines(llm: LLM, folder: Path) -> None:
    records = answered(llm, LINES, folder)
    assert [(record["id"], record["index"]) for record in records] == [(n, n + 1) for n in range(20)]
    assert texts(records) == TEXTS
    status = read_status(paths(folder))
    assert (status.lines, status.answered, status.failed, status.process, status.ending) == (20, 20, 0, None, "finished")


def test_the_same_call_again_answers_nothing_again(llm: LLM, folder: Path, engines: list[FakeEngine]) -> None:
    first = answered(llm, LINES, str(folder))  # pyright: ignore[reportArgumentType]
    assert answered(llm, (dict(line) for line in LINES), folder) == first
    assert [engine.num_pulled for engine in engines] == [20]


def test_the_same_call_again_needs_no_engine(model_folder: Path, folder: Path, engines: list[FakeEngine]) -> None:
    for _ in range(2):
        with LLM(model_folder) as llm:
            assert texts(answered(llm, LINES, folder)) == TEXTS
    assert len(engines) == 1


@pytest.mark.parametrize("count", [0, 1, 7, 19])
def test_an_interrupted_call_goes_on(llm: LLM, folder: Path, fails: Callable[[int, BaseException], list[int]], count: int) -> None:
    before = fails(count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answered(llm, LINES, folder)
    assert read_status(paths(folder)).answered == count
    after = fails(100, KeyboardInterrupt())
    assert texts(answered(llm, LINES, folder)) == TEXTS
    assert not set(before) & set(after)
    assert len(before) + len(after) == 20


def test_a_failure_is_told_and_nothing_is_lost(llm: LLM, folder: Path, fails: Callable[[int, BaseException], list[int]]) -> None:
    fails(5, EngineError("the disk is gone"))
    with pytest.raises(EngineError, match="the disk is gone"):
        answered(llm, LINES, folder)
    status = read_status(paths(folder))
    assert (status.answered, status.ending, status.process) == (5, "the disk is gone", None)


def test_a_call_that_is_asked_to_stop(llm: LLM, folder: Path) -> None:
    stop = StopRequest()
    with pytest.raises(Stopped):
        answered(llm, LINES, folder, stop=stop, on_progress=lambda progress: stop.ask())
    status = read_status(paths(folder))
    assert 0 < status.answered < 20
    assert status.ending == "stopped"
    assert texts(answered(llm, LINES, folder)) == TEXTS


def test_memory_that_runs_out_halves_the_block(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = FakeEngine.generate

    def generate(engine: FakeEngine, *given: Any, **how: Any) -> Any:
        if llm.options.max_num_seqs is None:
            raise OutOfMemoryError("a test says so")
        return works(engine, *given, **how)

    monkeypatch.setattr(FakeEngine, "generate", generate)
    assert texts(answered(llm, LINES, folder)) == TEXTS
    assert llm.options.max_num_seqs == 2


def test_lines_may_be_added(llm: LLM, folder: Path, engines: list[FakeEngine]) -> None:
    answered(llm, LINES[:15], folder)
    assert texts(answered(llm, LINES, folder)) == TEXTS
    assert engines[-1].num_pulled == 20


@pytest.mark.parametrize("changed", [LINES[::-1], LINES[:-1], [], [*LINES[:4], {"prompt": "other"}, *LINES[5:]]], ids=len)
def test_other_lines_are_refused_and_change_nothing(llm: LLM, folder: Path, changed: list[dict[str, Any]]) -> None:
    first = answered(llm, LINES, folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(JobError, match=r"another input.*: accept_changes=True answers those again, another folder starts anew$"):
        answered(llm, changed, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert answered(llm, LINES, folder) == first
    assert len(answered(llm, changed, folder, accept_changes=True)) == len(changed)


def test_other_defaults_are_refused(llm: LLM, folder: Path) -> None:
    answered(llm, LINES, folder)
    with pytest.raises(JobError, match=r"default temperature 0\.0, now it is 1\.0"):
        answered(llm, LINES, folder, defaults=SamplingParams(max_tokens=None))


def test_other_options_are_refused_in_python_s_words(model_folder: Path, folder: Path, engines: list[FakeEngine]) -> None:
    with LLM(model_folder) as llm:
        answered(llm, LINES, folder)
    with LLM(model_folder, kv_format="int8", seed=3) as llm:
        with pytest.raises(JobError) as caught:
            answered(llm, LINES, folder)
        assert str(caught.value) == (
            f"{folder} was begun with kv_format='auto', now it is 'int8'; seed=0, now it is 3: the earlier values go on, "
            "accept_changes=True goes on with the new ones, another folder starts anew"
        )
        assert texts(answered(llm, LINES, folder, accept_changes=True)) == TEXTS


def test_bad_lines_have_their_errors(llm: LLM, folder: Path) -> None:
    lines = [LINES[0], {"promt": "a"}, {}, {"prompt": [POISON]}, {"prompt": "a" * 100}, {"prompt": "\ud800"}, LINES[1]]
    first, *bad, last = answered(llm, lines, folder)
    assert [first["text"], last["text"]] == TEXTS[:2]
    codes = ["unknown_field", "invalid_request", "non_finite_logits", "context_length_exceeded", "invalid_json"]
    assert [record["error"]["code"] for record in bad] == codes


def test_errors_are_tried_again_if_that_is_asked_for(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [LINES[0], {"prompt": [POISON], "max_tokens": 2}]
    first = answered(llm, lines, folder)
    assert "error" in first[1]
    monkeypatch.setattr("fakes.POISON", -1)
    assert answered(llm, lines, folder) == first
    good, mended = answered(llm, lines, folder, retry_errors=True)
    assert good == first[0]
    assert len(mended["token_ids"]) == 2


def test_no_lines(llm: LLM, folder: Path, engines: list[FakeEngine]) -> None:
    assert answered(llm, [], folder) == []
    assert answered(llm, [], folder) == []
    assert engines == []
    assert texts(answered(llm, LINES, folder)) == TEXTS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": object()}, "type object"), ({"prompt": "a", "temperature": float("nan")}, "JSON compliant"), (["a"], "type list"),
        ("a", "type str"), (None, "type NoneType"), ({"prompt": b"a"}, "type bytes"), ({("a",): 1}, "keys must be"),
    ],
    ids=["object", "nan", "list", "text", "null", "bytes", "keys"],
)  # fmt: skip
def test_a_line_that_is_no_json_object_is_named(llm: LLM, folder: Path, line: Any, said: str) -> None:
    for earlier in ([], [LINES[0]]):
        answered(llm, earlier, folder) if earlier else None
        with pytest.raises(RequestError, match=f"^line 3 .*{said}"):
            answered(llm, [*LINES[:2], line], folder)
        assert folder.exists() == bool(earlier)
    assert texts(answered(llm, LINES, folder)) == TEXTS


def test_a_line_that_holds_itself(llm: LLM, folder: Path) -> None:
    line: dict[str, Any] = {"prompt": "a"}
    line["metadata"] = {"of": line}
    with pytest.raises(RequestError, match="line 1 is not a JSON object"):
        answered(llm, [line], folder)


def test_values_of_numpy_and_torch(llm: LLM, folder: Path) -> None:
    prompts = [np.array([64, 65]), torch.tensor([64, 65]), (64, 65), range(64, 66), [np.int64(64), torch.tensor(65)]]
    lines = [{"id": np.int64(n), "prompt": prompt, "max_tokens": np.int32(3)} for n, prompt in enumerate(prompts)]
    records = answered(llm, lines, folder)
    assert texts(records) == [fake_text("ab", 3)] * 5
    assert [record["id"] for record in records] == [0, 1, 2, 3, 4]


def test_an_error_of_the_caller_s_generator_is_the_caller_s(llm: LLM, folder: Path) -> None:
    def lines() -> Iterator[dict[str, Any]]:
        yield LINES[0]
        raise LookupError("no more rows")

    with pytest.raises(LookupError, match="no more rows"):
        answered(llm, lines(), folder)
    assert not folder.exists()


def test_two_calls_on_one_folder(llm: LLM, folder: Path) -> None:
    with JobFolder(paths(folder)), pytest.raises(JobError, match="being written by another"):
        answered(llm, LINES, folder)


def test_a_folder_in_a_folder_that_is_missing(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        answered(llm, LINES, tmp_path / "missing" / "job")


def test_records_are_read_as_they_are_asked_for(llm: LLM, folder: Path) -> None:
    records = answer_lines(llm, LINES, folder, defaults=GREEDY)
    assert read_status(paths(folder)).answered == 20
    assert next(records)["text"] == TEXTS[0]
    records.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_openai_s_lines(llm: LLM, folder: Path) -> None:
    body = {"prompt": ["ab", "abab"], "max_tokens": 3, "temperature": 0}
    (record,) = answered(llm, [{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body}], folder)
    choices = record["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == [fake_text("ab", 3), fake_text("abab", 3)]
    assert json.dumps(record)
