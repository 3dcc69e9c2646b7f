"""Random weights of one run, from a config alone: only what the plan leaves on disk is ever written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flexgen.base.quantities import format_size
from flexgen.base.steps import step
from flexgen.checkpoint.dummy import RandomFiles, size_on_disk
from flexgen.errors import CapacityError
from flexgen.io.aligned import Extent
from flexgen.io.offload import OffloadFolder
from flexgen.models.assemble import AssembledModel
from flexgen.plan.machine import Limits
from flexgen.plan.policy import Policy
from flexgen.plan.price.weights import unit_homes


class RandomWeights:
    """The files of random weights, in a fresh offload folder.

    What lives in memory is made when it is loaded, block by block, as it would have been read; so a large model takes no time to write and
    no room on a disk that is not used.

    Args:
        config: The transformers config.
        dtype: The dtype of plain weights.
        limits: The budgets, which name the offload folder.

    Attributes:
        folder: The folder of the files, with headers that can be read.

    Raises:
        StorageError: The folder or a file cannot be written.
    """

    def __init__(self, config: Any, dtype: torch.dtype, limits: Limits) -> None:
        self._limits = limits
        self._offload = OffloadFolder(Path(limits.offload_dir))
        self.folder = self._offload.path
        try:
            files = RandomFiles(config, self.folder, dtype)
        except BaseException:
            self.remove()
            raise
        self._files, self.open_file = files, files.open_file

    def write(self, model: AssembledModel, policy: Policy) -> None:
        """Write what a policy leaves on disk.

        Raises:
            CapacityError: It does not fit the disk space granted, beside KV.
            StorageError: It cannot be written.
        """
        extents = list(left_on_disk(model, policy))
        size, granted = size_on_disk(extents), self._limits.disk_bytes - policy.num_blocks * policy.kv_disk_bytes
        if size > granted:
            raise CapacityError(
                f"random weights take {format_size(size)} of disk, {format_size(max(granted, 0))} are granted: raise disk=, or place them "
                "in memory by weights="
            )
        if extents:
            step(f"writing {format_size(size)} of random weights")
            self._files.write(extents)

    def remove(self) -> None:
        """Delete the files."""
        self._offload.remove()


def left_on_disk(model: AssembledModel, policy: Policy) -> Iterator[Extent]:
    """Yield the parts of the weight files that passes read: units whose home is the disk, and tables whose rows are gathered from there."""
    for layout, home in zip(model.layouts, unit_homes(model.spec, policy.weights), strict=True):
        if home == "disk":
            yield from layout.extents
    if not policy.embedding_resident:
        for table in model.tables:
            yield from table.layout.extents
