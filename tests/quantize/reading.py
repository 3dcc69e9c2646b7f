"""Tiny models to convert, and a plain reader of what a conversion has written, made from the description of the layout alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_model
from tests.models.parity import build, save
from tests.models.tiny_configs import tiny_config


def made(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[PreTrainedModel, ModelFiles]:
    """A random model and its folder."""
    model: Any = build(tiny_config(model_type, **settings))
    model = model.to(dtype)
    model.config.dtype = dtype
    save(model, folder)
    return model, resolve_model(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of weights."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The integers in 32-bit words along the last dimension, from the low bits on: (rows, words) -> (rows, count)."""
    shifts = torch.arange(0, 32, bits)
    numbers = (words.long()[..., None] & 0xFFFFFFFF) >> shifts & ((1 << bits) - 1)
    return numbers.flatten(-2)[..., :count]


def codes_and_zeros(packed: torch.Tensor, zeros: torch.Tensor, bits: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (outputs, inputs) and the zero points (outputs, groups)."""
    return unpacked(packed, bits, shape[1]), unpacked(zeros.T.contiguous(), bits, shape[0]).T


def dequantized(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """A weight in float32."""
    rows, columns = tensors[f"{name}_shape"].tolist()
    scales = tensors[f"{name}_scale"].float()
    codes, zeros = codes_and_zeros(tensors[f"{name}_packed"], tensors[f"{name}_zero_point"], bits, (rows, columns))
    group = columns // scales.shape[1]
    return (codes - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
