"""GPTQ and AWQ from files to numbers, against layouts that are written out in layouts.py; what a config alone says; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.repository import RepositoryTensors
from flexgen.checkpoint.sources import ParameterSource
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.table import stated_format
from flexgen.models.describe import describe_config, describe_headers
from tests.formats.from_config import encoded, stated
from tests.formats.layouts import Stored, awq, gptq
from tests.models.tiny_configs import tiny_config

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


def weights(outputs: int = 64, inputs: int = 96) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def order_of(inputs: int, group: int) -> Tensor:
    return (torch.arange(inputs) // group)[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]


def read(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of the only matrix, `a.weight`."""
    save_file({f"a.{name}": x for name, x in tensors.items()} | {"norm": torch.ones(3)}, folder / "model.safetensors")
    headers = Checkpoint(folder).decoded(stated(quantization), dtype)
    assert headers.tensors.keys() == {"a.weight", "norm"}
    tensor = headers.tensors["a.weight"]
    out = torch.empty(tensor.shape, dtype=dtype)
    ParameterSource(name="a", shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor)).read(out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(version: int, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = gptq(weights(), bits, version=version, symmetric=False)
    layout = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ | {"bits": bits} | layout, dtype), stored.numbers.to(dtype))


def test_symmetric_gptq_has_sevens_for_zeros(tmp_path: Path) -> None:
    stored = gptq(weights())
    assert set(stored.tensors["qzeros"].view(-1).tolist()) == {0x77777777}
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ), stored.numbers)


def test_a_zero_point_of_the_largest_code_is_zero(tmp_path: Path) -> None:
    """Minus one was stored as 15, which one is added to again: AutoGPTQ keeps the last four bits."""
    stored = gptq(weights())
    stored.tensors["qzeros"] = torch.full_like(stored.tensors["qzeros"], -1)
    scales = stored.tensors["scales"].float().t()[:, torch.arange(96) // 32]
    codes = (stored.numbers / scales).round() + 8
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ), codes * scales)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_with_inputs_in_any_order(bits: int, tmp_path: Path) -> None:
    stored = gptq(weights(), bits, order=order_of(96, 32), symmetric=False)
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ | {"bits": bits, "desc_act": True}), stored.numbers)


def test_order_is_not_used_where_the_config_does_not_ask_for_it(tmp_path: Path) -> None:
    """Some tools leave only zeros in it, with and without desc_act."""
    stored = gptq(weights())
    stored.tensors["g_idx"].zero_()
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ), stored.numbers)
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ | {"desc_act": True}), stored.numbers)
    del stored.tensors["g_idx"]
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ), stored.numbers)
    with pytest.raises(CheckpointError, match=r"a\.g_idx is missing, which desc_act"):
        read(tmp_path, stored.tensors, GPTQ | {"desc_act": True})


@pytest.mark.parametrize(("group", "stated_group"), [(96, -1), (64, 64), (48, 48)])
def test_gptq_with_other_groups(group: int, stated_group: int, tmp_path: Path) -> None:
    """One group for all inputs, and a last group that is smaller."""
    stored = gptq(weights(), group=group)
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ | {"group_size": stated_group}), stored.numbers)


