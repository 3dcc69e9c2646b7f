"""A model as numbers, for the planner: of a model that is here, of headers that are elsewhere, or of a config alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch

from flexgen.checkpoint.parameters import Headers
from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.checkpoint.sources import Piece
from flexgen.errors import UnsupportedModelError
from flexgen.formats.low_bit import DecodedHeaders, decoded_headers, dtype_name, published_format
from flexgen.io.direct_io import plan_extents
from flexgen.kv.format import KVFormat, PlainKV
from flexgen.models.layouts import Layouts, lay_out, trace_config
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.tracing import ModelTrace
from flexgen.models.units import UnitPart
from flexgen.passes.geometry import by_geometry
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.weights.unit import UnitLayout

SHARD_BYTES = 5 * 10**9  # of most repositories' files


def describe_headers(headers: Headers, config: Any, dtype: torch.dtype, *, name: str) -> ModelSpec:
    """The model of these headers, also when its weights are in a published low-bit format, which the engine refuses.

    Args:
        headers: of files that need not be here.
        config: its transformers config; quantization_config says what format the weights are in.
        dtype: to compute in. name: of the repository.

    Raises:
        ModelError: when the architecture, the number format or the headers are not understood.
    """
    decoded = decoded_headers(headers, published_format(config), dtype)
    model, sources, trace = trace_config(_without_quantization(config), dtype, decoded.headers)
    layouts = lay_out(model, trace, sources, dtype, unit_bytes=None)
    return model_spec(config, layouts, trace, decoded, name=name, kv_format=PlainKV(dtype))


def describe_config(config: Any, dtype: torch.dtype, *, stored: torch.dtype, name: str, shard_bytes: int = SHARD_BYTES) -> ModelSpec:
    """The model of a config, as if somebody had saved it.

    Args:
        stored: dtype of the plain weights in the files. shard_bytes: size of the files.
        config, dtype, name: as in `describe_headers`.

    Raises:
        UnsupportedModelError: when the architecture or the number format is not understood.
    """
    check_supported_architecture(config)
    tensors = saved_tensors(meta_model(_without_quantization(config), stored), stored)
    if (number_format := published_format(config)) is not None:
        tensors = [part for tensor in tensors for part in number_format.encode(tensor)]
    return describe_headers(headers_of(name, sharded(tensors, shard_bytes)), config, dtype, name=name)


def _without_quantization(config: Any) -> Any:
    """The config of the same model with plain weights."""
    plain = deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        part.__dict__.pop("quantization_config", None)
    return plain


def model_spec(config: Any, layouts: Layouts, trace: ModelTrace, decoded: DecodedHeaders, *, name: str, kv_format: KVFormat) -> ModelSpec:
    """What the planner needs to know of a model that was laid out.

    Raises:
        UnsupportedModelError: when the config states no context length.
    """
    text = config.get_text_config(decoder=True)
    sources = layouts.sources
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise UnsupportedModelError(f"model type {config.model_type!r} states no max_position_embeddings")
    hidden = int(text.hidden_size)
    tied = {sources.tied_to(f"{t.module}.{t.parameter}") for layout in layouts.streamed for t in layout.tensors}
    untied = [table for table in layouts.tables if sources.tied_to(f"{table.module}.weight") not in tied]
    return ModelSpec(
        name=name,
        model_type=config.model_type,
        number_format=decoded.number_format,
        dtype=dtype_name(sources.dtype("")),
        units=tuple(_unit_spec(parts, layout, decoded) for parts, layout in zip(layouts.units, layouts.streamed, strict=True)),
        kv_groups=tuple(
            KVGroupSpec(
                num_layers=len(members),
                bytes_per_token=kv_format.key_bytes(geometry) + kv_format.value_bytes(geometry),
                attention_flops_per_pair=sum(each.flops_per_pair for each in members) / len(members),
                window=geometry.reach,
            )
            for geometry, members in by_geometry(trace.layers).items()
        ),
        resident_bytes=layouts.residents.packed_bytes,
        embedding_bytes=sum(table.num_rows * table.row_elements * table.dtype.itemsize for table in untied),
        embedding_row_bytes=sum(table.row_bytes for table in layouts.tables),
        hidden_size=hidden,
        intermediate_size=max(_widest(layouts.units), hidden),
        vocab_size=int(text.vocab_size),
        max_position_embeddings=context,
    )


def _unit_spec(parts: Sequence[UnitPart], layout: UnitLayout, decoded: DecodedHeaders) -> UnitSpec:
    # memory/ knows them by a protocol; these were made by models/
    pieces = cast("list[Piece]", [piece for tensor in layout.tensors for piece in tensor.source.pieces])
    extents, _, _ = plan_extents(decoded.ranges(pieces))
    return UnitSpec(
        name=layout.name,
        disk_bytes=sum(extent.size for extent in extents),
        decoded_bytes=layout.packed_bytes,
        flops_per_token=sum(part.use.flops_per_token * (part.stop - part.start) / part.use.rows for part in parts),
        head=parts[0].use.head,
        plain=layout.plain and not any(piece.tensor.name in decoded.encoded for piece in pieces),
    )


def _widest(units: Sequence[Sequence[UnitPart]]) -> int:
    return max((part.use.rows for parts in units for part in parts if part.use.kind == "linear" and not part.use.head), default=0)
