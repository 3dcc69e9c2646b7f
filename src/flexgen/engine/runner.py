"""ModelRunner: a model where its policy puts it, and the threads that move it; runs passes.  Knows nothing of requests that wait or end."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from flexgen.devices.base import Backend
from flexgen.engine.batches import micro_batches
from flexgen.engine.pass_load import pass_load
from flexgen.engine.schedule import Slice
from flexgen.engine.sequence import Sequence as LiveSequence
from flexgen.engine.sweep import MicroBatch, run_pass
from flexgen.io.direct_io import FileSet, IOPool
from flexgen.kv.open import KVSetup, open_places
from flexgen.kv.pages import group_layers
from flexgen.kv.place import View
from flexgen.models.assemble import LoadedModel
from flexgen.models.attention import PassCache
from flexgen.plan.policy import Policy
from flexgen.plan.price.work import PassLoad, unit_homes
from flexgen.report.run_log import Meters
from flexgen.weights.rows import EmbeddingRows
from flexgen.weights.store import WeightStore

logger = logging.getLogger(__name__)

# A thread that has read a chunk wants the interpreter for some microseconds; others give it up after this time.  With Python's own 5 ms a
# disk of 3.4 GB/s reads 1.6 beside Python code (docs/log.md).
SWITCH_SECONDS = 1e-4


class ModelRunner:
    """What executes passes, and owns the memory and the threads that this takes.

    Args:
        model: described, without weights. policy: where everything lives.
        backend: the device, or None when computing happens in host memory; it is closed with the runner.
        offload_dir: folder for spilled KV; needed only where the policy puts KV on disk.
        verify_reads: check what comes from disk against what was written or first read.
        poison: overwrite released memory, so that a late use shows (tests).

    Attributes:
        homes: of every unit's weights. places, cache: where KV is kept, by tier.
    """

    def __init__(
        self,
        model: LoadedModel,
        policy: Policy,
        *,
        backend: Backend | None = None,
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
        groups = group_layers(model.layers, policy.page_tokens, model.kv_format)
        with contextlib.ExitStack() as undo:  # what would outlive a runner that cannot be made
            self._io = IOPool(policy.io_threads)
            undo.callback(self._io.close)
            self._weights = WeightStore(
                model.layouts, self.homes, model.bound, self._io, self._files, backend=backend,
                host_ring_bytes=policy.host_ring_bytes, device_ring_bytes=policy.device_ring_bytes, poison=poison,
            )  # fmt: skip
            undo.callback(self._weights.close)
            self.places, self.cache = open_places(KVSetup(
                groups=groups, policy=policy, backend=backend, io=self._io, offload_dir=offload_dir, notify=self._weights.notify,
                verify=verify_reads,
            ))  # fmt: skip
            undo.pop_all()
        torch.set_num_threads(policy.compute_threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        self.meters = Meters(io=self._io, rows=self._rows, backend=backend)
        self._pass_cache = PassCache()
        self._loaded = False

    def load(self) -> None:
        """Read what stays in memory, bind it, and let the links run ahead; done once."""
        if self._loaded:
            return
        self._load_residents()
        if self.policy.embedding_resident:
            for table in self.model.tables:
                self._rows.load(table.module)
        self.model.bound.move_buffers(self._device)
        self._weights.load_residents()
        self._weights.start()
        self._loaded = True
        logger.debug("weights: %s", self._weights.describe())

    def _load_residents(self) -> None:
        """Norms, biases, routers' buffers: read once, plainly, and bound for good."""
        for tensor in self.model.residents.tensors:
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor.source.read(out)  # type: ignore[attr-defined]
            name = f"{tensor.module}.{tensor.parameter}" if tensor.module else tensor.parameter
            self.model.bound.bind_resident(name, out.to(self._device))

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

    @property
    def num_units(self) -> int:
        """Units of a pass: the steps of its progress."""
        return len(self.model.layouts)

    def device_bytes(self) -> int:
        """Bytes of the device's arenas (0 on a CPU device)."""
        return self._backend.used_bytes if self._backend is not None else 0

    def micro_batches(self, live: Iterable[LiveSequence]) -> tuple[list[MicroBatch], PassLoad]:
        """What the next pass computes for these sequences, and what it carries, counted for pricing."""
        batches = micro_batches(live, self.places, self.policy, self._micro_batch)
        return batches, pass_load(batches, tuple(self.places), len(self.cache.groups))

    def _micro_batch(self, slices: Sequence[Slice], view: View) -> MicroBatch:
        bound, even_rows = self.model.bound, self._backend is None
        return MicroBatch(slices, bound, self._pass_cache, view, self._rows, self._device, even_rows=even_rows)

    def run(self, batches: Sequence[MicroBatch], on_unit: Callable[[int], None]) -> dict[str, float]:
        """A pass; then each micro-batch has its logits.

        Args:
            on_unit: told whenever the frontmost micro-batch enters a unit.

        Returns:
            seconds without anything to run, by what was waited for.

        Raises:
            StorageError: when something could not be read or written, or is not what it was.
        """
        waits: dict[str, float] = {}
        for home, place in self.places.items():
            place.begin_pass([batch.view for batch in batches if batch.home == home])
        run_pass(batches, self._weights, self.num_units, on_unit=on_unit, waits=waits)
        for place in self.places.values():
            place.finish_pass()
        self._files.check_unchanged()  # before any token comes of what was read
        self._rows.check_unchanged()
        return waits
