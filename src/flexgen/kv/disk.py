"""KV on disk: pages are read ahead into staging, attended to on the host, and written when they are full.

Pages that are not full yet stay in memory (tails.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence

from flexgen.base.recorder import WAITING, recorded
from flexgen.io.pool import Contents, IOPool, Ticket
from flexgen.kv.format import KVPages
from flexgen.kv.host import HostAttention, HostView
from flexgen.kv.pages import layer_index
from flexgen.kv.place import Answer, Place, View
from flexgen.kv.plan import GroupPlans
from flexgen.kv.read_ahead import ReadAhead
from flexgen.kv.slots import BatchSlots
from flexgen.kv.spill import DiskPool, StagedLayer
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice


class DiskPlace(Place):
    """The place for micro-batches whose pages are on disk.

    Args:
        pool: The pages.
        attention: The host attention, which attends to pages in staging.
        io: The threads that read and write pages.
        staging_bytes: The staging for pages that are read ahead: at least one layer of one micro-batch.
        overlap: Whether pages are read ahead and written behind; otherwise both are waited for at once.
    """

    def __init__(self, pool: DiskPool, attention: HostAttention, io: IOPool, staging_bytes: int, *, overlap: bool = True) -> None:
        self.pool, self._attention, self._io, self._overlap = pool, attention, io, overlap
        self.read_ahead = ReadAhead(pool, io, staging_bytes, overlap=overlap)
        self._where = layer_index(pool.groups)
        self._served: set[tuple[BatchSlots, int]] = set()  # layers of this pass that the worker has stored
        self._writes: list[Ticket] = []
        self._filled: list[tuple[int, list[int]]] = []  # (group, pages) of tails that are written in this pass

    def view(self, slices: Sequence[Slice]) -> DiskView:
        batch = BatchSlots(self.pool.groups, slices, self.pool.tails)
        self._filled += [(index, group.filled) for index, group in enumerate(batch.groups)]
        return DiskView(batch, self._attention.view(batch.slices, functools.partial(self._lend, batch)))

    def begin_pass(self, views: Sequence[View]) -> None:
        self.read_ahead.begin([view.batch for view in views if isinstance(view, DiskView) and view.batch.reads])

    @contextlib.contextmanager
    def _lend(self, batch: BatchSlots, layer: int) -> Iterator[KVPages]:
        """Lend a layer's pages in staging; those with new tokens are written to disk or copied to the tails afterwards."""
        (_, place), again = self._where[layer], (batch, layer) in self._served
        slots, tails = batch.groups, self.pool.tails
        staged = self._read_again(batch, layer) if again else self._acquire(batch, layer)
        for each in staged.groups:
            tails.load(each.index, place, each.memory, slots[each.index].kept if again else slots[each.index].loaded)
        yield staged.pages
        if not again:
            for each in staged.groups:
                tails.store(each.index, place, each.memory, slots[each.index].kept)
            self._write_back(batch, layer, staged)
            self._served.add((batch, layer))

    def _read_again(self, batch: BatchSlots, layer: int) -> StagedLayer:
        """Read again the pages that an earlier layer has stored, for a layer that shares its keys."""
        group, place = self._where[layer]
        staged = StagedLayer(self.pool.groups, group, batch.num_slots)
        parts = self.pool.parts(place, staged, [each.stored for each in batch.groups])
        with self._recorded_wait("wait for pages"):
            for ticket in self._writes:
                ticket.wait()
            self._io.read(parts, contents=Contents("KV", f"KV of layer {layer}")).wait()
        return staged

    def _acquire(self, batch: BatchSlots, layer: int) -> StagedLayer:
        if batch.reads:
            with self._recorded_wait("wait for pages"):
                return self.read_ahead.acquire(batch, layer)
        group, _ = self._where[layer]  # new prompts are not read, so they have staging of their own
        return StagedLayer(self.pool.groups, group, batch.num_slots)

    def _write_back(self, batch: BatchSlots, layer: int, staged: StagedLayer) -> None:
        group, place = self._where[layer]
        parts = self.pool.parts(place, staged, [each.written for each in batch.groups])
        contents = Contents("KV", f"KV of layer {layer}")
        give_back = functools.partial(self.read_ahead.give_back, batch, group, staged) if batch.reads else None
        waits = not (batch.reads and self._overlap)  # so that the staging of new prompts holds one layer at a time
        with self._recorded_wait("wait for the write of pages") if waits else contextlib.nullcontext():
            ticket = self._io.write(parts, give_back, contents)
            if waits:
                ticket.wait()
        self._writes.append(ticket)

    def _recorded_wait(self, name: str) -> contextlib.AbstractContextManager[object]:
        return recorded(self._attention.recorder, self._attention.lane.track, name, WAITING)

    def finish_pass(self) -> None:
        self._attention.drain()
        self.read_ahead.finish()
        for ticket in self._writes:
            ticket.wait()
        self._writes.clear()
        self._served.clear()
        for group, pages in self._filled:
            self.pool.tails.forget(group, pages)
        self._filled.clear()

    def forget(self, sequences: Collection[int]) -> None:
        self.pool.tails.end(sequences)

    def close(self) -> None:
        self.read_ahead.stop()
        self._attention.close()
        self.read_ahead.settle()
        for ticket in self._writes:
            ticket.settle()
        self.pool.close()


class DiskView:
    """The KV of a micro-batch, over staged pages.

    Attributes:
        batch: The slots of the micro-batch.
        plan: The index tensors, which refer to slots.
    """

    def __init__(self, batch: BatchSlots, staged: HostView) -> None:
        self.batch, self.plan, self._staged = batch, staged.plan, staged

    @property
    def device_groups(self) -> GroupPlans:
        """The index tensors on the computing device; see `View`."""
        return self._staged.device_groups

    @device_groups.setter
    def device_groups(self, groups: GroupPlans) -> None:
        self._staged.device_groups = groups

    def attend(self, call: AttentionCall) -> Answer:
        return self._staged.attend(call)
