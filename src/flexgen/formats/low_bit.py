"""Published low-bit formats, as they show in headers: which stored tensors stand for one tensor of the model, and how many bytes.

For planning: nothing here decodes a number, and the engine refuses these formats by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexgen.checkpoint.headers import StoredTensor
from flexgen.checkpoint.parameters import Headers, quantization_of, refuse_quantization
from flexgen.checkpoint.repository import NamedTensor
from flexgen.checkpoint.sources import Piece
from flexgen.errors import CheckpointError
from flexgen.hub.diagnose import some

ByteRange = tuple[Path, int, int]  # (file, offset, bytes)

_MXFP4_GROUP = 32  # numbers of 4 bits that share a scale of 8 bits (OCP Microscaling Formats 1.0)
_MXFP4_BLOCK_BYTES = _MXFP4_GROUP // 2
_MXFP4_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_FP8_BLOCK = 128  # rows, and columns, that share a float32 scale (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)
_FP8_SCALE = "_scale_inv"
_FP8_MODULES = ("_proj.weight", "_proj_with_mqa.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that holds some of what an encoded one is made of.

    Attributes:
        rows: of the encoded tensor, that one row of this one stands for.
    """

    tensor: StoredTensor
    rows: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor of the model that is stored in parts: the shape it has when decoded, and the parts."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def ranges(self, piece: Piece) -> Iterator[ByteRange]:
        """What has to be read for the rows that `piece` of the decoded tensor touches."""
        row_elements = math.prod(self.shape[1:])
        start = piece.first // row_elements
        stop = -(-(piece.first + piece.nbytes // piece.dtype.itemsize) // row_elements)
        for part in self.parts:
            first, last = start // part.rows, -(-stop // part.rows)
            row_bytes = part.tensor.nbytes // part.tensor.shape[0]
            yield part.tensor.path, part.tensor.offset + first * row_bytes, (last - first) * row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """One published format.

    Attributes:
        name: in ModelSpec.number_format.
        encode: the stored tensors of one that `save_pretrained` would write: itself where the format leaves it alone.
        find: the encoded tensors among stored ones, by the name of the decoded one.
    """

    name: str
    encode: Callable[[NamedTensor], list[NamedTensor]]
    find: Callable[[Mapping[str, StoredTensor]], dict[str, Encoded]]


def published_format(config: Any) -> NumberFormat | None:
    """The format of a config's weights, by its quantization_config; None where they are plain numbers.

    Raises:
        UnsupportedModelError: when the format is not known here.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    found = FORMATS.get(method) if isinstance(method, str) else None
    if found is None or (found is FP8_BLOCK and (block is None or list(block) != [_FP8_BLOCK, _FP8_BLOCK])):
        raise refuse_quantization(quantization)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedHeaders:
    """Headers as they would be if the weights were stored as plain numbers.

    Attributes:
        number_format: as in ModelSpec.
        headers: of tensors in their decoded shapes; offsets of those that are encoded mean nothing.
        encoded: what these are really stored as, by name.
    """

    number_format: str
    headers: Headers
    encoded: Mapping[str, Encoded]

    def ranges(self, pieces: Iterable[Piece]) -> list[ByteRange]:
        """What has to be read for these pieces."""
        ranges: list[ByteRange] = []
        for piece in pieces:
            if piece.tensor.name in self.encoded:
                ranges += self.encoded[piece.tensor.name].ranges(piece)
            else:
                ranges.append((piece.path, piece.offset, piece.nbytes))
        return ranges


def decoded_headers(headers: Headers, number_format: NumberFormat | None, dtype: torch.dtype) -> DecodedHeaders:
    """What the headers would say if the weights had been stored in `dtype`; the headers themselves where they are plain (None).

    Raises:
        CheckpointError: when the tensors are not stored as the format has it.
    """
    if number_format is None:
        return DecodedHeaders(number_format=_most_common_dtype(headers), headers=headers, encoded={})
    encoded = number_format.find(headers.tensors)
    consumed = {part.tensor.name for each in encoded.values() for part in each.parts}
    plain = {name: tensor for name, tensor in headers.tensors.items() if name not in consumed}
    low_bit = [name for name, tensor in plain.items() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1]
    if not encoded or low_bit:
        what = f"{some(low_bit)} without scales" if low_bit else "none of its tensors is"
        raise CheckpointError(f"{headers.folder}: config.json says that the weights are {number_format.name}, but {what}")
    for name, each in encoded.items():
        first = each.parts[0].tensor
        nbytes = math.prod(each.shape) * dtype.itemsize
        plain[name] = StoredTensor(name=name, path=first.path, offset=first.offset, nbytes=nbytes, dtype=dtype, shape=each.shape)
    return DecodedHeaders(number_format=number_format.name, headers=Headers(headers.folder, [plain]), encoded=encoded)


def _most_common_dtype(headers: Headers) -> str:
    """Name of the dtype that most of the stored bytes are of."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in headers.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return dtype_name(max(sizes, key=lambda dtype: sizes[dtype]))


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _encode_mxfp4(tensor: NamedTensor) -> list[NamedTensor]:
    if not tensor.name.endswith(_MXFP4_EXPERTS):
        return [tensor]
    experts, inputs, outputs = tensor.shape
    groups = (experts, outputs, inputs // _MXFP4_GROUP)
    return [
        NamedTensor(f"{tensor.name}_blocks", (*groups, _MXFP4_BLOCK_BYTES), torch.uint8),
        NamedTensor(f"{tensor.name}_scales", groups, torch.uint8),
    ]


def _find_mxfp4(tensors: Mapping[str, StoredTensor]) -> dict[str, Encoded]:
    found = {}
    for name, blocks in tensors.items():
        scales = tensors.get(name.removesuffix("_blocks") + "_scales")
        if scales is None or blocks.shape != (*scales.shape, _MXFP4_BLOCK_BYTES):
            continue
        experts, outputs, groups = scales.shape
        shape = (experts, groups * _MXFP4_GROUP, outputs)
        found[name.removesuffix("_blocks")] = Encoded(shape, (Part(blocks, 1), Part(scales, 1)))
    return found


def _encode_fp8_block(tensor: NamedTensor) -> list[NamedTensor]:
    if not tensor.name.endswith(_FP8_MODULES) or len(tensor.shape) != 2:
        return [tensor]
    scales = tuple(-(-n // _FP8_BLOCK) for n in tensor.shape)
    return [
        NamedTensor(tensor.name, tensor.shape, torch.float8_e4m3fn),
        NamedTensor(tensor.name + _FP8_SCALE, scales, torch.float32),
    ]


def _find_fp8_block(tensors: Mapping[str, StoredTensor]) -> dict[str, Encoded]:
    found = {}
    for name, weight in tensors.items():
        scales = tensors.get(name + _FP8_SCALE)
        if scales is not None and scales.shape == tuple(-(-n // _FP8_BLOCK) for n in weight.shape):
            found[name] = Encoded(weight.shape, (Part(weight, 1), Part(scales, _FP8_BLOCK)))
    return found


MXFP4 = NumberFormat(name="mxfp4", encode=_encode_mxfp4, find=_find_mxfp4)
FP8_BLOCK = NumberFormat(name="fp8_block", encode=_encode_fp8_block, find=_find_fp8_block)
FORMATS: Mapping[str, NumberFormat] = {"mxfp4": MXFP4, "fp8": FP8_BLOCK}  # by quant_method
