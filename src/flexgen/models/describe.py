"""Describes a model as numbers for the planner: a model on this machine, one known by its headers, or one known by its config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.repository import RepositoryTensors, headers_of, sharded
from flexgen.errors import UnsupportedModelError
from flexgen.formats.plain import dtype_name
from flexgen.kv.format import KVFormat, default_kv_format
from flexgen.models.expert_sums import SUM_BYTES, ExpertLayer, pair_numbers
from flexgen.models.experts import expert_layer, scored_expert_layer
from flexgen.models.operations import OperationCounter, untraced_operations
from flexgen.models.parts import Part
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.units import ModelUnits, cut_model
from flexgen.models.weightless import is_scored_experts
from flexgen.passes.geometry import LayerKV, by_geometry
from flexgen.plan.machine import int8_name
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.weights.unit import UnitLayout

SHARD_BYTES = 5 * 10**9  # the size of the files in most repositories


def describe_headers(
    headers: Headers,
    config: Any,
    dtype: torch.dtype,
    *,
    name: str,
    kv_format: KVFormat | None = None,
    cpu_compute: str = "auto",
    sparse_attention: float | None = None,
    device: str = "cpu",
) -> ModelSpec:
    """Describe the model of these headers.

    Args:
        headers: The headers of the weight files, which need not be on this machine.
        config: The model's transformers config; its quantization_config states the format of the weights.
        dtype: The dtype of computing.
        name: The name of the repository.
        kv_format: The format of keys and values; None for `default_kv_format`.
        cpu_compute: How linear layers are computed, as in EngineOptions.
        sparse_attention: The share of positions that generated tokens keep; None for all.
        device: Where it is computed: "cpu", "cuda" or "sim".

    Raises:
        ModelError: The architecture, the number format or the headers are not supported.
    """
    kv_format = kv_format or default_kv_format(dtype)
    units = cut_model(config, dtype, headers, cpu_compute=cpu_compute, device=device)
    return model_spec(config, units, dtype, name=name, kv_format=kv_format, sparse_attention=sparse_attention)


def describe_config(
    config: Any,
    dtype: torch.dtype,
    *,
    stored: torch.dtype,
    name: str,
    kv_format: KVFormat | None = None,
    cpu_compute: str = "auto",
    sparse_attention: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
) -> ModelSpec:
    """Describe the model of a config as if `save_pretrained` had written it.

    Args:
        config: The model's transformers config; its quantization_config states the format of the weights.
        dtype: The dtype of computing.
        stored: The dtype of the plain weights in the files.
        name: The name of the repository.
        kv_format: The format of keys and values; None for `default_kv_format`.
        cpu_compute: How linear layers are computed, as in EngineOptions.
        sparse_attention: The share of positions that generated tokens keep; None for all.
        shard_bytes: The size of the files.
        device: Where it is computed: "cpu", "cuda" or "sim".

    Raises:
        UnsupportedModelError: The architecture or the number format is not supported.
    """
    check_supported_architecture(config)
    tensors = RepositoryTensors.of(config, stored).tensors
    headers = headers_of(name, sharded(tensors, shard_bytes))
    given: dict[str, Any] = {"kv_format": kv_format, "cpu_compute": cpu_compute, "sparse_attention": sparse_attention, "device": device}
    return describe_headers(headers, config, dtype, name=name, **given)


def model_spec(
    config: Any, units: ModelUnits, dtype: torch.dtype, *, name: str, kv_format: KVFormat, sparse_attention: float | None = None
) -> ModelSpec:
    """Return what the planner needs to know about a model that was cut into units.

    Raises:
        UnsupportedModelError: The config states no context length, or generated tokens are to leave out values that are also keys.
    """
    if sparse_attention is not None and any(each.geometry.latent for each in units.trace.layers):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} caches latents, which are keys and values at once: all are read for the scores, and sparse "
            "attention would save nothing; leave out sparse_attention"
        )
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise UnsupportedModelError(f"model type {config.model_type!r} states no max_position_embeddings")
    tail = kv_format.tail
    hidden, kept_as = int(text.hidden_size), units.sources.kept_as
    tied = {kept_as(f"{tensor.module}.{tensor.parameter}") for layout in units.layouts for tensor in layout.tensors}
    untied = [table for table in units.tables if kept_as(f"{table.module}.weight") not in tied]
    return ModelSpec(
        name=name,
        model_type=config.model_type,
        number_format=units.number_format,
        dtype=dtype_name(dtype),
        decoded_from=_decoded_from(units),
        kv_format=kv_format.name,
        sparse_attention=sparse_attention,
        units=tuple(_unit_spec(parts, layout) for parts, layout in zip(units.parts, units.layouts, strict=True)),
        kv_groups=tuple(
            KVGroupSpec(
                num_layers=len(members),
                layers=_decoder_layers(units, members),
                bytes_per_token=kv_format.key_bytes(geometry) + kv_format.value_bytes(geometry),
                attention_flops_per_pair=sum(each.flops_per_pair for each in members) / len(members),
                window=geometry.reach,
                exact_bytes_per_token=0 if tail is None else tail.key_bytes(geometry) + tail.value_bytes(geometry),
                slot_bytes_per_token=0 if (slot := kv_format.disk_slot(geometry, PAGE_TOKENS)) is None else slot.page_bytes // PAGE_TOKENS,
                value_bytes_per_token=0 if sparse_attention is None else kv_format.value_bytes(geometry),
                queries_per_key=1 if sparse_attention is None else _queries_per_key(members),
                key_heads=1 if sparse_attention is None else geometry.key_heads,
            )
            for geometry, members in by_geometry(units.trace.layers).items()
        ),
        resident_bytes=units.residents.decoded_bytes,
        embedding_bytes=sum(table.num_rows * table.row_elements * table.dtype.itemsize for table in untied),
        embedding_row_bytes=sum(table.row_bytes for table in units.tables),
        hidden_size=hidden,
        intermediate_size=max(_widest(units.parts), hidden),
        vocab_size=int(text.vocab_size),
        max_position_embeddings=context,
        operations=units.trace.num_operations + untraced_operations(units.parts),
        expert_numbers_per_token=_expert_numbers(units),
        expert_bytes_per_token=_expert_bytes(units, dtype),
    )


def _decoder_layers(units: ModelUnits, members: Sequence[LayerKV]) -> tuple[int, ...]:
    """Return the `layers` of a KVGroupSpec; none where the decoder layers are not known."""
    return tuple(units.decoder.of_kv[each.layer] for each in members) if units.decoder.undivided is None else ()


def _queries_per_key(layers: Sequence[LayerKV]) -> int:
    """Return how many query heads share a key head of layers with equal geometries, from the FLOPs of their two products."""
    geometry = layers[0].geometry
    flops = sum(each.flops_per_pair for each in layers) / len(layers)
    return max(round(flops / (2 * geometry.key_heads * (geometry.key_dim + geometry.value_dim))), 1)


def _unit_spec(parts: Sequence[Part], layout: UnitLayout) -> UnitSpec:
    encoded = layout.carried_bytes != layout.decoded_bytes
    return UnitSpec(
        name=layout.name,
        disk_bytes=layout.stored_bytes,
        decoded_bytes=layout.decoded_bytes,
        encoded_bytes=layout.carried_bytes if encoded else None,
        flops_per_token=sum(part.flops_per_token for part in parts),
        int8_flops_per_token=sum(part.flops_per_token for part in parts if part.use.in_int8),
        head=parts[0].use.head,
        plain=layout.plain,
    )


def _decoded_from(units: ModelUnits) -> dict[str, int]:
    """Return the decoded bytes of the tensors that are decoded, by the format or dtype that they are stored in."""
    sizes: dict[str, float] = {}
    rounded = {f"{part.use.module}.{each}" for parts in units.parts for part in parts if part.use.in_int8 for each in part.use.parameters}
    for tensor in (tensor for layout in units.layouts for tensor in layout.tensors if not tensor.plain):
        pieces = units.sources[f"{tensor.module}.{tensor.parameter}"].pieces
        whole = sum(math.prod(piece.shape) for piece in pieces)
        for piece in pieces:
            encoding = piece.tensor.encoding
            name = dtype_name(piece.dtype) if encoding is None else encoding.format.name
            name = int8_name(name) if f"{tensor.module}.{tensor.parameter}" in rounded else name
            sizes[name] = sizes.get(name, 0) + tensor.nbytes * math.prod(piece.shape) / whole
    return {name: round(size) for name, size in sizes.items()}


def _expert_numbers(units: ModelUnits) -> int:
    """Return how many numbers grouped products hold at a time for a token and all experts that it chooses, in any layer at most."""
    found = (
        chosen * pair_numbers(outputs, hidden, normed=layer.norm is not None) for chosen, layer, outputs, hidden in _expert_layers(units)
    )
    return max(found, default=0)


def _expert_bytes(units: ModelUnits, dtype: torch.dtype) -> int:
    """Return the bytes that elementwise operations of a token's experts read and write in all layers: gates, norms and sums."""
    found = 0
    for chosen, layer, outputs, hidden in _expert_layers(units):
        with torch.no_grad(), OperationCounter() as counter:
            layer.gate(torch.empty(1, outputs, dtype=dtype, device="meta"))
            layer.normed(torch.empty(1, hidden, dtype=dtype, device="meta"))
        found += chosen * (counter.num_bytes + hidden * (dtype.itemsize + SUM_BYTES))
    return found


def _expert_layers(units: ModelUnits) -> Iterator[tuple[int, ExpertLayer, int, int]]:
    """Yield, for each layer of experts, how many a token chooses, how they compute, and the outputs of their two products."""
    for name, (chosen, _) in units.trace.experts_per_token.items():
        experts: Any = units.model.get_submodule(name)
        layer = scored_expert_layer(experts) if is_scored_experts(experts) else expert_layer(experts)
        first, second = (experts._parameters[each].shape[1:] for each in (layer.first, "down_proj"))
        place = 1 if layer.is_transposed else 0
        yield chosen, layer, first[place], second[place]


def _widest(units: Sequence[Sequence[Part]]) -> int:
    return max((part.use.rows for parts in units for part in parts if part.use.kind == "linear" and not part.use.head), default=0)
