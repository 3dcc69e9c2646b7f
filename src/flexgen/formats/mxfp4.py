"""MXFP4 as gpt-oss stores its experts: blocks of 4-bit numbers and a separate tensor of their scales.

The planner counts its bytes; the engine does not decode it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen.formats.base import Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor

if TYPE_CHECKING:
    import torch

_GROUP = 32  # 4-bit numbers that share an 8-bit scale (OCP Microscaling Formats 1.0)
_BLOCK_BYTES = _GROUP // 2
_RANDOM_SCALE = 127 - 7  # 2^-7: random 4-bit numbers have a standard deviation of 2.9
_EXAMPLE_WIDTH = 2880  # inputs and outputs of an expert of gpt-oss
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class MXFP4(NumberFormat):
    """MXFP4 experts of shape (experts, inputs, outputs), stored transposed and in blocks along the inputs."""

    name = "mxfp4"

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        return self if quantization.get("quant_method") == "mxfp4" else None

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch

        if not tensor.name.endswith(_EXPERTS):
            return [tensor]
        experts, inputs, outputs = tensor.shape
        groups = (experts, outputs, inputs // _GROUP)
        return [
            NamedTensor(f"{tensor.name}_blocks", (*groups, _BLOCK_BYTES), torch.uint8),
            NamedTensor(f"{tensor.name}_scales", groups, torch.uint8),
        ]

    def example(self, num_elements: int) -> NamedTensor:
        import torch

        experts = max(num_elements // _EXAMPLE_WIDTH**2, 1)
        return NamedTensor(f"model.layers.0.{_EXPERTS[1]}", (experts, _EXAMPLE_WIDTH, _EXAMPLE_WIDTH), torch.bfloat16)

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        import torch

        if stored.name.endswith("_scales"):
            return torch.full(stored.shape, _RANDOM_SCALE, dtype=torch.uint8)
        return torch.randint(256, stored.shape, dtype=torch.uint8, generator=generator)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        found = {}
        for name, blocks in tensors.items():
            scales = tensors.get(name.removesuffix("_blocks") + "_scales")
            if scales is None or blocks.shape != (*scales.shape, _BLOCK_BYTES):
                continue
            experts, outputs, groups = scales.shape
            shape = (experts, groups * _GROUP, outputs)
            found[name.removesuffix("_blocks")] = Encoding(self, shape, (EncodingPart(blocks, 1), EncodingPart(scales, 1)))
        return found
