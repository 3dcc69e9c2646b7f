"""Decoding, and products of experts, on tensors without memory, so that a device's kernels are compiled for all tensors of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexgen.checkpoint.pieces import Piece
from flexgen.checkpoint.sources import ParameterSource
from flexgen.kernels.grouped import GroupedKernels
from flexgen.kernels.triton_support import compiling
from flexgen.models.assemble import AssembledModel
from flexgen.models.expert_sums import ExpertLayer, GroupedRows
from flexgen.models.experts import expert_layer, scored_expert_layer
from flexgen.models.weightless import is_experts, is_scored_experts
from flexgen.weights.binder import encoded_places
from flexgen.weights.encoded import EncodedNumbers
from flexgen.weights.unit import DEVICE_ALIGNMENT, UnitForm, UnitLayout, UnitTensor

META = torch.device("meta")


def decode_without_memory(model: AssembledModel) -> None:
    """Decode one of each kind of tensors that a device decodes, as it does."""
    known: set[object] = set()
    with compiling():
        for layout in (*_layouts(model), *(table.layout for table in model.tables)):
            data = _bytes_of(layout)
            for tensor in layout.tensors:
                if tensor.source.carried_as_stored and (kind := _kind(tensor)) not in known:
                    known.add(kind)
                    tensor.numbers(data, UnitForm.CARRIED, _without_memory)


def multiply_without_memory(model: AssembledModel, kernels: GroupedKernels, mean_rows: Sequence[int]) -> None:
    """Multiply by each kind of groups of experts that arrive together, and add the results.

    Args:
        model: The model.
        kernels: The kernels of the device.
        mean_rows: How many rows an expert may have on average, one number for each size of tiles.
    """
    if not kernels.covers(model.dtype):
        return
    known: set[object] = set()
    for name, tensors in _experts(model, kernels):
        module = model.bound.model.get_submodule(name)
        scored = is_scored_experts(module)
        layer = scored_expert_layer(module) if scored else expert_layer(module)
        choices = 1 if scored else model.experts_per_token[name][0]
        shapes = tuple((own, *_form(each)) for own, each in sorted(tensors.items()))
        if (kind := (type(module), choices, layer.num_experts, shapes)) not in known:
            known.add(kind)
            # Routers weigh in the dtype of computing, or in float32.
            for weights in (None,) if scored else {model.dtype, torch.float32}:
                for mean in mean_rows:
                    _add(layer, kernels, tensors, -(-mean * layer.num_experts // choices), choices, model.dtype, weights)


def _add(
    layer: ExpertLayer, kernels: GroupedKernels, tensors: dict[str, Any], rows: int, choices: int, dtype: torch.dtype,
    weights: torch.dtype | None,
) -> None:  # fmt: skip
    """Add the outputs of experts for so many rows."""
    hidden = layer.matrices(tensors, "down_proj")[0].shape[2]
    x, experts = torch.empty(rows, hidden, dtype=dtype, device=META), torch.empty(rows, choices, dtype=torch.int64, device=META)
    own = None if weights is None else torch.empty(rows, choices, dtype=weights, device=META)
    with torch.no_grad():
        GroupedRows(layer, kernels, x, experts, own).add(tensors, 0)


def _experts(model: AssembledModel, kernels: GroupedKernels) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the names of experts modules, each with the tensors that one unit brings of it: decoded, and as they are stored."""
    modules = {name for name, module in model.bound.model.named_modules() if is_experts(module) or is_scored_experts(module)}
    for layout in _layouts(model):
        encoded, data = encoded_places(layout, model.bound, kernels), _bytes_of(layout)
        decoded: dict[str, dict[str, Any]] = defaultdict(dict)
        stored: dict[str, dict[str, Any]] = {}
        for tensor in layout.tensors:
            if tensor.module in modules:
                decoded[tensor.module][tensor.parameter] = _without_memory(tensor)
        for (module, parameter), places in encoded.items():
            numbers = decoded[module][parameter]
            matrices = places.within(data, numbers.dtype)
            stored.setdefault(module, dict(decoded[module]))[parameter] = EncodedNumbers(matrices, lambda numbers=numbers: numbers)
        yield from (*decoded.items(), *stored.items())


def _form(bound: Tensor | EncodedNumbers) -> tuple[object, ...]:
    """Return what distinguishes a tensor from others for kernels."""
    if isinstance(bound, EncodedNumbers):
        matrices = bound.matrices
        parts = matrices.codes, matrices.scales, *(() if matrices.zeros is None else (matrices.zeros,))
        return (
            matrices.shape,
            matrices.group,
            matrices.zero,
            *((each.shape, each.stride(), each.dtype, each.storage_offset()) for each in parts),
        )
    return bound.shape, bound.stride(), bound.dtype


def _layouts(model: AssembledModel) -> tuple[UnitLayout, ...]:
    return *model.layouts, model.residents


def _bytes_of(layout: UnitLayout) -> Tensor:
    return torch.empty(layout.carried_bytes, dtype=torch.uint8, device=META)


def _without_memory(tensor: UnitTensor) -> Tensor:
    return tensor.view(torch.empty(tensor.nbytes, dtype=torch.uint8, device=META), 0)


def _kind(tensor: UnitTensor) -> tuple[object, ...]:
    """Return what distinguishes the decoding of a tensor from that of others."""
    assert isinstance(tensor.source, ParameterSource)
    places = tuple(at % DEVICE_ALIGNMENT for at in tensor.carried_at)
    return tensor.shape, tensor.dtype, places, tuple(map(_kind_of_piece, tensor.source.pieces))


def _kind_of_piece(piece: Piece) -> tuple[object, ...]:
    encoding = piece.tensor.encoding
    assert encoding is not None
    number_format = type(encoding.format), repr(sorted(vars(encoding.format).items()))  # its settings
    return number_format, encoding.shape, piece.first, piece.shape, piece.strides, piece.start, piece.every
