"""The tensors of GGUF files, and the parameters that they become by transformers' own tables and processors.

These are called, not repeated; models that they do not place have processors of their own (gguf_processors.py).  Processors rearrange
NumPy arrays (rows of llama's queries and keys, fused projections).  They are run on arrays without numbers that consist of pieces of stored
tensors; where they compute with the numbers (norms stored plus one), they are run again on the numbers when those have been read, in
float32 as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from flexgen.checkpoint.conversion import Traced, Untraceable
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.gguf_arrays import MovedArray
from flexgen.checkpoint.pieces import put, whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import Encoding, EncodingPart, NumberFormat, StoredTensor
from flexgen.formats.gguf import blocks_of
from flexgen.hub.gguf_model import GGUFModel
from flexgen.hub.gguf_rope import FACTORS

PLAIN: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD = "output.weight"
_MOST_COMPUTED = 1 << 24  # numbers of a tensor that is computed, not moved: norms have some thousands


class GGUFHeaders(Headers):
    """The tensors of a model in GGUF; those in blocks are bytes, (..., bytes of a row).

    Args:
        model: The headers of the files.

    Raises:
        CheckpointError: As for `Headers`.
    """

    def __init__(self, model: GGUFModel) -> None:
        self.model = model
        stored = {}
        for path, tensor in model.tensors:
            dtype = PLAIN.get(tensor.type.name)
            shape = tensor.shape if dtype else (*tensor.shape[:-1], tensor.shape[-1] // tensor.type.block * tensor.type.block_bytes)
            stored[tensor.name] = StoredTensor(
                name=tensor.name, path=path, offset=tensor.offset, nbytes=tensor.nbytes, dtype=dtype or torch.uint8, shape=shape
            )
        super().__init__(model.parts[0].path, [stored])
        self.architecture = model.architecture
        self.readable = all(part.path.is_file() for part in model.parts)

    def decoded(self, number_format: NumberFormat | None, dtype: torch.dtype) -> Headers:
        """Return the headers as if tensors in blocks had been stored in `dtype`; the types of tensors stand in the files themselves."""
        tensors = dict(self.tensors)
        for _, tensor in self.model.tensors:
            if tensor.type.name in PLAIN:
                continue
            stored = self.tensors[tensor.name]
            tensors[tensor.name] = StoredTensor(
                name=tensor.name, path=stored.path, offset=stored.offset, nbytes=math.prod(tensor.shape) * dtype.itemsize, dtype=dtype,
                shape=tensor.shape, encoding=Encoding(blocks_of(tensor.type.name), tensor.shape, (EncodingPart(stored, 1),)),
            )  # fmt: skip
        found = Headers(self.folder, [tensors])
        found.number_format, found.architecture, found.readable = "gguf", self.architecture, self.readable
        return found


def gguf_sources(model: PreTrainedModel, headers: Headers) -> tuple[list[ParameterSource], set[str]]:
    """Return the sources of parameters by transformers' tables, and the names of stored tensors that belong to none.

    Raises:
        CheckpointError: A tensor cannot become what the tables say.
        UnsupportedModelError: The tables do not know the architecture.
    """
    assert headers.architecture is not None
    mapping = _Processing(model, headers.architecture)
    sources: list[ParameterSource] = []
    unexpected: set[str] = set()
    for name, tensor in headers.tensors.items():
        if name == FACTORS:  # read with the config
            continue
        placed = mapping.placed(tensor)
        if placed is None:
            unexpected.add(name)
        else:
            sources += [placed] if isinstance(placed, ParameterSource) else []
    return [*sources, *mapping.merged()], unexpected


class _Processing:
    """Transformers' names and processor for one model."""

    def __init__(self, model: PreTrainedModel, architecture: str) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        from flexgen.checkpoint.gguf_processors import INTERLEAVED, NAMED_AS, OWN_PROCESSORS

        model_type: str = model.config.model_type
        kind = OWN_PROCESSORS.get(model_type) or TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor: Any = kind(config=model.config.to_dict())
        self._join = _interleaved if model_type in INTERLEAVED else _joined
        self._experts: dict[str, dict[str, MovedArray]] = {}
        self._processor._set_moe_expert_tensor = self._collect
        try:
            self._names: Mapping[str, str] = get_gguf_hf_weights_map(
                _shallow(model),  # pyright: ignore[reportArgumentType]
                self._processor,
                NAMED_AS.get(model_type, model_type),
            )
        except NotImplementedError as error:
            raise UnsupportedModelError(f"GGUF has no names for the tensors of model type {model_type!r}") from error

    def placed(self, tensor: StoredTensor) -> ParameterSource | bool | None:
        """Return the source that a stored tensor becomes; True for a part of merged experts, None for a tensor that has no name."""
        known = tensor.name in self._names or tensor.name.removesuffix(".weight") in self._names
        if not known:
            return None
        if tensor.name == _HEAD:  # processors take it for an attention's
            return ParameterSource(name=self._names[_HEAD], shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        try:
            array, name = self._process(MovedArray(Traced.of(tensor)), tensor.name)
        except Exception:  # noqa: BLE001 - processors fail in any way on arrays without numbers
            return self._computed(tensor)
        if name is None:
            return True
        return None if name not in self._names else _source(self._names[name], array.tensor)

    def merged(self) -> list[ParameterSource]:
        """Return the sources of the experts that were collected: the gate's rows, and behind them or between them the up projection's.

        Raises:
            CheckpointError: One of the two is missing.
        """
        sources = []
        for target, parts in self._experts.items():
            if parts.keys() == {"down"}:
                sources.append(_source(target, parts["down"].tensor))
            elif parts.keys() == {"gate", "up"}:
                sources.append(self._join(target, _source(target, parts["gate"].tensor), _source(target, parts["up"].tensor)))
            else:
                raise CheckpointError(f"{target} is stored in the parts {', '.join(sorted(parts))}; gate and up belong together")
        return sources

    def _collect(self, weights: Any, parsed_parameters: object, hf_name: str, w: str) -> None:
        """Take the place of a processor's method that merges experts in memory."""
        self._experts.setdefault(hf_name, {})[w] = weights

    def _process(self, array: Any, name: str) -> tuple[Any, str | None]:
        result = self._processor.process(weights=array, name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}})
        return result.weights, result.name

    def _computed(self, tensor: StoredTensor) -> ParameterSource:
        """Return the source of a tensor whose numbers the processor changes."""
        if math.prod(tensor.shape) > _MOST_COMPUTED:
            raise CheckpointError(f"{tensor.name} of shape {tensor.shape} would have to be computed, which is done for small tensors only")
        try:
            array, name = self._process(np.zeros(tensor.shape, dtype=np.float32), tensor.name)
            target = self._names[str(name)]
        except Exception as error:
            raise CheckpointError(f"transformers cannot convert {tensor.name} of shape {tensor.shape}: {error}") from error
        convert: Callable[[Sequence[torch.Tensor]], torch.Tensor] = partial(self._compute, tensor.name)
        return ParameterSource(
            name=target, shape=tuple(array.shape), dtype=tensor.dtype, pieces=whole(tensor), convert=convert, convert_dtype=torch.float32
        )

    def _compute(self, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        array, _ = self._process(tensors[0].cpu().numpy(), name)
        return torch.from_numpy(np.ascontiguousarray(array))


def _source(name: str, x: torch.Tensor) -> ParameterSource:
    if not isinstance(x, Traced):
        raise Untraceable(f"{name} was made of nothing stored")
    return ParameterSource(name=name, shape=tuple(x.shape), dtype=x.dtype, pieces=x.pieces)


def _joined(name: str, one: ParameterSource, other: ParameterSource) -> ParameterSource:
    """Return one source behind another along dimension 1; they may be of different types."""
    if (one.shape[0], one.shape[2:]) != (other.shape[0], other.shape[2:]):
        raise CheckpointError(f"{name} cannot be made of parts of shape {one.shape} and {other.shape}")
    rows = one.shape[1]
    moved = tuple(replace(piece, start=put(piece.start, 1, piece.start[1] + rows)) for piece in other.pieces)
    return replace(one, shape=put(one.shape, 1, rows + other.shape[1]), pieces=one.pieces + moved)


def _interleaved(name: str, one: ParameterSource, other: ParameterSource) -> ParameterSource:
    """Return a source whose last dimension holds a number of one and a number of the other in turn."""
    if one.shape != other.shape:
        raise CheckpointError(f"{name} cannot be made of parts of shape {one.shape} and {other.shape}")
    pieces = [
        replace(piece, start=(*piece.start[:-1], 2 * piece.start[-1] + place), every=2)
        for place, source in enumerate((one, other))
        for piece in source.pieces
    ]
    return replace(one, shape=(*one.shape[:-1], 2 * one.shape[-1]), pieces=tuple(pieces))


def _shallow(model: PreTrainedModel) -> SimpleNamespace:
    """Return what transformers' tables ask of a model: its names, and those of the model without its head.

    They would go through all modules, and make the table of the architecture anew for each.
    """
    base = getattr(model, model.base_model_prefix, None)
    within = SimpleNamespace(config=model.config, state_dict=base.state_dict, named_children=list) if base is not None else None
    children = [] if within is None else [(model.base_model_prefix, within)]
    return SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=lambda: children)
