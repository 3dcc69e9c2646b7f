"""Cuts a traced model into units: what streams, what stays in memory, what is gathered row by row, and where their bytes are.

Reads headers, never weights; knows no tiers and no budgets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from flexgen.base.quantities import align_up
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.meta import SkeletonLimits
from flexgen.checkpoint.parameters import ModelSources, parameter_sources
from flexgen.checkpoint.repository import saved_shapes
from flexgen.errors import UnsupportedModelError
from flexgen.formats.linear_names import is_linear_of_layer
from flexgen.formats.table import stated_format, without_quantization
from flexgen.models.parts import ParameterUse, Part
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.skeleton import build_skeleton
from flexgen.models.tracing import ModelTrace, is_experts, is_scored_experts, trace_model
from flexgen.models.unit_size import default_unit_bytes
from flexgen.options import INT8
from flexgen.weights.rounded import RoundedSource
from flexgen.weights.rows import RowTable
from flexgen.weights.unit import UnitLayout, WantedTensor

GRANULE_ROWS = 64  # matrix products over odd numbers of rows are slower


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUnits:
    """A model that is cut into units.

    Attributes:
        model: The skeleton.
        trace: The findings of the trace.
        sources: The stored bytes of its parameters.
        number_format: The format in which the parameters are stored, as in ModelSpec.
        parts: For each unit that streams, its parts, in the order of use.
        layouts: The same units as bytes.
        residents: The tensors that stay where computing happens: vectors (norms, biases), position tables and buffers.
        tables: The embeddings whose rows are gathered.
        unused_bytes: The bytes of stored parameters that text generation does not need, such as those of vision towers.
    """

    model: Any
    trace: ModelTrace
    sources: ModelSources
    number_format: str
    parts: Sequence[Sequence[Part]]
    layouts: tuple[UnitLayout, ...]
    residents: UnitLayout
    tables: tuple[RowTable, ...]
    unused_bytes: int


def cut_model(
    config: Any, dtype: torch.dtype, headers: Headers, unit_bytes: int | None = None, *, cpu_compute: str = "auto", device: str = "cpu"
) -> ModelUnits:
    """Trace the model of a config and cut it into units.

    The config is compared with the headers before anything of the size that it states is allocated.

    Args:
        config: The model's transformers config; its quantization_config states the format of the weights.
        dtype: The dtype of computing.
        headers: The headers of the weights, as stored.
        unit_bytes: The approximate size of a unit; None for a default that depends on the model and the device.
        cpu_compute: How linear layers are computed, as in EngineOptions.
        device: Where it is computed: "cpu", "cuda" or "sim".

    Raises:
        UnsupportedModelError: The engine does not support the model, the number format is not known, or there is no layer to compute in
            int8.
        CheckpointError: The headers do not match the model.
    """
    number_format = stated_format(config)
    if number_format is not None and not headers.readable:
        number_format = number_format.with_shapes(functools.partial(saved_shapes, config, dtype))
    stored_bytes, headers = headers.total_bytes, headers.decoded(number_format, dtype)
    check_supported_architecture(config)
    model = build_skeleton(without_quantization(config), dtype, SkeletonLimits.of(headers))
    sources = parameter_sources(model, headers)
    trace = trace_model(model)
    tensors = _Tensors(model, sources, dtype)
    tables = _row_tables(trace, sources, tensors.dtype)
    gathered = frozenset(table.module for table in tables)
    uses = streamed_uses(model, trace, dtype.itemsize, gathered, lambda name: sources[name].sliceable)
    if cpu_compute == INT8:
        uses = _in_int8(uses, lambda name: tensors.dtype(name) == dtype)
    weight_bytes = sum(use.decoded_bytes for use in uses)
    encodings = [tensor.encoding for tensor in headers.tensors.values() if tensor.encoding is not None]
    default = default_unit_bytes(weight_bytes, stored_bytes if encodings else weight_bytes, encodings, device)
    parts = cut_units(uses, unit_bytes or default)
    layouts = tuple(_layout(unit, tensors) for unit in parts)
    streamed = {f"{tensor.module}.{tensor.parameter}" for layout in layouts for tensor in layout.tensors}
    unused = _unused(model, sources, trace)
    placed = streamed | unused | {name for name in sources.names() if name.rpartition(".")[0] in gathered}
    return ModelUnits(
        model=model,
        trace=trace,
        sources=sources,
        number_format=headers.number_format,
        parts=parts,
        layouts=layouts,
        residents=tensors.residents(placed),
        tables=tables,
        unused_bytes=sum(sources[name].nbytes for name in unused if sources.kept_as(name) == name),
    )


# ---------------------------------------------------------------------- the parts that stream


def streamed_uses(
    model: Any, trace: ModelTrace, itemsize: int, gathered: frozenset[str], sliceable: Callable[[str], bool]
) -> list[ParameterUse]:
    """Return the modules whose parameters stream, in the order of use.

    Vectors (norms, biases) stay resident, and so do position tables and modules that a forward returns to.

    Args:
        model: The skeleton.
        trace: The findings of the trace.
        itemsize: The bytes of a number in the dtype of computing.
        gathered: The names of the embeddings whose rows are gathered.
        sliceable: A function that returns whether rows of a parameter (by its name in the state dict) can be read separately.
    """
    modules = dict(model.named_modules())
    output_embeddings = model.get_output_embeddings()
    uses = []
    for name in trace.order:
        module = modules[name]
        names = tuple(own for own, p in module._parameters.items() if p is not None and p.ndim >= 2)
        if not names or name in gathered or name in trace.revisited or isinstance(module, nn.Embedding):
            continue
        numel = sum(module._parameters[own].numel() for own in names)  # type: ignore[union-attr]
        chosen, of = trace.experts_per_token.get(name, (1, 1))
        can_be_cut = name not in trace.read_by and all(sliceable(f"{name}.{own}") for own in names)
        uses.append(
            ParameterUse(
                module=name,
                parameters=names,
                decoded_bytes=numel * itemsize,
                kind=_kind(name, module) if can_be_cut else "whole",
                rows=module._parameters[names[0]].shape[0],  # type: ignore[union-attr]
                flops_per_token=2.0 * numel * (chosen / of),
                head=module is output_embeddings,
                entered_with=trace.read_by.get(name, name),
            )
        )
    return uses


def _kind(name: str, module: nn.Module) -> str:
    """Return how a module whose rows can be read separately may be cut (see ParameterUse)."""
    if is_experts(module):
        return "experts"
    if is_scored_experts(module):
        return "scored_experts"
    needed_whole = name.endswith(".kv_b_proj")  # attention on latents needs it whole
    return "linear" if type(module) is nn.Linear and not needed_whole else "whole"


def _in_int8(uses: Sequence[ParameterUse], in_computed_dtype: Callable[[str], bool]) -> list[ParameterUse]:
    """Return the same uses, the linear layers of decoder layers computed in int8, except for routers and what is kept in float32.

    Raises:
        UnsupportedModelError: There is none.
    """

    def rounds(use: ParameterUse) -> bool:
        is_linear = use.kind == "linear" and not use.head and is_linear_of_layer(use.module)
        return is_linear and all(in_computed_dtype(f"{use.module}.{own}") for own in use.parameters)

    found = [replace(use, in_int8=rounds(use)) for use in uses]
    if not any(use.in_int8 for use in found):
        raise UnsupportedModelError(
            "cpu_compute='int8': this model has no linear layer whose rows are stored apart; experts, and matrices that are stored "
            "transposed, are computed in the dtype"
        )
    return found


def cut_units(uses: Sequence[ParameterUse], unit_bytes: int) -> list[list[Part]]:
    """Divide modules into units: consecutive modules share one of up to `unit_bytes`, and larger modules are cut by rows or by experts.

    A unit stays within one decoder layer, and never mixes the head with anything else.
    """
    units: list[list[Part]] = []
    room, owner = 0, None
    for use in uses:
        layer = (_layer_of(use.module), use.head)
        for start, stop in pairwise(_bounds(use, unit_bytes)):
            size = use.decoded_bytes * (stop - start) // use.rows
            if not units or size > room or layer != owner:
                units.append([])
                room, owner = unit_bytes, layer
            units[-1].append(Part(use=use, unit=len(units) - 1, start=start, stop=stop))
            room -= size
    return units


def _bounds(use: ParameterUse, unit_bytes: int) -> list[int]:
    """Return the rows at which a module is cut: about evenly, a linear layer at multiples that suit matrix products."""
    if use.kind == "whole":
        return [0, use.rows]
    most = max(unit_bytes * use.rows // use.decoded_bytes, 1)
    granule = GRANULE_ROWS if use.kind == "linear" and most >= 4 * GRANULE_ROWS else 1
    pieces = -(-use.rows // (most - most % granule))
    step = align_up(-(-use.rows // pieces), granule)
    return [*range(0, use.rows, step), use.rows]


def _layer_of(module: str) -> str | None:
    """Return the decoder layer's number, which is the first number in a module's name; None if there is none."""
    match = re.search(r"\.(\d+)\.", f".{module}.")
    return match[1] if match else None


# ---------------------------------------------------------------------- their bytes


class _Tensors:
    """The tensors that units bring: where each is stored, and its dtype once decoded."""

    def __init__(self, model: Any, sources: ModelSources, dtype: torch.dtype) -> None:
        self._sources, self._dtype, self._fp32 = sources, dtype, _fp32_patterns(model, dtype)
        self._buffers = dict(model.named_buffers())
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter or buffer, by its name in the state dict."""
        if name in self._buffers:
            return self._buffers[name].dtype
        return torch.float32 if any(pattern.search(name) for pattern in self._fp32) else self._dtype

    def tensor(self, name: str, rows: tuple[int, int] | None = None, *, rounded: bool = False) -> WantedTensor:
        """Return one parameter or buffer, or some of its rows, as numbers or rounded to int8."""
        module, _, parameter = name.rpartition(".")
        source = self._sources[name] if rows is None else self._sources[name].rows(*rows)
        if rounded:
            return WantedTensor(module=module, parameter=parameter, source=RoundedSource(source, self._dtype), dtype=torch.int8)
        return WantedTensor(module=module, parameter=parameter, source=source, dtype=self.dtype(name))

    def residents(self, placed: set[str]) -> UnitLayout:
        """Return the layout of all tensors of the model that are not placed elsewhere."""
        known = (self._parameters | self._buffers.keys()) & set(self._sources.names())
        return UnitLayout.of(-1, "resident", [self.tensor(name) for name in sorted(known - placed)])


