"""Experts by which a device multiplies as they are stored: where a unit's bytes hold them, and whole models that compute with them.

The simulated device has no kernels for that; operations of torch stand in for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from flexgen.checkpoint.sources import read_bytes
from flexgen.kernels import experts as chosen_kernels
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.policy import Fractions
from flexgen.weights.encoded import EncodedNumbers
from flexgen.weights.unit import UnitForm, UnitLayout
from tests.formats.encoded import Stored, Write, fp4_experts, fp8, mxfp4, nvfp4, with_quantization, write_model
from tests.formats.layouts import Stored as StoredMatrix
from tests.formats.layouts import gptq, packed
from tests.formats.test_floats_run import FP8, MODELOPT, experts_only
from tests.formats.test_integer_models import compressed
from tests.kernels.plain_grouped import PlainGroupedKernels, numbers_of
from tests.models.parity import answered, assert_equal, build, expected, policy, requests_for, save
from tests.models.tiny_configs import tiny_config


@dataclass(frozen=True)
class Case:
    """A model type, what its config states, and how experts are stored."""

    model_type: str
    quantization: dict[str, Any]
    write: Write
    of: Callable[[str, Tensor], bool] = lambda name, tensor: ".experts." in name and name.endswith(".weight")


def integers(store: Callable[[Tensor], StoredMatrix]) -> Write:
    def write(name: str, tensor: Tensor) -> tuple[Stored, Tensor]:
        found = store(tensor)
        return {f"{name.removesuffix('weight')}{each}": part for each, part in found.tensors.items()}, found.numbers

    return write


def mxfp4_rows(name: str, tensor: Tensor) -> tuple[Stored, Tensor]:
    """MXFP4 of compressed-tensors: as DeepSeek's experts, with other names and scales in plain bytes."""
    stored, dense = fp4_experts(name, tensor)
    codes, scales = stored.values()
    return {f"{name}_packed": codes.view(torch.uint8), f"{name}_scale": scales.view(torch.uint8)}, dense


MULTIPLIED = {
    "gpt_oss in MXFP4": Case("gpt_oss", {"quant_method": "mxfp4"}, mxfp4, experts_only),
    "qwen3_moe in int4": Case("qwen3_moe", compressed(), integers(packed)),
    "mixtral in int4 with zeros": Case("mixtral", compressed(symmetric=False), integers(lambda weight: packed(weight, symmetric=False))),
    "qwen3_moe in MXFP4": Case("qwen3_moe", compressed(type="float") | {"format": "mxfp4-pack-quantized"}, mxfp4_rows),
    "mixtral in FP4": Case("mixtral", FP8 | {"expert_dtype": "fp4"}, fp4_experts),
}
OTHERS = {
    "codes of 8 bits": Case("qwen3_moe", compressed(num_bits=8), integers(lambda weight: packed(weight, 8))),
    "words along the outputs": Case("qwen3_moe", {"quant_method": "gptq", "bits": 4, "group_size": 32}, integers(gptq)),
    "small floats": Case("mixtral", FP8, fp8((16, 32))),
    "a factor": Case("qwen3_moe", MODELOPT, nvfp4),
}
REQUESTS = requests_for(128)


def write(case: Case, folder: Path) -> PreTrainedConfig:
    """Save a random model with its experts in the format, and with the numbers that codes stand for; return the stating config."""
    config = tiny_config(case.model_type)
    save(build(config), folder / "plain")
    assert write_model(folder / "plain", folder / "encoded", folder / "dense", case.quantization, case.write, of=case.of) >= 6
    return with_quantization(config, case.quantization)


def described(folder: Path, config: PreTrainedConfig, unit_bytes: int) -> AssembledModel:
    return assemble_model(folder, copy.deepcopy(config), torch.float32, unit_bytes=unit_bytes)


def carried(layout: UnitLayout) -> Tensor:
    """The bytes of a unit whose tensors all cross as stored; those between are of no use."""
    data = torch.full((layout.carried_bytes,), 0x5A, dtype=torch.uint8)
    for tensor in layout.tensors:
        for each, position in zip(tensor.source.ranges, tensor.carried_at, strict=True):
            data[position : position + each.nbytes] = read_bytes(each.path, each.offset, each.nbytes)
    return data


def of_experts(model: AssembledModel) -> Iterator[UnitLayout]:
    """The units with experts, without all but their matrices."""
    for layout in model.layouts:
        matrices = [each for each in layout.tensors if each.module.endswith("experts") and not each.parameter.endswith("_bias")]
        if matrices:
            yield UnitLayout.of(layout.index, layout.name, matrices)


