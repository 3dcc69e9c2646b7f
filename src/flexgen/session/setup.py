"""From files and options to a plan, and from a plan to an open engine.

Everything heavy (transformers, kernels) is loaded before the process is measured, so that the plan sees the memory that is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from flexgen.base.quantities import GIB, MIB, format_size
from flexgen.base.steps import step
from flexgen.checkpoint.dummy import checkpoint_bytes, write_random_checkpoint
from flexgen.devices.open import open_device
from flexgen.engine.engine import Engine
from flexgen.errors import CapacityError, FlexGenError
from flexgen.io.checksums import BLOCK_BYTES, BYTES_PER_BLOCK
from flexgen.io.offload import OffloadFolder
from flexgen.kernels.attention import attention_kernels, warm_up
from flexgen.models.assemble import LoadedModel
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits
from flexgen.plan.play import admit
from flexgen.plan.search.ideal import budgets_of
from flexgen.plan.tell.forecast import Plan, make_plan
from flexgen.plan.workload import Workload
from flexgen.profile.check import MachineCheck
from flexgen.profile.measure import cached_machine
from flexgen.report.report import RunContext
from flexgen.session.model import DESCRIBING, ResolvedModel
from flexgen.session.planned import PlannedEngine
from flexgen.session.turns import forked

logger = logging.getLogger(__name__)

# From this expected duration of a job on, the brief check of the machine before and after it costs little in comparison.
CHECKED_SECONDS = 5.0
# From this size of weights on, half a minute of measuring costs little compared with the run.
THOROUGH_BYTES = 1 * GIB
# The process that loaded this module, and with it torch, to open an engine.
_PROCESS = os.getpid()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan, and the facts that were determined on the way to it.

    Attributes:
        model: The model's description, without weights.
        plan: The plan.
        limits: The budgets that it keeps.
        workload: The work that it is for.
        process_bytes: The resident memory of the process before any weight was loaded, plus that of checksums if reads are verified.
        dummy_folder: The folder of random weights written for this run, removed with it; None for real weights.
        verify_reads: As in EngineOptions.
    """

    model: LoadedModel
    plan: Plan
    limits: Limits
    workload: Workload
    process_bytes: int
    dummy_folder: OffloadFolder | None
    verify_reads: bool


def prepare(found: ResolvedModel, options: EngineOptions, workload: Workload) -> Prepared:
    """Describe the model, measure the machine, and choose the policy; no weights are read.

    Raises:
        ModelError: The model cannot be served.
        OptionError: An option cannot be honoured on this machine.
        CapacityError: A budget cannot be granted, or the budgets are too small.
        FlexGenError: This process was forked from one that had loaded this module.
    """
    if os.getpid() != _PROCESS:
        raise FlexGenError(forked("a model has been opened"))
    with DESCRIBING, contextlib.ExitStack() as undo:
        prepared = _prepare(found, options, workload, undo)
        undo.pop_all()
    return prepared


def _prepare(found: ResolvedModel, options: EngineOptions, workload: Workload, undo: contextlib.ExitStack) -> Prepared:
    limits, dtype = found.limits, getattr(torch, found.dtype)
    options = replace(options, dtype=found.dtype, device=limits.device)
    dummy_folder = None
    if options.load_format == "dummy":
        dummy_folder = _write_dummy(found.config, dtype, limits)
        undo.callback(dummy_folder.remove)
    model = found.take(dummy_folder.path if dummy_folder is not None else found.files.folder)
    model = replace(model, spec=replace(model.spec, name=found.files.name))
    if dummy_folder is not None:
        limits = replace(limits, disk_bytes=max(limits.disk_bytes - model.total_bytes, 0))
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
    return Prepared(
        model=model, plan=plan, limits=limits, workload=workload, process_bytes=process_bytes, dummy_folder=dummy_folder,
        verify_reads=options.verify_reads,
    )  # fmt: skip


def open_prepared(prepared: Prepared) -> PlannedEngine:
    """Open the engine that executes a prepared plan, with its resident weights loaded.

    Raises:
        CapacityError: There is not enough memory; nothing stays open.
        StorageError: No offload folder can be made; nothing stays open.
    """
    step("loading weights")
    with contextlib.ExitStack() as resources:
        resources.callback(discard, prepared)
        check = _machine_check(prepared)
        start = time.perf_counter()
        engine = _construct(prepared, resources)
        engine.load()
        load_seconds = time.perf_counter() - start
        logger.info("loaded in %.1f s", load_seconds)
        context = _context(prepared, load_seconds, check)
        return PlannedEngine(engine, prepared.plan, prepared.workload, context, resources.pop_all())


def discard(prepared: Prepared) -> None:
    """Remove the random weights that `prepare` wrote, if it wrote any."""
    if prepared.dummy_folder is not None:
        prepared.dummy_folder.remove()


def _machine_check(prepared: Prepared) -> MachineCheck | None:
    """Start measuring how fast the machine is now; return None for a short job."""
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


def _construct(prepared: Prepared, resources: contextlib.ExitStack) -> Engine:
    """Return an engine without weights; `resources` closes it and removes its offload folder."""
    limits, policy = prepared.limits, prepared.plan.policy
    offload_dir = None
    with contextlib.ExitStack() as undo:
        backend = open_device(limits.device, limits.device_bytes)
        if backend is not None:
            undo.callback(backend.close)
        if policy.kv_disk_bytes:
            offload = OffloadFolder(Path(limits.offload_dir))
            resources.callback(offload.remove)
            offload_dir = offload.path
        engine = Engine(
            prepared.model, policy, prepared.plan.machine, backend=backend, offload_dir=offload_dir, verify_reads=prepared.verify_reads
        )
        undo.pop_all()  # the engine closes it
    return resources.enter_context(engine)


def _context(prepared: Prepared, load_seconds: float, check: MachineCheck | None) -> RunContext:
    limits, spec = prepared.limits, prepared.model.spec
    return RunContext(
        model=spec.name,
        load_seconds=load_seconds,
        host_budget_bytes=limits.host_bytes,
        device_budget_bytes=limits.device_bytes,
        budgets=budgets_of(limits, spec, prepared.process_bytes),
        check=check.end if check is not None else None,
    )


def _warm_up_kernels(dtype: torch.dtype) -> None:
    """Compile (or load) the host's kernels and the planner's loop now: their memory belongs to the process, and their time to loading."""
    admit.prepare()
    kernels = attention_kernels(torch.device("cpu"), 1)
    try:
        warm_up(kernels, dtype)
    finally:
        kernels.close()


def _write_dummy(config: Any, dtype: torch.dtype, limits: Limits) -> OffloadFolder:
    """Write random weights for a config to a fresh offload folder, and return it."""
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