def _layout(parts: Sequence[Part], tensors: _Tensors) -> UnitLayout:
    first = parts[0].use.module
    name = first if len(parts) == 1 else f"{first} +{len(parts) - 1}"
    wanted = [
        tensors.tensor(f"{part.use.module}.{parameter}", None if part.is_whole else (part.start, part.stop), rounded=part.use.in_int8)
        for part in parts
        for parameter in part.use.parameters
    ]
    return UnitLayout.of(parts[0].unit, name, wanted)


def _fp32_patterns(model: Any, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """Return patterns of the modules that transformers keeps in float32 whatever the dtype."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    return [re.compile(rf"((^|\.){re.escape(name)}($|\.))") for name in sorted(names)]


def _row_tables(trace: ModelTrace, sources: ModelSources, dtype: Callable[[str], torch.dtype]) -> tuple[RowTable, ...]:
    """Return the embeddings of input ids whose rows can be read one by one."""
    weights = {name: f"{name}.weight" for name in sorted(trace.embeddings)}
    return tuple(
        RowTable(module=name, source=sources[weight], dtype=dtype(weight))
        for name, weight in weights.items()
        if weight in sources and sources[weight].rows_apart
    )


def _unused(model: Any, sources: ModelSources, trace: ModelTrace) -> set[str]:
    """Return the names of stored parameters and buffers that the trace did not use.

    A parameter is used if its module is; a buffer is used if its module, or the parent of its module, was entered.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def is_used(name: str) -> bool:
        module = name.rpartition(".")[0]
        return module in trace.used if name in parameters else bool({module, module.rpartition(".")[0]} & trace.entered)

    return {name for name in sources.names() if not is_used(name)}
