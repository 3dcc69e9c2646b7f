"""Whole jobs over a fake engine: one record for every line that is not blank, reruns, and inputs that are not what they were."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTEXT, FORECAST, POISON, VOCAB, FakeEngine, byte_id, fake_text, fake_token
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jobs.places import paths_of

from flexgen import LLM, EngineError, JobError, OutOfMemoryError, RequestError, SamplingParams, StorageError
from flexgen.base.text_input import is_compressed
from flexgen.jobs import store as store_module
from flexgen.jobs.export import export
from flexgen.jobs.folder import JobFolder
from flexgen.jobs.identity import identity_of
from flexgen.jobs.interrupt import Stopped, StopRequest
from flexgen.jobs.reading import Reader, index_of, line_and_choice
from flexgen.jobs.runner import Job
from flexgen.jobs.status import read_status
from flexgen.jobs.store import Store
from flexgen.plan.workload import Workload
from flexgen.request import Generated, PartialAnswer, TokenRequest, TokenResult
from flexgen.session.served import ServedModel
from flexgen.text.defaults import derive_seed

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=None)


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> LLM:
    return LLM(model_folder)


@pytest.fixture(autouse=True)
def fresh_engine(llm: LLM, engines: list[FakeEngine]) -> Iterator[None]:
    yield
    llm.model._engine.close()


@contextmanager
def opened(
    llm: LLM, source: Path, output: Path, *, defaults: SamplingParams = DEFAULTS, accept: bool = False, **more: Any
) -> Iterator[Job]:
    """A job that has compared its input; its output is made in the end, whatever happens."""
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        store.begin(identity_of(llm.model, defaults), "m", accept_changes=accept)
        job = Job(llm.model, source, store, defaults=defaults, **more)
        job.match(accept_changes=accept)
        try:
            yield job
        finally:
            export(store.paths, output)


def run(llm: LLM, source: Path, output: Path, **more: Any) -> Job:
    with opened(llm, source, output, **more) as job:
        workload = job.scan()
        assert job.store is not None
        job.store.start_run(job.num_lines)
        job.run(workload)
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
    assert flat[8]["text"] == fake_text("abcd", CONTEXT - 4, seed=derive_seed(0, index_of(8)), greedy=False)
    assert engines[0].workload == Workload(prompt_lens=(3, 2, 3, 3, 4), output_lens=(4, 3, 16, 3, 60), may_end_early=True)


def test_the_scan_finds_what_lines_have_in_common(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(
        tmp_path / "in.jsonl", *({"prompt": "x" * 20 + end, "max_tokens": 1} for end in "ab"), {"prompt": "y" * 20, "max_tokens": 1}
    )
    run(llm, source, output)
    assert [(point.length, point.num_requests) for point in engines[0].prefixes.path((byte_id("x"),) * 20)] == [(16, 2)]
    assert engines[0].prefixes.path((byte_id("y"),) * 20) == ()


def test_requests_are_pulled_as_the_engine_asks(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": "a", "max_tokens": 1} for _ in range(1000)))
    pulled: list[int] = []
    with opened(llm, source, output) as job:
        job.run(job.scan(), on_progress=lambda progress: pulled.append(engines[0].num_pulled))
    assert pulled == list(range(4, 1001, 4))
    assert len(answers(output)) == 1000


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
    job = Job(llm.model, source, None, defaults=DEFAULTS)
    assert job.scan() == Workload(prompt_lens=(3,), output_lens=(61,), may_end_early=True)
    assert (job.num_lines, job.num_bad_lines) == (2, 1)
    assert list(tmp_path.iterdir()) == [source]


def test_only_lines_that_may_end_early_are_expected_to(llm: LLM, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = [{"ignore_eos": True}, {"min_tokens": 7}, {}, {"ignore_eos": True, "min_tokens": 3}]
    source = write(tmp_path / "in.jsonl", *({"prompt": "abc", "max_tokens": 20, **each} for each in asked))
    wanted = Workload(prompt_lens=(3,) * 4, output_lens=(20,) * 4, least_lens=(20, 7, 0, 20), may_end_early=True)
    assert Job(llm.model, source, None, defaults=DEFAULTS).scan() == wanted


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_input_that_is_no_file(llm: LLM, tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="not a file"):
        Job(llm.model, tmp_path / name, None, defaults=DEFAULTS).scan()


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
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


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
    with pytest.raises(JobError, match="another input"):
        run(llm, write(source, *change(lines(10))), output)
    assert output.read_bytes() == content
    run(llm, source, output, accept=True)
    run(llm, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_mended_line_is_done_again_and_the_others_are_kept(llm: LLM, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = tmp_path / "in.jsonl"
    good = lines(10)
    good[0] = {"id": 0, "prompt": "ab", "max_tokens": 2}
    good[7] = {"id": 7, "prompt": "cd", "max_tokens": 2}
    run(llm, write(source, *lines(10)), output)
    job = run(llm, write(source, *good), output)
    assert (job.num_bad_lines, engines[-1].num_pulled) == (0, 8 + 2)
    run(llm, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_bad_line_may_go(llm: LLM, tmp_path: Path, output: Path) -> None:
    source = tmp_path / "in.jsonl"
    run(llm, write(source, *lines(10)), output)
    run(llm, write(source, "", *lines(10)[1:]), output)
    assert sorted(answers(output)) == list(range(2, 11))


def test_settings_that_answered_nothing_may_change(llm: LLM, tmp_path: Path, output: Path) -> None:
    source = write(tmp_path / "in.txt", "abc", "abd")
    run(llm, source, output)
    assert all("error" in record for record in answers(output).values())
    run(llm, source, output, defaults=SamplingParams(temperature=0.0, max_tokens=3), input_format="text")
    assert [record["text"] for record in answers(output).values()] == [fake_text("abc", 3), fake_text("abd", 3)]


# -- a file that is wrong as a whole ----------------------------------------------------------------------------------------------------

ALIKE = {
    "no json": ["foo bar"] * 50 + ["{'prompt': 1}"] * 50,
    "unknown fields": [{"text": str(n)} for n in range(100)],
    "too long": [{"prompt": "a" * (CONTEXT + n)} for n in range(100)],
    "no template": [{"messages": [{"role": "user", "content": str(n)}]} for n in range(100)],
}


@pytest.mark.parametrize("bad", ALIKE.values(), ids=ALIKE)
def test_a_hundred_lines_that_fail_alike_are_refused(llm: LLM, tmp_path: Path, output: Path, bad: list[object]) -> None:
    source = write(tmp_path / "in.jsonl", "", *bad, {"prompt": "a"})
    with opened(llm, source, output) as job, pytest.raises(JobError, match=r"first 100 lines all fail .* line 2: .*--keep-going"):
        job.check_head()
    with opened(llm, source, output) as job:  # asked to go on
        job.scan()
        assert job.num_bad_lines == 100
    with opened(llm, source, output) as job:  # it went on then
        job.check_head()


@pytest.mark.parametrize(
    "given_lines",
    [
        ALIKE["unknown fields"][:99],
        [*ALIKE["unknown fields"][:99], {"prompt": "a"}],
        [*ALIKE["unknown fields"][:99], {"txet": "a"}],
        [*ALIKE["no json"][:60], *ALIKE["too long"][:40]],
    ],
    ids=["fewer", "one is good", "another field", "two reasons"],
)
def test_lines_that_fail_for_themselves_stop_nothing(llm: LLM, tmp_path: Path, output: Path, given_lines: list[object]) -> None:
    with opened(llm, write(tmp_path / "in.jsonl", *given_lines), output) as job:
        job.check_head()


def test_what_a_run_tells_while_it_goes_on(llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.jobs.runs.STATUS_SECONDS", 0.0)
    source = write(tmp_path / "in.jsonl", *({"prompt": "ab", "max_tokens": 3} for _ in range(8)))
    found = []
    with opened(llm, source, output) as job:
        workload = job.scan()
        assert job.store is not None
        job.open(workload)
        job.store.start_run(job.num_lines)
        job.run(workload, on_progress=lambda progress: found.append(read_status(paths_of(output))))
    assert [each.output_tokens for each in found] == [12, 24]
    assert all(each.answering and each.planned_seconds == FORECAST.seconds and each.eta_seconds > 0 for each in found)


def test_another_seed_is_refused(model_folder: Path, llm: LLM, tmp_path: Path, output: Path) -> None:
    source = write(tmp_path / "in.jsonl", *lines(10))
    run(llm, source, output)
    with pytest.raises(JobError, match="begun with seed=0, now it is 1"):
        run(LLM(model_folder, seed=1), source, output)
    with pytest.raises(JobError, match="begun with default max_tokens null, now it is 5"):
        run(llm, source, output, defaults=SamplingParams(temperature=0.0, max_tokens=5))


@pytest.mark.parametrize("change", [lambda all: all[::-1], lambda all: all[:-3]])
def test_an_input_that_changes_after_the_scan(llm: LLM, tmp_path: Path, output: Path, change: Any) -> None:
    source = write(tmp_path / "in.jsonl", *lines(10))
    with opened(llm, source, output) as job:
        workload = job.scan()
        write(source, *change(lines(10)))
        with pytest.raises(StorageError, match="changed while"):
            job.run(workload)


def test_an_engine_that_forgets_a_request(llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = FakeEngine.generate

    def forgetful(engine: FakeEngine, requests: Any, **more: Any) -> Iterator[TokenResult]:
        return (result for result in generate(engine, requests, **more) if result.index != index_of(3))

    monkeypatch.setattr(FakeEngine, "generate", forgetful)
    with pytest.raises(EngineError, match="left 1 of 34 lines"):
        run(llm, write(tmp_path / "in.jsonl", *lines(40)), output)


# -- answers in progress ----------------------------------------------------------------------------------------------------------------


class SteppingEngine(FakeEngine):
    """One token for every live sequence per pass, and several sequences at once; `num_tokens` counts what it generates."""

    num_tokens = 0

    def generate(self, requests: Any, *, on_progress: Any = None, on_pass: Any = None, **more: Any) -> Iterator[TokenResult]:
        waiting = iter(requests)
        live: list[tuple[TokenRequest, list[int]]] = []
        while True:
            for request in itertools.islice(waiting, 4 - len(live)):
                live.append((request, list(request.generated.token_ids)))
            if not live:
                return
            for request, ids in live:
                ids.append(fake_token(request, len(ids)))
                SteppingEngine.num_tokens += 1
            for request, ids in [each for each in live if len(each[1]) == each[0].max_tokens]:
                live.remove((request, ids))
                yield TokenResult(index=request.index, token_ids=tuple(ids), finish_reason="length")
            if on_pass is not None:
                on_pass(PartialAnswer(index=request.index, generated=Generated(token_ids=tuple(ids))) for request, ids in live)


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.session.session.open_engine", lambda files, options, workload: SteppingEngine(workload))
    monkeypatch.setattr(SteppingEngine, "num_tokens", 0)
    monkeypatch.setattr(store_module, "COMMIT_SECONDS", 0.0)


class StopAfter(StopRequest):
    """Asks at the `count`-th look."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("looks", [0, 1, 2, 7, 20])
