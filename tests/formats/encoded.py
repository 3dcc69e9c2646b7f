"""Tensors written in published formats, plainly and slowly, beside the numbers that they stand for; and whole models written in them.

Knows nothing of the code under test.  What stored codes stand for is what transformers computes where it has a function for it, and
otherwise what the format's definition says.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

Stored = dict[str, Tensor]
Write = Callable[[str, Tensor], tuple[Stored, Tensor]]  # name and numbers -> what is stored, and what it stands for, in float32

E2M1 = torch.tensor(FP4_VALUES)
# The quantiles of a normal distribution that NF4 is made of (arXiv:2305.14314, appendix E), and FP4's magnitudes, divided by the largest.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4 = torch.cat([FP4, -FP4])


def nearest(numbers: Tensor, values: Tensor) -> Tensor:
    """The code of the nearest value of each number, uint8."""
    return (numbers[..., None] - values).abs().argmin(dim=-1).to(torch.uint8)


def packed(codes: Tensor, *, high_first: bool = False) -> Tensor:
    first, second = codes[..., 0::2], codes[..., 1::2]
    return (first << 4 | second) if high_first else (second << 4 | first)


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """One scale for each number, (..., rows, columns)."""
    wide = scales.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return wide[..., : shape[-2], : shape[-1]]


def largest(numbers: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block, (..., rows of blocks, columns of blocks)."""
    *matrices, rows, columns = numbers.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(*matrices, grid[0] * block[0], grid[1] * block[1])
    padded[..., :rows, :columns] = numbers.abs()
    return padded.view(*matrices, grid[0], block[0], grid[1], block[1]).amax(dim=(-3, -1)).clamp(min=1e-6)


def fp8(
    block: tuple[int, int] | None,
    scale_dtype: torch.dtype = torch.float32,
    *,
    name: str = "weight_scale_inv",
    beside: Mapping[str, Tensor] | None = None,
) -> Write:
    """E4M3 in blocks.  Where blocks come out even, transformers says what the codes stand for."""

    def write(tensor: str, numbers: Tensor) -> tuple[Stored, Tensor]:
        each = block or tuple(numbers.shape[-2:])
        scales = largest(numbers, (each[0], each[1])) / 448
        if scale_dtype in (torch.float8_e8m0fnu, torch.uint8):
            exponents = (scales.log2().ceil() + 127).to(torch.uint8)
            scales = exponents if scale_dtype == torch.uint8 else exponents.view(scale_dtype)
            wide = torch.pow(2.0, exponents.float() - 127)
        else:
            scales = scales.to(scale_dtype)
            wide = scales.float()
        of_each = spread(wide, (each[0], each[1]), tuple(numbers.shape))
        codes = (numbers / of_each).to(torch.float8_e4m3fn)
        dense = codes.float() * of_each
        if numbers.shape[-2] % each[0] == 0 and numbers.shape[-1] % each[1] == 0:
            public = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
            assert torch.equal(public, dense)
        if block is None and numbers.ndim == 2:
            scales = scales.reshape(())
        module = tensor.removesuffix(".weight")
        scale_name = f"{module}.{name}" if module != tensor else f"{tensor}_{name.removeprefix('weight_')}"
        return {tensor: codes, scale_name: scales, **{f"{module}.{key}": value.clone() for key, value in (beside or {}).items()}}, dense

    return write


def mxfp4(tensor: str, numbers: Tensor) -> tuple[Stored, Tensor]:
    """Experts (experts, inputs, outputs), stored as (experts, outputs, groups of inputs, 16 bytes)."""
    rows = numbers.transpose(1, 2)
    exponents = (largest(rows, (1, 32)) / 6).log2().ceil() + 127
    codes = nearest(rows / spread(torch.pow(2.0, exponents - 127), (1, 32), tuple(rows.shape)), E2M1)
    blocks = packed(codes).view(*exponents.shape, 16)
    scales = exponents.to(torch.uint8)
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {f"{tensor}_blocks": blocks, f"{tensor}_scales": scales}, dense


