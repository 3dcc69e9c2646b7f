"""From a model folder to the parts that the engine executes: the bound skeleton, its units, its KV and its ModelSpec.

Reads headers and configs, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexgen.checkpoint.files import Checkpoint, Headers
from flexgen.errors import EngineError
from flexgen.formats.base import Encoding
from flexgen.formats.table import check_supported_number_format
from flexgen.formats.warming import smallest_of_each_kind
from flexgen.io.direct_io import File
from flexgen.kv.format import KVFormat, default_kv_format
from flexgen.models.describe import model_spec
from flexgen.models.refusals import check_supported_architecture
from flexgen.models.rope import recompute_length, rope_regime
from flexgen.models.skeleton import BoundModel
from flexgen.models.stage import Stage
from flexgen.models.stage_units import units_of
from flexgen.models.units import ModelUnits, cut_model
from flexgen.passes.calls import AttentionCall
from flexgen.passes.geometry import LayerKV, by_geometry
from flexgen.plan.model import ModelSpec
from flexgen.plan.stages.spec import stage_spec
from flexgen.weights.rows import RowTable
from flexgen.weights.unit import UnitLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembledModel:
    """A model, or a pipeline stage of it, taken apart into what the engine executes, without its weights.

    Attributes:
        bound: The skeleton with its hooks.
        layouts: The units that stream, in the order of use.
        residents: Small tensors and buffers that always live where computing happens, as one layout.
        tables: Embeddings whose rows are gathered.
        layers: The KV of each attention layer.
        spec: The model as numbers, for the planner.
        dtype: The dtype of computing.
        cpu_compute: How linear layers are computed, as in EngineOptions.
        kv_format: The format of keys and values.
        total_bytes: Bytes of all stored tensors of the model.
        recompute_length: The length beyond which a sequence's keys change, so that they are computed anew; None if there is none.
        rope_regime: A function from the length of a prompt to what its keys depend on besides its tokens.
        unused_bytes: The bytes of stored parameters that text generation does not need, such as those of vision towers.
        encodings: An encoded tensor of each kind that the model has, so that decoding can be warmed up.
        calls: The model's attention calls, whose tensors have no memory, so that kernels can be compiled for them.
        experts_per_token: For each experts module, how many experts a token chooses, and of how many.
        open_file: Opens a file of weights; called with the arguments of `File`.
        stage: The pipeline stage that this is; None for the whole model.
        num_layers: The number of decoder layers of the whole model; 0 if it cannot be divided.
        cut_points: The layers at which a stage may begin behind another one; empty if the model cannot be divided.
    """

    bound: BoundModel
    layouts: tuple[UnitLayout, ...]
    residents: UnitLayout
    tables: tuple[RowTable, ...]
    layers: tuple[LayerKV, ...]
    spec: ModelSpec
    dtype: torch.dtype
    cpu_compute: str
    kv_format: KVFormat
    total_bytes: int
    recompute_length: int | None
    rope_regime: Callable[[int], Hashable]
    unused_bytes: int
    encodings: tuple[Encoding, ...] = ()
    calls: tuple[AttentionCall, ...] = ()
    experts_per_token: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    open_file: Callable[..., File] = File
    stage: Stage | None = None
    num_layers: int = 0
    cut_points: tuple[int, ...] = ()


def assemble_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    *,
    name: str | None = None,
    unit_bytes: int | None = None,
    cpu_compute: str = "auto",
    kv_format: KVFormat | None = None,
    headers: Headers | None = None,
    sparse_attention: float | None = None,
    device: str = "cpu",
    layers: range | None = None,
) -> AssembledModel:
    """Take the model in `folder` apart into what the engine executes; no weights are read.

    Args:
        folder: The folder of the weights.
        config: The model's transformers config.
        dtype: The dtype of computing.
        name: The name of the model; None for that of the folder.
        unit_bytes: The approximate size of a unit; None for a default that depends on the model and the device.
        cpu_compute: How linear layers are computed, as in EngineOptions.
        kv_format: The format of keys and values; None for `default_kv_format`.
        headers: The headers of the weights if they are not safetensors files in `folder`.
        sparse_attention: The share of positions that generated tokens keep; None for all.
        device: Where it is computed: "cpu", "cuda" or "sim".
        layers: The decoder layers of the pipeline stage that is wanted; None for the whole model.

    Raises:
        ModelError: The architecture, the number format or the files are not supported, or the model cannot be divided there.
    """
    check_supported_number_format(config)
    check_supported_architecture(config)
    kv_format = kv_format or default_kv_format(dtype)
    checkpoint = Checkpoint(folder) if headers is None else headers
    units = cut_model(config, dtype, checkpoint, unit_bytes, cpu_compute=cpu_compute, device=device)
    spec = model_spec(config, units, dtype, name=name or folder.name, kv_format=kv_format, sparse_attention=sparse_attention)
    stage = None
    if layers is not None:
        units.decoder.check(layers)
        stage = Stage(layers=layers, decoder=units.decoder)
        units, spec = units_of(stage, units), stage_spec(spec, layers, units.decoder.num_layers)
        _check_agreement(units, spec)
    return AssembledModel(
        bound=BoundModel(units.model, units.parts, sorted(table.module for table in units.tables), units.trace.tail, stage),
        layouts=units.layouts,
        residents=units.residents,
        tables=units.tables,
        layers=units.trace.layers,
        spec=spec,
        dtype=dtype,
        cpu_compute=cpu_compute,
        kv_format=kv_format,
        total_bytes=checkpoint.total_bytes,
        recompute_length=recompute_length(config),
        rope_regime=rope_regime(config),
        unused_bytes=units.unused_bytes,
        calls=units.trace.calls,
        experts_per_token=units.trace.experts_per_token,
        stage=stage,
        num_layers=units.decoder.num_layers,
        cut_points=units.decoder.cut_points,
        encodings=smallest_of_each_kind(
            piece.tensor.encoding
            for source in units.sources.parameters.values()
            for piece in source.pieces
            if piece.tensor.encoding is not None and 0 not in piece.tensor.shape
        ),
    )


def _check_agreement(units: ModelUnits, spec: ModelSpec) -> None:
    """Check that a stage has the units and the KV that the plan counts on.

    Raises:
        EngineError: It has not.
    """
    groups = [len(members) for members in by_geometry(units.trace.layers).values()]
    if len(units.layouts) != len(spec.units) or groups != [group.num_layers for group in spec.kv_groups]:
        raise EngineError(
            f"the plan of a stage counts {len(spec.units)} units and KV groups of {[group.num_layers for group in spec.kv_groups]} layers, "
            f"the stage has {len(units.layouts)} and {groups}"
        )