@pytest.mark.usefixtures("stepping")
def test_a_stopped_job_generates_no_token_twice(llm: LLM, tmp_path: Path, looks: int) -> None:
    lines = ({"prompt": "ab", "max_tokens": 3 + 5 * (n % 4), "temperature": 1.0, "n": 1 + n % 3} for n in range(12))
    source = write(tmp_path / "in.jsonl", *lines)
    run(llm, source, tmp_path / "whole.jsonl")
    needed, SteppingEngine.num_tokens = SteppingEngine.num_tokens, 0
    num_stops = 0
    for _ in range(100):
        try:
            job = run(llm, source, tmp_path / "out.jsonl", stop=StopAfter(looks))
            break
        except Stopped:
            num_stops += 1
    assert num_stops > 0
    assert SteppingEngine.num_tokens == needed
    assert (job.num_resumed > 0) == (job.tokens_kept > 0)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.usefixtures("stepping")
def test_a_pass_that_is_given_up_costs_no_earlier_token(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "ab", "max_tokens": 20})
    stop, generate = StopRequest(), SteppingEngine.generate
    monkeypatch.setattr("flexgen.jobs.interrupt.PATIENCE_SECONDS", 0.0)

    def slow(engine: SteppingEngine, requests: Any, *, on_pass: Any, on_progress: Any, **more: Any) -> Iterator[TokenResult]:
        passes = 0

        def counted(live: Any) -> None:
            nonlocal passes
            on_pass(list(live))
            passes += 1
            if passes == 7:
                stop.ask()
                on_progress(None)

        yield from generate(engine, requests, on_pass=counted, **more)

    monkeypatch.setattr(SteppingEngine, "generate", slow)
    with pytest.raises(Stopped):
        run(llm, source, tmp_path / "out.jsonl", stop=stop, checkpoint_seconds=1e9)
    monkeypatch.undo()
    with JobFolder(paths_of(tmp_path / "out.jsonl")) as folder, Store(folder) as store:
        assert store._tokens_in_progress() == 7


