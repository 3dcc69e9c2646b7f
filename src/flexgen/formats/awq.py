"""AWQ: 4-bit integer codes along the outputs of each linear layer, stored transposed, so that a matrix is read as a whole.

The layout is that of AutoAWQ's gemm version (awq/utils/packing_utils.py), which auto-round writes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexgen.base.parallel import Parallel, serially
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.linear_names import contains_any, is_linear_of_layer, module_of
from flexgen.formats.matrices import StoredMatrix
from flexgen.formats.stated import Stated

if TYPE_CHECKING:
    import torch

AWQ_NAME = "awq"
_BITS, _PER_WORD, _MIDDLE = 4, 8, 8
_VERSION = "gemm"
_ROUNDED = "auto_round:auto_awq"


@dataclass(frozen=True, kw_only=True)
class AWQMatrix(StoredMatrix):
    """A matrix.  Parts: words, scales and, if there are any, zero points.

    Attributes:
        group_size: The inputs that share a scale.
    """

    name = AWQ_NAME
    group_size: int

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints
        from flexgen.kernels.dequantize.integers import decode_awq

        outputs, inputs = out.shape
        zeros = None
        if len(parts) > 2:
            words = parts[2].view(-1, outputs // _PER_WORD).t()
            zeros = ZeroPoints(words=words, packing=Packing(bits=_BITS), rows=outputs, interleaved=True)
        groups = Groups(scales=parts[1].view(-1, outputs).t(), zeros=zeros, zero=_MIDDLE, columns=self.group_size)
        decode_awq(parts[0].view(inputs, -1), groups, out, parallel)


class AWQ(NumberFormat):
    """Weights as AutoAWQ stores them.

    Args:
        group_size: The inputs that share a scale; -1 for all of them.
        kept: Words in the names of modules that are not encoded.
        with_zeros: Whether zero points are stored.
    """

    name = AWQ_NAME
    runs = True

    def __init__(self, group_size: int = 128, kept: Sequence[str] = (), *, with_zeros: bool = True) -> None:
        self._group_size, self._kept, self._with_zeros = group_size, tuple(kept), with_zeros

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        method, stated = quantization.get("quant_method"), Stated(quantization)
        if method == "auto-round" and stated.text("packing_format", "") == _ROUNDED:
            version = _VERSION
        elif method == "awq":
            version = stated.text("version", "") or stated.text("checkpoint_format", "") or stated.text("format", _VERSION)
        else:
            return None
        if stated.text("backend", "") == "llm-awq":
            version = "llm-awq"
        bits = stated.whole("bits", stated.whole("w_bit", _BITS))
        group_size = stated.group_size("group_size", stated.group_size("q_group_size"))
        if version.lower() != _VERSION or bits != _BITS:
            raise UnsupportedModelError(
                f"quantization_config in config.json (awq) states {bits} bits in groups of {group_size}, version {version:.40}, which is "
                f"not supported; supported are {_BITS} bits in version {_VERSION}"
            )
        # The second list is auto-round's: modules that it left in 16 bits.
        kept = [*stated.names("modules_to_not_convert")]
        kept += [name for name, change in stated.objects("extra_config") if change.whole("bits", _BITS) != _BITS]
        return AWQ(group_size, kept, with_zeros=stated.flag("zero_point", True))

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch

        module = module_of(tensor)
        if module is None or not is_linear_of_layer(module) or contains_any(module, self._kept):
            return [tensor]
        outputs, inputs = tensor.shape
        group_size = self._group_size if self._group_size > 0 else inputs
        if inputs % group_size or outputs % _PER_WORD:
            return [tensor]
        groups = inputs // group_size
        stored = [
            ("qweight", (inputs, outputs // _PER_WORD), torch.int32),
            ("qzeros", (groups, outputs // _PER_WORD), torch.int32),
            ("scales", (groups, outputs), torch.float16),
        ]
        return [NamedTensor(f"{module}.{field}", shape, dtype) for field, shape, dtype in stored]

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        return {AWQ_NAME: {"quant_method": "awq", "bits": _BITS, "group_size": 128}}

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        from flexgen.formats.integer_samples import sample_integers

        return sample_integers(stored, _BITS, generator)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return {f"{module}.weight": self._encoding(module, tensors) for module in modules}

    def _encoding(self, module: str, tensors: Mapping[str, StoredTensor]) -> Encoding:
        import torch

        words, zeros, scales = (tensors.get(f"{module}.{field}") for field in ("qweight", "qzeros", "scales"))
        found = [each for each in (words, scales, zeros) if each is not None]
        if words is None or scales is None or any(len(each.shape) != 2 for each in found) or (zeros is None and self._with_zeros):
            raise CheckpointError(f"{module} needs matrices qweight, qzeros and scales: config.json says that the weights are {self.name}")
        (inputs, row_words), (groups, outputs) = words.shape, scales.shape
        group_size = self._group_size if self._group_size > 0 and groups > 1 else inputs
        fits = row_words * _PER_WORD == outputs and groups * group_size == inputs and (zeros is None or zeros.shape == (groups, row_words))
        fits = fits and scales.dtype.is_floating_point
        if not fits or any(each.dtype != torch.int32 for each in (words, zeros) if each is not None):
            shapes = ", ".join(f"{each.name.rpartition('.')[2]} {tuple(each.shape)}" for each in found)
            raise CheckpointError(f"{module}: {shapes} do not make a matrix in groups of {self._group_size} inputs in {self.name}")
        parts = tuple(EncodingPart(each, None) for each in found)
        return Encoding(AWQMatrix(group_size=group_size), (outputs, inputs), parts, by_rows=False)