@pytest.mark.parametrize("unit_bytes", [60_000, 10_000_000])
@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_units_bytes_hold_the_matrices_at_equal_distances(name: str, unit_bytes: int, tmp_path: Path) -> None:
    config = write(MULTIPLIED[name], tmp_path)
    found = 0
    for layout in of_experts(described(tmp_path / "encoded", config, unit_bytes)):
        data = carried(layout)
        for tensor in layout.tensors:
            places = tensor.source.encoded_places(tensor.carried_at)
            assert places is not None
            wanted = tensor.numbers(data, UnitForm.CARRIED, lambda each: each.view(torch.empty(each.nbytes, dtype=torch.uint8), 0))
            encoded = places.within(data, torch.float32)
            assert encoded.shape == (wanted if tensor.source.columns_first else wanted.mT).shape
            assert torch.equal(numbers_of(encoded), wanted if tensor.source.columns_first else wanted.mT)
            found += 1
    assert found >= 6


def test_pieces_at_other_distances_are_decoded(tmp_path: Path) -> None:
    config = write(MULTIPLIED["qwen3_moe in int4"], tmp_path)
    layout = next(of_experts(described(tmp_path / "encoded", config, 10**7)))
    tensor = next(each for each in layout.tensors if "gate" in each.parameter)
    assert tensor.source.encoded_places(tensor.carried_at) is not None
    moved = [position + 256 * (number >= 5) for number, position in enumerate(tensor.carried_at)]
    assert tensor.source.encoded_places(moved) is None
    assert tensor.source.encoded_places(tensor.carried_at[::-1]) is None
    assert tensor.source.encoded_places([position + 1 for position in tensor.carried_at]) is None, "scales are no longer aligned"


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_decoded(name: str, tmp_path: Path) -> None:
    config = write(OTHERS[name], tmp_path)
    tensors = [tensor for layout in of_experts(described(tmp_path / "encoded", config, 60_000)) for tensor in layout.tensors]
    assert tensors
    assert all(tensor.source.encoded_places(tensor.carried_at) is None for tensor in tensors)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainGroupedKernels]:
    """Stands in on the simulated device; next tokens meet matrices as they are stored, prompts of three tokens and more decoded ones."""
    found = PlainGroupedKernels(encoded_rows=1)
    monkeypatch.setitem(chosen_kernels.KERNELS, "sim", lambda device: found)
    chosen_kernels.grouped_kernels.cache_clear()
    yield found
    chosen_kernels.grouped_kernels.cache_clear()


@pytest.mark.parametrize(("name", "unit_bytes"), [*((name, 60_000) for name in MULTIPLIED), ("qwen3_moe in int4", 10_000_000)])
def test_answers_are_those_of_the_decoded_weights(
    name: str, unit_bytes: int, kernels: PlainGroupedKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights stream from disk and from host memory; a unit is decoded once in a pass with prompts, and in no other."""
    config = write(MULTIPLIED[name], tmp_path)
    plain = copy.deepcopy(config)
    del plain.__dict__["quantization_config"]
    reference: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", config=plain, attn_implementation="eager", dtype=torch.float32
    )
    reference.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    wanted = expected(reference.eval(), REQUESTS)
    model = described(tmp_path / "encoded", config, unit_bytes)
    ring = 2 * max(max(layout.stored_bytes, layout.carried_bytes) for layout in model.layouts)
    chosen = policy("sim", weights=Fractions(host=0.5, disk=0.5), kv=Fractions(device=1.0), ring_bytes=ring)
    assert_equal(answered(model, chosen, REQUESTS, monkeypatch, tmp_path), wanted)
    assert kernels.num_encoded > kernels.num_decoded > 0


@pytest.mark.parametrize("name", ["gpt_oss in MXFP4", "mixtral in int4 with zeros"])
def test_where_all_products_read_codes_nothing_is_decoded(
    name: str, kernels: PlainGroupedKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(MULTIPLIED[name], tmp_path)
    model = described(tmp_path / "encoded", config, 60_000)
    ring = 2 * max(max(layout.stored_bytes, layout.carried_bytes) for layout in model.layouts)
    chosen = policy("sim", weights=Fractions(disk=1.0), kv=Fractions(device=1.0), ring_bytes=ring)
    wanted = answered(model, chosen, REQUESTS, monkeypatch, tmp_path)

    def decoded(numbers: EncodedNumbers) -> Tensor:
        raise AssertionError("experts were decoded")

    monkeypatch.setattr(EncodedNumbers, "decoded", decoded)
    monkeypatch.setattr(kernels, "reads_encoded", lambda mean_rows: True)
    got = answered(described(tmp_path / "encoded", config, 60_000), chosen, REQUESTS, monkeypatch, tmp_path)
    assert got.tokens == wanted.tokens
    for index, logits in wanted.logits.items():
        torch.testing.assert_close(got.logits[index], logits, rtol=1e-4, atol=1e-4)
