"""Whole jobs over a fake engine: one record for every line that is not blank, reruns, and inputs that are not what they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTEXT, POISON, VOCAB, FakeEngine, byte_id, fake_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen import LLM, EngineError, SamplingParams, StorageError
from flexgen.defaults import derive_seed
from flexgen.jobs.runner import Job, identity
from flexgen.jobs.store import Store
from flexgen.plan.workload import Workload
from flexgen.request import TokenResult

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=None)


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> LLM:
    return LLM(model_folder)


@pytest.fixture(autouse=True)
def fresh_engine(llm: LLM, engines: list[FakeEngine]) -> Iterator[None]:
    yield
    llm._open.close()


def run(llm: LLM, source: Path, output: Path, *, defaults: SamplingParams = DEFAULTS) -> Job:
    with Store(output, identity(llm, defaults)) as store:
        job = Job(llm, source, store, defaults=defaults)
        job.run(job.scan())
        return job


def answers(output: Path) -> dict[int, dict[str, Any]]:
    """Flat records by line number."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({record["index"] for record in records}) == len(records)
    return {record["index"]: record for record in records}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_job(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"id": "text", "prompt": "abc", "max_tokens": 4},
        "",
        {"custom_id": "ids", "prompt": [64, 65], "max_tokens": 3},
        "not json",
        {"custom_id": "batch", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc", "temperature": 0}},
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}},
        {"prompt": "abc", "max_tokens": 3, "return_token_ids": True, "temperature": 1.0, "seed": 9},
        {"prompt": "abcd", "temperature": 1.0},
    )
    job = run(llm, source, output)
    assert (job.num_lines, job.num_bad_lines, job.started) == (7, 2, True)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 7
    flat = {record["index"]: record for record in records if "index" in record}
    batch = {record["custom_id"]: record for record in records if "custom_id" in record}
    assert flat[1] == {
        "id": "text",
        "index": 1,
        "text": fake_text("abc", 4),
        "finish_reason": "length",
        "stop_reason": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    assert (flat[3]["id"], flat[3]["text"]) == ("ids", fake_text("ab", 3))
    assert len(flat[3]["token_ids"]) == 3
    assert flat[4]["error"]["code"] == "invalid_json"
    assert batch["batch"]["response"]["body"]["choices"][0]["text"] == fake_text("abc", 16)
    assert batch["chat"]["response"]["body"]["error"]["param"] == "messages"
    assert (flat[7]["text"], len(flat[7]["token_ids"])) == (fake_text("abc", 3, seed=9, greedy=False), 3)
    assert flat[8]["text"] == fake_text("abcd", CONTEXT - 4, seed=derive_seed(0, 8), greedy=False)
    assert engines[0].workload == Workload(prompt_lens=(3, 2, 3, 3, 4), output_lens=(4, 3, 16, 3, 60))


def test_requests_are_pulled_as_the_engine_asks(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": "a", "max_tokens": 1} for _ in range(1000)))
    with Store(output, identity(llm, DEFAULTS)) as store:
        job = Job(llm, source, store, defaults=DEFAULTS)
        job.run(job.scan(), on_progress=lambda progress: assert_few(engines[0].num_pulled, store.num_answered))
    assert len(answers(output)) == 1000


def assert_few(pulled: int, answered: int) -> None:
    assert pulled == answered


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ({"prompt": "a" * CONTEXT}, "context_length_exceeded", "prompt"),
        ({"prompt": "a" * 100}, "context_length_exceeded", "prompt"),
        ({"prompt": [64] * 60, "max_tokens": 5}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "invalid_request", "max_tokens"),
        ({"prompt": [VOCAB]}, "invalid_request", "prompt"),
        ({"prompt": [-1]}, "invalid_request", "prompt"),
        ({"prompt": [10**400]}, "invalid_request", "prompt"),
        ({"prompt": []}, "invalid_request", "prompt"),
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": [POISON]}, "non_finite_logits", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_requests_that_cannot_be_served(llm: LLM, tmp_path: Path, output: Path, line: dict, code: str, param: str | None) -> None:
    good = {"prompt": "ab", "max_tokens": 3}
    run(llm, write(tmp_path / "in.jsonl", good, line, good), output)
    records = answers(output)
    assert records[1]["text"] == records[3]["text"] == fake_text("ab", 3)
    assert (records[2]["error"]["code"], records[2]["error"]["param"]) == (code, param)


def test_a_default_length_is_cut_to_the_context_and_a_stated_one_never(llm: LLM, tmp_path: Path, output: Path) -> None:
    body = {"prompt": [64] * 60}
    source = write(
        tmp_path / "in.jsonl",
        {"custom_id": "default", "url": "/v1/completions", "body": body},
        {"custom_id": "fits", "url": "/v1/completions", "body": body | {"max_tokens": 4}},
        {"custom_id": "stated", "url": "/v1/completions", "body": body | {"max_tokens": 16}},
        {"id": "bare", **body},
    )
    run(llm, source, output, defaults=SamplingParams(temperature=0.0, max_tokens=30))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    batch = {record["custom_id"]: record["response"] for record in records if "custom_id" in record}
    assert batch["default"]["body"]["usage"]["completion_tokens"] == 4
    assert batch["fits"]["status_code"] == 200
    assert batch["stated"]["status_code"] == 400
    assert next(record for record in records if record.get("id") == "bare")["usage"]["completion_tokens"] == 4


def test_a_model_without_a_tokenizer(bare_model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "ab"}, {"prompt": [64], "max_tokens": 2}, {"prompt": "cd"})
    run(LLM(bare_model_folder), source, output)
    records = answers(output)
    assert "no tokenizer" in records[1]["error"]["message"]
    assert "no tokenizer" in records[3]["error"]["message"]
    assert records[2]["text"] is None
    assert len(records[2]["token_ids"]) == 2


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_nothing_to_answer(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine], content: bytes) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    job = run(llm, source, output)
    assert (job.num_lines, job.started, engines) == (0, False, [])
    assert output.read_bytes() == b""


