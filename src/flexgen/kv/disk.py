"""KV at home on disk: pages in an unlinked file, read ahead layer by layer, attended to on the host.

A layer's pages lie together, a sequence's pages in runs, so that reads are large.  A page that several sequences of a
micro-batch share is read once.  A page is written when it is full; until then it stays in memory (kv_tails.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flexgen.devices.base import Backend
from flexgen.io.aligned import ALIGNMENT, AlignedBuffer
from flexgen.io.direct_io import File
from flexgen.io.pool import IOPool, Ticket
from flexgen.kv.cache import KVGroup, PageList
from flexgen.kv.host import HOST, HostPlace, HostView, Pages
from flexgen.kv.place import View
from flexgen.kv.tails import Moves, Tails
from flexgen.kv.views import KVPlan
from flexgen.passes.plan import Slice

if TYPE_CHECKING:
    from flexgen.kernels.attention import AttentionKernels as Kernels

logger = logging.getLogger(__name__)

NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class DiskPool:
    """Pages in a spill file: for each group, each layer's key pages, then its value pages.

    Args:
        tail_bytes: memory for pages that are not full yet.
    """

    def __init__(
        self, groups: Sequence[KVGroup], num_pages: Sequence[int], folder: Path, *, tail_bytes: int = 0, verify: bool = False
    ) -> None:
        self.groups, self.num_pages = tuple(groups), list(num_pages)
        self.tails = Tails(groups, tail_bytes)
        odd = [size for group in groups for size in (group.key_page_bytes, group.value_page_bytes) if size % ALIGNMENT]
        if odd:
            logger.warning("KV pages of %d bytes are no multiple of %d: they go through the page cache, which is slower", odd[0], ALIGNMENT)
        path = folder / f"kv-{os.getpid()}-{id(self):x}.spill"
        self.file = File(path, flags=NEW_FILE, direct=not odd, unlinked=True, verify=verify)
        self._bases: list[int] = []
        total = 0
        for group, count in zip(groups, num_pages, strict=True):
            self._bases.append(total)
            total += count * group.page_bytes
        self.file.truncate(total)
        self._free = [PageList(count) for count in num_pages]

    def take(self, group: int, count: int) -> list[int] | None:
        return self._free[group].take(count)

    def give_back(self, group: int, pages: Sequence[int]) -> None:
        self.tails.forget(group, pages)
        self._free[group].give_back(pages)

    def offsets(self, group: int, index: int, page: int) -> tuple[int, int]:
        """Where a page's keys and values begin, for the layer at place `index` of the group."""
        layout, count = self.groups[group], self.num_pages[group]
        layer = self._bases[group] + index * count * (layout.key_page_bytes + layout.value_page_bytes)
        return layer + page * layout.key_page_bytes, layer + count * layout.key_page_bytes + page * layout.value_page_bytes

    def close(self) -> None:
        self.file.close()


@dataclass(frozen=True, slots=True)
class _StagedPage:
    """A page of the file and its place in staging."""

    page: int
    slot: int


class Staged:
    """One layer's pages of one micro-batch, in host memory."""

    def __init__(self, group: KVGroup, num_slots: int) -> None:
        self.keys = AlignedBuffer(num_slots * group.key_page_bytes)
        self.values = AlignedBuffer(num_slots * group.value_page_bytes)
        # (slots, bytes of a page)
        self.key_rows = self.keys.tensor[: num_slots * group.key_page_bytes].view(num_slots, group.key_page_bytes)
        self.value_rows = self.values.tensor[: num_slots * group.value_page_bytes].view(num_slots, group.value_page_bytes)
        self.key_pages = self.key_rows.view(group.dtype).view(num_slots, group.key_heads, group.key_dim, group.page_tokens)
        self.value_pages = self.value_rows.view(group.dtype).view(num_slots, group.value_heads, group.page_tokens, group.value_dim)
        self.ticket: Ticket | None = None


