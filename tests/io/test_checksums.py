"""Files that bring back something else than they were given."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.devices.staging import Staging
from flexgen.errors import StorageError
from flexgen.formats.base import StoredTensor
from flexgen.io.aligned import AlignedBuffer
from flexgen.io.checksums import BLOCK_BYTES, BlockSums
from flexgen.io.direct_io import File, FileSet
from flexgen.kv.spill import NEW_FILE
from flexgen.weights.rows import EmbeddingRows, RowTable

SIZE = 16 * BLOCK_BYTES


def random_bytes(buffer: AlignedBuffer, seed: int) -> memoryview:
    buffer.view[:SIZE] = np.random.default_rng(seed).bytes(SIZE)
    return buffer.view[:SIZE]


def flip(path: str | Path, bit: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    (old,) = os.pread(descriptor, 1, bit // 8)
    os.pwrite(descriptor, bytes([old ^ 1 << bit % 8]), bit // 8)
    os.close(descriptor)


def test_every_flipped_bit_of_a_spill_file_is_noticed(tmp_path: Path) -> None:
    numbers, buffer = random.Random(0), AlignedBuffer(SIZE)
    file = File(tmp_path / "spill", flags=NEW_FILE, unlinked=True, verify=True)
    file.truncate(SIZE)
    file.write_from(random_bytes(buffer, 1)[: SIZE // 2], 0)
    path = f"/proc/self/fd/{file._fd}"
    for _ in range(1000):
        bit = numbers.randrange(SIZE * 8)
        flip(path, bit)
        with pytest.raises(StorageError, match="are not what they were"):
            file.read_into(buffer.view, 0)
        flip(path, bit)
    file.read_into(buffer.view, 0)
    file.close()


def test_a_weight_file_is_compared_with_its_first_reading(tmp_path: Path) -> None:
    path, buffer = tmp_path / "weights", AlignedBuffer(SIZE)
    path.write_bytes(bytes(random_bytes(buffer, 2))[: SIZE - 100])
    files = FileSet(verify=True)
    files[path].read_into(buffer.view[: 4 * BLOCK_BYTES], 0)
    flip(path, 3 * BLOCK_BYTES * 8)
    flip(path, 8 * BLOCK_BYTES * 8)  # not seen before
    with pytest.raises(StorageError, match="are not what they were"):
        files[path].read_into(buffer.view, 0)
    flip(path, 3 * BLOCK_BYTES * 8)
    files[path].read_into(buffer.view, 0)
    flip(path, (SIZE - 101) * 8)  # in the last block, which is short
    with pytest.raises(StorageError, match="are not what they were"):
        files[path].read_into(buffer.view, 0)
    files.close()


def test_what_a_second_reading_brings_right_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, buffer = tmp_path / "weights", AlignedBuffer(SIZE)
    path.write_bytes(bytes(random_bytes(buffer, 3)))
    wanted = bytes(buffer.view)
    file = File(path, verify=True)
    file.read_into(buffer.view, 0)
    plain, calls = os.preadv, []

    def flipping(descriptor: int, views: list[memoryview], offset: int) -> int:
        count = plain(descriptor, views, offset)
        calls.append(1)
        views[0][7] ^= len(calls) == 1
        return count

    monkeypatch.setattr(os, "preadv", flipping)
    file.read_into(buffer.view, 0)
    assert bytes(buffer.view) == wanted
    assert len(calls) == 2
    assert "reading them again" in caplog.text
    file.close()


def test_rows_of_an_embedding_are_compared_with_their_first_reading(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(200)) * 8)
    stored = StoredTensor(name="m", path=path, offset=8, nbytes=400, dtype=torch.float32, shape=(20, 5))
    source = ParameterSource(name="m", shape=(20, 5), dtype=torch.float32, pieces=whole(stored))
    table = RowTable(module="m", source=source, dtype=torch.float32)
    rows = EmbeddingRows([table], Staging(None), verify=True)
    before = rows.rows("m", torch.tensor([3, 7, 3]))[0].view(torch.uint8)
    for row, noticed in ((7, True), (9, False)):
        bit = (8 + row * 20 + 13) * 8 + 2
        flip(path, bit)
        if noticed:
            with pytest.raises(StorageError, match="rows of m are not what they were"):
                rows.rows("m", torch.tensor([row]))
        else:
            rows.rows("m", torch.tensor([row]))
        flip(path, bit)
    assert torch.equal(rows.rows("m", torch.tensor([7, 3]))[0].view(torch.uint8), before)
    rows.close()


def test_blocks_that_are_moved_in_part_are_not_checked() -> None:
    sums, data = BlockSums(3 * BLOCK_BYTES), memoryview(bytearray(3 * BLOCK_BYTES))
    sums.note(data, 0)
    data[BLOCK_BYTES - 8] = 1
    data[BLOCK_BYTES] = 1
    sums.note(data[BLOCK_BYTES - 8 : BLOCK_BYTES + 8], BLOCK_BYTES - 8)
    assert sums.agree(data, 0)  # neither of the two blocks is known any more
    data[2 * BLOCK_BYTES] = 1
    assert not sums.agree(data, 0)
    assert sums.agree(data[: 2 * BLOCK_BYTES + 8], 0)
