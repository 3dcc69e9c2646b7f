"""Stages do not change answers: models divided among two and three of them answer as one engine does, and as transformers does.

The stages are threads of this process (threads.py): plans, hidden states and tokens travel as they do between machines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen import LLM, SamplingParams, StageError, StructuredOutputsParams
from flexgen.distributed.boundaries import LinkBoundary
from flexgen.engine.choosing import Chooser
from flexgen.errors import CapacityError, OptionError
from flexgen.plan.workload import Workload
from flexgen.request import TokenRequest, TokenResult
from flexgen.session.stage_group import StageGroup
from tests.distributed.threads import Hub, stages_as_threads
from tests.models.parity import Expected, assert_same_tokens, build, expected, requests_for, save
from tests.models.tiny_configs import tiny_config

# Latents with experts, windows, sinks, soft caps, scaled heads, biases, learned positions, experts of two kinds.
FAMILIES = (
    "deepseek_v3", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "qwen2", "opt", "gpt2", "mixtral", "llama4_text", "granitemoe", "phi3",
)  # fmt: skip
PROMPTS = [
    "Once upon a time there was",
    "The old house stood on",
    "It was a dark night and the",
    "He said",
    "In the morning they went to the",
]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "planned": {},
    "all from disk, zigzag": {"weights": "disk=1", "kv": "disk=1", "schedule": "zigzag"},
    "divided": {"weights": "host=.4,disk=.6", "kv": "host=.5,disk=.5", "micro_batch_tokens": 7},
    "on a device": {"device": "sim", "weights": "device=.3,host=.3,disk=.4", "kv": "device=.4,host=.3,disk=.3"},
    "one at a time": {"max_num_seqs": 1, "schedule": "row"},
}


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Hub]]:
    with stages_as_threads(monkeypatch) as made:
        yield made


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Expected]]:
    @functools.cache
    def made(model_type: str) -> tuple[Path, Expected]:
        folder = tmp_path_factory.mktemp(model_type)
        model = build(tiny_config(model_type, tie_word_embeddings=model_type in ("gemma2", "cohere2")))
        save(model, folder)
        return folder, expected(model, requests_for(128))

    return made


def answered(llm: LLM, requests: list[TokenRequest]) -> dict[int, TokenResult]:
    lengths = tuple(len(each.prompt_token_ids) for each in requests)
    workload = Workload(prompt_lens=lengths, output_lens=tuple(each.max_tokens for each in requests))
    return {result.index: result for result in llm.stream(requests, workload)}


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(model_type: str, num_stages: int, family: Callable[[str], tuple[Path, Expected]], hubs: list[Hub]) -> None:
    folder, wanted = family(model_type)
    with LLM(folder, dtype="float32", stages=num_stages, skip_tokenizer_init=True) as llm:
        results = answered(llm, requests_for(128))
        report = llm.report()
    assert all(result.error is None for result in results.values())
    assert_same_tokens({index: result.token_ids for index, result in results.items()}, wanted)
    assert [each.num_layers for each in report.stages].count(0) == 0
    assert sum(each.num_layers for each in report.stages) == 4
    assert len(report.stages) == num_stages
    assert {each.passes for each in report.stages} == {report.num_passes}


@pytest.mark.parametrize("kv", ["host=1", "host=.5,disk=.5"])
def test_more_blocks_than_stages(kv: str, novels_qwen3: Path, tmp_path: Path, hubs: list[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a link is slow, as many blocks are in flight as keep the stages busy."""
    monkeypatch.setattr(StageGroup, "ping_seconds", lambda self: 0.3)
    params = [SamplingParams(temperature=0.8 * (each % 2), seed=each, max_tokens=4 + each) for each in range(10)]
    how: dict[str, Any] = {"dtype": "float32", "offload_dir": str(tmp_path), "kv": kv, "max_num_seqs": 1}
    with LLM(novels_qwen3, **how) as alone:
        wanted = alone.generate(2 * PROMPTS, params)
    with LLM(novels_qwen3, stages=2, **how) as llm:
        found = llm.generate(2 * PROMPTS, params)
        assert llm.report().policy["num_blocks"] > 2
    assert [output.outputs[0].token_ids for output in found] == [output.outputs[0].token_ids for output in wanted]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_placements_and_schedules(placement: str, num_stages: int, novels_qwen3: Path, tmp_path: Path, hubs: list[Hub]) -> None:
    how: dict[str, Any] = {"dtype": "float32", "offload_dir": str(tmp_path), **PLACEMENTS[placement]}
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=9),
        SamplingParams(temperature=1.1, repetition_penalty=1.3, frequency_penalty=0.4, seed=4, max_tokens=14),
        SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1, bad_words=["the"]),
        SamplingParams(temperature=0.7, seed=1, n=2, max_tokens=7, stop=["."]),
    ]
    with LLM(novels_qwen3, **how) as alone:
        wanted = alone.generate(PROMPTS, params)
    with LLM(novels_qwen3, stages=num_stages, **how) as llm:
        found = llm.generate(PROMPTS, params)
        again = llm.generate(PROMPTS[:2], params[:2])  # the stages stay open
    assert [[each.token_ids for each in output.outputs] for output in found] == [
        [each.token_ids for each in output.outputs] for output in wanted
    ]
    assert [[each.finish_reason for each in output.outputs] for output in found] == [
        [each.finish_reason for each in output.outputs] for output in wanted
    ]
    assert [output.outputs[0].token_ids for output in again] == [output.outputs[0].token_ids for output in wanted[:2]]
    for ours, theirs in (
        (found[0].outputs[0].logprobs, wanted[0].outputs[0].logprobs),
        (found[3].prompt_logprobs, wanted[3].prompt_logprobs),
    ):
        assert ours is not None
        assert theirs is not None
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert {token: each.logprob for token, each in one.items()} == pytest.approx(
                    {token: each.logprob for token, each in other.items()}, abs=1e-4
                )


