"""From files and options to a plan, and from a plan to an open engine.  Called by llm.LLM only.

Everything heavy (transformers, kernels) is loaded before the process is measured, so that the plan sees what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from flexgen.base.sizes import GIB, MIB, format_size
from flexgen.base.steps import step
from flexgen.base.turns import forked
from flexgen.checkpoint.dummy import checkpoint_bytes, write_random_checkpoint
from flexgen.checkpoint.parameters import refuse_quantization
from flexgen.devices.open import open_device
from flexgen.engine.engine import Engine
from flexgen.errors import CapacityError, FlexGenError, ModelError, OptionError, is_out_of_memory
from flexgen.hub.config import read_config, reason_of
from flexgen.hub.foreign import other_quantization
from flexgen.hub.hub import ModelFiles
from flexgen.io.checksums import BLOCK_BYTES, BYTES_PER_BLOCK
from flexgen.io.offload import OffloadFolder
from flexgen.kernels.attention import attention_kernels, warm_up
from flexgen.models.assemble import LoadedModel, load_model
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits
from flexgen.plan.play import admit
from flexgen.plan.search.ideal import budgets_of
from flexgen.plan.tell.forecast import Plan, make_plan
from flexgen.plan.workload import Workload
from flexgen.profile.check import MachineCheck
from flexgen.profile.limits import find_limits
from flexgen.profile.measure import cached_machine
from flexgen.report.report import RunContext

logger = logging.getLogger(__name__)

# From this expected time on, a moment's look at the machine before and after a job is little beside it.
CHECKED_SECONDS = 5.0
# From this size of weights on, half a minute of measuring is little beside the run.
THOROUGH_BYTES = 1 * GIB
# The process that loaded this module, and with it torch, to open an engine.
_PROCESS = os.getpid()
# Building a skeleton replaces functions of torch for a moment: models are described one at a time.
_DESCRIBING = threading.Lock()
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan, and what was found on the way to it.

    Attributes:
        process_bytes: resident memory of the process before any weight was loaded.
        dummy_folder: random weights written for this run, removed with it.
        verify_reads: as in EngineOptions.
    """

    model: LoadedModel
    plan: Plan
    limits: Limits
    workload: Workload
    process_bytes: int
    dummy_folder: OffloadFolder | None
    verify_reads: bool


def prepare(files: ModelFiles, options: EngineOptions, workload: Workload) -> Prepared:
    """Describe the model, measure the machine, and choose the policy; no weights are read.

    Raises:
        ModelError, OptionError, CapacityError: when the model, an option or the budgets do not allow a run.
        FlexGenError: in a process that was forked from one that opened an engine.
    """
    if os.getpid() != _PROCESS:
        raise FlexGenError(forked("a model has been opened"))
    with _DESCRIBING:
        return _prepare(files, options, workload)


