"""Direct I/O: planned extents cover what is wanted, what is read equals the file, and every failure reaches who waits."""

import errno
import itertools
import logging
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import StorageError
from flexgen.io import aligned
from flexgen.io.aligned import ALIGNMENT, AlignedBuffer, plan_extents
from flexgen.io.direct_io import File, FileSet
from flexgen.io.pool import IOPool, Ticket

PATHS = [Path("a"), Path("b")]
SIZE = 3 * ALIGNMENT + 777


@pytest.fixture
def pool():
    io = IOPool(2)
    yield io
    io.close()


@pytest.fixture
def stored(tmp_path) -> tuple[Path, bytes]:
    content = random.Random(0).randbytes(SIZE)
    path = tmp_path / "stored"
    path.write_bytes(content)
    return path, content


@given(
    st.lists(st.tuples(st.sampled_from(PATHS), st.integers(0, 20 * ALIGNMENT), st.integers(1, 6 * ALIGNMENT)), min_size=1, max_size=12),
    st.sampled_from([0, ALIGNMENT, 4 * ALIGNMENT]),
)
def test_extents_cover_all_ranges(ranges, max_gap):
    extents, positions, total = plan_extents(ranges, max_gap)
    for (path, offset, size), position in zip(ranges, positions, strict=True):
        around = [e for e in extents if e.path == path and e.offset <= offset and offset + size <= e.offset + e.size]
        assert [e.position + offset - e.offset for e in around] == [position]
    assert all(value % ALIGNMENT == 0 for e in extents for value in (e.offset, e.size, e.position))
    ends = sorted((e.position, e.position + e.size) for e in extents)
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]  # staging without gaps or overlaps
    assert ends[-1][1] == total
    in_files = sorted((str(e.path), e.offset, e.size) for e in extents)
    for (path, offset, size), (next_path, following, _) in itertools.pairwise(in_files):
        assert path != next_path or following > offset + size + max_gap, "near extents are one read"


def test_no_ranges():
    assert plan_extents([]) == ([], [], 0)


@pytest.mark.parametrize("direct", [True, False])
def test_reads_equal_the_file(stored, pool, direct):
    path, content = stored
    file = File(path, direct=direct)
    choose = random.Random(1)
    for _ in range(30):
        offset = choose.randrange(0, SIZE)
        ranges = [(path, offset, choose.randint(1, SIZE - offset)), (path, SIZE - 1, 1)]
        extents, positions, total = plan_extents(ranges)
        buffer = AlignedBuffer(total)
        parts = [(file, e.offset, buffer.view[e.position : e.position + e.size]) for e in extents]
        assert pool.read(parts).wait(10)
        for (_, at, size), position in zip(ranges, positions, strict=True):
            assert bytes(buffer.view[position : position + size]) == content[at : at + size]
    file.close()


def test_large_reads_are_cut_and_counted(tmp_path, pool, monkeypatch):
    monkeypatch.setattr("flexgen.io.pool.CHUNK_BYTES", ALIGNMENT)
    content = random.Random(2).randbytes(9 * ALIGNMENT)
    (tmp_path / "f").write_bytes(content)
    file, buffer = File(tmp_path / "f"), AlignedBuffer(len(content))
    done = threading.Event()
    assert pool.read([(file, 0, buffer.view)], done.set).wait(10)
    assert done.wait(10)
    assert bytes(buffer.view) == content
    assert pool.bytes_read == len(content)
    assert pool.busy_seconds > 0
    file.close()


def test_written_bytes_come_back_and_the_file_is_private(tmp_path, pool):
    path = tmp_path / "spill"
    file = File(path, flags=os.O_RDWR | os.O_CREAT | os.O_EXCL, unlinked=True)
    assert os.fstat(file._fd).st_mode & 0o777 == 0o600
    assert not path.exists()
    buffer, back = AlignedBuffer(2 * ALIGNMENT), AlignedBuffer(2 * ALIGNMENT)
    buffer.view[:] = random.Random(3).randbytes(2 * ALIGNMENT)
    file.truncate(5 * ALIGNMENT)
    assert pool.write([(file, 3 * ALIGNMENT, buffer.view)]).wait(10)
    assert pool.read([(file, 3 * ALIGNMENT, back.view)]).wait(10)
    assert back.view == buffer.view
    assert pool.bytes_written == 2 * ALIGNMENT
    file.close()


