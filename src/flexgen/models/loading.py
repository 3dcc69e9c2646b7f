"""From a model folder to everything the engine executes: bound skeleton, unit layouts, KV groups, ModelSpec.

Reads headers and configs, never weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexgen.errors import UnsupportedModelError
from flexgen.memory.direct_io import plan_extents
from flexgen.memory.rows import RowTable
from flexgen.memory.unit import UnitLayout, UnitTensor, packed_offsets
from flexgen.models.checkpoint import Checkpoint, check_supported_number_format, parameter_sources
from flexgen.models.describe import UnitPart, cut_units, module_plans, streamed_uses
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.rope import recompute_length
from flexgen.models.skeleton import BoundModel, build_skeleton
from flexgen.models.trace import LayerKV, ModelTrace, trace_model
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.sizes import GIB, MIB

SMALLEST_UNIT_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to be executed, without a byte of its weights.

    Attributes:
        bound: the skeleton with its hooks. layouts: what streams, in order.
        residents: small tensors and buffers that always live on the device, as one layout.
        tables: embeddings whose rows are gathered. layers: KV per attention layer. spec: for the planner.
        recompute_length: when a sequence has more tokens than this for the first time, its keys change and are computed anew.
        unused_bytes: stored parameters that text does not need, such as those of vision towers.
    """

    bound: BoundModel
    layouts: tuple[UnitLayout, ...]
    residents: UnitLayout
    tables: tuple[RowTable, ...]
    layers: tuple[LayerKV, ...]
    spec: ModelSpec
    dtype: torch.dtype
    total_bytes: int
    recompute_length: int | None
    unused_bytes: int


def default_unit_bytes(weight_bytes: int) -> int:
    """1 % of the weights within [8 MiB, 1 GiB]; small models are still cut into a few dozen units."""
    return max(min(weight_bytes // 100, GIB), min(SMALLEST_UNIT_BYTES, weight_bytes // 24), 1)


def load_model(folder: Path, config: Any, dtype: torch.dtype, *, unit_bytes: int | None = None) -> LoadedModel:
    """Describe the model in `folder`.

    Args:
        config: its transformers config. dtype: to compute in.
        unit_bytes: size of a unit; None chooses.

    Raises:
        ModelError: when the architecture, the number format or the files cannot be served.
    """
    check_supported_number_format(config)
    check_supported_architecture(config)
    model = build_skeleton(config, dtype)
    trace = trace_model(model)
    checkpoint = Checkpoint(folder)
    found = parameter_sources(model, checkpoint)
    sources = _Sources(found.parameters, found.tied, _fp32_patterns(model, dtype), dtype)
    tables = _row_tables(trace, sources)
    gathered = frozenset(table.module for table in tables)
    uses = streamed_uses(model, trace, dtype.itemsize, gathered, sources.sliceable)
    weight_bytes = sum(use.decoded_bytes for use in uses)
    units = cut_units(uses, unit_bytes or default_unit_bytes(weight_bytes))
    layouts = tuple(_layout(index, parts, sources) for index, parts in enumerate(units))
    streamed = {(tensor.module, tensor.parameter) for layout in layouts for tensor in layout.tensors}
    unused = _unused(model, sources, trace)
    residents = _residents(model, sources, streamed, gathered, unused)
    bound = BoundModel(model, module_plans(units), sorted(gathered))
    spec = _spec(config, folder, units, layouts, residents, tables, trace.layers, sources)
    return LoadedModel(
        bound=bound, layouts=layouts, residents=residents, tables=tuple(tables), layers=trace.layers, spec=spec,
        dtype=dtype, total_bytes=checkpoint.total_bytes, recompute_length=recompute_length(config),
        unused_bytes=sum(sources[name].nbytes for name in unused if sources.tied_to(name) == name),
    )  # fmt: skip


class _Sources:
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


def _row_tables(trace: ModelTrace, sources: _Sources) -> list[RowTable]:
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


def _unused(model: Any, sources: _Sources, trace: ModelTrace) -> frozenset[str]:
    """Stored parameters of modules that the trace did not use, and buffers of what it never came near."""
    unused = []
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sources.names():
        module = name.rpartition(".")[0]
        used = module in trace.used if name in parameters else {module, module.rpartition(".")[0]} & trace.entered
        if not used:
            unused.append(name)
    return frozenset(unused)


def _layout(index: int, parts: Sequence[UnitPart], sources: _Sources) -> UnitLayout:
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
    model: Any, sources: _Sources, streamed: set[tuple[str, str]], gathered: frozenset[str], unused: frozenset[str]
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


def _spec(
    config: Any,
    folder: Path,
    units: Sequence[Sequence[UnitPart]],
    layouts: Sequence[UnitLayout],
    residents: UnitLayout,
    tables: Sequence[RowTable],
    layers: Sequence[LayerKV],
    sources: _Sources,
) -> ModelSpec:
    text = config.get_text_config(decoder=True)
    itemsize = sources.dtype("").itemsize
    groups: dict[tuple[int | None, ...], list[LayerKV]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise UnsupportedModelError(f"model type {config.model_type!r} states no max_position_embeddings")
    hidden = int(text.hidden_size)
    tied = {sources.tied_to(f"{t.module}.{t.parameter}") for layout in layouts for t in layout.tensors}
    untied = [table for table in tables if sources.tied_to(f"{table.module}.weight") not in tied]
    return ModelSpec(
        name=folder.name,
        model_type=config.model_type,
        units=tuple(_unit_spec(parts, layout) for parts, layout in zip(units, layouts, strict=True)),
        kv_groups=tuple(
            KVGroupSpec(
                num_layers=len(members),
                bytes_per_token=members[0].elements_per_token * itemsize,
                attention_flops_per_pair=sum(each.flops_per_pair for each in members) / len(members),
                window=members[0].window or members[0].chunk,
            )
            for members in groups.values()
        ),
        resident_bytes=residents.packed_bytes,
        embedding_bytes=sum(table.num_rows * table.row_elements * table.dtype.itemsize for table in untied),
        embedding_row_bytes=sum(table.row_bytes for table in tables),
        hidden_size=hidden,
        intermediate_size=max(_widest(units), hidden),
        vocab_size=int(text.vocab_size),
        max_position_embeddings=context,
    )


def _unit_spec(parts: Sequence[UnitPart], layout: UnitLayout) -> UnitSpec:
    return UnitSpec(
        name=layout.name,
        disk_bytes=sum(extent.size for extent in layout.extents),
        decoded_bytes=layout.packed_bytes,
        flops_per_token=sum(part.use.flops_per_token * (part.stop - part.start) / part.use.rows for part in parts),
        head=parts[0].use.head,
        plain=layout.plain,
    )


def _widest(units: Sequence[Sequence[UnitPart]]) -> int:
    return max((part.use.rows for parts in units for part in parts if part.use.kind == "linear" and not part.use.head), default=0)
