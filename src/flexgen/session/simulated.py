"""Prepares a run on a machine that is not at hand: the real engine on a simulated device with a clock, without weights and without memory.

What is planned for, and what is simulated, is the same machine: its typical rates, which are its best ones too.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexgen.base.steps import step
from flexgen.devices.clock import Clock
from flexgen.devices.timed import CopyRules, TimedDevice
from flexgen.errors import OptionError
from flexgen.hub.config import read_config
from flexgen.hub.model_files import ModelFiles
from flexgen.io.direct_io import File
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.options import EngineOptions
from flexgen.plan.known.machines import PROCESS_BYTES, limits_of
from flexgen.plan.machine import Machine, has_device_tier, read_machine
from flexgen.plan.policy import Policy
from flexgen.plan.price.operations import OperationPrices
from flexgen.plan.tell.forecast import make_plan
from flexgen.plan.workload import Workload
from flexgen.session.dtypes import compute_dtype, config_dtype
from flexgen.session.model import DESCRIBING, describing
from flexgen.session.prepare import Prepared
from flexgen.session.random_weights import RandomWeights

# What changes which kernels compute: these have no price.
PLAIN_ONLY = {"kv_format": "auto", "weight_format": "auto", "allow_formats": None, "sparse_attention": None, "cpu_compute": "auto"}
SLOW_MOTION = 10.0  # Python needs a millisecond for what a fast GPU computes in less


class _UnreadWeights(RandomWeights):
    """Weights that are never read: of their files there are the headers alone."""

    def write(self, model: AssembledModel, policy: Policy) -> None:
        """Write nothing."""


class _UnreadFile(File):
    """A file of weights, of which reading takes the time of the machine's disk and brings nothing.

    Args:
        read: Takes the time of reading so many bytes.
        path: The file.
        how: The other arguments of `File`.
    """

    def __init__(self, read: Callable[[int], None], path: Path, **how: Any) -> None:
        self._read = read
        super().__init__(path, **how)

    def _fill(self, view: memoryview, offset: int) -> None:
        self._read(len(view))


def prepare_simulated(
    files: ModelFiles,
    options: EngineOptions,
    machine: Machine,
    workload: Workload,
    *,
    slow_motion: float = SLOW_MOTION,
    rules: CopyRules | None = None,
) -> Prepared:
    """Plan a job for a machine, and make a simulated device of it on which the plan can be executed.

    Args:
        files: The model, of which the config is read.
        options: The options; budgets are those of the machine.
        machine: The machine.
        workload: The job.
        slow_motion: How many times longer everything takes here than there.
        rules: How copies are made; None for the usual way.

    Raises:
        OptionError: The machine has no device, or an option is not simulated.
        ModelError: The model cannot be served.
        CapacityError: The budgets are too small, or the plan needs KV on disk.
    """
    _check(options, machine)
    machine = _at_typical_rates(machine)
    config = read_config(files)
    dtype = options.dtype
    if dtype == "auto":
        dtype = compute_dtype(config_dtype(config), machine.device, bfloat16=machine.has_bfloat16)
    options = dataclasses.replace(options, dtype=dtype, device=machine.device, load_format="dummy")
    folder = options.offload_dir or tempfile.gettempdir()
    limits = dataclasses.replace(limits_of(machine, options), disk_bytes=0, offload_dir=folder)  # KV on disk is not simulated
    step("tracing the model's layers")
    computed = getattr(torch, dtype)
    weights = _UnreadWeights(config, computed, limits)
    try:
        with DESCRIBING, describing(files.name):
            model = assemble_model(weights.folder, config, computed, name=files.name, device=machine.device)
        step(f"choosing a plan for {machine.name}")
        plan = make_plan(options, model.spec, machine, limits, workload, process_bytes=PROCESS_BYTES[machine.device])
        prices = {place: OperationPrices(model.spec, machine, dtype, place) for place in ("device", "host")}
        device = TimedDevice(limits.device_bytes - limits.device_overhead_bytes, machine, prices, Clock(slow_motion), rules)
    except BaseException:
        weights.remove()
        raise

    def open_file(path: Path, **how: Any) -> File:
        return _UnreadFile(device.read, path, **how)

    return Prepared(
        model=dataclasses.replace(model, open_file=open_file), plan=plan, limits=limits, workload=workload,
        process_bytes=PROCESS_BYTES[machine.device], random_weights=weights, verify_reads=False, overlap=options.overlap, device=device,
    )  # fmt: skip


def _check(options: EngineOptions, machine: Machine) -> None:
    """Refuse what cannot be simulated."""
    if not has_device_tier(machine.device):
        raise OptionError(f"machine {machine.name!r} computes on its processor: only machines with a device of their own are simulated")
    for name, plain in PLAIN_ONLY.items():
        if (given := getattr(options, name)) != plain:
            raise OptionError(f"{name}={given!r} is not simulated: leave it out")
    if options.verify_reads:
        raise OptionError("verify_reads=True: a simulated run reads nothing that could be compared: leave it out")


def _at_typical_rates(machine: Machine) -> Machine:
    """Return the machine with its typical rates as its best ones: nothing that is simulated is ever faster."""

    def typical(value: Any) -> Any:
        if isinstance(value, dict):
            value = {key: typical(each) for key, each in value.items()}
            return value | {"best": value["typical"], "spread": 0.0} if "typical" in value else value
        return [typical(each) for each in value] if isinstance(value, list) else value

    return read_machine(json.dumps(typical(json.loads(machine.to_json()))))
