"""Whole models in integer formats: the engine answers what transformers answers with the decoded weights, wherever weights live."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.formats.table import stated_format
from flexgen.plan.policy import Fractions
from tests.formats.encoded import with_quantization, write_model
from tests.formats.layouts import Stored, awq, gptq, packed
from tests.models.parity import Expected, answered, assert_equal, build, describe, expected, policy, requests_for, save
from tests.models.tiny_configs import tiny_config

IN_MEMORY = Fractions(host=1.0)
# Where weights live, with a device or without.
PLACES = {
    "disk": ("cpu", Fractions(disk=1.0)),
    "memory": ("cpu", IN_MEMORY),
    "encoded": ("cpu", Fractions(host=0.3, encoded=0.7)),
    "sim": ("sim", Fractions(device=0.4, host=0.3, disk=0.3)),
}
EVERYWHERE = ("llama-pack-quantized", "llama-gptq")  # the others stream, with a device and without


@dataclass(frozen=True)
class Case:
    """A model type, what its config states, and how the weights of linear layers are stored."""

    model_type: str
    quantization: dict[str, Any]
    store: Callable[[str, Tensor], Stored]
    head: bool = False


def scattered(name: str, weight: Tensor) -> Stored:
    """GPTQ with desc_act: the inputs of a group are scattered, in each matrix otherwise."""
    generator = torch.Generator().manual_seed(len(name))
    inputs = torch.randperm(weight.shape[1], generator=generator)
    return gptq(weight, 4, 32, order=(torch.arange(weight.shape[1]) // 32)[inputs], symmetric=False)


def compressed(**weights: Any) -> dict[str, Any]:
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    group = {"targets": ["Linear"], "weights": settings}
    ignored = ["lm_head", r"re:.*mlp\.gate$"]
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}, "ignore": ignored}


CASES = {
    "llama-pack-quantized": Case("llama", compressed(symmetric=False), lambda _, weight: packed(weight, symmetric=False)),
    "llama-gptq": Case(
        "llama", {"quant_method": "gptq", "bits": 3, "group_size": 32, "lm_head": True}, lambda _, weight: gptq(weight, 3), head=True
    ),
    "qwen3_moe-pack-quantized": Case("qwen3_moe", compressed(), lambda _, weight: packed(weight)),
    "qwen3_moe-gptq": Case("qwen3_moe", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, scattered),
    "qwen3_moe-awq": Case("qwen3_moe", {"quant_method": "awq", "bits": 4, "group_size": 32}, lambda _, weight: awq(weight)),
    "mixtral-awq": Case("mixtral", {"quant_method": "awq", "bits": 4, "group_size": 32}, lambda _, weight: awq(weight)),
    "gpt2-gptq": Case("gpt2", {"quant_method": "gptq", "bits": 4, "group_size": 32}, lambda _, weight: gptq(weight.t())),
    "llama-awq": Case("llama", {"quant_method": "awq", "bits": 4, "group_size": 32}, lambda _, weight: awq(weight)),
}


LINEAR = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight", "c_attn.weight", "c_fc.weight")


def write(case: Case, folder: Path) -> PreTrainedConfig:
    """Save a random model in the format, and with the numbers that its codes stand for; return the config that states the format."""

    def stored(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found = case.store(name, weight)
        numbers = found.numbers.t() if "c_" in name else found.numbers  # of a Conv1D, which tools quantize as a linear layer
        return {f"{name.removesuffix('weight')}{each}": part for each, part in found.tensors.items()}, numbers

    def of(name: str, weight: Tensor) -> bool:
        return weight.ndim == 2 and name.endswith(LINEAR if not case.head else (*LINEAR, "lm_head.weight"))

    config = tiny_config(case.model_type)
    save(build(config), folder / "plain")
    assert write_model(folder / "plain", folder / "encoded", folder / "dense", case.quantization, stored, of=of) >= 16
    return with_quantization(config, case.quantization)


def answers_of_decoded(folder: Path, config: PreTrainedConfig) -> Expected:
    """What transformers answers with the decoded weights."""
    plain = copy.deepcopy(config)
    del plain.__dict__["quantization_config"]
    reference: Any = AutoModelForCausalLM.from_pretrained(folder / "dense", config=plain, attn_implementation="eager", dtype=torch.float32)
    reference.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return expected(reference.eval(), requests_for(128))


SLOW = ("qwen3_moe-awq",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_answers_are_those_of_the_decoded_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(CASES[name], tmp_path)
    wanted = answers_of_decoded(tmp_path, config)
    for place in PLACES if name in EVERYWHERE else ("disk", "sim"):
        device, weights = PLACES[place]
        model = describe(tmp_path / "encoded", config)
        assert not all(unit.plain for unit in model.spec.units), place
        largest = max(max(layout.stored_bytes, layout.carried_bytes) for layout in model.layouts)
        kv = IN_MEMORY if device == "cpu" else Fractions(device=1.0)
        chosen = policy(device, weights=weights, kv=kv, ring_bytes=4 * largest + 8192)
        assert_equal(answered(model, chosen, requests_for(128), monkeypatch, tmp_path / place), wanted)


def test_experts_are_cut_although_a_matrix_is_read_as_a_whole(tmp_path: Path) -> None:
    """An expert of transposed words is a matrix of its own, so that a unit need not hold all experts."""
    config = write(CASES["qwen3_moe-gptq"], tmp_path)
    layouts = [layout for layout in describe(tmp_path / "encoded", config).layouts if "experts" in layout.name]
    experts = max(tensor.shape[0] for layout in layouts for tensor in layout.tensors)
    assert experts < config.num_experts


RANDOM = {
    "packed": compressed(symmetric=False),
    "packed-3": compressed(num_bits=3, symmetric=False),
    "int8": compressed(num_bits=8, strategy="channel", group_size=None) | {"format": "int-quantized"},
    "nvfp4": compressed(type="float", strategy="tensor_group", group_size=16) | {"format": "nvfp4-pack-quantized"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq-3": {"quant_method": "gptq", "bits": 3, "group_size": 32, "checkpoint_format": "gptq_v2", "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_weights_in_the_format_of_a_config(name: str, tmp_path: Path) -> None:
    """Complete, and of a common size once they are decoded."""
    config = with_quantization(tiny_config("llama"), RANDOM[name])
    assert write_random_checkpoint(config, tmp_path, torch.bfloat16) == Checkpoint(tmp_path).total_bytes
    number_format = stated_format(config)
    assert number_format is not None
    decoded = [each for each in Checkpoint(tmp_path).decoded(number_format, torch.float32).tensors.values() if each.encoding is not None]
    assert len(decoded) == 28
    for tensor in decoded:
        out = torch.empty(tensor.shape)
        ParameterSource(name="a", shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor)).read(out)
        assert out.std().item() == pytest.approx(0.02, rel=0.5)
        assert abs(out.mean().item()) < 0.01
