"""bitsandbytes in 4 bits: NF4 or FP4, whose blocks run over the flattened matrix; scales may be quantized once more.

The shape of a matrix and the constants of its blocks are a JSON text in a stored tensor.  These few bytes are read when the encoded tensors
are looked for.  Where the files are elsewhere, so that nothing is decoded, shapes are those of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flexgen.base.parallel import Parallel, serially
from flexgen.base.strict_json import strict_json
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor
from flexgen.formats.linear_names import contains_any, is_linear_of_layer, module_of
from flexgen.formats.stated import Stated

if TYPE_CHECKING:
    import torch

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MOST_BYTES = 1 << 16  # of a description, or of a table
_BLOCK, _NESTED_BLOCK = 64, 256  # of what transformers writes
_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 32)  # that bitsandbytes has kernels for, the usual ones first

Shapes = Callable[[], Mapping[str, tuple[int, ...]]]


class BitsAndBytes(NumberFormat):
    """NF4 and FP4, by blocks of the flattened matrix.

    Args:
        kind: The kind of numbers that the config states.
        nested: Whether scales are quantized, too.
        skipped: Parts of the names of modules that are plain.
        shapes: The shapes of matrices whose files are elsewhere, by the name of the weight.
    """

    name = "bitsandbytes_4bit"
    runs = True
    carried_as_stored = True
    stored_as_linear = True

    def __init__(
        self, kind: str = "nf4", *, nested: bool = False, skipped: Sequence[object] = (), shapes: Shapes | None = None
    ) -> None:  # fmt: skip
        self._kind, self._nested, self._skipped, self._shapes = kind, nested, tuple(skipped), shapes

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        method, stated = quantization.get("quant_method"), Stated(quantization)
        if method != "bitsandbytes" and not (method is None and (stated.flag("load_in_4bit") or stated.flag("load_in_8bit"))):
            return None
        if not stated.flag("load_in_4bit"):
            raise UnsupportedModelError(
                "the weights are quantized by bitsandbytes to 8 bits (LLM.int8), which is not supported: use a repository with its 4-bit "
                "weights or with the bfloat16, float16 or float32 weights of this model"
            )
        kind, skipped = quantization.get("bnb_4bit_quant_type", "fp4"), quantization.get("llm_int8_skip_modules")
        return BitsAndBytes(
            kind if kind in _KINDS else "nf4",
            nested=bool(quantization.get("bnb_4bit_use_double_quant")),
            skipped=skipped if isinstance(skipped, Sequence) and not isinstance(skipped, str) else (),
        )

    def with_shapes(self, shapes: Shapes) -> NumberFormat:
        return BitsAndBytes(self._kind, nested=self._nested, skipped=self._skipped, shapes=shapes)

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        import torch

        module = module_of(tensor)
        if module is None or not is_linear_of_layer(module) or contains_any(module, self._skipped):
            return [tensor]
        count = -(-math.prod(tensor.shape) // _BLOCK)
        described: dict[str, Any] = {"quant_type": self._kind, "blocksize": _BLOCK, "dtype": "bfloat16", "shape": tensor.shape}
        stored = [
            ("", (-(-math.prod(tensor.shape) // 2), 1), torch.uint8),
            (".absmax", (count,), torch.uint8 if self._nested else torch.float32),
            (".quant_map", (16,), torch.float32),
        ]
        if self._nested:
            described |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.04}
            stored += [(".nested_absmax", (-(-count // _NESTED_BLOCK),), torch.float32), (".nested_quant_map", (256,), torch.float32)]
        stored.append((f"{_STATE}{self._kind}", (len(json.dumps(described)),), torch.uint8))
        return [NamedTensor(f"{tensor.name}{ending}", shape, dtype) for ending, shape, dtype in stored]

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        found = {}
        shapes = self._shapes() if self._shapes is not None else None
        for name in tensors:
            weight, separator, kind = name.partition(_STATE)
            if separator:
                found[weight] = _encoding(self.name, weight, kind, tensors, shapes)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """How one matrix is stored.

    Attributes:
        shape: The rows and columns.
        size: The numbers of a block.
        values: The values of the 16 codes.
        nested_size: The scales that share a scale of their own; 0 if scales are plain numbers.
        nested_values: The values of the 256 codes of scales.
        offset: A number that is added to each scale.
    """

    shape: tuple[int, int]
    size: int
    values: tuple[float, ...]
    nested_size: int = 0
    nested_values: tuple[float, ...] = ()
    offset: float = 0.0

    @property
    def by_rows(self) -> bool:
        """Whether each row begins with a block."""
        return self.shape[1] % self.size == 0 and self.shape[1] % 2 == 0


class _FlatBlocks(NumberFormat):
    """One matrix.  The parts of its encoding are the codes, the scales of blocks and, for quantized ones, the scales of these."""

    runs = True
    carried_as_stored = True
    stored_as_linear = True

    def __init__(self, name: str, blocks: _Blocks) -> None:
        self.name, self._blocks = name, blocks

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        import torch

        from flexgen.kernels.dequantize import tables
        from flexgen.kernels.dequantize.blocks import Codes, NestedScales
        from flexgen.kernels.dequantize.lookup import decode_flat

        blocks, scales = self._blocks, parts[1]
        if blocks.nested_size:
            scales = NestedScales(
                codes=scales, values=tables.on_device(blocks.nested_values, out.device), scales=parts[2], size=blocks.nested_size,
                first=start * blocks.shape[1] // blocks.size, offset=blocks.offset,
            )  # fmt: skip
        codes = Codes(numbers=parts[0].view(torch.uint8), values=tables.on_device(blocks.values, out.device), high_first=True)
        decode_flat(codes, scales, blocks.size, out.view(-1), parallel)


def _encoding(
    name: str, weight: str, kind: str, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]] | None
) -> Encoding:  # fmt: skip
    """Return the encoding of a matrix, from the tensors beside it and, if the files are elsewhere, from the shapes of matrices.

    Raises:
        CheckpointError: They contradict each other, or cannot be read.
    """
    import torch

    state = tensors[f"{weight}{_STATE}{kind}"]
    if kind not in _KINDS:
        raise _broken(state, f"the kind of numbers {kind[:40]!r} is not known")
    codes, scales, table = (_beside(tensors, each, state) for each in (weight, f"{weight}.absmax", f"{weight}.quant_map"))
    blocks = _described(weight, state, tensors, table) if shapes is None else _expected(weight, state, tensors, shapes)
    rows, columns = blocks.shape
    count = -(-rows * columns // blocks.size)
    if codes.nbytes != -(-rows * columns // 2) or math.prod(scales.shape) != count:
        raise _broken(
            state, f"{weight} has {codes.nbytes} bytes and {math.prod(scales.shape)} scales, which are not {rows} by {columns} numbers"
        )
    by_rows = blocks.by_rows
    codes = replace(codes, dtype=torch.uint8, shape=(rows, columns // 2) if by_rows else (codes.nbytes,))
    scales = replace(scales, shape=(rows, columns // blocks.size) if by_rows else (count,))
    parts = [EncodingPart(codes, 1 if by_rows else None), EncodingPart(scales, 1 if by_rows else None)]
    beside = [state.name, table.name]
    if blocks.nested_size:
        nested = _beside(tensors, f"{weight}.nested_absmax", state)
        if math.prod(nested.shape) != -(-count // blocks.nested_size) or scales.dtype != torch.uint8:
            raise _broken(state, f"{nested.name} of {nested.shape} are no scales of the scales in {scales.name}")
        parts.append(EncodingPart(nested, None))
        beside.append(f"{weight}.nested_quant_map")
    elif not scales.dtype.is_floating_point:
        raise _broken(state, f"{scales.name} holds {scales.dtype}, but has no scales of its own")
    return Encoding(_FlatBlocks(name, blocks), blocks.shape, tuple(parts), by_rows=by_rows, beside=tuple(beside))


def _expected(weight: str, state: StoredTensor, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> _Blocks:
    """Return how a matrix is stored whose description is elsewhere, without the values of codes, which only decoding needs."""
    shape, count = shapes.get(weight, ()), math.prod(tensors[f"{weight}.absmax"].shape)
    if len(shape) != 2:
        raise _broken(state, f"the model of config.json has no matrix {weight}: download the repository first, and give its folder")
    size = next((size for size in _BLOCK_SIZES if -(-math.prod(shape) // size) == count), _BLOCK)
    nested = tensors.get(f"{weight}.nested_absmax")
    nested_size = 0 if nested is None else next((n for n in _BLOCK_SIZES[2:] if -(-count // n) == math.prod(nested.shape)), _NESTED_BLOCK)
    return _Blocks(shape=(shape[0], shape[1]), size=size, values=(), nested_size=nested_size)


def _described(weight: str, state: StoredTensor, tensors: Mapping[str, StoredTensor], table: StoredTensor) -> _Blocks:
    """Read the description of a matrix, and its tables of values."""
    try:
        described = strict_json(_read(state), max_values=1000)
    except ValueError as error:
        raise _broken(state, f"it is not valid JSON: {error}") from error
    shape, size = described.get("shape"), described.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        raise _broken(state, f"the shape {str(shape)[:80]} is not that of a matrix")
    if type(size) is not int or size < 2 or size % 2 or size > 1 << 20:
        raise _broken(state, f"blocks of {str(size)[:40]} numbers are not possible")
    blocks = _Blocks(shape=(shape[0], shape[1]), size=size, values=_numbers(table, 16))
    if "nested_blocksize" not in described:
        return blocks
    nested_size, offset = described["nested_blocksize"], described.get("nested_offset")
    if type(nested_size) is not int or not 1 <= nested_size <= 1 << 20 or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise _broken(state, f"scales of {str(nested_size)[:40]} scales with the offset {str(offset)[:40]} are not possible")
    values = _numbers(_beside(tensors, f"{weight}.nested_quant_map", state), 256)
    return replace(blocks, nested_size=nested_size, nested_values=values, offset=float(offset))


def _beside(tensors: Mapping[str, StoredTensor], name: str, state: StoredTensor) -> StoredTensor:
    if name not in tensors:
        raise _broken(state, f"{name} is missing")
    return tensors[name]


def _numbers(tensor: StoredTensor, count: int) -> tuple[float, ...]:
    """Read a table of float32 numbers."""
    import torch

    if tensor.dtype != torch.float32 or math.prod(tensor.shape) != count:
        raise _broken(tensor, f"{tensor.dtype} of the shape {tensor.shape}, not {count} values in float32")
    return tuple(torch.frombuffer(bytearray(_read(tensor)), dtype=torch.float32).tolist())


def _read(tensor: StoredTensor) -> bytes:
    """Return the bytes of a small tensor.

    Raises:
        CheckpointError: There is no such file, it cannot be read, or the tensor is not small.
    """
    if tensor.nbytes > _MOST_BYTES:
        raise _broken(tensor, f"{tensor.nbytes} bytes are too many for what it should hold")
    if not tensor.path.exists():
        raise CheckpointError(
            f"{tensor.path}: bitsandbytes stores the shapes of matrices beside their numbers, so headers are not enough: download the "
            "repository first, and give its folder"
        )
    return tensor.small_bytes()


def _broken(tensor: StoredTensor, reason: str) -> CheckpointError:
    return CheckpointError(f"{tensor.path.name}: {tensor.name}: {reason}")
