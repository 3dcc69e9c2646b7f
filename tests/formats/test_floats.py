"""Published formats of small floating-point numbers: what is decoded is what transformers, or the format's definition, says, to the bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flexgen.checkpoint.files import Checkpoint, Headers
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource, read_bytes
from flexgen.devices.sim_tensor import register
from flexgen.errors import CheckpointError, ModelError, UnsupportedModelError
from flexgen.formats.base import NumberFormat
from flexgen.formats.table import stated_format
from flexgen.models.describe import describe_config, describe_headers
from tests.formats.encoded import NF4, Stored, Write, bitsandbytes, fp4_experts, fp8, mxfp4, nvfp4, write_model
from tests.models.parity import build, save
from tests.models.tiny_configs import tiny_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}

# format, stated config, writer, shape of the matrix
CASES: dict[str, tuple[dict[str, Any], Write, tuple[int, ...]]] = {
    "fp8 in whole blocks": (FP8, fp8((16, 32)), (64, 96)),
    "fp8 with blocks cut short": (FP8, fp8((16, 32)), (57, 75)),
    "fp8 of one block": (FP8, fp8((16, 32)), (3, 5)),
    "fp8 with scales in bfloat16": (FP8, fp8((16, 32), torch.bfloat16), (64, 96)),
    "fp8 with scales in E8M0": (FP8 | {"scale_fmt": "ue8m0"}, fp8((16, 32), torch.float8_e8m0fnu), (64, 96)),
    "fp8 of several matrices": (FP8, fp8((16, 32)), (5, 40, 70)),
    "fp8 with one scale": (FP8 | {"weight_block_size": None}, fp8(None), (20, 36)),
    "fp8 with other blocks than stated": (FP8, fp8((8, 24)), (64, 96)),
    "fp8 with static activations": (
        FP8 | {"activation_scheme": "static", "weight_block_size": None},
        fp8(None, beside={"activation_scale": torch.tensor(2.0)}),
        (20, 36),
    ),
    "fp8 by other names": (FP8, fp8((16, 32), name="qscale_weight"), (64, 96)),
    "fp8 of fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        fp8((1, 50), name="weight_scale", beside={"input_scale_ub": torch.tensor([1200.0])}),
        (24, 50),
    ),
    "fp8 of fbgemm, experts by columns": ({"quant_method": "fbgemm_fp8"}, fp8((24, 1), name="weight_scale"), (3, 24, 50)),
    "fp8 of vLLM's first tools": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8(None, name="weight_scale", beside={"input_scale": torch.tensor(0.5)}),
        (20, 36),
    ),
    "mxfp8": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, fp8((1, 32), torch.uint8), (24, 96)),
    "fp4 experts beside fp8": (FP8 | {"expert_dtype": "fp4"}, fp4_experts, (24, 96)),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4, (3, 96, 40)),
    "nvfp4": (MODELOPT, nvfp4, (24, 96)),
    "modelopt fp8": (MODELOPT | {"quant_algo": "FP8"}, fp8(None, name="weight_scale", beside={"input_scale": torch.tensor(1.0)}), (24, 50)),
    "modelopt mxfp8": (MODELOPT | {"quant_algo": "MXFP8"}, fp8((1, 32), torch.uint8, name="weight_scale"), (24, 96)),
    "modelopt fp8 in blocks": (MODELOPT | {"quant_algo": "fp8_pb_wo"}, fp8((128, 128), name="weight_scale"), (200, 130)),
    "nf4": (BNB, bitsandbytes("nf4"), (24, 128)),
    "fp4": (BNB, bitsandbytes("fp4"), (24, 128)),
    "nf4 with scales in 8 bits": (BNB, bitsandbytes("nf4", nested=True), (300, 128)),
    "nf4 in blocks across rows": (BNB, bitsandbytes("nf4", nested=True), (33, 50)),
    "nf4 of an odd number": (BNB, bitsandbytes("nf4"), (13, 15)),
    "nf4 in large blocks": (BNB, bitsandbytes("nf4", size=256), (6, 512)),
}  # fmt: skip


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def stored_as(
    folder: Path, quantization: dict[str, Any], stored: Stored, dtype: torch.dtype
) -> tuple[NumberFormat, dict[str, ParameterSource]]:
    """The format, and the sources of what its tensors stand for."""
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    found = stated_format({"quantization_config": quantization})
    assert found is not None
    decoded = Checkpoint(folder).decoded(found, dtype)
    assert decoded.number_format == found.name
    return found, {
        name: ParameterSource(name=name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        for name, tensor in decoded.tensors.items()
    }


def on(device: torch.device, source: ParameterSource, dtype: torch.dtype) -> Tensor:
    out = torch.empty(source.shape, dtype=dtype).to(device)
    source.assemble([read_bytes(each.path, each.offset, each.nbytes).view(each.dtype).to(device) for each in source.ranges], out)
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_decoded_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As a whole and row by row, on the host and on a device."""
    quantization, write, shape = CASES[case]
    name = "mlp.experts.gate_up_proj" if len(shape) == 3 else "a_proj.weight"
    stored, dense = write(name, numbers(shape))
    _, sources = stored_as(tmp_path, quantization, stored, dtype)
    assert sources.keys() == {name}, "all that was stored belongs to the matrix"
    wanted = dense.to(dtype)
    for device in (torch.device("cpu"), register()):
        assert torch.equal(on(device, sources[name], dtype), wanted)
        if not sources[name].sliceable:
            continue
        cuts = [0, 1, shape[0] // 3, shape[0] // 2 + 1, shape[0]]
        for start, stop in pairwise(cuts):
            assert torch.equal(on(device, sources[name].rows(start, stop), dtype), wanted[start:stop])


@pytest.mark.parametrize("case", ["nf4 in blocks across rows", "nf4 of an odd number"])
def test_blocks_across_rows_are_read_as_a_whole(case: str, tmp_path: Path) -> None:
    quantization, write, shape = CASES[case]
    _, sources = stored_as(tmp_path, quantization, write("a_proj.weight", numbers(shape))[0], torch.float32)
    assert not sources["a_proj.weight"].sliceable


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_every_exponent(dtype: torch.dtype, tmp_path: Path) -> None:
    """Overflow, underflow, NaN: as transformers computes them."""
    exponents = torch.arange(256, dtype=torch.uint8)
    bytes_of_codes = torch.arange(16, dtype=torch.uint8) * 17
    blocks = bytes_of_codes.expand(1, 256, 1, 16).contiguous()
    stored = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": exponents[None, :, None]}
    _, sources = stored_as(tmp_path, {"quant_method": "mxfp4"}, stored, dtype)
    public = convert_moe_packed_tensors(blocks, exponents[None, :, None], dtype=dtype)
    got = on(torch.device("cpu"), sources["experts.down_proj"], dtype)
    assert torch.equal(got[..., :255], public[..., :255])
    assert not got[..., 255].isfinite().any(), "255 is no exponent; transformers computes 2 ** 128 times the code"

    codes = exponents.view(torch.float8_e4m3fn).expand(256, 256).contiguous()
    powers = exponents.view(torch.float8_e8m0fnu)[:, None].contiguous()
    _, sources = stored_as(tmp_path, FP8, {"a.weight": codes, "a.weight_scale_inv": powers}, dtype)
    public = Fp8Dequantize(None)._dequantize_one(codes, powers, dtype)
    torch.testing.assert_close(on(torch.device("cpu"), sources["a.weight"], dtype), public, rtol=0, atol=0, equal_nan=True)


def test_rows_of_one_scale_are_read_without_the_others(tmp_path: Path) -> None:
    stored, _ = fp8((16, 32))("a.weight", numbers((64, 96)))
    _, sources = stored_as(tmp_path, FP8, stored, torch.float32)
    sizes = [[each.nbytes for each in sources["a.weight"].rows(*rows).ranges] for rows in ((0, 16), (10, 20), (63, 64))]
    assert sizes == [[16 * 96, 12], [10 * 96, 24], [96, 12]]


def mixed(*algorithms: str) -> dict[str, Any]:
    layers = {str(index): {"quant_algo": algorithm} for index, algorithm in enumerate(algorithms)}
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


REFUSED = {
    "another number": ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
    "another scheme": ({"quant_method": "fp8", "activation_scheme": "weird"}, "weird"),
    "blocks of three sizes": ({"quant_method": "fp8", "weight_block_size": [1, 2, 3]}, r"\[1, 2, 3\]"),
    "blocks without a size": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"\[0, 128\]"),
    "blocks in words": ({"quant_method": "mxfp8", "weight_block_size": "large"}, "large"),
    "int8 of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8"),
    "bitsandbytes without bits": ({"quant_method": "bitsandbytes"}, "LLM.int8"),
    "another algorithm": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ.*NVFP4"),
    "no algorithm": ({"quant_method": "modelopt"}, "quant_algo is missing; it must be one of NVFP4"),
    "an algorithm of a layer": (mixed("FP8", "INT4_AWQ"), "INT4_AWQ"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_variants_are_refused_by_name(case: str) -> None:
    quantization, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        stated_format({"quantization_config": quantization})


def test_what_is_stated_otherwise_is_understood() -> None:
    nested = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    for quantization, name in (
        ({"load_in_4bit": True}, "bitsandbytes_4bit"),
        ({"quant_method": "modelopt", "quantization": nested}, "modelopt"),
        (mixed("NVFP4", "FP8"), "modelopt"),
        ({"quant_method": "fp8"}, "fp8_block"),
    ):
        found = stated_format({"quantization_config": quantization})
        assert found is not None
        assert found.name == name


def broken(case: str) -> tuple[dict[str, Any], Stored, str]:
    """What is stored wrongly, and what the error says."""
    weight = "a_proj.weight"
    if case == "scales that fit no block":
        return (
            FP8,
            {weight: numbers((64, 96)).to(torch.float8_e4m3fn), f"{weight}_scale_inv": torch.ones(3, 3)},
            "a_proj.weight.*no scales of blocks",
        )
    if case == "scales of integers":
        return FP8, {weight: numbers((64, 96)).to(torch.float8_e4m3fn), f"{weight}_scale_inv": torch.ones(4, 3, dtype=torch.int32)}, "int32"
    if case == "no scales":
        return FP8, {weight: numbers((64, 96)).to(torch.float8_e4m3fn)}, "a_proj.weight without scales"
    if case == "inputs that are scaled":
        stored, _ = nvfp4(weight, numbers((24, 96)))
        return MODELOPT, stored | {"a_proj.pre_quant_scale": torch.ones(96)}, "pre_quant_scale"
    if case == "nvfp4 without its factor":
        stored, _ = nvfp4(weight, numbers((24, 96)))
        return MODELOPT, {name: tensor for name, tensor in stored.items() if not name.endswith("_2")}, "neither as NVFP4 nor as FP8"
    if case == "a factor of several numbers":
        stored, _ = nvfp4(weight, numbers((24, 96)))
        return MODELOPT, stored | {f"{weight}_scale_2": torch.ones(3)}, "should be one number"
    stored, _ = bitsandbytes("nf4", nested=case.startswith("nested"))(weight, numbers((24, 128)))
    state = f"{weight}.quant_state.bitsandbytes__nf4"

    def described(text: str) -> Stored:
        return stored | {state: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}

    changed: dict[str, tuple[Stored, str]] = {
        "a description that is no JSON": (described("{"), "not valid JSON"),
        "a description of another shape": (described('{"shape": [24, 127], "blocksize": 64}'), "24 by 127"),
        "a shape that is no matrix": (described('{"shape": [24], "blocksize": 64}'), "not that of a matrix"),
        "impossible blocks": (described('{"shape": [24, 128], "blocksize": 63}'), "63"),
        "no scales of blocks": ({name: x for name, x in stored.items() if not name.endswith(".absmax")}, "absmax is missing"),
        "a table of 15": (stored | {f"{weight}.quant_map": NF4[:15].clone()}, "16 values"),
        "scales in 8 bits without scales": (stored | {f"{weight}.absmax": torch.ones(48, dtype=torch.uint8)}, "no scales of its own"),
        "nested scales of another number": (stored | {f"{weight}.nested_absmax": torch.ones(2)}, "no scales of the scales"),
        "another kind": ({name.replace("__nf4", "__nf5"): x for name, x in stored.items()}, "nf5"),
    }
    return BNB, *changed[case]


@pytest.mark.parametrize(
    "case",
    [
        "scales that fit no block", "scales of integers", "no scales", "inputs that are scaled", "nvfp4 without its factor",
        "a factor of several numbers", "a description that is no JSON", "a description of another shape", "a shape that is no matrix",
        "impossible blocks", "no scales of blocks", "a table of 15", "scales in 8 bits without scales", "nested scales of another number",
        "another kind",
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    quantization, stored, message = broken(case)
    with pytest.raises(CheckpointError, match=message):
        stored_as(tmp_path, quantization, stored, torch.float32)


def test_a_description_in_a_file_that_is_elsewhere(tmp_path: Path) -> None:
    """Headers of a repository of bitsandbytes are not enough."""
    save_file(
        {name: x.contiguous() for name, x in bitsandbytes("nf4")("a.weight", numbers((24, 128)))[0].items()}, tmp_path / "model.safetensors"
    )
    headers = Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = stated_format({"quantization_config": BNB})
    with pytest.raises(CheckpointError, match="download the repository"):
        headers.decoded(found, torch.float32)


@pytest.mark.parametrize("nested", [False, True])
def test_headers_of_bitsandbytes_are_enough_to_plan(nested: bool, tmp_path: Path) -> None:
    """The shapes are those of the model; what transformers would write for a config is what is planned for a config alone."""
    stated = BNB | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    config = tiny_config("llama")
    save(build(config), tmp_path / "plain")
    write_model(tmp_path / "plain", tmp_path / "encoded", tmp_path / "dense", stated, bitsandbytes("nf4", nested=nested))
    config.quantization_config = stated
    here = Checkpoint(tmp_path / "encoded")
    elsewhere = Headers(here.folder, [here.tensors])
    wanted = describe_headers(here, config, torch.float32, name="x")
    (tmp_path / "encoded" / "model.safetensors").unlink()
    assert describe_headers(elsewhere, config, torch.float32, name="x") == wanted
    planned = describe_config(config, torch.float32, stored=torch.float32, name="x")
    assert planned.decoded_bytes == wanted.decoded_bytes
    assert planned.streamed_bytes == pytest.approx(wanted.streamed_bytes, rel=0.02)


def test_scales_that_the_config_does_not_state(tmp_path: Path) -> None:
    """Without them the numbers would be others."""
    stored, _ = fp8(None, name="weight_scale")("a_proj.weight", numbers((24, 50)))
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"a_proj.weight.*hf_quant_config.json"):
        Checkpoint(tmp_path).decoded(None, torch.float32)