def test_prefixes_preemptions_and_guides(novels_qwen3: Path, hubs: list[Hub]) -> None:
    head = "The captain looked at the sea for a long time, and then he said to the boy who stood beside him: "
    prompts = [head + each for each in ("sail", "we must", "do you", "never", "the wind", "look", "go")]
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    guided = SamplingParams(temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=["yes indeed", "no"]))
    params = [free if place % 3 else guided for place in range(len(prompts))]
    with LLM(novels_qwen3, dtype="float32") as alone:
        wanted = [each.outputs[0].text for each in alone.generate(prompts, params)]
    with LLM(novels_qwen3, dtype="float32", stages=2, max_num_seqs=2) as llm:
        assert [each.outputs[0].text for each in llm.generate(prompts, params)] == wanted
        report = llm.report()
    assert report.shared_prompt_tokens > 0
    assert set(wanted[::3]) <= {"yes indeed", "no"}


def test_choices_are_scored_on_the_last_stage(novels_opt: Path, hubs: list[Hub]) -> None:
    prompts, choices = PROMPTS[:3], [" house", " sea", " king"]
    with LLM(novels_opt, dtype="float32") as alone:
        wanted = alone.classify(prompts, choices)
    with LLM(novels_opt, dtype="float32", stages=2) as llm:
        found = llm.classify(prompts, choices)
    for one, other in zip(found, wanted, strict=True):
        assert one.outputs.probs == pytest.approx(other.outputs.probs, abs=1e-5)


def test_a_request_that_never_fits_is_refused_alone(novels_qwen3: Path, hubs: list[Hub]) -> None:
    with LLM(novels_qwen3, dtype="float32", stages=2) as llm:
        requests = [TokenRequest(index=index, prompt_token_ids=(5, 6, 7), max_tokens=4) for index in range(3)]
        requests.append(TokenRequest(index=3, prompt_token_ids=(5,) * 20, max_tokens=10**6))
        results = {each.index: each for each in llm.stream(requests[:3], Workload(prompt_lens=(3, 3, 3), output_lens=(4, 4, 4)))}
        assert {len(each.token_ids) for each in results.values()} == {4}


def test_an_error_of_a_stage_ends_the_run_and_names_it(novels_qwen3: Path, hubs: list[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CapacityError("no memory for this")

    with LLM(novels_qwen3, dtype="float32", stages=2) as llm:
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=2))
        monkeypatch.setattr(Chooser, "start", fail)
        with pytest.raises(StageError, match=r"stage 1.*no memory for this"):
            llm.generate(PROMPTS, SamplingParams(max_tokens=4))


def test_an_error_of_the_leader_leaves_stages_that_serve_again(
    novels_qwen3: Path, hubs: list[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass that was on its way is given up on the other stages."""
    params = SamplingParams(temperature=0, max_tokens=6)
    put = LinkBoundary.put

    def fail(*_: object) -> None:
        raise OptionError("stop here")

    with LLM(novels_qwen3, dtype="float32", stages=2) as llm:
        wanted = [each.outputs[0].text for each in llm.generate(PROMPTS, params)]
        monkeypatch.setattr(LinkBoundary, "put", fail)
        with pytest.raises(OptionError, match="stop here"):
            llm.generate(PROMPTS, params)
        monkeypatch.setattr(LinkBoundary, "put", put)
        assert [each.outputs[0].text for each in llm.generate(PROMPTS, params)] == wanted


def test_a_trace_shows_all_stages(novels_qwen3: Path, hubs: list[Hub], tmp_path: Path) -> None:
    import json

    trace = tmp_path / "trace.json"
    with LLM(novels_qwen3, dtype="float32", stages=3, trace=str(trace)) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=3))
    events = json.loads(trace.read_text())["traceEvents"]
    units = {(each["pid"], each["name"]) for each in events if each.get("ph") == "X" and each["name"].startswith("unit ")}
    assert {pid for pid, _ in units} == {1, 2, 3}
    names = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    assert names == {1: "stage 0 on host0", 2: "stage 1 on host1", 3: "stage 2 on host2"}
    assert list(tmp_path.iterdir()) == [trace]


def test_more_stages_than_layers_are_refused(novels_qwen3: Path, hubs: list[Hub]) -> None:
    with LLM(novels_qwen3, dtype="float32", stages=9) as llm, pytest.raises(OptionError, match="at most 6 stages, not into 9"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=3))
