"""Opens what one stage of a pipeline computes with: its part of the model where its own policy puts the bytes."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from flexgen.base.recorder import Recorder
from flexgen.devices.open import open_device
from flexgen.engine.runner import ModelRunner
from flexgen.io.offload import OffloadFolder
from flexgen.plan.policy import Policy
from flexgen.session.model import ResolvedModel
from flexgen.session.prepare import Described


def open_stage(
    found: ResolvedModel, here: Described, layers: range, policy: Policy, resources: contextlib.ExitStack, recorder: Recorder | None = None
) -> ModelRunner:
    """Return the runner of a stage with its resident weights loaded; `resources` closes it and removes its offload folder.

    Args:
        found: The model.
        here: What the plan was made from on this host.
        layers: The decoder layers of the stage.
        policy: The policy of the stage.
        resources: What closes the runner.
        recorder: The recorder of the trace; None without one.

    Raises:
        ModelError: The model cannot be divided there.
        CapacityError: There is not enough memory.
        StorageError: Weights cannot be read, or no offload folder can be made.
    """
    model = found.take(here.folder, layers)
    if here.random_weights is not None:
        model = dataclasses.replace(model, open_file=here.random_weights.open_file)
        here.random_weights.write(model, policy)
    offload_dir = None
    if policy.kv_disk_bytes:
        offload = OffloadFolder(Path(here.limits.offload_dir))
        resources.callback(offload.remove)
        offload_dir = offload.path
    backend = open_device(here.limits.device, here.limits.device_bytes - here.limits.device_overhead_bytes)
    if backend is not None:
        backend.limit(here.limits.device_bytes)
    runner = ModelRunner(
        model, policy, backend=backend, offload_dir=offload_dir, verify_reads=here.options.verify_reads, overlap=here.options.overlap,
        recorder=recorder,
    )  # fmt: skip
    resources.callback(runner.close)
    runner.load()
    return runner