def test_modules_with_their_own_bits(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` and auto-round's `extra_config`: the tensors tell."""
    stored = gptq(weights(), 8, group=96)
    assert torch.equal(read(tmp_path, stored.tensors, GPTQ), stored.numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 96])
def test_awq(group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = awq(weights(), group)
    settings = AWQ | {"group_size": group if group < 96 else -1}
    assert torch.equal(read(tmp_path, stored.tensors, settings, dtype), stored.numbers.to(dtype))


def test_awq_in_the_words_of_its_own_file(tmp_path: Path) -> None:
    stored = awq(weights())
    assert torch.equal(
        read(tmp_path, stored.tensors, {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}), stored.numbers
    )


def test_awq_without_zero_points(tmp_path: Path) -> None:
    stored = awq(weights())
    del stored.tensors["qzeros"]
    read(tmp_path, stored.tensors, AWQ | {"zero_point": False})
    with pytest.raises(CheckpointError, match="a needs matrices qweight, qzeros and scales"):
        read(tmp_path, stored.tensors, AWQ)


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        ("auto_round:auto_gptq", gptq(weights(), symmetric=False)),
        ("auto_round:gptqmodel", gptq(weights(), symmetric=False, version=2)),
        ("auto_round:auto_awq", awq(weights())),
    ],
    ids=["gptq", "gptq_v2", "awq"],
)
def test_auto_round(layout: str, stored: Stored, tmp_path: Path) -> None:
    assert torch.equal(read(tmp_path, stored.tensors, ROUND | {"packing_format": layout}), stored.numbers)


CONFIGS = {
    "gptq": GPTQ,
    "gptq-3": GPTQ | {"bits": 3, "group_size": -1},
    "gptq-dynamic": GPTQ | {"dynamic": {"-:.*k_proj": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": 16}}},
    "gptq-head": GPTQ | {"lm_head": True, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]},
    "awq": AWQ | {"modules_to_not_convert": ["v_proj"]},
    "auto-round": ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 16}}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_what_is_encoded_is_found_again(model_type: str, name: str) -> None:
    headers, plain = encoded(CONFIGS[name], model_type)
    decoded = headers.decoded(stated(CONFIGS[name]), torch.bfloat16)
    assert {key: tensor.shape for key, tensor in decoded.tensors.items()} == {tensor.name: tensor.shape for tensor in plain}
    assert headers.total_bytes < decoded.total_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_alone_is_planned_for_like_its_headers(name: str) -> None:
    config = tiny_config("llama")
    config.quantization_config = CONFIGS[name]
    spec = describe_config(config, torch.bfloat16, stored=torch.bfloat16, name="x")
    assert spec == describe_headers(encoded(CONFIGS[name], "llama")[0], config, torch.bfloat16, name="x")
    assert spec.number_format == stated(CONFIGS[name]).name


def test_a_config_of_gpt2_is_planned_for_like_its_files() -> None:
    """Whose linear layers are stored transposed, and quantized as others are."""
    config = tiny_config("gpt2")
    config.quantization_config = GPTQ
    tensors = RepositoryTensors.of(config, torch.bfloat16).tensors
    (words,) = (tensor.shape for tensor in tensors if tensor.name == "transformer.h.0.attn.c_attn.qweight")
    assert words == (config.n_embd // 8, 3 * config.n_embd)
    assert describe_config(config, torch.bfloat16, stored=torch.bfloat16, name="x").number_format == "gptq"


def test_what_a_config_names_is_encoded_or_not() -> None:
    def stored(name: str) -> set[str]:
        return {tensor for tensor in encoded(CONFIGS[name], "llama")[0].tensors if ".qweight" in tensor}

    in_layers = {f"model.layers.{layer}" for layer in range(4)}
    assert stored("gptq") == {
        f"{layer}.{module}.qweight"
        for layer in in_layers
        for module in (*(f"self_attn.{each}_proj" for each in "qkvo"), *(f"mlp.{each}_proj" for each in ("gate", "up", "down")))
    }
    assert stored("gptq") - stored("gptq-dynamic") == {f"{layer}.self_attn.k_proj.qweight" for layer in in_layers}
    assert stored("gptq-head") == {"lm_head.qweight"} | {
        f"{layer}.{each}.qweight" for layer in in_layers for each in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert stored("gptq") - stored("awq") == {f"{layer}.self_attn.v_proj.qweight" for layer in in_layers}
    assert stored("gptq") - stored("auto-round") == {"model.layers.0.mlp.up_proj.qweight"}
    routers = [tensor for tensor in encoded(CONFIGS["gptq"], "qwen3_moe")[0].tensors if "mlp.gate." in tensor]
    assert routers
    assert all(tensor.endswith(".weight") for tensor in routers)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq.*layout marlin"),
        (GPTQ | {"is_marlin_format": True}, "gptq.*layout marlin"),
        (GPTQ | {"format": "gptq_p"}, "layout gptq_p"),
        (GPTQ | {"bits": 5}, "5 bits"),
        (GPTQ | {"pack_dtype": "int16"}, "packed in int16"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "not a regular expression"),
        (AWQ | {"version": "gemv"}, "awq.*version gemv"),
        (AWQ | {"bits": 8}, "awq.*8 bits"),
        (AWQ | {"backend": "llm-awq"}, "version llm-awq"),
        (GPTQ | {"bits": 4.0}, r"config\.json: quantization_config\.bits must be a whole number, not 4\.0"),
        (GPTQ | {"dynamic": {"+:a": {"bits": "x"}}}, r"quantization_config\.dynamic\.\+:a\.bits must be a whole number, not the text 'x'"),
        (ROUND | {"packing_format": "auto_round:auto_gptq", "data_type": "mx_fp"}, "numbers of type mx_fp"),
        (ROUND | {"packing_format": "auto_round:llm_compressor"}, "auto-round"),
    ],
)
def test_refused_by_name(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        stated_format({"quantization_config": quantization})


@pytest.mark.parametrize(
    ("quantization", "change", "message"),
    [
        (GPTQ, {"scales": None}, "a needs matrices"),
        (GPTQ, {"qzeros": torch.zeros(3, 7, dtype=torch.int32)}, "do not make a matrix"),
        (GPTQ, {"qzeros": torch.zeros(3, 8, dtype=torch.int64)}, "do not make a matrix"),
        (GPTQ, {"g_idx": torch.zeros(95, dtype=torch.int32)}, "do not make a matrix"),
        (GPTQ, {"scales": torch.zeros(5, 64), "qzeros": torch.zeros(5, 8, dtype=torch.int32)}, "5 groups of 96 inputs"),
        (AWQ, {"scales": torch.zeros(2, 64)}, "do not make a matrix in groups of 32"),
    ],
)
def test_tensors_that_contradict_each_other(
    quantization: dict[str, Any], change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    stored = (gptq if quantization is GPTQ else awq)(weights())
    tensors = {name: x for name, x in (stored.tensors | change).items() if x is not None}
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, tensors, quantization)


def test_weights_that_are_not_as_the_config_says(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="gptq, but none"):
        Checkpoint(tmp_path).decoded(stated(GPTQ), torch.float32)
