"""Models in formats of small floating-point numbers answer what the same models answer with the numbers that the codes stand for.

Weights stream in small units or stay in memory, and are decoded on the host or on a simulated device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from flexgen.engine import sweep
from flexgen.engine.sweep import MicroBatchForward
from flexgen.plan.policy import Fractions
from flexgen.weights.opened import OpenUnits
from flexgen.weights.store import WeightStore
from tests.formats.encoded import Stored, Write, bitsandbytes, fp8, is_linear, mxfp4, nvfp4, with_quantization, write_model
from tests.models.parity import Answers, answered, assert_equal, build, describe, expected, policy, requests_for, save
from tests.models.tiny_configs import tiny_config

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "kv_cache_scheme": {"type": "float", "num_bits": 8}}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

Chosen = Callable[[str, torch.Tensor], bool]


def experts_only(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def as_linear(write: Write) -> Write:
    """Of GPT-2, whose matrices are transposed before they are quantized."""

    def transposed(name: str, tensor: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        stored, dense = write(name, tensor.t().contiguous())
        return stored, dense.t()

    return transposed


# model type, changes of its config, stated format, writer, which tensors are in it
CASES: dict[str, tuple[str, dict[str, object], dict[str, Any], Write, Chosen]] = {
    "gpt_oss in MXFP4": ("gpt_oss", {}, {"quant_method": "mxfp4"}, mxfp4, experts_only),
    "deepseek_v3 in FP8": ("deepseek_v3", {}, FP8, fp8((16, 32)), is_linear),
    "llama in FP8 with one scale": ("llama", {}, FP8 | {"weight_block_size": None}, fp8(None), is_linear),
    "qwen3 in FP8, tied": ("qwen3", {"tie_word_embeddings": True}, FP8, fp8((16, 32), torch.float8_e8m0fnu), is_linear),
    "qwen3 in FP8, tied and embedded": (
        "qwen3",
        {"tie_word_embeddings": True},
        FP8,
        fp8((16, 32)),
        lambda name, tensor: is_linear(name, tensor) or "embed" in name,
    ),
    "mixtral in FP8": ("mixtral", {}, FP8, fp8((16, 32)), is_linear),
    "llama4_text in FP8, fused experts": ("llama4_text", {}, FP8, fp8((16, 32)), is_linear),
    "llama in NVFP4": ("llama", {}, MODELOPT, nvfp4, is_linear),
    "qwen3_moe in ModelOpt's FP8": ("qwen3_moe", {}, MODELOPT | {"quant_algo": "FP8"}, fp8(None, name="weight_scale"), is_linear),
    "gpt2 in NF4": ("gpt2", {}, BNB, as_linear(bitsandbytes("nf4")), lambda name, tensor: tensor.ndim == 2 and ".c_" in name),
    "llama in NF4": ("llama", {}, BNB, bitsandbytes("nf4", nested=True), is_linear),
}
PLACES = {
    "cpu": ("cpu", Fractions(host=0.2, encoded=0.3, disk=0.5), Fractions(host=1.0)),
    "sim": ("sim", Fractions(device=0.2, host=0.3, disk=0.5), Fractions(device=1.0)),
    "far apart": ("sim", Fractions(host=0.5, disk=0.5), Fractions(host=1.0)),
}
RING_UNITS = {"cpu": 2, "sim": 2, "far apart": 12}


def frontmost(active: Sequence[MicroBatchForward], weights: WeightStore) -> MicroBatchForward | None:
    """The runnable micro-batch at the highest unit, so that each goes as far ahead of the others as the ring allows."""
    return max((each for each in active if each.runnable(weights)), key=lambda each: each.unit, default=None)


def count_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets every unit whose numbers had made room when it was used again."""
    again, really = list[int](), OpenUnits.use

    def use(opened: OpenUnits, unit: int) -> None:
        again.extend(opened._undone & {unit})
        really(opened, unit)

    monkeypatch.setattr(OpenUnits, "use", use)
    return again


WITH_TRANSFORMERS = ("gpt_oss in MXFP4", "deepseek_v3 in FP8")


@pytest.mark.parametrize("case", CASES)
def test_same_answers_as_with_decoded_weights(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, changes, quantization, write, of = CASES[case]
    config = tiny_config(model_type, **changes)
    save(build(config), tmp_path / "plain")
    count = write_model(tmp_path / "plain", tmp_path / "encoded", tmp_path / "dense", quantization, write, of=of)
    assert count >= 8
    requests = requests_for(128)

    def run(folder: str, place: str) -> Answers:
        stated = with_quantization(config, quantization) if folder == "encoded" else config
        model = describe(tmp_path / folder, stated)
        encoded = sum(tensor.source.carried_as_stored for layout in model.layouts for tensor in layout.tensors)
        assert (encoded > 0) == (folder == "encoded")
        device, weights, kv = PLACES[place]
        if place == "far apart":
            monkeypatch.setattr(sweep, "_next_runnable", frontmost)
            monkeypatch.setattr(OpenUnits, "in_use", lambda opened, units: None)  # as if all others waited for attention
        ring = RING_UNITS[place] * max(max(layout.stored_bytes, layout.decoded_bytes) for layout in model.layouts)
        return answered(model, policy(device, weights=weights, kv=kv, ring_bytes=ring), requests, monkeypatch, tmp_path)

    dense = run("dense", "cpu")
    again = count_again(monkeypatch)
    for place in PLACES if case in WITH_TRANSFORMERS else list(PLACES)[list(CASES).index(case) % 2 :][:1]:
        got = run("encoded", place)
        assert bool(again) == (place == "far apart")
        assert got.tokens == dense.tokens
        for index, logits in dense.logits.items():
            torch.testing.assert_close(got.logits[index], logits, rtol=1e-4, atol=1e-4)
    if case in WITH_TRANSFORMERS:
        reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", config=copy.deepcopy(config), attn_implementation="eager")
        reference.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
        assert_equal(dense, expected(reference.float().eval(), requests))
