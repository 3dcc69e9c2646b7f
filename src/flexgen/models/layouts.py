"""A traced model and its headers to layouts: what streams, unit by unit, what stays, and what is gathered.

Reads headers, never weights; knows no tiers and no budgets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.base.quantities import GIB, MIB
from flexgen.checkpoint.parameters import Headers, ModelSources, parameter_sources
from flexgen.io.aligned import plan_extents
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.skeleton import Room, build_skeleton
from flexgen.models.tracing import ModelTrace, trace_model
from flexgen.models.units import UnitPart, cut_units, streamed_uses
from flexgen.weights.rows import RowTable
from flexgen.weights.unit import UnitLayout, UnitTensor, packed_offsets

SMALLEST_UNIT_BYTES = 8 * MIB


def default_unit_bytes(weight_bytes: int) -> int:
    """1 % of the weights within [8 MiB, 1 GiB]; small models are still cut into a few dozen units."""
    return max(min(weight_bytes // 100, GIB), min(SMALLEST_UNIT_BYTES, weight_bytes // 24), 1)


def trace_config(config: Any, dtype: torch.dtype, headers: Headers) -> tuple[Any, ModelSources, ModelTrace]:
    """(skeleton, where its parameters are stored, its trace) of a transformers config.

    The config is compared with the headers before anything as large as it says is made.

    Raises:
        UnsupportedModelError: when the engine would compute the model wrongly, or not at all.
        CheckpointError: when the headers are not those of this model.
    """
    check_supported_architecture(config)
    model = build_skeleton(config, dtype, Room.of(headers))
    sources = parameter_sources(model, headers)
    return model, sources, trace_model(model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """A model, cut into what streams, what stays and what is gathered.

    Attributes:
        units: what streams, in the order of use. streamed: the same as bytes.
        residents, tables, unused_bytes: as in LoadedModel.
        sources: where all of it comes from.
    """

    units: Sequence[Sequence[UnitPart]]
    streamed: tuple[UnitLayout, ...]
    residents: UnitLayout
    tables: tuple[RowTable, ...]
    sources: Sources
    unused_bytes: int


def lay_out(model: Any, trace: ModelTrace, found: ModelSources, dtype: torch.dtype, unit_bytes: int | None) -> Layouts:
    """Cut a model into units of about `unit_bytes` (None chooses), and find their bytes."""
    sources = Sources(found.parameters, found.tied, _fp32_patterns(model, dtype), dtype)
    tables = _row_tables(trace, sources)
    gathered = frozenset(table.module for table in tables)
    uses = streamed_uses(model, trace, dtype.itemsize, gathered, sources.sliceable)
    units = cut_units(uses, unit_bytes or default_unit_bytes(sum(use.decoded_bytes for use in uses)))
    layouts = tuple(_layout(index, parts, sources) for index, parts in enumerate(units))
    streamed = {(tensor.module, tensor.parameter) for layout in layouts for tensor in layout.tensors}
    unused = _unused(model, sources, trace)
    return Layouts(
        units=units,
        streamed=layouts,
        residents=_residents(model, sources, streamed, gathered, unused),
        tables=tuple(tables),
        sources=sources,
        unused_bytes=sum(sources[name].nbytes for name in unused if sources.tied_to(name) == name),
    )


class Sources:
    """Stored sources of parameters by state-dict name, tied names resolved, and the dtype each is wanted in."""

    def __init__(self, sources: Mapping[str, Any], tied: Mapping[str, str], fp32: Sequence[re.Pattern[str]], dtype: torch.dtype) -> None:
        self._sources, self._tied, self._fp32, self._dtype = sources, tied, fp32, dtype

    def __contains__(self, name: str) -> bool:
        return self._tied.get(name, name) in self._sources

    def __getitem__(self, name: str) -> Any:
        return self._sources[self._tied.get(name, name)]

    def names(self) -> list[str]:
        return [*self._sources, *self._tied]

    def tied_to(self, name: str) -> str:
        return self._tied.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if any(pattern.search(name) for pattern in self._fp32) else self._dtype

    def sliceable(self, name: str) -> bool:
        return self[name].sliceable


def _fp32_patterns(model: Any, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """Modules that transformers keeps in float32 whatever the dtype."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    return [re.compile(rf"((^|\.){re.escape(name)}($|\.))") for name in sorted(names)]


