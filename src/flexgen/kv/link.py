"""The link that brings pages of KV from host memory to the device, for next tokens that are attended to there.

Its thread takes the layers of a pass in order, and in each of them the micro-batches.  It gathers pages in pinned memory, and copies one
part in the stream of bulk copies while it gathers the next.  What a layer's pages hold was stored by earlier passes, so the link runs
ahead of computing, as far as its ring allows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.recorder import COMPUTE, KV_TO_DEVICE, WAITING, Recorder, recorded
from flexgen.base.ring import ByteRing, Slot
from flexgen.devices.base import Device, Event
from flexgen.devices.chunks import CHUNK_BYTES
from flexgen.kv.compact import CompactPages
from flexgen.kv.format import KVPages
from flexgen.kv.pages import PageMemory, PagePool, layer_index, layer_pages, with_tail


@dataclass(slots=True, eq=False, kw_only=True)
class Arrival:
    """Pages that the link has brought, or is bringing.

    Attributes:
        slot: Their slot in the ring.
        memories: The pages on the device, and their tails, if they have tails.
        event: The completion of their copies.
    """

    slot: Slot
    memories: Sequence[PageMemory]
    event: Event


class KVLink:
    """The link, whose ring has the same slots in memory of the device and in pinned memory of the host.

    Args:
        pool: The pages in host memory.
        backend: The device.
        ring_bytes: The bytes of the ring, on either side.
        notify: A function that wakes the ready loop.
        recorder: The recorder of the trace; None without one.
        overlap: Whether there is a thread that runs ahead; otherwise pages are brought when they are lent.

    Raises:
        CapacityError: The ring does not fit the device.
    """

    def __init__(
        self, pool: PagePool, backend: Device, ring_bytes: int, notify: Callable[[], None], recorder: Recorder | None = None, *,
        overlap: bool = True,
    ) -> None:  # fmt: skip
        self._pool, self._backend, self._notify, self._recorder, self._overlap = pool, backend, notify, recorder, overlap
        self._where = layer_index(pool.groups)
        self._on_device, self._on_host = backend.allocate(ring_bytes), backend.allocate_host(ring_bytes)
        self._ring = ByteRing(ring_bytes)
        self._lock = threading.Condition()
        self._arrived: dict[tuple[CompactPages, int], Arrival] = {}  # by micro-batch and the model's index of the layer
        self._left: list[tuple[Slot, Sequence[Event]]] = []  # slots that were given back, and what their next use has to wait for
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stopping = False

    def holds(self, pages: CompactPages) -> bool:
        """Return whether every layer of a micro-batch fits the ring."""
        return pages.largest_layer_bytes <= self._ring.capacity_bytes

    def begin(self, batches: Sequence[CompactPages]) -> None:
        """Start bringing the pages of these micro-batches, each layer of which is lent once in this pass; the ring holds each of them."""
        if batches and self._overlap:
            self._thread = threading.Thread(target=self._run, args=(batches,), name="flexgen-kv-link", daemon=True)
            self._thread.start()

    def _run(self, batches: Sequence[CompactPages]) -> None:
        try:
            for layer in sorted(self._where):
                for pages in batches:
                    if not self._bring(pages, layer):
                        return
        except BaseException as error:  # noqa: BLE001 - raised to the micro-batch that waits for the pages
            with self._lock:
                self._failure = error
            self._notify()

    def _bring(self, pages: CompactPages, layer: int) -> bool:
        """Bring one layer of a micro-batch, up to submitting its last copy; return False when closing."""
        group, place = self._where[layer]
        slot = self._claim(pages.layer_bytes(group))
        if slot is None:
            return False
        here, there = (pages.in_memory(group, ring[slot.offset : slot.offset + slot.size]) for ring in (self._on_host, self._on_device))
        event: Event | None = None
        with recorded(self._recorder, KV_TO_DEVICE, f"KV of layer {layer}", bytes=slot.size):
            for index, through, memory in zip(with_tail(self._pool.groups, group), here, there, strict=True):
                for source, pinned, destination in zip(self._pool.memory[index].planes, through.planes, memory.planes, strict=True):
                    event = self._copy(source[place], pages.ids[index], pinned[0], destination[0]) or event
        assert event is not None, "a next token sees its own page"
        with self._lock:
            self._arrived[pages, layer] = Arrival(slot=slot, memories=there, event=event)
        self._notify()
        return True

    def _copy(self, source: torch.Tensor, ids: torch.Tensor, through: torch.Tensor, destination: torch.Tensor) -> Event | None:
        """Copy pages, uint8 (pages, bytes), by their ids; return the completion of the last copy, None if there are no ids."""
        at_once = max(CHUNK_BYTES // max(source.shape[1], 1), 1)
        event: Event | None = None
        for start in range(0, len(ids), at_once):
            part = slice(start, min(start + at_once, len(ids)))
            torch.index_select(source, 0, ids[part], out=through[part])
            event = self._backend.copy_in(destination[part], through[part])
        return event

    def _claim(self, size_bytes: int) -> Slot | None:
        """Wait for a slot that neither computing nor a copy uses any more; return None when closing."""
        with self._lock:
            while (slot := self._ring.take(size_bytes)) is None and not self._stopping:
                self._lock.wait()
            if slot is None or self._stopping:
                return None
            self._count()
            guarded = [
                each for each in self._left if each[0].offset < slot.offset + slot.size and slot.offset < each[0].offset + each[0].size
            ]
            self._left = [each for each in self._left if each not in guarded]
        for _, guards in guarded:
            for guard in guards:
                guard.wait()
        return slot

    def has_arrived(self, pages: CompactPages, layer: int) -> bool:
        """Return whether a layer of a micro-batch can be lent, or the link has failed."""
        with self._lock:
            return not self._overlap or self._failure is not None or (pages, layer) in self._arrived

    @contextlib.contextmanager
    def lend(self, pages: CompactPages, layer: int) -> Iterator[KVPages]:
        """Lend a layer that has arrived to the thread that computes; what it submits within the block waits for the pages."""
        if not self._overlap:
            with recorded(self._recorder, COMPUTE, "wait for pages", WAITING):
                self._bring(pages, layer)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            arrival = self._arrived.pop((pages, layer))
        self._backend.await_in(arrival.event)
        yield layer_pages(arrival.memories, 0)
        marker = self._backend.marker()
        with self._lock:
            self._left.append((arrival.slot, (marker, arrival.event)))
            self._ring.give_back(arrival.slot)
            self._count()
            self._lock.notify_all()

    def _count(self) -> None:
        """Record how much of the ring is in use."""
        if self._recorder is not None:
            self._recorder.counter("ring of kv-link", self._ring.used_bytes)

    def finish(self) -> None:
        """Return once everything has been brought."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self) -> None:
        """Stop the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self.finish()
