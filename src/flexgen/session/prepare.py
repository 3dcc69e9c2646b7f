"""From a resolved model and options to a plan; no weights are read.

Everything heavy (transformers, kernels) is loaded before the process is measured, so that the plan sees the memory that is left.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from flexgen.base.heap import limit_heap
from flexgen.base.quantities import GIB, MIB
from flexgen.base.steps import step
from flexgen.devices.timed import TimedDevice
from flexgen.errors import FlexGenError
from flexgen.formats import warming
from flexgen.io.checksums import BLOCK_BYTES, BYTES_PER_BLOCK
from flexgen.kernels.attention import attention_kernels, warm_up, warm_up_sealed, warm_up_sparse
from flexgen.kernels.int8.products import check_exact, warm_up_int8
from flexgen.kv.format import KVFormat
from flexgen.models.assemble import AssembledModel
from flexgen.options import INT8, EngineOptions
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.play import admit
from flexgen.plan.tell.forecast import Plan, make_plan
from flexgen.plan.workload import Workload
from flexgen.profile.kept import cached_machine
from flexgen.session.device_kernels import compile_kernels
from flexgen.session.model import DESCRIBING, ResolvedModel
from flexgen.session.random_weights import RandomWeights
from flexgen.session.turns import forked

# From this size of weights on, half a minute of measuring costs little compared with the run.
THOROUGH_BYTES = 1 * GIB
# The process that loaded this module, and with it torch, to open an engine.
_PROCESS = os.getpid()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan, and what is needed to open the engine that executes it.

    Attributes:
        model: The model, without weights.
        plan: The plan.
        limits: The budgets that it keeps.
        workload: The work that it is for.
        process_bytes: The resident memory of the process before any weight was loaded, plus that of checksums if reads are verified.
        random_weights: The random weights of this run, removed with it; None for real weights.
        verify_reads: As in EngineOptions.
        overlap: As in EngineOptions.
        device: A simulated device with a clock, on which nothing is computed; None for the device of this machine.
    """

    model: AssembledModel
    plan: Plan
    limits: Limits
    workload: Workload
    process_bytes: int
    random_weights: RandomWeights | None
    verify_reads: bool
    overlap: bool
    device: TimedDevice | None = None

    def write_weights(self) -> None:
        """Write what the plan leaves on disk, where weights are random.

        Raises:
            CapacityError: It does not fit the disk space granted.
            StorageError: It cannot be written.
        """
        if self.random_weights is not None:
            self.random_weights.write(self.model, self.plan.policy)

    def discard(self) -> None:
        """Remove the files of random weights, if there are any."""
        if self.random_weights is not None:
            self.random_weights.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a plan is made from.

    Attributes:
        options: The options, with the dtype and the device that are meant.
        model: The model, without weights.
        folder: The folder of its weights.
        machine: The rates of this machine.
        limits: The budgets.
        process_bytes: As in Prepared.
        random_weights: As in Prepared.
    """

    options: EngineOptions
    model: AssembledModel
    folder: Path
    machine: Machine
    limits: Limits
    process_bytes: int
    random_weights: RandomWeights | None

    def discard(self) -> None:
        """Remove the files of random weights, if there are any."""
        if self.random_weights is not None:
            self.random_weights.remove()


def prepare(found: ResolvedModel, options: EngineOptions, workload: Workload) -> Prepared:
    """Describe the model, measure the machine, and choose the policy.

    Raises:
        ModelError: The model cannot be served.
        OptionError: An option cannot be honoured on this machine.
        CapacityError: A budget cannot be granted, or the budgets are too small.
        FlexGenError: This process was forked from one that had loaded this module.
    """
    with contextlib.ExitStack() as undo:
        here = describe(found, options)
        undo.callback(here.discard)
        step("choosing a plan")
        plan = make_plan(here.options, here.model.spec, here.machine, here.limits, workload, process_bytes=here.process_bytes)
        undo.pop_all()
    return Prepared(
        model=here.model, plan=plan, limits=here.limits, workload=workload, process_bytes=here.process_bytes,
        random_weights=here.random_weights, verify_reads=options.verify_reads, overlap=options.overlap,
    )  # fmt: skip


def describe(found: ResolvedModel, options: EngineOptions, num_local: int = 1) -> Described:
    """Describe the model, measure the machine, and load what computing needs.

    Args:
        found: The model.
        options: The options.
        num_local: The number of stages on this host, which share what the options do not grant to each.

    Raises:
        ModelError: The model cannot be served.
        OptionError: An option cannot be honoured on this machine.
        CapacityError: A budget cannot be granted.
        FlexGenError: This process was forked from one that had loaded this module.
    """
    if os.getpid() != _PROCESS:
        raise FlexGenError(forked("a model has been opened"))
    limit_heap()
    with DESCRIBING, contextlib.ExitStack() as undo:
        limits, folder, random_weights = shared(found.limits, options, num_local), found.files.folder, None
        options = replace(options, dtype=found.dtype, device=limits.device)
        if options.load_format == "dummy":
            random_weights = RandomWeights(found.config, getattr(torch, options.dtype), limits)
            undo.callback(random_weights.remove)
            folder = random_weights.folder
        model = found.take(folder)
        if random_weights is not None:
            model = replace(model, open_file=random_weights.open_file)
            limits = replace(limits, disk_bytes=max(limits.disk_bytes - model.total_bytes, 0))  # the plan may leave all on disk
        load_products(model.dtype, model.cpu_compute)
        weights = model.layouts[0].extents[0].path.parent
        machine = measured_machine(limits, weights, model.total_bytes, model.spec)
        load_kernels(model.dtype, model.kv_format, sparse=options.kept_share is not None)
        if limits.device == "cuda":
            compile_kernels(model, torch.device("cuda"))
        for encoding in model.encodings:
            if limits.device == "cpu" or not encoding.format.carried_as_stored:
                warming.warm_up(encoding, model.dtype)
        process_bytes = bytes_of_process(options, model.total_bytes, limits)
        undo.pop_all()
    return Described(
        options=options, model=model, folder=folder, machine=machine, limits=limits, process_bytes=process_bytes,
        random_weights=random_weights,
    )  # fmt: skip


def shared(limits: Limits, options: EngineOptions, num_local: int) -> Limits:
    """Return the budgets of one of so many processes of this host: an equal part of what the options do not grant to each."""
    host = limits.host_bytes if options.host_mem is not None else limits.host_bytes // num_local
    disk = limits.disk_bytes if options.disk is not None else limits.disk_bytes // num_local
    return replace(limits, host_bytes=host, disk_bytes=disk)


def measured_machine(limits: Limits, weights: Path, total_bytes: int, spec: ModelSpec) -> Machine:
    """Return the rates of this machine.

    Args:
        limits: The budgets, which buffers keep.
        weights: The folder that weights stream from.
        total_bytes: The bytes of all weights, which decide how long measuring may take.
        spec: The model, which decides what has to be known.
    """
    return cached_machine(
        limits.device, spec.dtype, weights, max_bytes=min(256 * MIB, limits.host_bytes // 8),
        device_bytes=min(GIB, limits.device_bytes // 4), quick=total_bytes < THOROUGH_BYTES, formats=spec.decoded_from,
        sparse=spec.sparse_attention,
    )  # fmt: skip


def bytes_of_process(options: EngineOptions, total_bytes: int, limits: Limits) -> int:
    """Return the memory of this process before weights of so many bytes are loaded, plus that of checksums if reads are verified."""
    checksums = (total_bytes + limits.disk_bytes) // BLOCK_BYTES * BYTES_PER_BLOCK if options.verify_reads else 0
    return resident_bytes() + checksums


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    return psutil.Process().memory_info().rss


def load_products(dtype: torch.dtype, cpu_compute: str) -> None:
    """Compile (or load) the loops around products in int8, if that is how linear layers are computed.

    Raises:
        OptionError: This processor's products in int8 are not exact.
    """
    if cpu_compute == INT8:
        check_exact()
        warm_up_int8(dtype)


def load_kernels(dtype: torch.dtype, kv_format: KVFormat, *, sparse: bool = False) -> None:
    """Compile (or load) the host's kernels and the planner's loop now: their memory belongs to the process, and their time to loading."""
    step("loading kernels (compiled once)")
    admit.prepare()
    kernels = attention_kernels(torch.device("cpu"), 1)
    try:
        warm_up(kernels, dtype)
        if kv_format.tail is not None:
            warm_up_sealed(kernels, dtype)
        if sparse:
            warm_up_sparse(kernels, dtype, sealed=kv_format.tail is not None)
    finally:
        kernels.close()
