"""The layouts of compressed-tensors (llm-compressor and others): packed integers, 8-bit numbers, NVFP4 and MXFP4, with scales in tensors of
their own.

Only weights are decoded.  Where a config also quantizes activations or the KV cache, these stay in the dtype of computing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen.errors import CheckpointError
from flexgen.formats.base import Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.compressed_schemes import MXFP4, MXFP8, NVFP4, PACKED, Scheme, Schemes, stated_schemes
from flexgen.formats.linear_names import module_of
from flexgen.formats.matrices import Blocks, IntegerRows, rows_of_zeros
from flexgen.formats.scaled import sample, scaled

if TYPE_CHECKING:
    import torch

    from flexgen.kernels.dequantize.groups import Packing

logger = logging.getLogger(__name__)

_BESIDE = (
    "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale",
    "output_scale", "output_zero_point", "output_global_scale",
)  # fmt: skip
_WHOLE_SCALES = ("weight_global_scale", "input_global_scale", "input_scale")  # of which random weights have 1
_SHAPE_BYTES = 16  # two int64
_HALF_BYTES = (NVFP4, MXFP4)  # two numbers in a byte


class CompressedTensors(NumberFormat):
    """Weights as compressed-tensors stores them.

    Args:
        schemes: What the config states; None in the table of formats.
    """

    name = "compressed-tensors"
    runs = True

    def __init__(self, schemes: Schemes | None = None) -> None:
        self._schemes = schemes or Schemes(groups=(), ignored=(), kv_cache=False)

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        schemes = stated_schemes(quantization)
        return None if schemes is None else CompressedTensors(schemes)

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        module = module_of(tensor)
        scheme = self._schemes.planned(module) if module is not None else None
        return [tensor] if module is None or scheme is None else _encoded(module, tensor, scheme)

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        return {f"int{bits}": _packed_integers(bits) for bits in (4, 8)}

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        import torch

        from flexgen.formats.integer_samples import sample_integers

        module, _, field = stored.name.rpartition(".")
        scheme = self._schemes.planned(module)
        if scheme is not None and not scheme.floating:
            return sample_integers(stored, scheme.bits, generator)
        return torch.ones(stored.shape, dtype=stored.dtype) if field in _WHOLE_SCALES else sample(stored, generator)

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        found = {}
        for name in tensors:
            module, _, parameter = name.rpartition(".")
            if parameter == "weight_packed" or (parameter == "weight" and f"{module}.weight_scale" in tensors):
                scheme = self._schemes.stored(module)
                if scheme is None:
                    raise CheckpointError(f"{name} is stored encoded, but no group of quantization_config in config.json names {module}")
                found[f"{module}.weight"] = _StoredModule(module, scheme, tensors).encoding()
        self._tell()
        return found

    def _tell(self) -> None:
        """Say what of the config has no effect here."""
        if quantized := sorted({_words(each.inputs) for each in self._schemes.groups if each.inputs is not None}):
            logger.info(
                "the config also quantizes activations (%s), which stay in the dtype of computing: numbers differ from those of an engine "
                "that rounds them", ", ".join(quantized),
            )  # fmt: skip
        if self._schemes.kv_cache:
            logger.info("the config also asks for a quantized KV cache (kv_cache_scheme), which is ignored")


class _StoredModule:
    """The stored tensors of one module."""

    def __init__(self, module: str, scheme: Scheme, tensors: Mapping[str, StoredTensor]) -> None:
        self._module, self._scheme, self._tensors = module, scheme, tensors
        codes = self._get("weight_packed" if f"{module}.weight_packed" in tensors else "weight")
        self._codes, self._scale = codes, self._get("weight_scale")
        if len(codes.shape) != 2:
            raise self._wrong(codes, "a matrix")

    def encoding(self) -> Encoding:
        """Return the encoding of the weight.

        Raises:
            CheckpointError: The tensors do not have the dtypes and shapes that the config asks for.
        """
        return self._floats() if self._scheme.floating else self._integers()

    def _floats(self) -> Encoding:
        import torch

        halves = self._scheme.stored_as in _HALF_BYTES
        if self._codes.dtype != (torch.uint8 if halves else torch.float8_e4m3fn):
            raise self._wrong(self._codes, "uint8" if halves else "float8_e4m3fn")
        shape = self._codes.shape[0], self._codes.shape[1] * (2 if halves else 1)
        blocks = self._blocks(shape)
        divided = self._scheme.stored_as == NVFP4
        return scaled(
            CompressedTensors.name, self._codes, self._scale, (blocks.rows or shape[0], blocks.columns), bits=4 if halves else 8,
            factor=self._get("weight_global_scale") if divided else None, divided=divided, tensors=self._tensors,
            beside=[f"{self._module}.{each}" for each in _BESIDE],
        )  # fmt: skip

    def _integers(self) -> Encoding:
        import torch

        if not self._scale.dtype.is_floating_point or self._scale.dtype.itemsize == 1:
            raise self._wrong(self._scale, "bfloat16, float16 or float32")
        packing, columns = self._packing()
        shape = self._codes.shape[0], columns
        blocks = self._blocks(shape)
        parts = [EncodingPart(self._codes, 1), EncodingPart(self._scale, blocks.rows)]
        zero_packing = None
        if with_zeros := not self._scheme.symmetric:
            zeros = self._get("weight_zero_point")
            if zeros.dtype.itemsize != 1:
                zero_packing = self._zero_packing(zeros, shape[0])
            elif zeros.shape != self._scale.shape:
                raise self._wrong(zeros, f"{self._scale.shape}, or packed in int32")
            parts.append(EncodingPart(zeros, rows_of_zeros(zero_packing) if zero_packing is not None else blocks.rows))
        elif (zeros := self._tensors.get(f"{self._module}.weight_zero_point")) is not None and zeros.dtype == torch.int32:
            # Packed zero points are those of asymmetric weights; symmetric ones may come with zeros in bytes, which say nothing.
            raise self._wrong(zeros, "no zero points, since config.json says that they are symmetric")
        if with_order := f"{self._module}.weight_g_idx" in self._tensors:
            order = self._get("weight_g_idx")
            if order.shape != (columns,):
                raise self._wrong(order, f"({columns},)")
            parts.append(EncodingPart(order, None))
        matrix = IntegerRows(packing=packing, blocks=blocks, zero_packing=zero_packing, with_zeros=with_zeros, with_order=with_order)
        read = {part.tensor.name for part in parts}
        beside = tuple(name for each in _BESIDE if (name := f"{self._module}.{each}") in self._tensors and name not in read)
        return Encoding(matrix, shape, tuple(parts), beside=beside)

    def _packing(self) -> tuple[Packing, int]:
        """Return how the codes are packed, and the number of columns."""
        import torch

        from flexgen.kernels.dequantize.groups import Packing

        bits, codes = self._scheme.bits, self._codes
        if self._scheme.stored_as != PACKED:
            if codes.dtype != torch.int8:
                raise self._wrong(codes, "int8")
            return Packing(bits=8, signed=True), codes.shape[1]
        if codes.dtype != torch.int32:
            raise self._wrong(codes, "int32")
        dense, padded = Packing(bits=bits), Packing(bits=bits, padded=32 % bits != 0)
        grouped = self._scale.shape[-1] * (self._scheme.group_size or 0)
        columns = next((grouped for each in (dense, padded) if grouped and each.words(grouped) == codes.shape[1]), None)
        columns = columns or self._written_columns() or codes.shape[1] * 32 // bits
        for packing in (dense, padded):  # older versions left a word's last bits unused
            if packing.words(columns) == codes.shape[1]:
                return packing, columns
        raise self._wrong(codes, f"words of {columns} codes of {bits} bits")

    def _written_columns(self) -> int | None:
        """Return the columns that weight_shape states; None if there is none, or its file is not on this machine."""
        stated = self._tensors.get(f"{self._module}.weight_shape")
        if stated is None or stated.nbytes != _SHAPE_BYTES or not stated.path.is_file():
            return None
        return int.from_bytes(stated.small_bytes()[8:], "little", signed=True)

    def _zero_packing(self, zeros: StoredTensor, rows: int) -> Packing:
        """Return how zero points are packed along the rows."""
        import torch

        from flexgen.kernels.dequantize.groups import Packing

        bits = self._scheme.bits
        for packing in (Packing(bits=bits), Packing(bits=bits, padded=32 % bits != 0)):
            if zeros.dtype == torch.int32 and zeros.shape == (packing.words(rows), self._scale.shape[-1]):
                return packing
        raise self._wrong(zeros, f"zero points of {rows} rows, packed in int32")

    def _blocks(self, shape: tuple[int, int]) -> Blocks:
        """Return the blocks that share a scale; the scales have to be those of a matrix of this shape."""
        rows, columns = self._scheme.block_of(shape)
        blocks = Blocks(rows=rows, columns=columns)
        expected = blocks.shape(0, *shape)
        if self._scale.nbytes != expected[0] * expected[1] * self._scale.dtype.itemsize or (rows and self._scale.shape[:1] != expected[:1]):
            raise self._wrong(self._scale, f"{expected}, for {self._scheme.strategy} scales of a matrix of {shape}")
        return blocks

    def _get(self, parameter: str) -> StoredTensor:
        name = f"{self._module}.{parameter}"
        if name not in self._tensors:
            raise CheckpointError(f"{name} is missing, which {self._scheme.stored_as} weights ({self._scheme.group}) need")
        return self._tensors[name]

    def _wrong(self, tensor: StoredTensor, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{tensor.name} is {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}; {self._scheme.stored_as} weights of "
            f"{self._scheme.bits} bits ({self._scheme.group}) need {expected}"
        )


def _packed_integers(bits: int) -> dict[str, Any]:
    """Return the quantization_config of integers in groups of 128."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": PACKED, "config_groups": groups}


