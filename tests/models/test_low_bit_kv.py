"""Low-bit KV in whole models: the same request has the same tokens at every home, however prompts are cut, shared and resumed.

Everything is computed in float64: rounding in float32 now and then lands on the other side of the border between two codes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.engine.sampling import Sampler
from flexgen.kv.low_bit import kv_format
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import Generated, TokenRequest
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from tests.models.parity import Answers, build, policy, save
from tests.models.tiny_configs import tiny_config

PAGE = 8
RING_BYTES = 4 << 20
# Multi-head, grouped, one key head, windows and caps, windows and sinks, latents, layers that share keys.
MODELS = ("opt", "llama", "gpt_bigcode", "gemma2", "gpt_oss", "deepseek_v3", "gemma3n_text")
FORMATS = ("int8", "k8v4", "int4")
OVERRIDES: dict[str, dict[str, object]] = {"deepseek_v3": {"first_k_dense_replace": 4}}  # its router computes in float32


def placed(device: str, micro_batch_tokens: int = 12, **changed: Any) -> Policy:
    kv = changed.pop("kv")
    found = policy(device, weights=Fractions(host=1), kv=Fractions(**kv), ring_bytes=RING_BYTES, micro_batch_tokens=micro_batch_tokens)
    return dataclasses.replace(found, dtype="float64", max_num_seqs=6, **changed)


WHOLE = placed("cpu", 4096, kv={"host": 1.0}, prefill_tokens=4096)
POLICIES = {
    "small chunks": placed("cpu", 5, kv={"host": 1.0}),
    "one at a time": placed("cpu", kv={"host": 1.0}, schedule="row"),
    "disk": placed("cpu", kv={"disk": 1.0}),
    "disk without tails in memory": placed("cpu", kv={"disk": 1.0}, kv_tail_bytes=0),
    "device": placed("sim", 7, kv={"device": 1.0}),
    "host beside a device": placed("sim", 7, kv={"host": 1.0}),
    "host, attended to on the device": placed("sim", 7, kv={"host": 1.0}, host_attention=False, kv_ring_bytes=1 << 18),
    "everywhere": placed("sim", kv={"device": 0.3, "host": 0.3, "disk": 0.4}),
}


@dataclass(frozen=True)
class Case:
    """A model with KV in a format, and what it answers where nothing is cut, moved or shared."""

    model: AssembledModel
    requests: list[TokenRequest]
    answers: Answers


def config_of(name: str) -> PreTrainedConfig:
    return tiny_config(name, **OVERRIDES.get(name, {}))


def tokens(length: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size - 8, (length,), generator=generator).tolist())


def asked(vocab_size: int) -> list[TokenRequest]:
    """Prompts of less than a page, of whole pages and of more, three of which begin with the same pages."""
    shared = tokens(2 * PAGE + 3, 1, vocab_size)
    prompts = [tokens(length, 10 + length, vocab_size) for length in (3, PAGE, PAGE + 1, 4 * PAGE + 5)]
    prompts += [(*shared, *tokens(length, 20 + length, vocab_size)) for length in (1, 6, 13)]
    return [TokenRequest(index=index, prompt_token_ids=prompt, max_tokens=PAGE + 4) for index, prompt in enumerate(prompts)]


def answered(
    model: AssembledModel, chosen: Policy, requests: list[TokenRequest], folder: Path, prefixes: CommonPrefixes = NO_PREFIXES
) -> Answers:
    """What the engine answers, and the logits that it chose by."""
    answers, rows, original = Answers(), {each.index: [] for each in requests}, Sampler.start

    def recording(sampler: Sampler, logits: torch.Tensor, sampled: list[TokenRequest], generated: list[list[int]]) -> object:
        for row, request in zip(logits, sampled, strict=True):
            rows[request.index].append(row.to("cpu", copy=True))
        return original(sampler, logits, sampled, generated)

    backend = SimulatedDevice(64_000_000) if chosen.device == "sim" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "start", recording)
        with Engine(model, chosen, backend=backend, offload_dir=folder, poison=True) as engine:
            for result in engine.generate(requests, prefixes=prefixes):
                assert result.error is None, result.error
                answers.tokens[result.index] = list(result.token_ids)
            assert all(used == 0 for used in engine.cache.used_bytes.values())
    answers.logits = {index: torch.stack(each) for index, each in rows.items()}
    return answers


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param)
    save(build(config_of(request.param)), path)
    return request.param, path


def assembled(name: str, path: Path, kv: str) -> AssembledModel:
    return assemble_model(path, config_of(name), torch.float64, kv_format=kv_format(kv, torch.float64))


@pytest.fixture(scope="module")
def case(folder: tuple[str, Path]) -> Case:
    model = assembled(*folder, "int4")
    requests = asked(model.spec.vocab_size)
    return Case(model, requests, answered(model, WHOLE, requests, folder[1]))


def assert_same(got: Answers, wanted: Answers) -> None:
    assert got.tokens == wanted.tokens
    for index, logits in wanted.logits.items():
        torch.testing.assert_close(got.logits[index], logits, rtol=0, atol=1e-9)


@pytest.mark.matrix(6, always=["gpt_oss-small chunks", "gemma3n_text-disk", "llama-everywhere"])
@pytest.mark.parametrize("place", POLICIES)
def test_placement_does_not_change_answers(case: Case, folder: tuple[str, Path], place: str) -> None:
    model = assembled(*folder, "int4")
    assert_same(answered(model, POLICIES[place], case.requests, folder[1]), case.answers)


@pytest.mark.matrix(2)
def test_shared_prefixes_do_not_change_answers(case: Case, folder: tuple[str, Path]) -> None:
    census = PrefixCensus(PAGE)
    for each in case.requests:
        census.add(each.prompt_token_ids)
    model = assembled(*folder, "int4")
    for chosen in (POLICIES["small chunks"], POLICIES["everywhere"], POLICIES["host, attended to on the device"]):
        assert_same(answered(model, chosen, case.requests, folder[1], census.common()), case.answers)
        model = assembled(*folder, "int4")


@pytest.mark.matrix(2)
def test_resumed_answers_go_on_alike(case: Case, folder: tuple[str, Path]) -> None:
    """What was generated before is computed as a prompt is, in which it sees the same numbers."""
    before = 5
    requests = [
        dataclasses.replace(each, generated=Generated(token_ids=tuple(case.answers.tokens[each.index][:before]))) for each in case.requests
    ]
    got = answered(assembled(*folder, "int4"), POLICIES["small chunks"], requests, folder[1])
    assert got.tokens == case.answers.tokens
    for index, logits in case.answers.logits.items():
        torch.testing.assert_close(got.logits[index], logits[before:], rtol=0, atol=1e-9)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("kv", FORMATS)
def test_answers_are_near_those_with_exact_keys_and_values(folder: tuple[str, Path], kv: str) -> None:
    """And not equal to them from the second page on; the first page is exact."""
    plain, model = assembled(*folder, "auto"), assembled(*folder, kv)
    prompt = tokens(3 * PAGE, 1, model.spec.vocab_size)
    requests = [TokenRequest(index=length, prompt_token_ids=prompt[:length], max_tokens=1) for length in (PAGE, 3 * PAGE)]
    exact, rounded = (answered(each, WHOLE, requests, folder[1]).logits for each in (plain, model))
    torch.testing.assert_close(rounded[PAGE], exact[PAGE], rtol=0, atol=1e-9)
    off = (rounded[3 * PAGE] - exact[3 * PAGE]).std() / exact[3 * PAGE].std()  # 1.4 for logits that have nothing in common
    assert 0 < off < (0.1 if kv == "int8" else 0.8)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("length", [5, 43])
@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("kv", FORMATS)
def test_compiled_kernels_are_near_the_reference(folder: tuple[str, Path], kv: str, home: str, length: int) -> None:
    """Answers in float32, over several pages of next tokens; a number that falls to another code is lost in what is allowed."""
    name, path = folder
    request = TokenRequest(index=0, prompt_token_ids=tokens(length, 3, 100), max_tokens=3 * PAGE)
    exact = answered(assembled(name, path, kv), WHOLE, [request], path)
    model = assemble_model(path, config_of(name), torch.float32, kv_format=kv_format(kv, torch.float32))
    found = answered(model, dataclasses.replace(placed("cpu", 256, kv={home: 1}), dtype="float32"), [request], path)
    same = next((i for i, pair in enumerate(zip(exact.tokens[0], found.tokens[0], strict=True)) if pair[0] != pair[1]), 3 * PAGE)
    assert same >= PAGE
    off = (found.logits[0][:same] - exact.logits[0][:same]).std() / exact.logits[0].std()
    assert off < 0.02


@pytest.mark.matrix(2)
def test_the_plan_counts_the_bytes_that_are_stored(folder: tuple[str, Path]) -> None:
    model = assembled(*folder, "int4")
    with Engine(model, WHOLE) as engine:
        groups = engine.cache.groups
    number = len(model.spec.kv_groups)
    assert len(groups) == 2 * number
    for spec, group, tail in zip(model.spec.kv_groups, groups, groups[number:], strict=False):
        assert group.page_bytes == WHOLE.page_tokens * spec.num_layers * spec.bytes_per_token
        assert tail.page_bytes == WHOLE.page_tokens * spec.num_layers * spec.exact_bytes_per_token