class DiskPlace(HostPlace):
    """Serves micro-batches whose pages are on disk.

    Args:
        staging_bytes: of pages read ahead, at least one layer of one micro-batch.
    """

    chunks = False  # a later chunk's read would race with an earlier one's write

    def __init__(
        self, pool: DiskPool, kernels: Kernels, device_kernels: Kernels, backend: Backend | None, notify: Callable[[], None],
        io: IOPool, staging_bytes: int,
    ) -> None:  # fmt: skip
        self._share(pool.groups, kernels, device_kernels, backend, notify, "flexgen-disk-attention")
        self.disk, self._io = pool, io
        self._staging_bytes = staging_bytes
        self._lock = threading.Condition()
        self._staged: dict[tuple[int, int], Staged] = {}  # (view, layer)
        self._served: set[tuple[int, int]] = set()  # (view, layer) of this pass; the worker's
        self._in_use = 0
        self._lent = 0  # staged layers that the worker uses, or that are being written back
        self._wanted: tuple[int, int] | None = None  # (view, layer) that the worker waits for
        self._spare: dict[tuple[int, int], list[Staged]] = {}
        self._writes: list[Ticket] = []
        self._filled: list[tuple[int, int]] = []  # (group, page) of tails that this pass writes
        self._ahead: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stopping = False

    def view(self, slices: Sequence[Slice]) -> DiskView:
        view = DiskView(self, slices)
        self._filled += view.filled
        return view

    # ------------------------------------------------------------------ reading ahead

    def begin_pass(self, views: Sequence[View]) -> None:
        """Start reading what the next tokens will attend to, layer by layer."""
        reading = [view for view in views if isinstance(view, DiskView)]
        if not reading:
            return
        self._ahead = threading.Thread(target=self._read_ahead, args=(reading,), name="flexgen-kv-ahead", daemon=True)
        self._ahead.start()

    def _read_ahead(self, views: Sequence[DiskView]) -> None:
        try:
            for layer in sorted(self.where):
                for view in views:
                    if view.reads and not self._stage(view, layer):
                        return
        except BaseException as error:  # noqa: BLE001 - raised to the worker, which waits for the pages
            with self._lock:
                self._failure = error
                self._lock.notify_all()

    def _stage(self, view: DiskView, layer: int) -> bool:
        group, index = self.where[layer]
        staged = self._take(view, group)
        if staged is None:
            return False
        staged.ticket = self._io.read(view.read_parts(staged, group, index))
        with self._lock:
            self._staged[id(view), layer] = staged
            self._lock.notify_all()
        return True

    def _take(self, view: DiskView, group: int) -> Staged | None:
        """Staging for one layer of a view, once there is room; None when closing.

        Micro-batches may overtake each other.  When the worker waits for what is not staged yet, and nothing that is
        will be given back before, there is no room to wait for: the limit is passed.
        """
        slots, layout = view.num_slots(group), self.disk.groups[group]
        size = slots * (layout.key_page_bytes + layout.value_page_bytes)
        with self._lock:
            while self._in_use and self._in_use + size > self._staging_bytes and not self._stopping:
                if self._starved() and not self._lent:
                    break
                self._lock.wait()
            if self._stopping:
                return None
            self._in_use += size
            if spare := self._spare.get((group, slots)):
                return spare.pop()
            self._spare.clear()  # sizes change from pass to pass: spares of another size are memory held for nothing
            return Staged(layout, slots)

    def _starved(self) -> bool:
        """Whether the worker waits for a layer that is not staged (a layer staged a moment ago may not have woken it yet)."""
        return self._wanted is not None and self._wanted not in self._staged

    def _give_back(self, view: DiskView, group: int, staged: Staged) -> None:
        if not view.reads:
            return
        slots, layout = view.num_slots(group), self.disk.groups[group]
        with self._lock:
            self._in_use -= slots * (layout.key_page_bytes + layout.value_page_bytes)
            self._lent -= 1
            self._spare.setdefault((group, slots), []).append(staged)
            self._lock.notify_all()

    # ------------------------------------------------------------------ the worker's side

    @contextlib.contextmanager
    def pages(self, view: HostView, layer: int) -> Iterator[Pages]:
        """A layer's pages in staging; those with new tokens go back afterwards, to disk or to the tails."""
        assert isinstance(view, DiskView)
        again = (id(view), layer) in self._served
        staged = self._read_again(view, layer) if again else self._acquire(view, layer)
        group, index = self.where[layer]
        rows = group, index, staged.key_rows, staged.value_rows
        self.disk.tails.load(*rows, view.kept[group] if again else view.loaded[group])
        yield staged.key_pages, staged.value_pages
        if not again:
            self.disk.tails.store(*rows, view.kept[group])
            self._write_back(view, layer, staged)
            self._served.add((id(view), layer))

    def _read_again(self, view: DiskView, layer: int) -> Staged:
        """The pages that an earlier layer has stored: layers that share keys come back to them."""
        for ticket in self._writes:
            ticket.wait()
        group, index = self.where[layer]
        staged = Staged(self.disk.groups[group], view.num_slots(group))
        self._io.read(view.stored_parts(staged, group, index)).wait()
        return staged

    def _acquire(self, view: DiskView, layer: int) -> Staged:
        if not view.reads:  # new prompts only
            group, _ = self.where[layer]
            return Staged(self.disk.groups[group], view.num_slots(group))
        with self._lock:
            while (id(view), layer) not in self._staged:
                if self._failure is not None:
                    raise self._failure
                self._wanted = (id(view), layer)
                self._lock.notify_all()
                self._lock.wait()
            self._wanted = None
            self._lent += 1
            staged = self._staged.pop((id(view), layer))
        assert staged.ticket is not None
        staged.ticket.wait()
        return staged

    def _write_back(self, view: DiskView, layer: int, staged: Staged) -> None:
        group, index = self.where[layer]
        ticket = self._io.write(view.write_parts(staged, group, index), lambda: self._give_back(view, group, staged))
        if not view.reads:
            ticket.wait()  # prompts bring their own staging: one layer at a time
        self._writes.append(ticket)

    def finish_pass(self) -> None:
        self.worker.drain()
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None
        for ticket in self._writes:
            ticket.wait()
        self._writes.clear()
        self._served.clear()
        for group, page in self._filled:
            self.disk.tails.forget(group, [page])
        self._filled.clear()

    def close(self) -> None:
        with self._lock:
            self._stopping = True
            self._failure = self._failure or RuntimeError("closed")
            self._lock.notify_all()
        if self._ahead is not None:
            self._ahead.join()
        self.worker.close()
        for staged in self._staged.values():
            if staged.ticket is not None:
                staged.ticket.settle()
        for ticket in self._writes:
            ticket.settle()
        self.kernels.close()
        self.device_kernels.close()
        self.disk.close()