def _words(inputs: Mapping[str, Any] | None) -> str:
    inputs = inputs or {}
    return f"{inputs.get('type', 'int')!s:.20} of {inputs.get('num_bits', 8)!s:.8} bits"


def _encoded(module: str, tensor: NamedTensor, scheme: Scheme) -> list[NamedTensor]:
    """Return the tensors that are stored for the weight of a module."""
    import torch

    from flexgen.kernels.dequantize.groups import Packing

    rows, columns = tensor.shape
    block_rows, block_columns = scheme.block_of((rows, columns))
    scales = Blocks(rows=block_rows, columns=block_columns).shape(0, rows, columns)
    stored: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    scale_dtype = tensor.dtype
    if scheme.stored_as == PACKED:
        packing = Packing(bits=scheme.bits)
        stored += [("weight_packed", (rows, packing.words(columns)), torch.int32), ("weight_shape", (2,), torch.int64)]
        if not scheme.symmetric and scheme.strategy != "tensor":
            stored.append(("weight_zero_point", (packing.words(rows), scales[1]), torch.int32))
    elif scheme.stored_as in _HALF_BYTES:
        stored.append(("weight_packed", (rows, columns // 2), torch.uint8))
        scale_dtype = torch.float8_e4m3fn if scheme.stored_as == NVFP4 else torch.uint8
        if scheme.stored_as == NVFP4:
            stored.append(("weight_global_scale", (1,), torch.float32))
    else:
        stored.append(("weight", (rows, columns), torch.float8_e4m3fn if scheme.floating else torch.int8))
        scale_dtype = torch.uint8 if scheme.stored_as == MXFP8 else tensor.dtype
    if not scheme.symmetric and (scheme.stored_as != PACKED or scheme.strategy == "tensor"):
        stored.append(("weight_zero_point", (1,) if scheme.strategy == "tensor" else scales, torch.int8))
    if scheme.ordered:
        stored.append(("weight_g_idx", (columns,), torch.int32))
    stored.append(("weight_scale", (1,) if scheme.strategy == "tensor" else scales, scale_dtype))
    if scheme.inputs is not None and scheme.inputs.get("dynamic") == "local":
        stored.append(("input_global_scale", (1,), torch.float32))
    elif scheme.inputs is not None and not scheme.inputs.get("dynamic"):
        stored.append(("input_scale", (1,), tensor.dtype))
    return [NamedTensor(f"{module}.{parameter}", shape, dtype) for parameter, shape, dtype in stored]
