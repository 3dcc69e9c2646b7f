"""Takes a traced model apart: the units that stream, what stays in memory, what is gathered row by row, and where their bytes are.

Reads headers, never weights; knows no tiers and no budgets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.meta import SkeletonLimits
from flexgen.checkpoint.parameters import ModelSources, parameter_sources
from flexgen.checkpoint.repository import saved_shapes
from flexgen.formats.table import stated_format, without_quantization
from flexgen.models.cuts import cut_units, in_int8, layer_named_in, streamed_uses
from flexgen.models.flow import decoder_layers
from flexgen.models.layers import DecoderLayers
from flexgen.models.parts import ParameterUse, Part
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.skeleton import build_skeleton
from flexgen.models.tracing import ModelTrace, trace_model
from flexgen.models.unit_size import default_unit_bytes
from flexgen.options import INT8
from flexgen.weights.rounded import RoundedSource
from flexgen.weights.rows import RowTable
from flexgen.weights.unit import UnitLayout, WantedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUnits:
    """A model that is cut into units.

    Attributes:
        model: The skeleton.
        trace: The findings of the trace.
        decoder: Its decoder layers.
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
    decoder: DecoderLayers
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
        uses = in_int8(uses, lambda name: tensors.dtype(name) == dtype)
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
        decoder=_named_by_layer(decoder_layers(model, trace), uses),
        sources=sources,
        number_format=headers.number_format,
        parts=parts,
        layouts=layouts,
        residents=tensors.residents(placed),
        tables=tables,
        unused_bytes=sum(sources[name].nbytes for name in unused if sources.kept_as(name) == name),
    )


def _named_by_layer(decoder: DecoderLayers, uses: Sequence[ParameterUse]) -> DecoderLayers:
    """Return the layers, which cannot be divided where the names of units do not tell their layers, since a plan goes by names."""
    if decoder.cut_points:
        for use in uses:
            if layer_named_in(use.module) != decoder.layer_of(use.module):
                return DecoderLayers(model_type=decoder.model_type, undivided=f"{use.module} is not named by its layer")
    return decoder


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