def nvfp4(tensor: str, numbers: Tensor) -> tuple[Stored, Tensor]:
    """Groups of 16 with a scale in E4M3, all of them times one number."""
    factor = numbers.abs().max() / (6 * 448)
    scales = (largest(numbers, (1, 16)) / 6 / factor).to(torch.float8_e4m3fn)
    of_each = spread(scales.float() * factor, (1, 16), tuple(numbers.shape))
    codes = nearest(numbers / of_each, E2M1)
    stored = {tensor: packed(codes), f"{tensor}_scale": scales, f"{tensor}_scale_2": factor}
    stored[f"{tensor.removesuffix('.weight')}.input_scale"] = torch.tensor(0.5)
    return stored, E2M1[codes.long()] * of_each


def fp4_experts(tensor: str, numbers: Tensor) -> tuple[Stored, Tensor]:
    """DeepSeek-V4's experts: two codes of E2M1 in an int8, and a power of two for 32 numbers of a row."""
    exponents = ((largest(numbers, (1, 32)) / 6).log2().ceil() + 127).to(torch.uint8)
    codes = nearest(numbers / spread(torch.pow(2.0, exponents.float() - 127), (1, 32), tuple(numbers.shape)), E2M1)
    stored, scales = packed(codes).view(torch.int8), exponents.view(torch.float8_e8m0fnu)
    dense = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32)
    return {tensor: stored, f"{tensor.removesuffix('.weight')}.scale": scales}, dense


def bitsandbytes(kind: str, *, size: int = 64, nested: bool = False) -> Write:
    """NF4 or FP4 over the flattened matrix; scales in float32, or in 8 bits by blocks of 256 around their mean."""
    values = {"nf4": NF4, "fp4": FP4}[kind]

    def write(tensor: str, numbers: Tensor) -> tuple[Stored, Tensor]:
        flat = numbers.reshape(-1)
        count = -(-len(flat) // size)
        padded = torch.zeros(count * size)
        padded[: len(flat)] = flat
        scales = padded.view(count, size).abs().amax(dim=1).clamp(min=1e-6)
        described: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(numbers.shape)}
        stored: Stored = {f"{tensor}.quant_map": values.clone()}
        if nested:
            offset = scales.mean()
            table = torch.linspace(-1, 1, 256).pow(3)
            blocks = -(-count // 256)
            moved = torch.zeros(blocks * 256)
            moved[:count] = scales - offset
            of_scales = moved.view(blocks, 256).abs().amax(dim=1).clamp(min=1e-6)
            codes = nearest(moved.view(blocks, 256) / of_scales[:, None], table).view(-1)[:count]
            scales = table[codes.long()] * of_scales.repeat_interleave(256)[:count] + offset
            described |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
            stored |= {f"{tensor}.nested_absmax": of_scales, f"{tensor}.nested_quant_map": table, f"{tensor}.absmax": codes}
        else:
            stored[f"{tensor}.absmax"] = scales
        codes = nearest(padded.view(count, size) / scales[:, None], values).view(-1)[: len(flat)]
        even = torch.cat([codes, codes.new_zeros(len(flat) % 2)])
        stored[tensor] = packed(even, high_first=True)[:, None]
        text = json.dumps(described).encode()
        stored[f"{tensor}.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dense = values[codes.long()] * scales.repeat_interleave(size)[: len(flat)]
        return stored, dense.view(numbers.shape)

    return write


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and ("proj" in name or ".w1" in name or ".w2" in name or ".w3" in name) and "bias" not in name


def write_model(
    plain: Path, encoded: Path, dense: Path, quantization: Mapping[str, Any], write: Write, *, of: Callable[[str, Tensor], bool] = is_linear
) -> int:  # fmt: skip
    """Write the model of `plain` twice: with the tensors `of` which it is said in a format, and with the numbers that these stand for.

    Returns:
        How many tensors are in the format.
    """
    stored: Stored = {}
    decoded: Stored = {}
    count = 0
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = decoded[name] = tensor
        if of(name, tensor):
            del stored[name]
            added, decoded[name] = write(name, tensor)
            stored |= added
            count += 1
    for folder, tensors, more in ((encoded, stored, {"quantization_config": dict(quantization)}), (dense, decoded, {})):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((plain / "config.json").read_text()) | more
        (folder / "config.json").write_text(json.dumps(config))
    return count


def with_quantization(config: PreTrainedConfig, quantization: Mapping[str, Any]) -> PreTrainedConfig:
    stated = copy.deepcopy(config)
    stated.quantization_config = dict(quantization)
    return stated
