"""One LLM in several threads and processes, with the bundled model: right answers, or a refusal, and never a hang."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexgen import LLM, FlexGenError, SamplingParams
from flexgen.plan.workload import Workload
from flexgen.request import TokenResult

PROMPTS = ["Once upon a time", "The old house stood on", "It was a dark night and"]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def llm(novels_opt: Path, offload: Path) -> Iterator[LLM]:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with LLM(novels_opt, dtype="float32", kv="disk=1", offload_dir=str(offload), chat_template=template) as llm:
        yield llm


@pytest.fixture(scope="module")
def wanted(llm: LLM) -> list[str]:
    return answers(llm)


def answers(llm: LLM) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]


def stream(llm: LLM) -> Iterator[TokenResult]:
    params = [SamplingParams(temperature=0, max_tokens=2 + 3 * place) for place in range(len(PROMPTS))]
    requests = [r for place, ids in enumerate(llm.encode(PROMPTS)) for r in llm.model.token_requests(place, ids, params[place])]
    lengths = tuple(len(request.prompt_token_ids) for request in requests)
    return llm.stream(requests, Workload(prompt_lens=lengths, output_lens=tuple(request.max_tokens for request in requests)))


def forked(function: Callable[[], object]) -> str:
    """What a forked process has of it; a hang ends after a minute."""
    read, write = os.pipe()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads, since Python 3.12
        pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            said = str(function())
        except BaseException as error:  # noqa: BLE001  (told to the parent)
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_threads_get_the_answers_that_they_would_get_alone(llm: LLM, wanted: list[str]) -> None:
    def chat(_: int) -> list[str]:
        conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        return [output.outputs[0].text for output in llm.chat(conversations, GREEDY)]

    alone = chat(0)
    with ThreadPoolExecutor(4) as threads:
        generated, chatted = threads.map(lambda _: answers(llm), range(4)), threads.map(chat, range(4))
        assert list(generated) == [wanted] * 4
        assert list(chatted) == [alone] * 4


def test_an_iterator_loses_nothing_to_another_call(llm: LLM, wanted: list[str]) -> None:
    results = stream(llm)
    first = next(results)
    with pytest.raises(FlexGenError, match="exhaust or close"):
        answers(llm)
    with pytest.raises(FlexGenError, match="exhaust or close"), ThreadPoolExecutor(1) as threads:
        threads.submit(answers, llm).result()
    assert sorted(result.index for result in (first, *results)) == [0, 1, 2]
    assert answers(llm) == wanted


def test_an_iterator_that_is_left_behind_lets_go(llm: LLM, wanted: list[str]) -> None:
    for _ in stream(llm):
        break
    assert answers(llm) == wanted


def test_an_iterator_ends_with_its_llm(novels_opt: Path) -> None:
    llm = LLM(novels_opt, dtype="float32")
    results = stream(llm)
    next(results)
    llm.close()
    with pytest.raises(FlexGenError, match="closed"):
        next(results)
    with pytest.raises(FlexGenError, match="closed"):
        answers(llm)


def test_a_forked_process_is_refused_and_leaves_its_parent_s_files_alone(llm: LLM, wanted: list[str], offload: Path) -> None:
    assert answers(llm) == wanted
    before = sorted(offload.rglob("*"))
    assert before
    assert "spawn" in forked(lambda: answers(llm))
    assert "spawn" in forked(lambda: llm.chat([{"role": "user", "content": "Once"}], GREEDY))
    assert forked(llm.close) == "None"
    assert sorted(offload.rglob("*")) == before
    assert answers(llm) == wanted


def test_nor_can_a_forked_process_open_a_model_of_its_own(llm: LLM, wanted: list[str], novels_opt: Path) -> None:
    assert "spawn" in forked(lambda: answers(LLM(novels_opt, dtype="float32")))


def test_several_models_in_several_threads(novels_opt: Path, novels_qwen3: Path) -> None:
    def alone(folder: Path) -> list[str]:
        with LLM(folder, dtype="float32") as llm:
            return answers(llm)

    folders = [novels_opt, novels_qwen3]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(alone, folders * 2))
    assert together == [alone(folder) for folder in folders] * 2
