"""Large copies in chunks: few are outstanding, and the end of the last is the end of all."""

from __future__ import annotations

import threading

import pytest
import torch

from flexgen.devices.chunks import CHUNK_BYTES, OUTSTANDING_BYTES, Chunks


class Started:
    """A chunk that was started; waiting for it copies it."""

    def __init__(self, stream: list[Started], destination: torch.Tensor, source: torch.Tensor) -> None:
        self.destination, self.source, self.ended = destination, source, False
        self.stream = stream

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        for each in self.stream[: self.stream.index(self) + 1]:
            each.destination.copy_(each.source)
            each.ended = True


class Stream:
    """What was started, and the most bytes that were outstanding."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.most_bytes = 0
        self.fails_at = -1

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Started:
        if len(self.started) == self.fails_at:
            raise RuntimeError("the device is gone")
        self.started.append(Started(self.started, destination, source))
        self.most_bytes = max(self.most_bytes, sum(each.source.nbytes for each in self.started if not each.ended))
        return self.started[-1]


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 300, 1234])
def test_a_copy_is_whole_when_its_event_has_happened(size: int) -> None:
    stream, source = Stream(), torch.arange(size, dtype=torch.int64)
    destination = torch.full_like(source, -1)
    event = Chunks(stream.start, chunk_bytes=800, outstanding_bytes=2400).copy(destination, source)
    assert not event.done()
    assert len(stream.started) == max(-(-source.nbytes // 800), 1)
    assert stream.most_bytes == min(source.nbytes, 2400)
    event.wait()
    assert torch.equal(destination, source)


def test_the_thread_waits_for_the_oldest_chunk_only() -> None:
    stream, source = Stream(), torch.zeros(1000, dtype=torch.uint8)
    chunks = Chunks(stream.start, chunk_bytes=100, outstanding_bytes=300)
    chunks.copy(torch.empty_like(source), source)
    assert [each.ended for each in stream.started] == [True] * 7 + [False] * 3


def test_small_copies_are_counted_by_their_bytes() -> None:
    """Many tensors of a few bytes do not wait for each other."""
    stream, source = Stream(), torch.zeros(10, dtype=torch.uint8)
    chunks = Chunks(stream.start, chunk_bytes=100, outstanding_bytes=300)
    for _ in range(30):
        chunks.copy(torch.empty_like(source), source)
    assert not any(each.ended for each in stream.started)
    chunks.copy(torch.empty_like(source), source)
    assert [each.ended for each in stream.started] == [True] + [False] * 30


def test_copies_of_two_threads_share_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one does not wait for all of a large one, and few chunks are outstanding all the same."""
    stream, large, small = Stream(), torch.zeros(1000, dtype=torch.uint8), torch.ones(100, dtype=torch.uint8)
    chunks = Chunks(stream.start, chunk_bytes=100, outstanding_bytes=300)
    other = threading.Thread(target=lambda: chunks.copy(torch.empty_like(small), small), daemon=True)
    really = Chunks._submit

    def submit(self: Chunks[Started], destination: torch.Tensor, source: torch.Tensor) -> Started:
        if len(stream.started) == 5 and threading.current_thread() is not other:
            other.start()
            other.join(20)
            assert not other.is_alive()
        return really(self, destination, source)

    monkeypatch.setattr(Chunks, "_submit", submit)
    chunks.copy(torch.empty_like(large), large)
    assert [int(each.source[0]) for each in stream.started] == [0] * 5 + [1] + [0] * 5
    assert stream.most_bytes <= 300


def test_a_copy_that_fails_half_way_does_not_keep_others_from_going_on() -> None:
    stream, source = Stream(), torch.arange(1000) % 100
    chunks = Chunks(stream.start, chunk_bytes=800, outstanding_bytes=1600)
    stream.fails_at = 4
    with pytest.raises(RuntimeError, match="the device is gone"):
        chunks.copy(torch.empty_like(source), source)
    stream.fails_at = -1
    destination = torch.empty_like(source)
    chunks.copy(destination, source).wait()
    assert torch.equal(destination, source)
    assert stream.most_bytes <= 1600


def test_what_is_outstanding_takes_a_millisecond() -> None:
    """At the rate of PCIe 4; an urgent copy waits no longer, and the thread has some chunks' time to submit another."""
    assert OUTSTANDING_BYTES / 25e9 < 1.01e-3
    assert OUTSTANDING_BYTES >= 2 * CHUNK_BYTES
