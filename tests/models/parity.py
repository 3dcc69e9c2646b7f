"""Random tiny models, what eager transformers answers with them, and what the engine answers.

Used by test_parity.py; knows the protocol: prompts that are ragged, chunked, and join late, teacher-forced by being equal.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine_of
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexgen.engine import engine as engine_module
from flexgen.engine.engine import Engine
from flexgen.memory.transfer import SimulatedDevice
from flexgen.models.loading import LoadedModel, load_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest
from tests.models.tiny_configs import vary_constants

PROMPT_LENGTHS = (5, 9, 3, 23)
NUM_TOKENS = 12
UNIT_BYTES = 12_000
# In 5.23 eager generation with a cache feeds one token to an emptied cache where the frequencies change.
WITHOUT_CACHE = frozenset({"phi4_multimodal"})

MACHINE = machine_of(dense={"float32": [(1, 1e11)]})


@dataclass(slots=True)
class Answers:
    """Per request index: the generated ids, and the logits (tokens, vocab) that they were chosen by."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


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


@torch.no_grad()
def expected(model: PreTrainedModel, requests: list[TokenRequest]) -> Answers:
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


def describe(folder: Path, config: PreTrainedConfig) -> LoadedModel:
    return load_model(folder, copy.deepcopy(config), torch.float32, unit_bytes=UNIT_BYTES)


def answered(
    model: LoadedModel, chosen: Policy, requests: list[TokenRequest], monkeypatch: pytest.MonkeyPatch, offload_dir: Path | None = None
) -> Answers:
    """What the engine answers."""
    answers = Answers()
    rows: dict[int, list[torch.Tensor]] = {request.index: [] for request in requests}
    original = engine_module.sample

    def recording(logits: torch.Tensor, sampled: list[TokenRequest], generated: list[list[int]]) -> object:
        for row, request in zip(logits, sampled, strict=True):
            rows[request.index].append(row.clone())
        return original(logits, sampled, generated)

    monkeypatch.setattr(engine_module, "sample", recording)
    backend = SimulatedDevice(32_000_000) if chosen.device == "sim" else None
    with Engine(model, chosen, MACHINE, backend=backend, offload_dir=offload_dir, poison=True) as engine:
        for result in engine.generate(requests):
            assert result.error is None, result.error
            answers.tokens[result.index] = list(result.token_ids)
    answers.logits = {index: torch.stack(each) for index, each in rows.items()}
    return answers


def assert_equal(got: Answers, wanted: Answers) -> None:
    assert got.tokens == wanted.tokens
    for index, logits in wanted.logits.items():
        torch.testing.assert_close(got.logits[index], logits, rtol=0, atol=1e-4 * logits.abs().max().item())