def _prepare(files: ModelFiles, options: EngineOptions, workload: Workload) -> Prepared:
    config = read_config(files)
    limits = find_limits(options)
    dtype = compute_dtype(options.dtype, config, limits.device)
    options = replace(options, dtype=str(dtype).removeprefix("torch."), device=limits.device)
    dummy_folder = _write_dummy(config, dtype, limits) if options.load_format == "dummy" else None
    try:
        step("tracing the model's layers")
        model = _load_model(files, dummy_folder.path if dummy_folder is not None else files.folder, config, dtype)
        if dummy_folder is not None:
            limits = replace(limits, disk_bytes=max(limits.disk_bytes - model.total_bytes, 0))
        model = replace(model, spec=replace(model.spec, name=files.name))
        weights = model.layouts[0].extents[0].path.parent
        quick = model.total_bytes < THOROUGH_BYTES
        machine = cached_machine(limits.device, options.dtype, weights, max_bytes=min(256 * MIB, limits.host_bytes // 8), quick=quick)
        step("loading kernels (compiled once)")
        _warm_up_kernels(dtype)
        process_bytes = psutil.Process().memory_info().rss
        if options.verify_reads:
            process_bytes += (model.total_bytes + limits.disk_bytes) // BLOCK_BYTES * BYTES_PER_BLOCK
        step("choosing a plan")
        plan = make_plan(options, model.spec, machine, limits, workload, process_bytes=process_bytes)
    except BaseException:
        if dummy_folder is not None:
            dummy_folder.remove()
        raise
    return Prepared(
        model=model, plan=plan, limits=limits, workload=workload, process_bytes=process_bytes, dummy_folder=dummy_folder,
        verify_reads=options.verify_reads,
    )  # fmt: skip


def open_prepared(prepared: Prepared) -> Engine:
    """The engine that executes a prepared plan, with its resident weights loaded.

    Raises:
        CapacityError, StorageError: when memory or the offload folder cannot be had; nothing stays open.
    """
    step("loading weights")
    with contextlib.ExitStack() as undo:
        undo.callback(discard, prepared)
        check = _machine_check(prepared)
        start = time.perf_counter()
        engine = _construct(prepared, undo, check)
        undo.pop_all()  # from here on the engine owns everything
    try:
        engine.load()
    except BaseException:
        engine.close()
        raise
    engine.load_seconds = time.perf_counter() - start
    logger.info("loaded in %.1f s", engine.load_seconds)
    return engine


def discard(prepared: Prepared) -> None:
    """Remove what `prepare` wrote, if no engine will."""
    if prepared.dummy_folder is not None:
        prepared.dummy_folder.remove()


def _machine_check(prepared: Prepared) -> MachineCheck | None:
    """How fast the machine is now; None for a short job."""
    policy, model = prepared.plan.policy, prepared.model
    if prepared.plan.forecast.seconds < CHECKED_SECONDS:
        return None
    files = {extent.path for layout in model.layouts for extent in layout.extents} if policy.weights.disk else set[Path]()
    check = MachineCheck(
        machine=prepared.plan.machine, device=policy.device, dtype=policy.dtype, max_bytes=policy.workspace_bytes,
        job_seconds=prepared.plan.forecast.seconds, weights=max(files, key=lambda path: path.stat().st_size, default=None),
    )  # fmt: skip
    check.start()
    return check


def _construct(prepared: Prepared, undo: contextlib.ExitStack, check: MachineCheck | None) -> Engine:
    """An engine without weights; what it would own is registered with `undo` as it is made."""
    limits, policy, model = prepared.limits, prepared.plan.policy, prepared.model
    backend = open_device(limits.device, limits.device_bytes)
    if backend is not None:
        undo.callback(backend.close)
    offload = OffloadFolder(Path(limits.offload_dir)) if policy.kv_disk_bytes else None
    if offload is not None:
        undo.callback(offload.remove)
    folders = [folder for folder in (offload, prepared.dummy_folder) if folder is not None]
    context = RunContext(
        model=model.spec.name,
        host_budget_bytes=limits.host_bytes,
        device_budget_bytes=limits.device_bytes,
        budgets=budgets_of(limits, model.spec, prepared.process_bytes),
        forecast=prepared.plan.forecast,
        workload=prepared.workload,
        check=check.end if check is not None else None,
    )
    offload_dir = offload.path if offload is not None else None
    return Engine(
        model, policy, prepared.plan.machine, context=context, backend=backend, offload_dir=offload_dir, temporary=folders,
        verify_reads=prepared.verify_reads,
    )  # fmt: skip


def check_model(files: ModelFiles, options: EngineOptions) -> None:
    """Refuse what `prepare` would refuse because of the model's files, before anything else is done.

    Raises:
        ModelError: naming what is wrong.
        OptionError: the dtype cannot be computed in.
    """
    config = read_config(files)
    dtype = compute_dtype(options.dtype, config, find_limits(options).device)
    if options.load_format != "dummy":
        with _DESCRIBING:
            _load_model(files, files.folder, config, dtype)


def _load_model(files: ModelFiles, folder: Path, config: Any, dtype: torch.dtype) -> LoadedModel:
    """The model in a folder; what is refused because it is quantized is so before its weights are compared with its config."""
    if (tool := other_quantization(files.folder, files.config)) is not None:
        raise refuse_quantization({"quant_method": tool})
    with describing(files.name):
        return load_model(folder, config, dtype)


@contextlib.contextmanager
def describing(name: str) -> Iterator[None]:
    """Whatever fails while a model is described fails because of its files: it is refused, and nothing is run.

    Raises:
        ModelError: for what is no error of ours.
        CapacityError: for what takes more memory than there is.
    """
    try:
        yield
    except FlexGenError:
        raise
    except Exception as error:
        logger.debug("%s cannot be described", name, exc_info=True)
        if is_out_of_memory(error):
            raise CapacityError(f"{name}: describing the model takes more memory than there is ({reason_of(error)})") from error
        raise ModelError(f"{name} cannot be used, because of its config.json or its weights: {reason_of(error)}") from error


def compute_dtype(wanted: str, config: Any, device: str) -> torch.dtype:
    """The dtype to compute in: "auto" is the checkpoint's, but never float16 on a CPU, which computes it slowly."""
    if wanted != "auto":
        dtype = getattr(torch, wanted)
    else:
        stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
        dtype = getattr(torch, stored, None) if isinstance(stored, str) else stored
        if dtype not in _DTYPES:
            raise ModelError(f"config.json has dtype {str(stored)[:40]}, which cannot be computed in: give --dtype")
        if dtype == torch.float16 and device != "cuda":
            dtype = torch.bfloat16
    if dtype not in _DTYPES:
        raise OptionError(f"cannot compute in {dtype}")
    return dtype


def _warm_up_kernels(dtype: torch.dtype) -> None:
    """Compile (or load) the host's kernels and the planner's loop now: their memory belongs to the process, and their time to loading."""
    admit.prepare()
    kernels = attention_kernels(torch.device("cpu"), 1)
    try:
        warm_up(kernels, dtype)
    finally:
        kernels.close()


def _write_dummy(config: Any, dtype: torch.dtype, limits: Limits) -> OffloadFolder:
    """Random weights for a config, on the offload folder's disk."""
    folder = OffloadFolder(Path(limits.offload_dir))
    logger.info("writing random weights to %s", folder.path)
    try:
        size = checkpoint_bytes(config, dtype)
        if size > limits.disk_bytes:
            granted = format_size(limits.disk_bytes)
            raise CapacityError(f"random weights take {format_size(size)} of disk, {granted} are granted: raise --disk")
        write_random_checkpoint(config, folder.path, dtype)
    except BaseException:
        folder.remove()
        raise
    return folder