def test_a_dry_scan_writes_nothing(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "abc"}, "bad")
    job = Job(llm, source, None, defaults=DEFAULTS)
    assert job.scan() == Workload(prompt_lens=(3,), output_lens=(61,))
    assert (job.num_lines, job.num_bad_lines) == (2, 1)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_input_that_is_no_file(llm: LLM, tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="not a file"):
        Job(llm, tmp_path / name, None, defaults=DEFAULTS).scan()


# -- reruns -----------------------------------------------------------------------------------------------------------------------------


def lines(count: int) -> list[object]:
    return [{"id": n, "prompt": "ab" * (1 + n % 9), "max_tokens": 1 + n % 5} if n % 7 else f"bad line {n}" for n in range(count)]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [0, 1, 5, 17])
def test_an_interrupted_job_goes_on(
    llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, engines: list[FakeEngine]
) -> None:
    """The output is that of an uninterrupted run, line for line, and no finished line is computed again."""
    source = write(tmp_path / "in.jsonl", *lines(40))
    run(llm, source, tmp_path / "whole.jsonl")
    answer = FakeEngine._answer
    count = 0

    def interrupted(engine: FakeEngine, request: Any) -> TokenResult:
        nonlocal count
        count += 1
        if count > stop_after:
            raise Stop
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", interrupted)
    with pytest.raises(Stop):
        run(llm, source, output)
    monkeypatch.setattr(FakeEngine, "_answer", answer)
    job = run(llm, source, output)
    assert engines[-1].num_pulled == 34 - stop_after
    assert job.num_bad_lines == 0  # they had been answered
    assert answers(output) == answers(tmp_path / "whole.jsonl")