def test_an_answer_whose_text_cannot_be_made_is_an_error(llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that panics on what the model says does not stop the others."""
    decode = llm.get_tokenizer().decode
    source = write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 2}, {"prompt": "a", "max_tokens": 3})

    def panic(ids: list[int], **how: Any) -> Any:
        if len(ids) == 1 + 2:  # a token of the prompt, and the answer
            raise type("PanicException", (BaseException,), {})("index out of bounds")
        return decode(ids, **how)

    monkeypatch.setattr(llm.get_tokenizer(), "decode", panic)
    run(llm, source, output)
    assert answers(output)[1]["error"]["code"] == "tokenizer_error"
    assert len(answers(output)[2]["text"]) == 3


def test_an_answer_that_no_database_holds_is_an_error(llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.jobs.serving.MAX_RECORD_BYTES", 10)
    run(llm, write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 5}), output)
    assert answers(output)[1]["error"]["code"] == "answer_too_large"


@pytest.mark.parametrize("broken", ["output", "token_requests"])
def test_an_exception_of_one_line_is_its_error(
    llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """Of the line with seed 13; before the model has it, or once it is answered."""
    source = write(tmp_path / "in.jsonl", *({"prompt": "ab", "max_tokens": 4, "seed": seed} for seed in (12, 13, 14)))
    works = getattr(ServedModel, broken)

    def breaks(self: ServedModel, *args: Any) -> Any:
        if any(isinstance(each, SamplingParams) and each.seed == 13 for each in args):
            raise IndexError("index 13 is out of range")
        return works(self, *args)

    monkeypatch.setattr(ServedModel, broken, breaks)
    run(llm, source, output)
    records = answers(output)
    assert records[2]["error"] == {"code": "internal_error", "message": "IndexError: index 13 is out of range", "param": None}
    assert [records[1]["text"], records[3]["text"]] == [fake_text("ab", 4)] * 2
    assert "please report" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.usefixtures("stepping")
def test_a_line_that_only_the_scan_could_serve_ends_in_an_error(
    llm: LLM, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template may draw lots."""
    source = write(tmp_path / "in.jsonl", *lines(4))
    read, readings = Reader.read, []

    def fickle(reader: Reader, found: Any) -> Iterator[Any]:
        readings.append(1)
        for request, token_requests in read(reader, found):
            refuses = len(readings) == 2 and request.line_number == 3
            yield (request.refused(RequestError("unlucky")), ()) if refuses else (request, token_requests)

    monkeypatch.setattr(Reader, "read", fickle)
    run(llm, source, output)
    assert sorted(answers(output)) == [1, 2, 3, 4]
    assert answers(output)[3]["error"]["message"] == "unlucky"


@pytest.mark.parametrize(("seconds", "lost"), [(0.0, False), (1e9, True)])
@pytest.mark.usefixtures("stepping")
def test_tokens_are_stored_as_often_as_asked(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, lost: bool) -> None:
    """A failure costs what was generated since the last checkpoint, and no more."""
    source = write(tmp_path / "in.jsonl", {"prompt": "ab", "max_tokens": 20})
    generate = SteppingEngine.generate

    def failing(engine: SteppingEngine, requests: Any, **more: Any) -> Iterator[TokenResult]:
        def on_pass(live: Any) -> None:
            more["on_pass"](live)
            if SteppingEngine.num_tokens == 10:
                raise EngineError("the disk is gone")

        return generate(engine, requests, on_pass=on_pass)

    monkeypatch.setattr(SteppingEngine, "generate", failing)
    with pytest.raises(EngineError, match="gone"):
        run(llm, source, tmp_path / "out.jsonl", checkpoint_seconds=seconds)
    job = run(llm, source, tmp_path / "out.jsonl", checkpoint_seconds=seconds)
    assert SteppingEngine.num_tokens == (30 if lost else 20)
    assert (job.num_resumed, job.tokens_kept) == ((0, 0) if lost else (1, 10))
    assert answers(tmp_path / "out.jsonl")[1]["text"] == fake_text("ab", 20)


@pytest.mark.usefixtures("stepping")
def test_what_is_generated_already_is_part_of_the_prompt_to_plan_for(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "abc", "max_tokens": 20}, {"prompt": "ab", "max_tokens": 2})
    with pytest.raises(Stopped), opened(llm, source, tmp_path / "out.jsonl", stop=StopAfter(2)) as job:
        job.run(job.scan())
    with opened(llm, source, tmp_path / "out.jsonl") as job:
        assert job.scan() == Workload(prompt_lens=(3 + 3,), output_lens=(20 - 3,), may_end_early=True)


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError("else")])
@pytest.mark.usefixtures("stepping")
def test_running_out_of_memory(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(engine: SteppingEngine, requests: Any, **more: Any) -> Iterator[TokenResult]:
        next(iter(requests))
        raise error
        yield

    monkeypatch.setattr(SteppingEngine, "generate", failing)
    wanted = ValueError if isinstance(error, ValueError) else OutOfMemoryError
    with pytest.raises(wanted, match=r"memory ran out.*lower max_num_seqs|else"):
        run(llm, write(tmp_path / "in.jsonl", *lines(10)), tmp_path / "out.jsonl")


def test_indices() -> None:
    for line, choice in ((1, 0), (7, 3), (10**7, 16383)):
        assert line_and_choice(index_of(line) + choice) == (line, choice)


# -- the whole file ---------------------------------------------------------------------------------------------------------------------


def test_strict_lists_what_is_wrong(llm: LLM, tmp_path: Path, output: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "x"},
        "not json",
        {"id": "b", "prompt": "x", "max_tokens": 1000},
        "",
        {"id": "a", "prompt": "x"},
        {"id": 1, "prompt": "x"},
        {"id": "1", "prompt": "x"},
    )
    with opened(llm, source, output) as job:
        with pytest.raises(JobError) as caught:
            job.check()
        assert job.store is not None
        assert job.store.num_failed == 0
    said = str(caught.value).splitlines()
    assert "found 3 faults" in said[0]
    assert [line.partition(":")[0] for line in said[1:]] == ["line 2", "line 3", "line 5"]
    assert "same id" in said[3]