def _row_tables(trace: ModelTrace, sources: Sources) -> list[RowTable]:
    """Embeddings of input ids, where their rows can be read one by one."""
    tables = []
    for name in sorted(trace.embeddings):
        weight = f"{name}.weight"
        if weight not in sources or not sources[weight].is_view:
            continue
        piece = sources[weight].pieces[0]
        tables.append(
            RowTable(
                module=name, path=piece.path, offset=piece.offset, num_rows=piece.shape[0], row_elements=piece.shape[1],
                stored_dtype=piece.dtype, dtype=sources.dtype(weight),
            )
        )  # fmt: skip
    return tables


def _unused(model: Any, sources: Sources, trace: ModelTrace) -> frozenset[str]:
    """Stored parameters of modules that the trace did not use, and buffers of what it never came near."""
    unused = []
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sources.names():
        module = name.rpartition(".")[0]
        used = module in trace.used if name in parameters else {module, module.rpartition(".")[0]} & trace.entered
        if not used:
            unused.append(name)
    return frozenset(unused)


def _layout(index: int, parts: Sequence[UnitPart], sources: Sources) -> UnitLayout:
    wanted = []
    for part in parts:
        for parameter in part.use.parameters:
            name = f"{part.use.module}.{parameter}"
            source = sources[name]
            if (part.start, part.stop) != (0, part.use.rows):
                source = source.rows(part.start, part.stop)
            wanted.append((part.use.module, parameter, source, sources.dtype(name)))
    first = parts[0].use.module
    return make_layout(index, first if len(parts) == 1 else f"{first} +{len(parts) - 1}", wanted)


def make_layout(index: int, name: str, wanted: Sequence[tuple[str, str, Any, torch.dtype]]) -> UnitLayout:
    """Lay (module, parameter, source, dtype) tensors out for reading and for packing."""
    ranges = [(piece.path, piece.offset, piece.nbytes) for _, _, source, _ in wanted for piece in source.pieces]
    extents, positions, staging_bytes = plan_extents(ranges)
    sizes = [torch.Size(source.shape).numel() * dtype.itemsize for _, _, source, dtype in wanted]
    offsets, packed_bytes = packed_offsets(sizes)
    tensors, at = [], 0
    for (module, parameter, source, dtype), offset in zip(wanted, offsets, strict=True):
        tensors.append(
            UnitTensor(
                module=module, parameter=parameter, shape=tuple(source.shape), dtype=dtype, source=source,
                positions=tuple(positions[at : at + len(source.pieces)]), packed_offset=offset,
            )
        )  # fmt: skip
        at += len(source.pieces)
    return UnitLayout(
        index=index, name=name, tensors=tuple(tensors), extents=tuple(extents),
        staging_bytes=max(staging_bytes, 1), packed_bytes=max(packed_bytes, 1),
    )  # fmt: skip


def _residents(
    model: Any, sources: Sources, streamed: set[tuple[str, str]], gathered: frozenset[str], unused: frozenset[str]
) -> UnitLayout:
    """Everything stored that neither streams nor is gathered."""
    wanted = []
    buffers = dict(model.named_buffers())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(set(sources.names())):
        module, _, own = name.rpartition(".")
        if (module, own) in streamed or module in gathered or name in unused or (name not in parameters and name not in buffers):
            continue
        dtype = buffers[name].dtype if name in buffers else sources.dtype(name)
        wanted.append((module, own, sources[name], dtype))
    return make_layout(-1, "resident", wanted)
