"""compressed-tensors from files to numbers: against layouts that are written out in layouts.py and, if the package is there, against it."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import NamedTensor
from flexgen.formats.table import stated_format
from flexgen.models.describe import describe_config, describe_headers
from tests.formats.from_config import encoded, stated
from tests.formats.layouts import packed, padded_words
from tests.models.tiny_configs import tiny_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(**settings: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | settings


def config_of(stored_as: str = "pack-quantized", targets: tuple[str, ...] = ("Linear",), **settings: Any) -> dict[str, Any]:
    """A quantization_config of one group."""
    group = {"targets": list(targets), "weights": weights_of(**settings), "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": stored_as, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


NVFP4 = config_of("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
MXFP4 = config_of("mxfp4-pack-quantized", type="float", group_size=32, scale_dtype="torch.uint8")
FP8 = config_of("float-quantized", type="float", num_bits=8, strategy="channel", group_size=None)


def weights(outputs: int = 64, inputs: int = 96) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def source(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: torch.dtype) -> ParameterSource:
    """Write the tensors of module `a` and return the source of its weight."""
    save_file({f"a.{name}": x for name, x in tensors.items()} | {"norm": torch.ones(3)}, folder / "model.safetensors")
    headers = Checkpoint(folder).decoded(stated(quantization), dtype)
    assert headers.tensors.keys() == {"a.weight", "norm"}
    tensor = headers.tensors["a.weight"]
    return ParameterSource(name="a", shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))


def read(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of the matrix, which are the same if it is read in parts."""
    found = source(folder, tensors, quantization, dtype)
    out, parts = torch.empty(found.shape, dtype=dtype), torch.empty(found.shape, dtype=dtype)
    found.read(out)
    bounds = [0, 1, 7, 21, found.shape[0]]
    for start, stop in pairwise(bounds):
        found.rows(start, stop).read(parts[start:stop])
    assert torch.equal(out, parts)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers(bits: int, symmetric: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = packed(weights(), bits, symmetric=symmetric, scale_dtype=torch.bfloat16)
    got = read(tmp_path, stored.tensors, config_of(num_bits=bits, symmetric=symmetric), dtype)
    assert torch.equal(got, stored.numbers.to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_packed_integers_of_older_versions(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """Which left bits unused where codes did not fill a word; the width of the matrix tells."""
    stored = packed(weights(), bits, symmetric=symmetric, padded=True)
    assert stored.tensors["weight_packed"].shape[1] != packed(weights(), bits).tensors["weight_packed"].shape[1]
    assert torch.equal(read(tmp_path, stored.tensors, config_of(num_bits=bits, symmetric=symmetric)), stored.numbers)


@pytest.mark.parametrize("inputs", [96, 93, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_integers_by_channel(bits: int, symmetric: bool, inputs: int, tmp_path: Path) -> None:
    """The number of columns is in weight_shape, where words do not tell it."""
    stored = packed(weights(inputs=inputs), bits, inputs, symmetric=symmetric)
    settings = config_of(num_bits=bits, symmetric=symmetric, strategy="channel", group_size=None)
    assert torch.equal(read(tmp_path, stored.tensors, settings), stored.numbers)


def test_a_last_group_that_is_smaller(tmp_path: Path) -> None:
    stored = packed(weights(inputs=80), 4, 32, symmetric=False)
    assert torch.equal(read(tmp_path, stored.tensors, config_of(symmetric=False)), stored.numbers)


def test_one_scale_for_a_matrix(tmp_path: Path) -> None:
    stored = packed(weights(), 4, 96)
    scale = stored.tensors["weight_scale"]
    tensors = stored.tensors | {"weight_scale": torch.tensor([0.5])}
    got = read(tmp_path, tensors, config_of(strategy="tensor", group_size=None))
    assert torch.equal(got, (stored.numbers / scale).round() * 0.5)


def test_columns_in_any_order(tmp_path: Path) -> None:
    """Activation order of older versions; -1 means that there is none."""
    stored = packed(weights())
    order = (torch.arange(96) // 32)[torch.randperm(96, generator=torch.Generator().manual_seed(1))].to(torch.int32)
    scales = stored.tensors["weight_scale"]
    codes = (stored.numbers / scales[:, torch.arange(96) // 32]).round()
    quantization = config_of(actorder="group")
    assert torch.equal(read(tmp_path, stored.tensors | {"weight_g_idx": order}, quantization), codes * scales[:, order.long()])
    assert torch.equal(read(tmp_path, stored.tensors | {"weight_g_idx": torch.full_like(order, -1)}, quantization), stored.numbers)


def test_zero_points_in_plain_bytes(tmp_path: Path) -> None:
    stored = packed(weights(), symmetric=False)
    plain = packed(weights(), symmetric=False).tensors["weight_zero_point"]
    codes = torch.stack([(plain >> (4 * i)) & 15 for i in range(8)], dim=1).view(64, 3)
    tensors = stored.tensors | {"weight_zero_point": (codes - 8).to(torch.int8)}
    assert torch.equal(read(tmp_path, tensors, config_of(symmetric=False)), stored.numbers)


@pytest.mark.parametrize("stored_as", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("channel", (64, 1)), ("group", (64, 3)), ("block", (4, 3))])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_in_bytes(symmetric: bool, strategy: str, shape: tuple[int, ...], stored_as: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-128, 128, (64, 96), dtype=torch.int8, generator=generator)
    scales, zeros = torch.rand(shape, generator=generator), torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    tensors = {"weight": numbers, "weight_scale": scales, "input_scale": torch.ones(1)} | (
        {} if symmetric else {"weight_zero_point": zeros}
    )
    rows, columns = {"tensor": (64, 96), "channel": (1, 96), "group": (1, 32), "block": (16, 32)}[strategy]

    def spread(x: Tensor) -> Tensor:
        return x.view(64 // rows, 96 // columns).float().repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)

    quantization = config_of(
        stored_as, num_bits=8, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None,
        block_structure=[16, 32] if strategy == "block" else None,
    )  # fmt: skip
    wanted = (numbers.float() - (0 if symmetric else spread(zeros))) * spread(scales)
    assert torch.equal(read(tmp_path, tensors, quantization), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("channel", (64, 1)), ("group", (64, 3)), ("block", (4, 3))])
def test_fp8(strategy: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    codes, scales = weights().to(torch.float8_e4m3fn), torch.rand(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    quantization = config_of(
        "float-quantized", type="float", num_bits=8, strategy=strategy, group_size=32 if strategy == "group" else None,
        block_structure=[16, 32] if strategy == "block" else None,
    )  # fmt: skip
    rows, columns = {"tensor": (64, 96), "channel": (1, 96), "group": (1, 32), "block": (16, 32)}[strategy]
    spread = scales.view(64 // rows, 96 // columns).float().repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    got = read(tmp_path, {"weight": codes, "weight_scale": scales}, quantization, dtype)
    assert torch.equal(got, (codes.float() * spread).to(dtype))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def halves(codes: Tensor) -> Tensor:
    """Two codes in a byte, the first in the low half."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 96), generator=generator)
    scales = (1 + 400 * torch.rand(64, 6, generator=generator)).to(torch.float8_e4m3fn)
    divisor = torch.tensor([1234.5])
    tensors = {"weight_packed": halves(codes), "weight_scale": scales, "weight_global_scale": divisor, "input_global_scale": torch.ones(1)}
    wanted = E2M1[codes] * (scales.float() / divisor).repeat_interleave(16, dim=1)
    assert torch.equal(read(tmp_path, tensors, NVFP4, dtype), wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, scales = (torch.randint(low, high, shape, generator=generator) for low, high, shape in ((0, 16, (64, 96)), (115, 135, (64, 3))))
    tensors = {"weight_packed": halves(codes), "weight_scale": scales.to(torch.uint8)}
    wanted = E2M1[codes] * torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(read(tmp_path, tensors, MXFP4, dtype), wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("stored_as", "settings"),
    [
        *(("pack-quantized", {"num_bits": bits, "symmetric": symmetric}) for bits in range(2, 9) for symmetric in (True, False)),
        ("pack-quantized", {"strategy": "channel", "group_size": None, "symmetric": False}),
        ("pack-quantized", {"strategy": "tensor", "group_size": None}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
        ("naive-quantized", {"num_bits": 8, "symmetric": False}),
        ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "block", "group_size": None, "block_structure": [16, 32]}),
        ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor", "group_size": None}),
        ("nvfp4-pack-quantized", {"type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", {"type": "float"}),
        ("mxfp8-quantized", {"type": "float", "num_bits": 8, "scale_dtype": "torch.uint8"}),
    ],
    ids=str,
)
def test_as_the_package_has_it(stored_as: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """What it compresses is found, and has the bits that it decompresses, in the dtype of the scales.

    4-bit floating-point numbers it decompresses in bfloat16 only.
    """
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    scheme = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme(targets=["Linear"], weights=weights_of(**settings))
    compressor = compressors.BaseCompressor.get_value_from_registry(stored_as)
    weight = weights().to(dtype)
    stored = compressor.compress({"weight": weight} | package_scales(weight, scheme.weights), scheme)
    wanted = compressor.decompress(stored, scheme)["weight"]
    tensors = {name: x.contiguous() for name, x in stored.items()}
    assert torch.equal(read(tmp_path, tensors, config_of(stored_as, **settings), wanted.dtype), wanted)


def package_scales(weight: Tensor, settings: Any) -> dict[str, Tensor]:
    """Scales, and zero points of asymmetric integers, as an observer would have chosen them."""
    rows, columns = {
        "tensor": weight.shape,
        "channel": (1, weight.shape[1]), "group": (1, settings.group_size), "tensor_group": (1, settings.group_size),
        "block": settings.block_structure,
    }[settings.strategy]  # fmt: skip
    parts = weight.float().view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    most = {8: 448.0, 4: 6.0}[settings.num_bits] if settings.type == "float" else 2.0 ** (settings.num_bits - 1) - 1
    found: dict[str, Tensor] = {}
    scale = parts.abs().amax(dim=(1, 3)) / most
    if settings.strategy == "tensor_group":
        found["weight_global_scale"] = (448 / scale.max()).view(1)
        scale = (scale * found["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    elif settings.type == "float" and settings.group_size == 32:
        scale = torch.exp2(scale.log2().ceil())
    found["weight_scale"] = scale.view(-1) if settings.strategy == "tensor" else scale
    found["weight_scale"] = found["weight_scale"].to(weight.dtype)
    if not settings.symmetric:
        zeros = torch.randint(-3, 3, scale.shape, generator=torch.Generator().manual_seed(2)).clamp(-(2.0 ** (settings.num_bits - 1)), most)
        found["weight_zero_point"] = zeros.to(torch.int8)
    return found


CONFIGS = {
    "w4a16": config_of(),
    "w4a16-asym": config_of(symmetric=False, group_size=16),
    "w3-channel": config_of(num_bits=3, strategy="channel", group_size=None),
    "w4-ordered": config_of(actorder="group"),
    "w8a8": config_of("int-quantized", num_bits=8, strategy="channel", group_size=None),
    "w8-asym": config_of("naive-quantized", num_bits=8, symmetric=False, strategy="tensor", group_size=None),
    "fp8": FP8,
    "fp8-block": config_of("float-quantized", type="float", num_bits=8, strategy="block", group_size=None, block_structure=[128, 128]),
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "mxfp8": config_of("mxfp8-quantized", type="float", num_bits=8, scale_dtype="torch.uint8"),
    "mixed": FP8
    | {
        "format": "mixed-precision",
        "config_groups": {
            "attention": FP8["config_groups"]["group_0"] | {"format": "float-quantized", "targets": ["re:.*self_attn.*"]},
            "rest": config_of()["config_groups"]["group_0"] | {"format": "pack-quantized"},
            "table": config_of(num_bits=8)["config_groups"]["group_0"] | {"targets": ["Embedding"]},
        },
        "ignore": ["re:.*lm_head", "model.layers.0.mlp.down_proj", r"re:.*mlp\.gate$"],
    },
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
    assert spec.number_format == "compressed-tensors"


def test_groups_and_what_they_leave_out() -> None:
    headers, _ = encoded(CONFIGS["mixed"], "llama")
    dtypes = {name: tensor.dtype for name, tensor in headers.tensors.items()}
    assert dtypes["model.layers.1.self_attn.q_proj.weight"] == torch.float8_e4m3fn
    assert dtypes["model.layers.1.mlp.down_proj.weight_packed"] == torch.int32
    assert dtypes["model.layers.0.mlp.down_proj.weight"] == dtypes["lm_head.weight"] == torch.bfloat16
    assert headers.tensors["model.embed_tokens.weight_packed"].shape == (128, 16)
    moe, _ = encoded(CONFIGS["mixed"], "qwen3_moe")
    assert "model.layers.1.mlp.gate.weight" in moe.tensors
    assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in moe.tensors


def test_exact_names_come_before_patterns_and_patterns_before_classes() -> None:
    groups = {
        f"{bits}": {"targets": [target], "weights": weights_of(num_bits=bits)}
        for bits, target in ((2, "Linear"), (3, "re:a"), (4, "a.b"), (5, "Embedding"))
    }
    number_format = stated(config_of() | {"config_groups": groups, "ignore": []})

    def words(name: str) -> int:
        return number_format.encode(NamedTensor(f"{name}.weight", (32, 32), torch.bfloat16))[0].shape[1]

    assert [words(name) for name in ("b", "a", "a.b", "embed_tokens")] == [2, 3, 4, 5]


def test_the_older_name_of_the_config(tmp_path: Path) -> None:
    stored = packed(weights())
    save_file({f"a.{name}": x for name, x in stored.tensors.items()}, tmp_path / "model.safetensors")
    found = stated_format({"compression_config": {"quantization_config": config_of(), "sparsity_config": {"format": "dense"}}})
    assert Checkpoint(tmp_path).decoded(found, torch.float32).tensors["a.weight"].shape == (64, 96)


def test_what_has_no_effect_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = packed(weights())
    quantization = config_of() | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    quantization["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    with caplog.at_level(logging.INFO, logger="flexgen"):
        read(tmp_path, stored.tensors, quantization)
    assert [record.getMessage().split("(")[0].strip() for record in caplog.records] == [
        "the config also quantizes activations",
        "the config also asks for a quantized KV cache",
    ]
    assert "float of 8 bits" in caplog.text


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (config_of("marlin-24"), "compressed-tensors.*marlin-24"),
        (config_of("sparse-24-bitmask"), "sparse-24-bitmask"),
        (config_of("dense"), "format 'dense'"),
        (config_of("mxfp6-pack-quantized", type="float", num_bits=6), "mxfp6-pack-quantized"),
        (config_of() | {"sparsity_config": {"format": "sparse-bitmask"}}, "sparse-bitmask"),
        (config_of() | {"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations"),
        (config_of(num_bits=9), "weights of 9 bits"),
        (config_of(strategy="attn_head"), "strategy attn_head"),
        (config_of(group_size=0), r"config_groups\.group_0\.weights\.group_size must be a whole number above 0, not 0"),
        (config_of("float-quantized", type="float", num_bits=4), "4-bit floating-point numbers as float-quantized"),
        (config_of("float-quantized"), "type int as float-quantized"),
        (config_of("float-quantized", type="float", num_bits=8, symmetric=False), "asymmetric weights of 8 bits, type float"),
        (config_of(targets=("re:(",)), "not a regular expression"),
        (config_of() | {"config_groups": {"W4A16": ["Linear"]}}, r'config_groups\.W4A16 must be an object, not \["Linear"\]'),
        (config_of() | {"config_groups": None}, "config_groups is missing; it must be an object"),
        (config_of() | {"config_groups": {"g": {"targets": ["Linear"]}}}, "quantizes no weights"),
    ],
)
def test_refused_by_name(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        stated_format({"quantization_config": quantization})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"weight_scale": None}, {}, "a.weight_scale is missing"),
        ({"weight_scale": torch.ones(64, 4)}, {}, "need"),
        ({"weight_scale": torch.ones(64, 3, dtype=torch.uint8)}, {}, "need bfloat16, float16 or float32"),
        ({"weight_packed": torch.ones(64, 12)}, {}, "a.weight_packed is .*float32.*need int32"),
        ({"weight_packed": padded_words(torch.ones(64, 96, dtype=torch.int64), 3)}, {}, "words of 96 codes of 4 bits"),
        ({}, {"symmetric": False}, "a.weight_zero_point is missing"),
        ({"weight_zero_point": torch.ones(7, 3, dtype=torch.int32)}, {"symmetric": False}, "zero points of 64 rows"),
        ({"weight_zero_point": torch.ones(8, 3, dtype=torch.int32)}, {}, "need no zero points, since config.json says"),
        ({"weight_g_idx": torch.ones(7, dtype=torch.int32)}, {}, r"need \(96,\)"),
    ],
)
def test_tensors_that_contradict_the_config(
    change: dict[str, Tensor | None], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {name: x for name, x in (packed(weights()).tensors | change).items() if x is not None}
    with pytest.raises(CheckpointError, match=message):
        source(tmp_path, tensors, config_of(**settings), torch.float32)


def test_a_module_that_no_group_names(tmp_path: Path) -> None:
    groups = {name: {"targets": [f"re:{name}"], "weights": weights_of()} for name in ("b", "c")}
    with pytest.raises(CheckpointError, match=r"no group .* names a"):
        source(tmp_path, packed(weights()).tensors, config_of() | {"config_groups": groups}, torch.float32)
