"""The files that a repository of a config would hold: tensor names, shapes, dtypes and offsets.  No numbers are computed or written.

Names and shapes are those that `save_pretrained` would write (original names, per-expert tensors), and so are the files'
headers, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.pytorch_utils import Conv1D

from flexgen.base.quantities import align_up
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.headers import DTYPES, PREFIX_BYTES
from flexgen.checkpoint.meta import LOOSEST_LIMITS, building, parameters_on_meta
from flexgen.formats.base import NamedTensor, NumberFormat
from flexgen.formats.table import stated_format, without_quantization
from flexgen.hub.model_files import SINGLE_FILE

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a config without its weights.

    Raises:
        UnsupportedModelError: The model cannot be built.
        CheckpointError: The config asks for a larger model than any known one.
    """
    with building(config), torch.device("meta"), parameters_on_meta(LOOSEST_LIMITS):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved_tensors(model: PreTrainedModel, dtype: torch.dtype) -> list[NamedTensor]:
    """Return the tensors that `save_pretrained` would store: all floating-point numbers in `dtype`, tied weights once."""
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: x for name, x in model.state_dict().items() if name not in ignored}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return [NamedTensor(name, tuple(x.shape), dtype if x.is_floating_point() else x.dtype) for name, x in state.items()]


def saved_shapes(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `save_pretrained` would store, by name: those of linear layers, also for a Conv1D.

    Raises:
        UnsupportedModelError: The model cannot be built.
        CheckpointError: The config asks for a larger model than any known one.
    """
    model = meta_model(without_quantization(config), dtype)
    return {tensor.name: tensor.shape for tensor in _as_linear(model, saved_tensors(model, dtype))}


def _as_linear(model: PreTrainedModel, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Yield the tensors, the weights of a Conv1D with their dimensions in the order of a linear layer."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for tensor in tensors:
        yield NamedTensor(tensor.name, tensor.shape[::-1], tensor.dtype) if tensor.name in names else tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryTensors:
    """The tensors of a repository that `save_pretrained` would write, in the format that a config states.

    Attributes:
        architecture: The name of the model's class.
        number_format: The format of the encoded tensors; None if all numbers are plain.
        tensors: The stored tensors.
        encoded: The names of those that hold numbers of an encoded one.
    """

    architecture: str
    number_format: NumberFormat | None
    tensors: list[NamedTensor]
    encoded: frozenset[str]

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> RepositoryTensors:
        """Return the tensors for a config; plain floating-point numbers are in `dtype`.

        Raises:
            UnsupportedModelError: The model cannot be built, or the format is not known.
            CheckpointError: The config asks for a larger model than any known one.
        """
        model, number_format = meta_model(without_quantization(config), dtype), stated_format(config)
        tensors: list[NamedTensor] = []
        encoded: set[str] = set()
        saved = saved_tensors(model, dtype)
        stored = _as_linear(model, saved) if number_format is not None and number_format.stored_as_linear else saved
        for tensor, given in zip(saved, stored, strict=True):
            parts = [given] if number_format is None else number_format.encode(given)
            parts = [tensor] if parts == [given] else parts
            encoded |= {part.name for part in parts} if parts != [tensor] else set()
            tensors += parts
        return cls(architecture=type(model).__name__, number_format=number_format, tensors=tensors, encoded=frozenset(encoded))


def sharded(tensors: Iterable[NamedTensor], shard_bytes: int) -> dict[str, list[NamedTensor]]:
    """Return file name -> its tensors in their order in the file.  A tensor larger than `shard_bytes` has a file for itself."""
    shards: list[list[NamedTensor]] = []
    open_shard: list[NamedTensor] = []
    filled = 0
    for tensor in tensors:
        if tensor.nbytes > shard_bytes:
            shards.append([tensor])
            continue
        if filled + tensor.nbytes > shard_bytes:
            shards.append(open_shard)
            open_shard, filled = [], 0
        open_shard.append(tensor)
        filled += tensor.nbytes
    shards += [open_shard] if open_shard else []
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    # safetensors lays the largest numbers first, so that all are aligned, and equally large ones by name
    ordered = (sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)) for shard in shards)
    return dict(zip(names, ordered, strict=True))


def encode_header(tensors: Sequence[NamedTensor]) -> bytes:
    """Return the JSON header of a file that holds `tensors` one after the other; the 8 bytes of its length come before it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded.ljust(align_up(len(encoded), 8))


def headers_of(name: str, files: dict[str, list[NamedTensor]]) -> Headers:
    """Return the headers of files that do not exist.

    Args:
        name: The name of the repository, for messages.
        files: The files, as from `sharded`.
    """
    parsed = {}
    for file_name, tensors in files.items():
        header = encode_header(tensors)
        parsed[file_name] = header, PREFIX_BYTES + len(header) + sum(tensor.nbytes for tensor in tensors)
    return Headers.parsed(Path(name), parsed)