def test_a_finished_job_opens_no_engine(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", *lines(10))
    run(llm, source, output)
    content = output.read_bytes()
    assert not run(llm, source, output).started
    assert output.read_bytes() == content
    assert len(engines) == 1


def test_lines_may_be_added(llm: LLM, tmp_path: Path, output: Path) -> None:
    source = tmp_path / "in.jsonl"
    run(llm, write(source, *lines(10)), output)
    run(llm, write(source, *lines(15)), output)
    assert sorted(answers(output)) == list(range(1, 16))


@pytest.mark.parametrize("change", [lambda all: all[::-1], lambda all: all[:-1], lambda all: [*all[:4], {"prompt": "other"}, *all[5:]]])
def test_another_input_is_refused_and_the_output_kept(llm: LLM, tmp_path: Path, output: Path, change: Any) -> None:
    source = tmp_path / "in.jsonl"
    run(llm, write(source, *lines(10)), output)
    content = output.read_bytes()
    with pytest.raises(StorageError, match="another input"):
        run(llm, write(source, *change(lines(10))), output)
    assert output.read_bytes() == content


def test_another_seed_is_refused(model_folder: Path, llm: LLM, tmp_path: Path, output: Path) -> None:
    source = write(tmp_path / "in.jsonl", *lines(10))
    run(llm, source, output)
    with pytest.raises(StorageError, match="begun with seed 0, now it is 1"):
        run(LLM(model_folder, seed=1), source, output)
    with pytest.raises(StorageError, match="begun with max_tokens None, now it is 5"):
        run(llm, source, output, defaults=SamplingParams(temperature=0.0, max_tokens=5))


@pytest.mark.parametrize("change", [lambda all: all[::-1], lambda all: all[:-3]])
def test_an_input_that_changes_after_the_scan(llm: LLM, tmp_path: Path, output: Path, change: Any) -> None:
    source = write(tmp_path / "in.jsonl", *lines(10))
    with Store(output, identity(llm, DEFAULTS)) as store:
        job = Job(llm, source, store, defaults=DEFAULTS)
        workload = job.scan()
        write(source, *change(lines(10)))
        with pytest.raises(StorageError, match=r"changed while|another input"):
            job.run(workload)


def test_an_engine_that_forgets_a_request(llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = FakeEngine.generate

    def forgetful(engine: FakeEngine, requests: Any, **more: Any) -> Iterator[TokenResult]:
        return (result for result in generate(engine, requests, **more) if result.index != 3)

    monkeypatch.setattr(FakeEngine, "generate", forgetful)
    with pytest.raises(EngineError, match="answered 33 of 34"):
        run(llm, write(tmp_path / "in.jsonl", *lines(40)), output)


# -- anything at all --------------------------------------------------------------------------------------------------------------------

field_values = (
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=4) | st.lists(st.integers(-1, 310), max_size=3)
)
field_names = st.sampled_from(
    [
        "prompt",
        "id",
        "custom_id",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "n",
        "stop",
        "url",
        "body",
        "messages",
        "user",
        "x",
    ]
)
line_objects = st.dictionaries(field_names, field_values | st.dictionaries(field_names, field_values, max_size=3), max_size=5)
line_bytes = st.binary(max_size=30) | line_objects.map(lambda fields: json.dumps(fields).encode())


@given(st.lists(line_bytes, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_file_gives_one_record_per_line(llm: LLM, tmp_path_factory: pytest.TempPathFactory, content: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("any")
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(b"\n".join(content))
    job = run(llm, source, output)
    physical = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    wanted = sum(bool(line.strip()) for line in physical)
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(records) == job.num_lines == wanted
    for record in records:
        assert ("error" in record) + ("text" in record) == 1 or record["response"]["body"]


def test_ids_of_the_fake_tokenizer(llm: LLM) -> None:
    """The other tests lean on it."""
    assert llm.encode(["ab c"])[0] == [byte_id(character) for character in "ab c"]
