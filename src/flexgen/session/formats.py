"""Plans a job in every combination of formats that the options allow; nothing is converted, and no weights are read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from flexgen.base.quantities import format_size
from flexgen.base.steps import step
from flexgen.errors import CapacityError
from flexgen.hub.model_files import ModelFiles
from flexgen.kv.low_bit import kv_format
from flexgen.options import EngineOptions
from flexgen.plan.formats import Formats
from flexgen.plan.model import ModelSpec
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.tell.formats import jobs_in_formats, plan_in_formats, specs_of
from flexgen.plan.workload import Workload
from flexgen.quantize.cache import conversion_left, private_cache
from flexgen.quantize.settings import QuantizeSettings
from flexgen.session.lookup import describe_files
from flexgen.session.model import DESCRIBING, ResolvedModel
from flexgen.session.prepare import bytes_of_process, load_kernels, load_products, measured_machine


def plan_formats(found: ResolvedModel, options: EngineOptions, workload: Workload) -> Plan:
    """Return the plan in the formats of weights and KV that are best for a job, among those that the options allow.

    Raises:
        CapacityError: The job fits in none of them.
        ModelError: The model cannot be served.
        OptionError: An option cannot be honoured on this machine.
    """
    limits, dtype, computed = found.limits, found.dtype, getattr(torch, found.dtype)
    options = dataclasses.replace(options, dtype=dtype, device=limits.device)
    load_products(computed, options.cpu_compute)  # what this machine cannot do is refused before anything is converted
    step("describing the model in every format that is allowed")
    with DESCRIBING:
        stored, specs = specs_of(options, lambda asked: _described(found.files, asked, options))
    for kv in options.choices("kv_format"):
        load_kernels(computed, kv_format(kv, computed), sparse=options.kept_share is not None)
    process_bytes = bytes_of_process(options, stored.checkpoint_bytes, limits)
    step("choosing formats and a plan")

    def arguments(formats: Formats, spec: ModelSpec) -> dict[str, Any]:
        folder = private_cache() if formats.weights != options.weight_format else _weights_folder(found.files, limits.offload_dir)
        machine = measured_machine(limits, folder, stored.checkpoint_bytes, spec)
        given = {"options": options.in_formats(formats.weights, formats.kv), "spec": spec, "machine": machine, "limits": limits}
        return given | {"workload": workload, "process_bytes": process_bytes}

    def left(formats: Formats, spec: ModelSpec) -> float:
        return _left_to_convert(found.files, formats, spec) if formats.weights != options.weight_format else 0.0

    return plan_in_formats(jobs_in_formats(stored, specs, arguments, left))


def _described(files: ModelFiles, asked: EngineOptions, options: EngineOptions) -> ModelSpec:
    """Describe the model in the formats that are asked for; the files are in the weight format of `options` already."""
    if asked.weight_format == options.weight_format:
        asked = dataclasses.replace(asked, weight_format="auto")
    return describe_files(files, asked, device=options.device)


def _weights_folder(files: ModelFiles, offload_dir: str) -> Path:
    """Return the folder that weights stream from: random weights lie in the offload folder, which has no other files then."""
    folder = files.folder if files.gguf is None else files.gguf.parts[0].path.parent
    return folder if folder.is_dir() else Path(offload_dir)


def _left_to_convert(files: ModelFiles, formats: Formats, spec: ModelSpec) -> float:
    """Return the share of the conversion that is still to be done.

    Raises:
        CapacityError: There is no room for it.
        StorageError: What an earlier run has left of it cannot be understood.
    """
    left = conversion_left(files, QuantizeSettings(weight_format=formats.weights))
    needed, free = int(left * spec.checkpoint_bytes), shutil.disk_usage(private_cache()).free
    if needed > free:
        raise CapacityError(f"the converted weights take {format_size(needed)} in {private_cache()}, {format_size(free)} are free")
    return left
