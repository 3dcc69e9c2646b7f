"""MXFP4 as gpt-oss stores its experts: blocks of 4-bit numbers and a separate tensor of their scales.

Only experts are encoded.  An expert's matrix is stored with outputs as rows, and that is how it lies in memory when it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexgen.base.parallel import Parallel, serially
from flexgen.formats.base import Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor

if TYPE_CHECKING:
    import torch

    from flexgen.kernels.encoded import MatrixCodes

_GROUP = 32  # 4-bit numbers that share an 8-bit scale (OCP Microscaling Formats 1.0)
_BLOCK_BYTES = _GROUP // 2
_RANDOM_SCALE = 127 - 7  # 2^-7: random 4-bit numbers have a standard deviation of 2.9
_EXAMPLE_WIDTH = 2880  # inputs and outputs of an expert of gpt-oss
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class MXFP4(NumberFormat):
    """MXFP4 experts of shape (experts, inputs, outputs), stored transposed and in blocks along the inputs."""

    name = "mxfp4"
    runs = True
    carried_as_stored = True

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

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        return {"mxfp4": {"quant_method": "mxfp4"}}

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
        import torch

        found = {}
        for name, blocks in tensors.items():
            scales = tensors.get(name.removesuffix("_blocks") + "_scales")
            if scales is None or len(scales.shape) != 3 or blocks.shape != (*scales.shape, _BLOCK_BYTES):
                continue
            if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
                continue
            experts, outputs, groups = scales.shape
            shape = (experts, groups * _GROUP, outputs)
            parts = EncodingPart(blocks, 1), EncodingPart(scales, 1)
            found[name.removesuffix("_blocks")] = Encoding(self, shape, parts, columns_first=True)
        return found

    def matrix_codes(self, encoding: Encoding) -> MatrixCodes:
        import torch

        from flexgen.kernels.encoded import MatrixCodes

        _, inputs, outputs = encoding.shape
        parts = (torch.uint8, (outputs, inputs // 2)), (torch.uint8, (outputs, inputs // _GROUP))
        return MatrixCodes(parts=parts, group=_GROUP, zero=None)

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        import torch

        from flexgen.kernels.dequantize import tables
        from flexgen.kernels.dequantize.blocks import Codes, Scales
        from flexgen.kernels.dequantize.lookup import decode

        experts, inputs, outputs = out.shape
        if not out.mT.is_contiguous():
            columns = torch.empty((experts, outputs, inputs), dtype=out.dtype, device=out.device)
            self.decode(parts, start, columns.mT, parallel)
            out.copy_(columns.mT)
            return
        blocks, scales = parts
        codes = Codes(numbers=blocks.view(experts * outputs, inputs // 2), values=tables.on_device(tables.E2M1, out.device))
        given = Scales(numbers=scales.view(experts * outputs, inputs // _GROUP), block_columns=_GROUP)
        decode(codes, given, out.mT.reshape(experts * outputs, inputs), parallel)
