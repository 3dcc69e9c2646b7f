"""Rows of embeddings, gathered from memory or from the file of the table, one row at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from flexgen.base.recorder import COMPUTE, Recorder, recorded
from flexgen.devices.staging import Staging
from flexgen.errors import StorageError
from flexgen.io.aligned import AlignedBuffer
from flexgen.io.direct_io import File
from flexgen.weights.unit import TensorSource, UnitLayout, WantedTensor

logger = logging.getLogger(__name__)


class RowSource(TensorSource, Protocol):
    """A source of a matrix whose rows can also be read and made one by one."""

    def assemble_rows(self, raws: Sequence[torch.Tensor], out: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """An embedding table as stored.

    Attributes:
        module: The name of the module in the model.
        source: The stored bytes of the table, row by row: a source with `rows_apart`.
        dtype: The dtype of the decoded rows.
    """

    module: str
    source: RowSource
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        """The file that holds the table."""
        return self.source.ranges[0].path

    @property
    def num_rows(self) -> int:
        return self.source.shape[0]

    @property
    def row_elements(self) -> int:
        return self.source.shape[1]

    @property
    def row_bytes(self) -> int:
        """The stored bytes of a row, in all ranges together."""
        return sum(self.row_sizes)

    @property
    def row_sizes(self) -> list[int]:
        """The stored bytes of a row in each range of the source."""
        return [each.nbytes // self.num_rows for each in self.source.ranges]

    @property
    def layout(self) -> UnitLayout:
        """The whole table as a layout, so that it can be loaded like a unit."""
        return UnitLayout.of(-1, self.module, [WantedTensor(module=self.module, parameter="weight", source=self.source, dtype=self.dtype)])


class EmbeddingRows:
    """Gathers rows for the micro-batches, from memory for tables that were loaded.

    Args:
        tables: The tables.
        staging: What copies rows to where computing happens.
        verify: Whether to compare rows with those of their first read.
        recorder: The recorder of the trace; None without one.
    """

    def __init__(self, tables: Sequence[RowTable], staging: Staging, *, verify: bool = False, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        self._tables = {table.module: table for table in tables}
        self._resident: dict[str, torch.Tensor] = {}
        self._files: dict[Path, File] = {}
        self._staging = staging
        # Checksums of the rows of each table; -1 for rows that have not been read.
        self._sums = {table.module: torch.full((table.num_rows,), -1, dtype=torch.int64) for table in tables} if verify else {}
        self.bytes_gathered = 0

    def keep(self, module: str, parameter: str, table: torch.Tensor) -> None:
        """Use a table that was loaded into memory."""
        self._resident[module] = table

    def rows(self, module: str, token_ids: torch.Tensor, host_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (n, dim) and `token_ids` renumbered to index them, both where computing happens.

        Args:
            module: The name of the embedding.
            token_ids: The token ids, where computing happens.
            host_ids: The same ids in host memory; None if they have to be copied there first, for which the host waits.
        """
        if module in self._resident:
            return self._resident[module], token_ids
        with recorded(self._recorder, COMPUTE, "gather embedding rows") as told:
            unique, renumbered = torch.unique(token_ids.cpu() if host_ids is None else host_ids, return_inverse=True)
            found = self._checked(self._tables[module], unique)
            told.update(bytes=found.numel(), rows=len(unique))
            self.bytes_gathered += found.numel()
            rows, renumbered = self._staging.to_device(_decoded(self._tables[module], found), renumbered).take()
        return rows, renumbered

    def _checked(self, table: RowTable, wanted: torch.Tensor) -> torch.Tensor:
        """Return the bytes of rows, which are read again if they are not what they were.

        Raises:
            StorageError: They are still not what they were.
        """
        found = self._read(table, wanted)
        if self._sums and not self._agree(table, wanted, found):
            logger.warning("%s: rows of %s are not what they were; reading them again", table.path, table.module)
            found = self._read(table, wanted)
            if not self._agree(table, wanted, found):
                raise StorageError(f"{table.path}: rows of {table.module} are not what they were when they were first read")
        return found

    def _file(self, path: Path) -> File:
        if path not in self._files:
            self._files[path] = File(path, direct=False)  # hot rows stay in the page cache, which the kernel can reclaim
        return self._files[path]

    def _read(self, table: RowTable, wanted: torch.Tensor) -> torch.Tensor:
        """Return the bytes of these rows, (n, row_bytes) uint8; those that are not cached are fetched together."""
        sizes = table.row_sizes
        found = AlignedBuffer(len(wanted) * table.row_bytes)
        reads: list[tuple[File, int, int, int]] = []  # file, offset, place in the buffer, size
        at = 0
        for row in wanted.tolist():
            for each, size in zip(table.source.ranges, sizes, strict=True):
                reads.append((self._file(each.path), each.offset + row * size, at, size))
                at += size
        for file, offset, _, size in reads:
            file.will_read(offset, size)
        for file, offset, place, size in reads:
            file.read_into(found.view[place : place + size], offset)
        return found.tensor[:at].view(len(wanted), table.row_bytes)

    def _agree(self, table: RowTable, wanted: torch.Tensor, found: torch.Tensor) -> bool:
        """Return whether the rows have the checksums of their first read; record the checksums of rows that are read for the first time."""
        sums, before = found.sum(dim=1, dtype=torch.int64), self._sums[table.module][wanted]
        if bool(((before >= 0) & (before != sums)).any()):
            return False
        self._sums[table.module][wanted] = sums
        return True

    def check_unchanged(self) -> None:
        """Check that no file has changed.

        Raises:
            StorageError: A file has changed.
        """
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _decoded(table: RowTable, found: torch.Tensor) -> torch.Tensor:
    """Return rows (n, columns) made of their stored bytes (n, row_bytes)."""
    parts = found.split(table.row_sizes, dim=1)
    raws = [part.contiguous().view(-1).view(each.dtype) for part, each in zip(parts, table.source.ranges, strict=True)]
    rows = torch.empty(len(found), table.row_elements, dtype=table.dtype)
    table.source.assemble_rows(raws, rows)
    return rows
