"""Reads pages of KV ahead, layer by layer and micro-batch by micro-batch, into staging of a limited size; or when they are needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flexgen.io.pool import Contents, IOPool
from flexgen.kv.pages import layer_index, with_tail
from flexgen.kv.slots import BatchSlots
from flexgen.kv.spill import DiskPool, StagedLayer

BatchLayer = tuple[BatchSlots, int]  # a layer of a micro-batch, by the model's index


class ReadAhead:
    """Staging that a thread fills with layers, which a worker acquires and gives back.

    Args:
        pool: The pages on disk.
        io: The threads that read.
        limit_bytes: The size of the staging; it holds at least one layer of one micro-batch.
        overlap: Whether pages are read ahead, by a thread; otherwise `acquire` reads them.
    """

    def __init__(self, pool: DiskPool, io: IOPool, limit_bytes: int, *, overlap: bool = True) -> None:
        self._pool, self._io, self._limit_bytes, self._overlap = pool, io, limit_bytes, overlap
        self._where = layer_index(pool.groups)
        self._lock = threading.Condition()
        self._staged: dict[BatchLayer, StagedLayer] = {}
        self._in_use = 0  # bytes of staging
        self._lent = 0  # staged layers that the worker uses, or that are being written to disk
        self._wanted: BatchLayer | None = None  # the layer that the worker waits for
        self._spare: dict[tuple[int, ...], list[StagedLayer]] = {}  # (group, slots, slots of tails) -> staging of that size
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stopping = False

    def begin(self, batches: Sequence[BatchSlots]) -> None:
        """Start reading the pages that these micro-batches will attend to."""
        if batches and self._overlap:
            self._thread = threading.Thread(target=self._read, args=(batches,), name="flexgen-kv-ahead", daemon=True)
            self._thread.start()

    def _read(self, batches: Sequence[BatchSlots]) -> None:
        try:
            for layer in sorted(self._where):
                for batch in batches:
                    if not self._stage(batch, layer):
                        return
        except BaseException as error:  # noqa: BLE001 - raised to the worker, which waits for the pages
            with self._lock:
                self._failure = error
                self._lock.notify_all()

    def _stage(self, batch: BatchSlots, layer: int) -> bool:
        group, place = self._where[layer]
        staged = self._take(batch, group)
        if staged is None:
            return False
        parts = self._pool.parts(place, staged, [each.read for each in batch.groups])
        staged.ticket = self._io.read(parts, contents=Contents("KV", f"KV of layer {layer}"))
        with self._lock:
            self._staged[batch, layer] = staged
            self._lock.notify_all()
        return True

    def _take(self, batch: BatchSlots, group: int) -> StagedLayer | None:
        """Wait for room and return staging for one layer of a micro-batch; return None when closing.

        Micro-batches may overtake each other.  If the worker waits for a layer that is not staged yet while nothing staged is lent,
        nothing will be given back, so the limit is exceeded.
        """
        kind, size = self._kind(batch, group), self._size(batch, group)
        with self._lock:
            while self._in_use and self._in_use + size > self._limit_bytes and not self._stopping:
                if self._starved() and not self._lent:
                    break
                self._lock.wait()
            if self._stopping:
                return None
            self._in_use += size
            if spare := self._spare.get(kind):
                return spare.pop()
            self._spare.clear()  # sizes change from pass to pass: spares of other sizes would only take memory
            return StagedLayer(self._pool.groups, group, batch.num_slots)

    def _kind(self, batch: BatchSlots, group: int) -> tuple[int, ...]:
        return (group, *(batch.num_slots[each] for each in with_tail(self._pool.groups, group)))

    def _size(self, batch: BatchSlots, group: int) -> int:
        groups = self._pool.groups
        return sum(batch.num_slots[each] * groups[each].layer_page_bytes for each in with_tail(groups, group))

    def _starved(self) -> bool:
        """Return whether the worker waits for a layer that is not staged (it may not have noticed yet one that has just been staged)."""
        return self._wanted is not None and self._wanted not in self._staged

    def acquire(self, batch: BatchSlots, layer: int) -> StagedLayer:
        """Wait until a layer's pages have been read, and return them."""
        if not self._overlap:
            self._stage(batch, layer)
        with self._lock:
            while (batch, layer) not in self._staged:
                if self._failure is not None:
                    raise self._failure
                self._wanted = (batch, layer)
                self._lock.notify_all()
                self._lock.wait()
            self._wanted = None
            self._lent += 1
            staged = self._staged.pop((batch, layer))
        assert staged.ticket is not None
        staged.ticket.wait()
        return staged

    def give_back(self, batch: BatchSlots, group: int, staged: StagedLayer) -> None:
        """Let staging be reused."""
        with self._lock:
            self._in_use -= self._size(batch, group)
            self._lent -= 1
            self._spare.setdefault(self._kind(batch, group), []).append(staged)
            self._lock.notify_all()

    def finish(self) -> None:
        """Return once everything has been read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self) -> None:
        """Stop the thread; a waiting worker gets an error."""
        with self._lock:
            self._stopping = True
            self._failure = self._failure or RuntimeError("closed")
            self._lock.notify_all()
        self.finish()

    def settle(self) -> None:
        """Return once no read writes to the staging any more."""
        for staged in self._staged.values():
            if staged.ticket is not None:
                staged.ticket.settle()
