"""Opens what one stage of a pipeline computes with: its part of the model where its own policy puts the bytes."""

from __future__ import annotations

import contextlib
import dataclasses

from flexgen.base.recorder import Recorder
from flexgen.engine.runner import ModelRunner
from flexgen.plan.policy import Policy
from flexgen.session.model import ResolvedModel
from flexgen.session.opening import limited_device, offload_folder
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
    offload_dir, backend = offload_folder(policy, here.limits, resources), limited_device(here.limits)
    runner = ModelRunner(
        model, policy, backend=backend, offload_dir=offload_dir, verify_reads=here.options.verify_reads, overlap=here.options.overlap,
        recorder=recorder,
    )  # fmt: skip
    resources.callback(runner.close)
    runner.load()
    return runner
