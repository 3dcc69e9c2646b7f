"""The folder that a conversion writes, as values: which tensors lie in which file, and what config.json says.  Reads and writes nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.base.quantities import counted, format_size
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.headers import PREFIX_BYTES
from flexgen.checkpoint.repository import encode_header, headers_of
from flexgen.errors import UnsupportedModelError
from flexgen.formats.base import NamedTensor, StoredTensor
from flexgen.formats.flexgen_v0 import NAME as PAPER
from flexgen.formats.flexgen_v0 import encoded as encoded_as_the_paper
from flexgen.hub.model_files import SINGLE_FILE
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.targets import Targets, find_targets

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 10**9
_LAYOUT_VERSION = "0.20.1"  # of compressed-tensors, whose layout is followed
_QUANTIZATION = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of the source, and what is written for it.

    Attributes:
        source: The tensor as it is stored; encoded if it is in a low-bit format.
        written: The tensors that are written: itself, or those of its rounded form.
        rounded: Whether it is rounded.
    """

    source: StoredTensor
    written: tuple[NamedTensor, ...]
    rounded: bool

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.written)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights that is to be written.

    Attributes:
        name: The name of the file.
        items: What it is made of, in the order of the source.
    """

    name: str
    items: tuple[Item, ...]

    @property
    def tensors(self) -> list[NamedTensor]:
        """The tensors in their order in the file, which is that of the safetensors library: the largest numbers first, then by name."""
        written = [tensor for item in self.items for tensor in item.written]
        return sorted(written, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))

    @property
    def header(self) -> bytes:
        """What precedes the numbers in the file."""
        encoded = encode_header(self.tensors)
        return len(encoded).to_bytes(PREFIX_BYTES, "little") + encoded

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(item.nbytes for item in self.items)

    def offsets(self) -> dict[str, int]:
        """Return the offset of each tensor from the start of the file."""
        offsets, position = {}, len(self.header)
        for tensor in self.tensors:
            offsets[tensor.name] = position
            position += tensor.nbytes
        return offsets


def lay_out(headers: Headers, targets: Targets, settings: QuantizeSettings, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Divide what is written into files of at most `shard_bytes`; what one tensor becomes stays together."""
    items = [_item(tensor, tensor.name in targets.rounded, settings) for tensor in headers.tensors.values()]
    shards = list(_divided(items, shard_bytes))
    if len(shards) == 1:
        return [Shard(SINGLE_FILE, shards[0])]
    return [Shard(f"model-{index:05}-of-{len(shards):05}.safetensors", shard) for index, shard in enumerate(shards, 1)]


def _divided(items: Iterable[Item], shard_bytes: int) -> Iterator[tuple[Item, ...]]:
    shard, filled = list[Item](), 0
    for item in items:
        if shard and filled + item.nbytes > shard_bytes:
            yield tuple(shard)
            shard, filled = [], 0
        shard.append(item)
        filled += item.nbytes
    if shard:
        yield tuple(shard)


def _item(tensor: StoredTensor, rounded: bool, settings: QuantizeSettings) -> Item:
    plain = NamedTensor(tensor.name, tensor.shape, tensor.dtype)
    if not rounded:
        return Item(tensor, (plain,), rounded)
    return Item(tensor, tuple(encoded_as_the_paper(plain) if settings.is_paper else packed(plain, settings)), rounded)


def check_rounded_once(name: str, shards: Iterable[Shard], settings: QuantizeSettings, *, allow: bool) -> None:
    """Refuse to round weights that are in a low-bit format already, as llama.cpp's `llama-quantize` does, or warn of it.

    Args:
        name: The name of the model, for messages.
        shards: What is written.
        settings: What is asked for.
        allow: Whether it is asked for all the same.

    Raises:
        UnsupportedModelError: Some of the weights are in a low-bit format.
    """
    pairs = [(item, item.source.encoding) for shard in shards for item in shard.items if item.rounded]
    twice = [(item, encoding) for item, encoding in pairs if encoding is not None]
    if not twice:
        return
    before = sum(part.tensor.nbytes for _, encoding in twice for part in encoding.parts)
    after = sum(item.nbytes for item, _ in twice)
    formats = ", ".join(sorted({encoding.format.name for _, encoding in twice}))
    said = (
        f"{name} has {counted(len(twice), 'matrix', 'matrices')} in {formats} already, {format_size(before)}; rounded again to "
        f"{settings.weight_format} they take {format_size(after)}, and are less exact than either format"
    )
    if not allow:
        raise UnsupportedModelError(f"{said}: run the model as it is, or convert it with `flexgen convert --allow-requantize`")
    logger.warning("%s", said)


def packed(tensor: NamedTensor, settings: QuantizeSettings) -> list[NamedTensor]:
    """Return the tensors of a rounded matrix in the layout "pack-quantized" of compressed-tensors."""
    outputs, inputs = tensor.shape
    groups, per_word = inputs // settings.group_size, 32 // settings.bits_of(tensor.name)
    return [
        NamedTensor(f"{tensor.name}_packed", (outputs, inputs // per_word), torch.int32),
        NamedTensor(f"{tensor.name}_scale", (outputs, groups), scale_dtype(tensor.dtype)),
        NamedTensor(f"{tensor.name}_zero_point", (-(-outputs // per_word), groups), torch.int32),
        NamedTensor(f"{tensor.name}_shape", (2,), torch.int64),
    ]


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the scales of a tensor: its own, by which other tools choose the dtype of the decoded weights."""
    return torch.float32 if dtype == torch.float64 else dtype


def quantization_config(settings: QuantizeSettings, targets: Targets) -> dict[str, Any]:
    """Return what config.json says about the weights."""
    ignore = list(targets.ignore)
    if settings.is_paper:
        return {"quant_method": PAPER, "bits": settings.bits, "group_size": settings.group_size, "ignore": ignore}
    groups = {"group_0": _group(["Linear"], settings.bits, settings.group_size)}
    if targets.eight_bits:  # names come before classes
        groups["group_1"] = _group(list(targets.eight_bits), 8, settings.group_size)
    return {
        "quant_method": "compressed-tensors",
        "version": _LAYOUT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(targets: list[str], bits: int, group_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size,
        "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized"}


def written_config(config: Mapping[str, Any], settings: QuantizeSettings, targets: Targets) -> dict[str, Any]:
    """Return config.json of the converted model."""

    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in values.items() if name not in _QUANTIZATION}
        return {name: plain(value) if isinstance(value, dict) else value for name, value in kept.items()}

    return plain(config) | {"quantization_config": quantization_config(settings, targets)}


def planned(headers: Headers, config: Any, settings: QuantizeSettings, *, name: str) -> tuple[Headers, Any]:
    """Return the headers and the transformers config that the converted model would have.

    Args:
        headers: The headers of the source, decoded where they are in a low-bit format.
        config: The transformers config of the source.
        settings: What is asked for.
        name: The name of the model, for messages.

    Raises:
        OptionError: See `find_targets`.
        UnsupportedModelError: See `find_targets` and `check_rounded_once`.
    """
    targets = find_targets(config, headers, settings)
    shards = lay_out(headers, targets, settings)
    check_rounded_once(name, shards, settings, allow=False)
    files = {shard.name: shard.tensors for shard in shards}
    made = deepcopy(config)
    made.quantization_config = quantization_config(settings, targets)
    return headers_of(name, files), made
