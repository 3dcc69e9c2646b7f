"""A model where its policy puts it, and the threads that move it; executes plans of passes.  Knows no requests and no sequences."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from flexgen.devices.base import Device
from flexgen.engine.sweep import MicroBatchForward, run_pass
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.kv.open import KVSetup, open_places
from flexgen.kv.pages import group_layers
from flexgen.models.assemble import LoadedModel
from flexgen.models.attention import PassCache
from flexgen.passes.plan import PassPlan
from flexgen.plan.policy import Policy
from flexgen.plan.price.work import unit_homes
from flexgen.weights.rows import EmbeddingRows
from flexgen.weights.store import WeightStore

logger = logging.getLogger(__name__)

# A thread that has read a chunk wants the interpreter for some microseconds; others give it up after this time.  With Python's own 5 ms a
# disk of 3.4 GB/s reads 1.6 beside Python code (docs/log.md).
SWITCH_SECONDS = 1e-4


class ModelRunner:
    """Executes passes, and owns the memory and the threads that this takes.

    Args:
        model: The model, described, without weights.
        policy: Where everything lives.
        backend: The device, or None when computing happens in host memory; it is closed with the runner.
        offload_dir: The folder for spilled KV; needed only where the policy puts KV on disk.
        verify_reads: Whether what comes from disk is checked against what was written or first read.
        poison: Whether released memory is overwritten, so that a late use shows (for tests).

    Attributes:
        homes: The home of each unit's weights.
        places: Where KV is kept and attended to, by tier.
        cache: The pages of all sequences.
    """

    def __init__(
        self,
        model: LoadedModel,
        policy: Policy,
        *,
        backend: Device | None = None,
        offload_dir: Path | None = None,
        verify_reads: bool = False,
        poison: bool = False,
    ) -> None:
        self.model, self.policy = model, policy
        self._previous_threads, self._previous_interval = torch.get_num_threads(), sys.getswitchinterval()
        self._backend, self._device = backend, backend.device if backend is not None else torch.device("cpu")
        self._files = FileSet(verify=verify_reads)
        self.homes = unit_homes(model.spec, policy.weights)
        self._rows = EmbeddingRows(list(model.tables), self._device, verify=verify_reads)
        self._arrived = threading.Event()  # wakes the ready loop
        groups = group_layers(model.layers, policy.page_tokens, model.kv_format)
        with contextlib.ExitStack() as undo:  # what would outlive a runner that cannot be made
            self._io = IOPool(policy.io_threads)
            undo.callback(self._io.close)
            self._weights = WeightStore(
                model.layouts, self.homes, model.bound, self._io, self._files, backend=backend,
                host_ring_bytes=policy.host_ring_bytes, device_ring_bytes=policy.device_ring_bytes, on_arrival=self._arrived.set,
                poison=poison,
            )  # fmt: skip
            undo.callback(self._weights.close)
            self.places, self.cache = open_places(KVSetup(
                groups=groups, policy=policy, backend=backend, io=self._io, offload_dir=offload_dir, notify=self._arrived.set,
                verify=verify_reads,
            ))  # fmt: skip
            undo.pop_all()
        torch.set_num_threads(policy.compute_threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._pass_cache = PassCache()
        self._loaded = False

    def load(self) -> None:
        """Read what stays in memory, bind it, and let the links run ahead; done once."""
        if self._loaded:
            return
        self._weights.keep(self.model.residents, self.model.bound.bind_resident)
        if self.policy.embedding_resident:
            for table in self.model.tables:
                self._weights.keep(table.layout, self._rows.keep)
        self.model.bound.move_buffers(self._device)
        self._weights.load()
        self._weights.start()
        self._loaded = True
        logger.debug("weights: %s", self._weights.describe())

    def close(self) -> None:
        """Stop the links and free the memory."""
        self._weights.close()
        for place in self.places.values():
            place.close()
        self._io.close()
        self._rows.close()
        self._files.close()
        if self._backend is not None:
            self._backend.close()
        torch.set_num_threads(self._previous_threads)
        sys.setswitchinterval(self._previous_interval)

    # -- passes ---------------------------------------------------------------------------------------------------------------------

    @property
    def num_units(self) -> int:
        """Units of a pass: the steps of its progress."""
        return len(self.model.layouts)

    def run(self, plan: PassPlan, on_unit: Callable[[int], None] = lambda unit: None) -> tuple[list[torch.Tensor], dict[str, float]]:
        """Execute a pass.

        Args:
            plan: What it computes.
            on_unit: Called whenever the frontmost micro-batch enters a unit.

        Returns:
            For each micro-batch the logits (positions wanted, vocab), its slices and their positions in order; and the seconds without
            anything to run, by what was waited for.

        Raises:
            StorageError: Something could not be read or written, or is not what it was.
        """
        forwards: list[MicroBatchForward] = []
        for batch in plan.micro_batches:
            view, after = self.places[batch.home].view(batch.slices), [forwards[index] for index in batch.after]
            forwards.append(MicroBatchForward(batch, self.model.bound, self._pass_cache, view, self._rows, self._device, after))
        for home, place in self.places.items():
            place.begin_pass([forward.view for forward in forwards if forward.batch.home == home])
        waits = run_pass(forwards, self._weights, self.num_units, self._arrived, on_unit)
        for place in self.places.values():
            place.finish_pass()
        self._files.check_unchanged()  # before any token comes of what was read
        self._rows.check_unchanged()
        return [forward.logits for forward in forwards if forward.logits is not None], waits

    # -- what was used --------------------------------------------------------------------------------------------------------------

    def device_bytes(self) -> int:
        """Bytes of the device's arenas (0 on a CPU device)."""
        return self._backend.used_bytes if self._backend is not None else 0

    def placement(self) -> dict[str, dict[str, int]]:
        """Tier -> bytes, for "weights" as assigned and "kv" at the peak."""
        weights: dict[str, int] = {}
        for layout, home in zip(self.model.layouts, self.homes, strict=True):
            weights[home] = weights.get(home, 0) + (layout.stored_bytes if home == "disk" else layout.decoded_bytes)
        return {"weights": weights, "kv": dict(self.cache.peak_bytes)}

    def bytes_moved(self) -> dict[str, int]:
        """Link -> bytes, since the runner was made."""
        moved = {"disk_read": self._io.bytes_read + self._rows.bytes_gathered, "disk_write": self._io.bytes_written}
        if self._backend is not None:
            moved |= {"host_to_device": self._backend.bytes_in, "device_to_host": self._backend.bytes_out}
        return moved

    def disk_busy_seconds(self) -> float:
        """Seconds in which the disk was reading or writing, since the runner was made."""
        return self._io.busy_seconds