def test_strict_lists_no_more_than_a_person_reads(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *("bad" for _ in range(1000)))
    with pytest.raises(JobError, match="found 1,000 faults") as caught:
        Job(llm.model, source, None, defaults=DEFAULTS).check()
    assert len(str(caught.value).splitlines()) == 21


def test_strict_finds_nothing_wrong(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "x"}, {"prompt": "x"}, {"prompt": "x"})
    Job(llm.model, source, None, defaults=DEFAULTS).check()


def test_repeated_ids_are_answered_and_told_once(llm: LLM, tmp_path: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(llm, write(tmp_path / "in.jsonl", *({"id": "same", "prompt": "a", "max_tokens": 1} for _ in range(5))), output)
    assert len(answers(output)) == 5
    assert "4 lines have the id of an earlier line" in caplog.text


def test_one_repeated_id_is_told_in_the_singular(llm: LLM, tmp_path: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(llm, write(tmp_path / "in.jsonl", *({"id": "same", "prompt": "a", "max_tokens": 1} for _ in range(2))), output)
    assert "1 line has the id of an earlier line; all are answered" in caplog.text


def test_an_answer_that_is_refused_is_an_error_beside_the_answer(llm: LLM, tmp_path: Path, output: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"id": text, "prompt": text, "max_tokens": 3} for text in ("a", "bc")))
    job = run(llm, source, output, judge=lambda record: "it is that of a" if record["id"] == "a" else None)
    assert job.store is not None
    assert (job.store.num_answered, job.store.num_failed) == (1, 1)
    found = answers(output)
    assert found[1]["error"] == {"code": "invalid_answer", "message": "it is that of a", "param": None}
    assert (found[1]["text"], found[1]["finish_reason"]) == (fake_text("a", 3), "length")
    assert "error" not in found[2]
    status = read_status(job.store.paths)
    assert (status.answered, status.failed, status.output_tokens) == (1, 1, 6)
    with opened(llm, source, output) as again:
        assert again.store is not None
        assert again.store.forget_failed() == 1
        again.store.start_run(2)
        again.run(again.scan())
        assert (again.store.num_answered, again.store.num_failed) == (2, 0)
    assert "error" not in answers(output)[1]


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
    assume(not is_compressed(source))  # a file that begins as an archive of gzip is one, and refused if it is damaged
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
