"""FP8 in blocks: E4M3 with one scale per block of a matrix, per row or per matrix, as DeepSeek-V3 and its successors store linear layers.

The layouts are those that transformers' `FineGrainedFP8Config` describes, experts in 4 bits included, those of `FbgemmFp8Config` (one scale
for each row) and those that vLLM's first tools wrote (one scale for each matrix).  Weights only: activations are not quantized, as in
transformers where it dequantizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexgen.errors import UnsupportedModelError
from flexgen.formats.base import Encoding, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.linear_names import is_encoded
from flexgen.formats.scaled import sample, scaled
from flexgen.formats.stated import Stated

if TYPE_CHECKING:
    import torch

_BLOCKS = {"fp8": (128, 128), "mxfp8": (1, 32)}  # rows and columns that share a scale, where the config does not say it
_BY_ROWS = "fbgemm_fp8"  # one scale for each row
_FP4_BLOCK = (1, 32)
_SCHEMES = ("dynamic", "static")
_BESIDE = ("activation_scale", "input_scale", "qscale_act", "input_scale_ub")  # of activations


class FP8Block(NumberFormat):
    """E4M3 in blocks, and experts of E2M1 beside it.

    Args:
        block: The rows and columns of a block; None if a matrix has one scale.  Each tensor's own scales say it finally.
        kept: The patterns of modules whose weights are plain, as transformers reads them.
        scale_dtype: The dtype of scales, by torch's name.
        fp4_experts: Whether experts are stored in 4 bits.
        static: Whether there are scales of activations, which are not used.
        ending: The end of the names of scales.
    """

    name = "fp8_block"
    runs = True
    carried_as_stored = True

    def __init__(
        self,
        *,
        block: tuple[int, int] | None = _BLOCKS["fp8"],
        kept: Sequence[str] = (),
        scale_dtype: str = "float32",
        fp4_experts: bool = False,
        static: bool = False,
        ending: str = "_scale_inv",
    ) -> None:
        self._block, self._kept, self._scale_dtype = block, list(kept), scale_dtype
        self._fp4_experts, self._static, self._ending = fp4_experts, static, ending

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        method = quantization.get("quant_method")
        if not isinstance(method, str) or method not in (*_BLOCKS, _BY_ROWS):
            return None
        stated = Stated(quantization)
        kept = stated.names("modules_to_not_convert") or stated.names("ignored_layers")
        if method == _BY_ROWS:
            return FP8Block(block=None, kept=kept, ending="_scale")
        codes, scheme = stated.text("fmt", "e4m3"), stated.text("activation_scheme", "dynamic").lower()
        if codes != "e4m3":
            raise UnsupportedModelError(f"the weights are quantized by {method} with the numbers {codes[:40]!r}; only e4m3 is read")
        if scheme not in _SCHEMES:
            raise UnsupportedModelError(f"the weights are quantized by {method} with the unknown activation_scheme {scheme[:40]!r}")
        block = quantization.get("weight_block_size", _BLOCKS[method])  # null stands for one scale
        if block is not None:
            if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
                raise stated.wrong("weight_block_size", "rows and columns, both above 0")
            block = (block[0], block[1])
        power = "uint8" if method == "mxfp8" else "float8_e8m0fnu"
        return FP8Block(
            block=block,
            kept=kept,
            scale_dtype=power if method == "mxfp8" or stated.text("scale_fmt", "") == "ue8m0" else "float32",
            fp4_experts=stated.text("expert_dtype", "") == "fp4",
            static=scheme == "static",
        )

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch
        from transformers.quantizers.quantizers_utils import should_convert_module

        module = tensor.name.removesuffix(".weight")
        if not is_encoded(tensor) or not should_convert_module(module, self._kept or None):
            return [tensor]
        *matrices, rows, columns = tensor.shape
        scale_dtype = getattr(torch, self._scale_dtype)
        if self._fp4_experts and ".experts." in tensor.name:
            codes = NamedTensor(tensor.name, (*matrices, rows, columns // 2), torch.int8)
            grid: tuple[int, ...] = (*matrices, rows, -(-columns // _FP4_BLOCK[1]))
        else:
            codes = NamedTensor(tensor.name, tensor.shape, torch.float8_e4m3fn)
            grid = (*matrices, *(-(-n // size) for n, size in zip((rows, columns), self._block or (rows, columns), strict=True)))
            if self._block is None and not matrices:
                grid = (rows, 1) if self._ending == "_scale" else ()
        found = [codes, NamedTensor(f"{tensor.name}{self._ending}", grid, scale_dtype)]
        if self._static:
            name = f"{module}.activation_scale" if module != tensor.name else f"{tensor.name}_activation_scale"
            found.append(NamedTensor(name, tuple(matrices), torch.float32))
        return found

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        return {"fp8_block_fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]}}

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        return sample(stored, generator)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        import torch

        found = {}
        for name, codes in tensors.items():
            if codes.dtype not in (torch.float8_e4m3fn, torch.int8) or len(codes.shape) not in (2, 3):
                continue
            module = name.removesuffix(".weight")
            names = [f"{name}_scale_inv", f"{name}_scale"]
            if module != name:  # DeepSeek-V4's and Mistral's names
                names += [f"{module}.scale", f"{module}.qscale_weight"]
            scales = next((tensors[each] for each in names if each in tensors), None)
            if scales is None:
                continue
            bits = 4 if codes.dtype == torch.int8 else 8
            beside = [f"{name}_activation_scale", *(f"{module}.{each}" for each in _BESIDE)]
            found[name] = scaled(
                self.name, codes, scales, _FP4_BLOCK if bits == 4 else self._block, bits=bits, tensors=tensors, beside=beside
            )
        return found
