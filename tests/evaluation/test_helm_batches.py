"""Batches of HELM's requests, answered by the bundled checkpoint: log probabilities are the model's, and nothing is answered twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from evaluation.requests_of_helm import keyed

from flexgen import LLM, RequestError
from flexgen.evaluation import helm_batches
from flexgen.evaluation.helm_batches import Answerer
from flexgen.jobs.durable import answer_lines
from flexgen.report.progress import Progress

TEXT = "It was a dark night, and the old man"


@pytest.fixture(scope="module")
def llm(novels_opt: Path) -> Iterator[LLM]:
    with LLM(novels_opt, dtype="float32", host_mem="2GiB") as llm:
        yield llm


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all lines that the engine is asked to answer."""
    ids: list[str] = []

    def noting(model: LLM, lines: Iterable[Mapping[str, Any]], folder: Path, **how: Any) -> Iterator[dict[str, Any]]:
        listed = list(lines)
        ids.extend(line["id"] for line in listed)
        return answer_lines(model, listed, folder, **how)

    monkeypatch.setattr(helm_batches, "answer_lines", noting)
    return ids


def response(answers: Mapping[str, dict[str, Any] | RequestError], identity: str) -> dict[str, Any]:
    answer = answers[identity]
    assert isinstance(answer, dict)
    return answer


def test_an_echoed_prompt_has_the_log_probabilities_of_the_model(llm: LLM, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    scored = keyed(prompt=TEXT, echo_prompt=True, max_tokens=0, temperature=0.0)
    (completion,) = response(Answerer(llm).answer([scored], tmp_path), scored.identity)["completions"]
    ids = torch.tensor([llm.encode(TEXT)[0]])
    plain = llm.encode(TEXT, add_special_tokens=False)[0]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(llm.files.folder, dtype=torch.float32)(ids).logits
    expected = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert completion["text"] == TEXT == "".join(text for text, _ in completion["tokens"])
    assert len(completion["tokens"]) == len(plain)  # as many as HELM counts
    assert [logprob for _, logprob in completion["tokens"]][-len(expected) :] == pytest.approx(expected, abs=1e-4)


def test_an_answer_is_what_generate_answers(llm: LLM, tmp_path: Path) -> None:
    from flexgen import SamplingParams

    wanted = keyed(prompt=TEXT, temperature=0.0, max_tokens=6)
    answer = response(Answerer(llm).answer([wanted], tmp_path), wanted.identity)
    (output,) = llm.generate([TEXT], SamplingParams(temperature=0.0, max_tokens=6, logprobs=0))
    assert answer["completions"][0]["text"] == output.outputs[0].text
    assert sum(logprob for _, logprob in answer["completions"][0]["tokens"]) == pytest.approx(
        output.outputs[0].cumulative_logprob, abs=1e-4
    )
    assert answer["batch_size"] == 1


def test_the_same_call_again_answers_nothing_again(llm: LLM, tmp_path: Path, asked: list[str]) -> None:
    wanted = [keyed(prompt=f"{TEXT} {number}", max_tokens=3) for number in range(4)]
    first = Answerer(llm).answer(wanted, tmp_path)
    runs: list[Progress] = []
    again = Answerer(llm).answer(wanted, tmp_path, on_progress=runs.append)
    assert runs == []  # the job was complete, so that the engine did not run
    assert {key: answer["completions"] for key, answer in again.items() if isinstance(answer, dict)} == {
        key: answer["completions"] for key, answer in first.items() if isinstance(answer, dict)
    }
    assert set(asked) == {each.identity for each in wanted}


def test_other_requests_in_the_same_folder_reuse_what_was_answered(llm: LLM, tmp_path: Path, asked: list[str]) -> None:
    few, more = ([keyed(prompt=f"{TEXT} {number}", max_tokens=3) for number in range(count)] for count in (2, 4))
    first = Answerer(llm).answer(few, tmp_path)
    asked.clear()
    second = Answerer(llm).answer(more, tmp_path)
    assert set(asked) == {each.identity for each in more[2:]}
    assert all(response(second, each.identity)["completions"] == response(first, each.identity)["completions"] for each in few)
    assert set(second) == {each.identity for each in more}


def test_equal_requests_are_answered_once(llm: LLM, tmp_path: Path, asked: list[str]) -> None:
    same = [keyed(prompt=TEXT, max_tokens=2), keyed(prompt=TEXT, max_tokens=2)]
    assert len(Answerer(llm).answer(same, tmp_path)) == len(asked) == 1


def test_samples_do_not_depend_on_the_requests_beside_them(llm: LLM, tmp_path: Path) -> None:
    one, others = keyed(prompt=TEXT, max_tokens=8, num_completions=2), [keyed(prompt=f"{number}", max_tokens=2) for number in range(3)]
    alone = response(Answerer(llm).answer([one], tmp_path / "alone"), one.identity)
    among = response(Answerer(llm).answer([*others, one], tmp_path / "among"), one.identity)
    assert [each["text"] for each in alone["completions"]] == [each["text"] for each in among["completions"]]
    assert len({each["text"] for each in alone["completions"]}) == 2


def test_a_request_that_cannot_be_served_is_an_error_and_the_others_are_answered(llm: LLM, tmp_path: Path) -> None:
    long, good, odd = keyed(prompt="word " * 600, max_tokens=2), keyed(prompt=TEXT, max_tokens=2), keyed(prompt="\ud800", max_tokens=2)
    answers = Answerer(llm).answer([long, good, odd], tmp_path)
    assert isinstance(failed := answers[long.identity], RequestError)
    assert failed.code == "context_length_exceeded"
    assert isinstance(answers[good.identity], dict)
    assert isinstance(answers[odd.identity], RequestError)
