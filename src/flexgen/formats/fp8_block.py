"""FP8 in square blocks, as DeepSeek-V3 stores its linear layers: E4M3 with one float32 scale per block.

The planner counts its bytes; the engine does not decode it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen.formats.base import RANDOM_DEVIATION, Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor

if TYPE_CHECKING:
    import torch

_BLOCK = 128  # rows and columns that share a scale (arXiv:2412.19437, section 3.3.2)
_SCALE = "_scale_inv"
_MODULES = ("_proj.weight", "_proj_with_mqa.weight")


class FP8Block(NumberFormat):
    """FP8 matrices in blocks of 128 by 128."""

    name = "fp8_block"

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        block = quantization.get("weight_block_size")
        stated = quantization.get("quant_method") == "fp8" and block is not None and list(block) == [_BLOCK, _BLOCK]
        return self if stated else None

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch

        if not tensor.name.endswith(_MODULES) or len(tensor.shape) != 2:
            return [tensor]
        return [
            NamedTensor(tensor.name, tensor.shape, torch.float8_e4m3fn),
            NamedTensor(tensor.name + _SCALE, _blocks(tensor.shape), torch.float32),
        ]

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        import torch

        if stored.name.endswith(_SCALE):
            return torch.full(stored.shape, RANDOM_DEVIATION, dtype=torch.float32)
        return torch.randn(stored.shape, generator=generator).to(torch.float8_e4m3fn)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        found = {}
        for name, weight in tensors.items():
            scales = tensors.get(name + _SCALE)
            if scales is not None and scales.shape == _blocks(weight.shape):
                found[name] = Encoding(self, weight.shape, (EncodingPart(weight, 1), EncodingPart(scales, _BLOCK)))
        return found


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // _BLOCK) for n in shape)
