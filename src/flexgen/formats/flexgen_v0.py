"""The FlexGen paper's 4-bit weights (ICML 2023, section 5), which `flexgen convert` writes for comparisons.

A group is 64 neighbouring outputs of one input.  `NAME.weight_codes` holds two outputs in a byte, the first in the high half, uint8
(outputs / 2, inputs); `NAME.weight_ranges` holds 15 / (largest - smallest) and the smallest weight, float16 (outputs / 64 rounded up, 2,
inputs).  A weight is code / first + second.  What quantization_config lists as `ignore` is stored as plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexgen.base.parallel import Parallel, serially
from flexgen.formats.base import RANDOM_DEVIATION, Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.stated import Stated

if TYPE_CHECKING:
    import torch

NAME, GROUP = "flexgen-v0", 64
CODES, RANGES = "_codes", "_ranges"
_DEVIATION_OF_CODES = 4.61  # of numbers that are equally often 0, 1, ..., 15


class FlexGenV0(NumberFormat):
    """Matrices in the paper's 4 bits.

    Args:
        ignore: The modules whose weights are plain numbers.
    """

    name = NAME
    runs = True
    carried_as_stored = True

    def __init__(self, ignore: Sequence[str] = ()) -> None:
        self._ignore = frozenset(ignore)

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        if quantization.get("quant_method") != NAME:
            return None
        stated = Stated(quantization)
        for key, only in (("bits", 4), ("group_size", GROUP)):
            if stated.whole(key, None) != only:
                raise stated.wrong(key, f"{only} in {NAME}")
        return FlexGenV0(stated.names("ignore"))

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        module = tensor.name.removesuffix(".weight")
        if module == tensor.name or module in self._ignore or not fits(tensor.shape):
            return [tensor]
        return encoded(tensor)

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        return {NAME: {"quant_method": NAME, "bits": 4, "group_size": GROUP}}

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        import torch

        if stored.name.endswith(CODES):
            return torch.randint(256, stored.shape, dtype=torch.uint8, generator=generator)
        step = RANDOM_DEVIATION / _DEVIATION_OF_CODES
        ranges = torch.empty(stored.shape, dtype=torch.float16)
        ranges[:, 0], ranges[:, 1] = 1 / step, -7.5 * step
        return ranges

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        import torch

        found = {}
        for name, codes in tensors.items():
            ranges = tensors.get(name.removesuffix(CODES) + RANGES)
            if not name.endswith(CODES) or ranges is None or len(codes.shape) != 2:
                continue
            outputs, inputs = 2 * codes.shape[0], codes.shape[1]
            dtypes_fit = (codes.dtype, ranges.dtype) == (torch.uint8, torch.float16)
            if dtypes_fit and ranges.shape == (-(-outputs // GROUP), 2, inputs):
                parts = EncodingPart(codes, 2), EncodingPart(ranges, GROUP)
                found[name.removesuffix(CODES)] = Encoding(self, (outputs, inputs), parts)
        return found

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        from flexgen.kernels.dequantize.choice import dequantize_kernels

        columns = out.shape[1]  # on a CPU by torch's own threads: a mode such as inference_mode holds for one thread only
        dequantize_kernels(out.device).ranges(parts[0].view(-1, columns), parts[1].view(-1, 2, columns), GROUP, start, out)


def fits(shape: Sequence[int]) -> bool:
    """Return whether a tensor of this shape can be encoded."""
    return len(shape) == 2 and shape[0] % 2 == 0 and 0 not in shape


def encoded(tensor: NamedTensor) -> list[NamedTensor]:
    """Return the tensors that are stored for a matrix."""
    import torch

    outputs, inputs = tensor.shape
    return [
        NamedTensor(tensor.name + CODES, (outputs // 2, inputs), torch.uint8),
        NamedTensor(tensor.name + RANGES, (-(-outputs // GROUP), 2, inputs), torch.float16),
    ]
