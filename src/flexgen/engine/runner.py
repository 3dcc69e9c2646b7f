"""A model with its bytes where the policy puts them, and the threads that move them.

It executes the plans of passes, and knows no requests and no sequences.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgen.base.recorder import COMPUTE, WAITING, Recorder, recorded
from flexgen.devices.base import Device
from flexgen.devices.packed import PackedCopies
from flexgen.devices.recorded import RecordedDevice
from flexgen.devices.serial import SerialDevice
from flexgen.devices.staging import Staging
from flexgen.engine.boundary import Boundary, CheckedBoundary
from flexgen.engine.sweep import MicroBatchForward, SweepRecorder, run_pass
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.kernels.threads import KernelThreads
from flexgen.kv.flow import KVFlow
from flexgen.kv.open import KVSetup, open_places
from flexgen.kv.pages import group_layers
from flexgen.kv.random_pages import RandomPages
from flexgen.kv.sparse import ValueCounter
from flexgen.models.assemble import AssembledModel
from flexgen.models.attention import PassCache
from flexgen.models.fused import Fused
from flexgen.models.scoring import Scores
from flexgen.options import WEIGHT_HOMES
from flexgen.passes.plan import PassPlan
from flexgen.plan.policy import Policy
from flexgen.plan.price.weights import unit_homes
from flexgen.weights.rows import EmbeddingRows
from flexgen.weights.store import WeightStore

logger = logging.getLogger(__name__)

# A thread that has read a chunk needs the interpreter for some microseconds; others release it after this time.  With Python's default
# of 5 ms, a disk of 3.4 GB/s reads at 1.6 GB/s beside Python code (docs/log.md).
SWITCH_SECONDS = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutput:
    """What a micro-batch computed.

    Attributes:
        logits: The logits of the wanted positions, (positions, vocab), in the order of the slices and their positions.
        scores: The scores of the scored positions in the same order; None if there are none.
    """

    logits: torch.Tensor
    scores: Scores | None


class ModelRunner:
    """An executor of passes, which owns the memory and the threads that they need.

    Args:
        model: The assembled model, without weights.
        policy: Where every byte lives and what a pass carries.
        backend: The device, or None when computing happens in host memory; the runner closes it, also if it cannot be constructed.
        offload_dir: The folder of the spill file; needed only if the policy puts KV on disk.
        verify_reads: Whether to compare the bytes that are read from disk with those that were written or first read.
        poison: Whether to overwrite released memory, so that a late use is noticed (for tests).
        overlap: Whether bytes may be copied while something is computed; otherwise one waits for the other.
        recorder: The recorder of the trace; None without one.

    Attributes:
        homes: The home of each unit's weights.
        places: For each tier, the place where its KV is kept and attended to.
        cache: The pages of all sequences.
        copies: The copies of small tensors to and from the computing device.
        values: The bytes of values that sparse attention saw and did not read since the runner was made.
        now: Returns the time in seconds by which passes are measured.
        recorder: The recorder of the trace; None without one.
    """

    def __init__(
        self,
        model: AssembledModel,
        policy: Policy,
        *,
        backend: Device | None = None,
        offload_dir: Path | None = None,
        verify_reads: bool = False,
        poison: bool = False,
        overlap: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        if backend is not None and recorder is not None:
            backend = RecordedDevice(backend, recorder)
        if backend is not None and not overlap:
            backend = SerialDevice(backend, recorder)
        self.model, self.policy, self.recorder = model, policy, recorder
        self._previous_threads, self._previous_interval = torch.get_num_threads(), sys.getswitchinterval()
        self._backend, self.now = backend, time.perf_counter if backend is None else backend.now
        with contextlib.ExitStack() as opened:  # what outlives a failed construction is closed by it, too
            if backend is not None:
                opened.callback(backend.close)
            self.homes = unit_homes(model.spec, policy.weights)
            self._arrived = threading.Event()  # wakes the ready loop
            self.values = ValueCounter()
            self._files = FileSet(verify=verify_reads, open_file=model.open_file)
            opened.callback(self._files.close)
            staging = Staging(backend, policy.copies_in_bytes, policy.copies_out_bytes)
            self.copies = PackedCopies(staging)
            self._rows = EmbeddingRows(model.tables, staging, verify=verify_reads, recorder=recorder)
            opened.callback(self._rows.close)
            self._io = IOPool(policy.io_threads, recorder, self.now)
            opened.callback(self._io.close)
            self._decoders = KernelThreads(policy.compute_threads)
            opened.callback(self._decoders.close)
            model.bound.run_loops_on(self._decoders.over)
            if backend is None:
                opened.callback(Fused(model.bound.model, model.dtype, self._decoders.over).close)
            self._weights = WeightStore(
                model.layouts, self.homes, model.bound, self._io, self._files, backend=backend,
                host_ring_bytes=policy.host_ring_bytes, device_ring_bytes=policy.device_ring_bytes, on_arrival=self._arrived.set,
                parallel=self._decoders.over, runs_ahead=overlap, poison=poison, recorder=recorder,
            )  # fmt: skip
            opened.callback(self._weights.close)
            self.places, self.cache = open_places(KVSetup(
                groups=group_layers(model.layers, policy.page_tokens, model.kv_format), policy=policy, backend=backend,
                staging=staging, flow=KVFlow.of(has_device=backend is not None), io=self._io, offload_dir=offload_dir,
                notify=self._arrived.set, verify=verify_reads, values=self.values, recorder=recorder, overlap=overlap,
            ))  # fmt: skip
            for place in self.places.values():
                opened.callback(place.close)
            self._opened = opened.pop_all()
        torch.set_num_threads(policy.compute_threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._pass_cache = PassCache()
        self._loaded = False

    def load(self) -> None:
        """Read the weights that stay in memory, bind them, and start the links; call it once."""
        if self._loaded:
            return
        self._weights.keep(self.model.residents, self.model.bound.bind_resident)
        if self.policy.embedding_resident:
            for table in self.model.tables:
                self._weights.keep(table.layout, self._rows.keep)
        self.model.bound.move_buffers(self.copies.device)
        self._weights.load()
        self._weights.start()
        self._loaded = True
        logger.debug("weights: %s", self._weights.describe())

    def close(self) -> None:
        """Stop the links and free the memory, all of it also where a part of it fails."""
        try:
            self._opened.close()
        finally:
            torch.set_num_threads(self._previous_threads)
            sys.setswitchinterval(self._previous_interval)

    def fill_kv(self, stored: Mapping[str, Sequence[Sequence[int]]], seed: int) -> None:
        """Fill the pages of KV with random numbers, as if tokens had been computed; no pass may be running.

        Args:
            stored: For each tier and layer group, the page ids that hold tokens.
            seed: The seed of the numbers.

        Raises:
            StorageError: Pages cannot be written to disk.
        """
        with contextlib.closing(RandomPages(self.model.dtype, self.policy.compute_threads, self._backend, self._io, seed)) as pages:
            for tier, pool in self.cache.pools.items():
                pages.fill(tier, pool, stored[tier])

    # -- passes ---------------------------------------------------------------------------------------------------------------------

    @property
    def num_units(self) -> int:
        """The number of units of a pass, which are the steps of its progress."""
        return len(self.model.layouts)

    def wake(self) -> None:
        """Have the pass that is running, if there is one, look again at what it waits for; to be called from any thread."""
        self._arrived.set()

    def forget(self, sequences: Collection[int]) -> None:
        """Free what is kept for sequences, given by their ids, whose pages are free; no pass may be running.

        Only a stage that does not plan its passes itself has to be told.
        """
        for place in self.places.values():
            place.forget(sequences)

    def run(
        self, plan: PassPlan, on_unit: Callable[[int], None] = lambda unit: None, boundary: Boundary | None = None
    ) -> tuple[list[BatchOutput], dict[str, float]]:
        """Execute a pass.

        Args:
            plan: The plan of the pass.
            on_unit: A function that is called whenever the frontmost micro-batch enters a unit.
            boundary: Where hidden states enter and leave a stage; None if this is the whole model.

        Returns:
            The output of each micro-batch, none of a stage that hands its hidden states over; and for each cause the seconds in which
            there was nothing to run.

        Raises:
            StorageError: Something could not be read or written, or has changed on disk.
        """
        recorder, record = self.recorder, None
        checked = None if boundary is None else CheckedBoundary(boundary, len(plan.micro_batches))
        forwards: list[MicroBatchForward] = []
        with recorded(recorder, COMPUTE, "prepare"):
            for batch in plan.micro_batches:
                view, after = self.places[batch.home].view(batch.slices), [forwards[index] for index in batch.after]
                forwards.append(MicroBatchForward(
                    batch, self.model.bound, self._pass_cache, view, self._rows, self.copies, after, recorder, checked, len(forwards)
                ))  # fmt: skip
            for home, place in self.places.items():
                place.begin_pass([forward.view for forward in forwards if forward.batch.home == home])
        if recorder is not None:
            record = SweepRecorder(recorder, forwards, [layout.name for layout in self.model.layouts])
        waits = run_pass(forwards, self._weights, self.num_units, self._arrived, on_unit, record, self.now)
        self._files.check_unchanged()  # before any token results from what was read
        self._rows.check_unchanged()
        if checked is not None:
            checked.release()
        with recorded(recorder, COMPUTE, "wait for KV", WAITING):
            for place in self.places.values():
                place.finish_pass()
        return [BatchOutput(logits=each.logits, scores=each.scores) for each in forwards if each.logits is not None], waits

    # -- figures --------------------------------------------------------------------------------------------------------------------

    def device_bytes(self) -> int:
        """Return the most bytes that were taken on the device, see `Device.peak_bytes` (0 on a CPU)."""
        return self._backend.peak_bytes() if self._backend is not None else 0

    def placement(self) -> dict[str, dict[str, int]]:
        """Return, for each tier, the bytes of "weights" as assigned and of "kv" at the peak."""
        weights: dict[str, int] = {}
        for home, size in self._weights.held_bytes().items():
            weights[WEIGHT_HOMES[home]] = weights.get(WEIGHT_HOMES[home], 0) + size
        return {"weights": weights, "kv": dict(self.cache.peak_bytes)}

    def bytes_moved(self) -> dict[str, int]:
        """Return the bytes that each link has moved since the runner was made."""
        moved = {"disk_read": self._io.bytes_read + self._rows.bytes_gathered, "disk_write": self._io.bytes_written}
        if self._backend is not None:
            moved |= {"host_to_device": self._backend.bytes_in, "device_to_host": self._backend.bytes_out}
        return moved

    def values_attended(self) -> dict[str, int]:
        """Return the bytes of values that next tokens have "seen" under sparse attention, and of those left "unread"."""
        return {"seen": self.values.seen_bytes, "unread": self.values.unread_bytes}

    def disk_busy_seconds(self) -> float:
        """Return the seconds in which the disk was reading or writing since the runner was made."""
        return self._io.busy_seconds
