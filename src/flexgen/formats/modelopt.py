"""What NVIDIA's Model Optimizer writes: NVFP4 (E2M1 in groups of 16 with E4M3 scales), FP8 with one scale per matrix, row or block, MXFP8.

The layouts are those that its unified export for Hugging Face writes.  Weights only: the scales of activations and of the KV cache are for
kernels that quantize these, and are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import Encoding, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.linear_names import is_encoded
from flexgen.formats.scaled import sample, scaled
from flexgen.formats.stated import Stated

if TYPE_CHECKING:
    import torch

_GROUP = 16
_FP4 = ("NVFP4", "W4A16_NVFP4")
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8")
_MIXED = "MIXED_PRECISION"
_BLOCKS = {"FP8_PB_WO": (128, 128), "MXFP8": (1, 32)}
_BESIDE = ("input_scale", "k_scale", "v_scale", "output_scale")


class ModelOpt(NumberFormat):
    """NVFP4 and FP8 as ModelOpt exports them.

    Args:
        algorithm: The algorithm of the weights, by ModelOpt's name; each tensor's own dtypes and shapes say finally how it is stored.
        excluded: The patterns of modules whose weights are plain.
    """

    name = "modelopt"
    runs = True
    carried_as_stored = True

    def __init__(self, algorithm: str = "NVFP4", excluded: Sequence[str] = ()) -> None:
        self._algorithm, self._excluded = algorithm, tuple(excluded)

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        if not str(quantization.get("quant_method") or "").lower().startswith("modelopt"):
            return None
        stated = Stated(quantization)
        settings = stated.inner("quantization") or stated
        algorithm = settings.text("quant_algo", "").upper()
        if not algorithm:
            raise settings.wrong("quant_algo", f"one of {', '.join((*_FP4, *_FP8, _MIXED))}")
        of_layers = {each.text("quant_algo", "no algorithm").upper() for _, each in settings.objects("quantized_layers")}
        for each in sorted(of_layers if algorithm == _MIXED and of_layers else {algorithm}):
            if each not in (*_FP4, *_FP8):
                raise UnsupportedModelError(
                    f"the weights are quantized by ModelOpt with {each[:40]}, which is not supported; known: {', '.join((*_FP4, *_FP8))}"
                )
        return ModelOpt(algorithm, settings.names("exclude_modules") or settings.names("ignore"))

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch

        module = tensor.name.removesuffix(".weight")
        if not is_encoded(tensor) or len(tensor.shape) != 2 or any(fnmatchcase(module, each) for each in self._excluded):
            return [tensor]
        rows, columns = tensor.shape
        if self._algorithm in _FP4:
            found = [
                NamedTensor(tensor.name, (rows, columns // 2), torch.uint8),
                NamedTensor(f"{tensor.name}_scale", (rows, columns // _GROUP), torch.float8_e4m3fn),
                NamedTensor(f"{tensor.name}_scale_2", (), torch.float32),
            ]
        else:
            block = _BLOCKS.get(self._algorithm)
            grid = () if block is None else (-(-rows // block[0]), -(-columns // block[1]))
            found = [
                NamedTensor(tensor.name, tensor.shape, torch.float8_e4m3fn),
                NamedTensor(
                    f"{tensor.name}_scale",
                    (rows,) if self._algorithm == "FP8_PER_CHANNEL_PER_TOKEN" else grid,
                    torch.uint8 if self._algorithm == "MXFP8" else torch.float32,
                ),
            ]
        return found + ([NamedTensor(f"{module}.input_scale", (), torch.float32)] if self._algorithm in ("NVFP4", "FP8") else [])

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        algorithms = {"modelopt_fp4": "NVFP4", "modelopt_fp8": "FP8"}
        return {name: {"quant_method": "modelopt", "quant_algo": algorithm} for name, algorithm in algorithms.items()}

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        return sample(stored, generator)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        import torch

        found = {}
        for name, codes in tensors.items():
            scales, factor = tensors.get(f"{name}_scale"), tensors.get(f"{name}_scale_2")
            if scales is None or codes.dtype not in (torch.uint8, torch.float8_e4m3fn) or len(codes.shape) not in (2, 3):
                continue
            module = name.removesuffix(".weight")
            if f"{module}.pre_quant_scale" in tensors:
                raise CheckpointError(
                    f"{codes.path.name}: {module} has a pre_quant_scale, by which its inputs would have to be multiplied; "
                    "this is not supported: use a repository without AWQ or SmoothQuant"
                )
            fp4 = codes.dtype == torch.uint8
            if fp4 != (factor is not None) or (fp4 and scales.dtype != torch.float8_e4m3fn):
                raise CheckpointError(
                    f"{codes.path.name}: {name} is stored neither as NVFP4 nor as FP8: {codes.dtype} with scales in {scales.dtype}"
                    + (f" and {name}_scale_2" if factor is not None else "")
                )
            stated = (1, _GROUP) if fp4 else (1, 32) if scales.dtype == torch.uint8 else _BLOCKS.get(self._algorithm)
            found[name] = scaled(
                self.name, codes, scales, stated, bits=4 if fp4 else 8, factor=factor, tensors=tensors,
                beside=[f"{module}.{each}" for each in _BESIDE],
            )  # fmt: skip
        return found
