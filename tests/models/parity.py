"""Random tiny models, what eager transformers answers with them, and what the engine answers.

Used by test_parity.py; knows the protocol: prompts that are ragged, chunked, and join late, teacher-forced by being equal.

What counts as equal does not depend on the processor.  The reference computes in float64, and each answer says how far rounding to
float32 may move its logits: as far as a disturbance of all parameters by some units of float32's roundoff moves them, times a safety
factor.  Over all model types, with AMX and with AVX2 only, float32 errors (eager transformers' as well as the engine's) are 0.05 to 0.36
of what that disturbance does.  Where the two likeliest tokens are closer to each other than that, either is right, and the
comparison of the answer ends.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.engine.sampling import Sampler
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest
from tests.models.tiny_configs import vary_constants

PROMPT_LENGTHS = (5, 9, 3, 23)
NUM_TOKENS = 12
UNIT_BYTES = 12_000
# In 5.23 eager generation with a cache feeds one token to an emptied cache where the frequencies change.
WITHOUT_CACHE = frozenset({"phi4_multimodal"})

DISTURBANCE = 16 * 2.0**-24  # of each parameter, relative, standard deviation
SAFETY = 4.0
MOST = 0.5  # of a model's tokens are decided, or the comparison would mean little


@dataclass(slots=True)
class Answers:
    """Per request index: the generated ids, and the logits (tokens, vocab) that they were chosen by."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Expected:
    """What a model answers in float64.

    Attributes:
        answers: the tokens and logits.
        tolerance: per request index, how far the logits of a float32 computation may be from these.
        num_decided: per request index, how many tokens are decided by more than that.
    """

    answers: Answers
    tolerance: dict[int, float]
    num_decided: dict[int, int]


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A random eager model."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32).eval()
    vary_constants(model)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """The files that its repository would have; some of the modules that transformers saves are its own."""
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def requests_for(vocab_size: int) -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(1)
    return [
        TokenRequest(
            index=index,
            prompt_token_ids=tuple(torch.randint(3, vocab_size - 8, (length,), generator=generator).tolist()),
            max_tokens=NUM_TOKENS,
        )
        for index, length in enumerate(PROMPT_LENGTHS)
    ]


def expected(model: PreTrainedModel, requests: list[TokenRequest]) -> Expected:
    """What eager `generate` answers in float64, and how far rounding may be from it."""
    exact, disturbed = generated(in_float64(model), requests), generated(in_float64(model, disturbance=DISTURBANCE), requests)
    wanted = Expected(exact, {}, {})
    for index, logits in exact.logits.items():
        num_alike = _num_alike(exact.tokens[index], disturbed.tokens[index])
        moved = (disturbed.logits[index] - logits)[: num_alike + 1].abs().max().item()  # the next row still follows the same tokens
        wanted.tolerance[index] = SAFETY * moved
        likeliest = logits.topk(2, dim=-1).values  # (tokens, 2)
        undecided = (likeliest[:, 0] - likeliest[:, 1] <= 2 * wanted.tolerance[index]).nonzero()
        wanted.num_decided[index] = int(undecided[0]) if len(undecided) else len(logits)
    return wanted


def _num_alike(one: list[int], other: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def in_float64(model: PreTrainedModel, *, disturbance: float = 0.0) -> PreTrainedModel:
    """A copy whose parameters are off by that much, relative to each; the grouped products of experts know no float64."""
    copied: Any = copy.deepcopy(model).double()
    copied.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(2)
    for parameter in copied.parameters():
        parameter.data *= 1 + disturbance * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return copied


@torch.no_grad()
def generated(model: PreTrainedModel, requests: list[TokenRequest]) -> Answers:
    """What eager `generate` answers, one request at a time."""
    answers = Answers()
    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids])
        # what earlier calls left in rotary modules must not matter
        alone: Any = copy.deepcopy(model)
        out = alone.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
            output_logits=True, return_dict_in_generate=True, use_cache=model.config.model_type not in WITHOUT_CACHE,
        )  # fmt: skip
        answers.tokens[request.index] = out.sequences[0, prompt.shape[1] :].tolist()
        answers.logits[request.index] = torch.stack([each[0] for each in out.logits])
    return answers


def policy(device: str = "cpu", *, weights: Fractions, kv: Fractions, ring_bytes: int, micro_batch_tokens: int = 12) -> Policy:
    return Policy(
        device=device, dtype="float32", weights=weights, kv=kv,
        kv_device_bytes=bool(kv.device) * 1_000_000, kv_host_bytes=bool(kv.host) * 1_000_000, kv_disk_bytes=bool(kv.disk) * 1_000_000,
        kv_staging_bytes=bool(kv.disk) * 200_000, kv_tail_bytes=bool(kv.disk) * 100_000, host_ring_bytes=ring_bytes,
        device_ring_bytes=ring_bytes if device == "sim" else 0, workspace_bytes=0, embedding_resident=False, schedule="diagonal",
        max_num_seqs=4, prefill_tokens=16, micro_batch_tokens=micro_batch_tokens, page_tokens=8, compute_threads=1, io_threads=1,
    )  # fmt: skip


def describe(folder: Path, config: PreTrainedConfig) -> AssembledModel:
    return assemble_model(folder, copy.deepcopy(config), torch.float32, unit_bytes=UNIT_BYTES)


def answered(
    model: AssembledModel, chosen: Policy, requests: list[TokenRequest], monkeypatch: pytest.MonkeyPatch, offload_dir: Path | None = None
) -> Answers:
    """What the engine answers."""
    answers = Answers()
    rows: dict[int, list[torch.Tensor]] = {request.index: [] for request in requests}
    original = Sampler.start

    def recording(sampler: Sampler, logits: torch.Tensor, sampled: list[TokenRequest], generated: list[list[int]]) -> object:
        for row, request in zip(logits, sampled, strict=True):
            rows[request.index].append(row.to("cpu", copy=True))
        return original(sampler, logits, sampled, generated)

    monkeypatch.setattr(Sampler, "start", recording)
    backend = SimulatedDevice(32_000_000) if chosen.device == "sim" else None
    with Engine(model, chosen, backend=backend, offload_dir=offload_dir, poison=True) as engine:
        for result in engine.generate(requests):
            assert result.error is None, result.error
            answers.tokens[result.index] = list(result.token_ids)
    answers.logits = {index: torch.stack(each) for index, each in rows.items()}
    return answers


def assert_equal(got: Answers, wanted: Expected) -> None:
    """The same tokens as far as they are decided, and the logits that they were chosen by."""
    assert_same_tokens(got.tokens, wanted)
    for index, logits in wanted.answers.logits.items():
        rows = slice(0, wanted.num_decided[index] + 1)  # the undecided row, too, follows the same tokens
        torch.testing.assert_close(got.logits[index][rows], logits[rows], rtol=0, atol=wanted.tolerance[index])


def assert_same_tokens(got: Mapping[int, Sequence[int]], wanted: Expected) -> None:
    """The same tokens as far as they are decided, and as many."""
    tokens = wanted.answers.tokens
    assert {index: len(ids) for index, ids in got.items()} == {index: len(ids) for index, ids in tokens.items()}
    for index, decided in wanted.num_decided.items():
        assert list(got[index][:decided]) == tokens[index][:decided]
    assert sum(wanted.num_decided.values()) >= MOST * sum(map(len, tokens.values())), "a reference that decides little"