class DiskView(HostView):
    """A micro-batch over staged pages: its tables are renumbered to slots of the staging.

    Attributes:
        loaded, kept: per group, pages that come from the tails, and those that go there.
        filled: (group, page) of tails that go to disk.
        reads: whether there are earlier tokens.
    """

    def __init__(self, place: DiskPlace, slices: Sequence[Slice]) -> None:
        self._disk_place = place
        groups = place.disk.groups
        self._pages: list[list[_StagedPage]] = []  # per group: all pages of the micro-batch, by slot
        self._old: list[list[_StagedPage]] = []  # those with earlier tokens that are on disk
        self._written: list[list[_StagedPage]] = []  # those that go to disk
        self.loaded: list[Moves] = []
        self.kept: list[Moves] = []
        self.filled: list[tuple[int, int]] = []
        staged_tables: list[list[list[int]]] = [[] for _ in slices]
        for index, group in enumerate(groups):
            self._lay_out(index, group, slices, staged_tables)
        staged = [dataclasses.replace(each, tables=tuple(map(tuple, tables))) for each, tables in zip(slices, staged_tables, strict=True)]
        super().__init__(place, KVPlan(groups, staged, HOST), KVPlan(groups, staged, place.device))
        self.reads = any(each.start for each in slices)

    def _lay_out(self, index: int, group: KVGroup, slices: Sequence[Slice], tables: list[list[list[int]]]) -> None:
        tails = self._disk_place.disk.tails
        pages: list[_StagedPage] = []
        slots: dict[int, int] = {}  # page -> its slot
        old: list[_StagedPage] = []
        written: list[_StagedPage] = []
        loaded: list[tuple[int, int]] = []
        kept: list[tuple[int, int]] = []
        size = group.page_tokens
        for each, slice_tables in zip(slices, tables, strict=True):
            table = each.tables[index]
            end = each.start + each.length
            stop = -(-end // size)
            first = min(group.first_visible(each.start), each.start) // size
            renumbered = [-1] * stop
            for position in range(first, stop):
                renumbered[position] = slots.setdefault(table[position], len(pages))
                if renumbered[position] < len(pages):
                    continue  # shared
                staged = _StagedPage(table[position], len(pages))
                pages.append(staged)
                tail = tails.slot(index, staged.page)
                if tail is not None:
                    loaded.append((staged.slot, tail))
                elif position * size < each.start:
                    old.append(staged)
                if (position + 1) * size <= each.start:
                    continue  # no new token
                if (position + 1) * size > end and (tail := tails.keep(index, staged.page)) is not None:
                    kept.append((staged.slot, tail))
                else:
                    written.append(staged)
                    if tail is not None:
                        self.filled.append((index, staged.page))
            slice_tables.append(renumbered)
        self._pages.append(pages)
        self._old.append(old)
        self._written.append(written)
        self.loaded.append(_moves(loaded))
        self.kept.append(_moves(kept))

    def num_slots(self, group: int) -> int:
        return max(len(self._pages[group]), 1)

    def read_parts(self, staged: Staged, group: int, index: int) -> list[tuple[File, int, memoryview]]:
        return self._parts(staged, group, index, self._old[group])

    def write_parts(self, staged: Staged, group: int, index: int) -> list[tuple[File, int, memoryview]]:
        return self._parts(staged, group, index, self._written[group])

    def stored_parts(self, staged: Staged, group: int, index: int) -> list[tuple[File, int, memoryview]]:
        """All that is on disk once this pass has written."""
        kept = set(self.kept[group][0].tolist())
        return self._parts(staged, group, index, [each for each in self._pages[group] if each.slot not in kept])

    def _parts(self, staged: Staged, group: int, index: int, pages: Sequence[_StagedPage]) -> list[tuple[File, int, memoryview]]:
        """File ranges and staging views; neighbours in both are joined."""
        disk = self._disk_place.disk
        layout = disk.groups[group]
        parts = []
        for start, length in _runs(pages):
            key_offset, value_offset = disk.offsets(group, index, start.page)
            for view, offset, size in (
                (staged.keys.view, key_offset, layout.key_page_bytes),
                (staged.values.view, value_offset, layout.value_page_bytes),
            ):
                parts.append((disk.file, offset, view[start.slot * size : (start.slot + length) * size]))
        return parts


def _moves(pairs: Sequence[tuple[int, int]]) -> Moves:
    rows, slots = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    return rows, slots


def _runs(pages: Sequence[_StagedPage]) -> list[tuple[_StagedPage, int]]:
    """(first page, count) of stretches that are consecutive in the file and in staging."""
    runs: list[tuple[_StagedPage, int]] = []
    for each in pages:
        if runs:
            first, count = runs[-1]
            if each.page == first.page + count and each.slot == first.slot + count:
                runs[-1] = (first, count + 1)
                continue
        runs.append((each, 1))
    return runs