@pytest.fixture
def refuse_direct(monkeypatch):
    """A file system that opens nothing with O_DIRECT, but creates the file all the same, as Linux does."""
    really = os.open

    def refusing(path, flags, mode=0o777, **more):
        if flags & os.O_DIRECT:
            if flags & os.O_CREAT:
                os.close(really(path, flags & ~os.O_DIRECT, mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", refusing)


def test_plain_reads_take_over_and_say_so_once(tmp_path, pool, refuse_direct, caplog):
    contents = [random.Random(seed).randbytes(SIZE) for seed in range(3)]
    files = FileSet()
    with caplog.at_level(logging.WARNING):
        for index, content in enumerate(contents):
            path = tmp_path / f"shard-{index}"
            path.write_bytes(content)
            buffer = AlignedBuffer(SIZE)
            assert pool.read([(files[path], 0, buffer.view)]).wait(10)
            assert bytes(buffer.view[:SIZE]) == content
            assert not files[path].direct
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "O_DIRECT" in caplog.text
    files.close()


def test_a_spill_file_where_direct_is_refused(tmp_path, refuse_direct, caplog):
    path = tmp_path / "spill"
    file = File(path, flags=os.O_RDWR | os.O_CREAT | os.O_EXCL, unlinked=True)
    assert not file.direct
    file.write_from(memoryview(b"bytes"), 3)
    buffer = bytearray(5)
    file.read_into(memoryview(buffer), 3)
    assert buffer == b"bytes"
    file.close()


def test_direct_refused_at_an_offset(stored, monkeypatch, caplog):
    """Some file systems open with O_DIRECT and refuse a read; several threads may meet that at once."""
    path, content = stored
    file = File(path)
    if not file.direct:
        pytest.skip("no O_DIRECT here")
    really, barrier = os.preadv, threading.Barrier(4)

    def refusing(fd, buffers, offset):
        if file.direct:
            barrier.wait(10)
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    buffers = [AlignedBuffer(SIZE) for _ in range(4)]
    with caplog.at_level(logging.WARNING):
        io = IOPool(4)
        tickets = [io.read([(file, 0, buffer.view)]) for buffer in buffers]
        assert all(ticket.wait(10) for ticket in tickets)
        io.close()
    assert all(bytes(buffer.view[:SIZE]) == content for buffer in buffers)
    assert len(caplog.records) == 1
    file.close()


@pytest.mark.parametrize(("call", "start"), [("preadv", "read"), ("pwritev", "write")])
def test_a_failing_transfer_is_raised_to_who_waits(tmp_path, pool, monkeypatch, call, start):
    (tmp_path / "f").write_bytes(bytes(4 * ALIGNMENT))
    file, buffer = File(tmp_path / "f", flags=os.O_RDWR), AlignedBuffer(2 * ALIGNMENT)

    def failing(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    ticket = getattr(pool, start)([(file, ALIGNMENT, buffer.view)])
    with pytest.raises(StorageError, match=f"{file.path} at {ALIGNMENT}: Input/output error"):
        ticket.wait(10)
    monkeypatch.undo()
    assert getattr(pool, start)([(file, 0, buffer.view)]).wait(10), "the threads go on"
    file.close()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match=r"cannot open .*: No such file"):
        File(tmp_path / "absent")


def test_nothing_to_transfer_is_done_at_once(pool):
    done = threading.Event()
    ticket = pool.read([], done.set)
    assert ticket.done()
    assert ticket.wait(0)
    assert done.is_set()


def test_close_finishes_what_is_queued(stored):
    path, content = stored
    file, io = File(path), IOPool(2)
    buffers = [AlignedBuffer(SIZE) for _ in range(20)]
    tickets = [io.read([(file, 0, buffer.view)]) for buffer in buffers]
    io.close()
    assert all(ticket.done() for ticket in tickets)
    assert all(bytes(buffer.view[:SIZE]) == content for buffer in buffers)
    file.close()


def test_a_ticket_waits_for_all_parts():
    ticket = Ticket(2)
    ticket.part_done(ValueError("first"))
    assert not ticket.wait(0)
    ticket.part_done(ValueError("second"))
    with pytest.raises(StorageError, match="first"):
        ticket.wait()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_became_shorter_is_an_error(stored, direct):
    path, _ = stored
    file = File(path, direct=direct)
    os.truncate(path, 2 * ALIGNMENT)
    buffer = AlignedBuffer(4 * ALIGNMENT)
    file.read_into(buffer.view[: 2 * ALIGNMENT], 0)
    with pytest.raises(StorageError, match="has become shorter"):
        file.read_into(buffer.view, 0)
    file.close()


@pytest.mark.parametrize("size", [1, aligned.SMALLEST_HUGE_BYTES - 1, aligned.SMALLEST_HUGE_BYTES, 9 * aligned.HUGE_PAGE + 5])
def test_buffers_are_aligned_and_whole(size):
    buffer = AlignedBuffer(size)
    alignment = aligned.HUGE_PAGE if size >= aligned.SMALLEST_HUGE_BYTES else ALIGNMENT
    assert buffer.tensor.data_ptr() % alignment == 0
    assert buffer.tensor.numel() == len(buffer.view) == buffer.size_bytes >= size
    buffer.tensor[-1], buffer.view[0] = 7, 9
    assert buffer.view[-1] == 7
    assert buffer.tensor[0] == 9
