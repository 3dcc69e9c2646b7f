"""Host memory for copies: what is registered is unregistered, and no failure outlives the call that failed."""

from __future__ import annotations

import threading

import pytest

from flexgen.devices.arena import HostArena
from tests.devices.fake_cudart import ALREADY_REGISTERED, OUT_OF_MEMORY, PAGE, FakeRuntime

SIZES = (1, 100, 5000, PAGE, 9 << 20)


def test_blocks_begin_at_pages_that_no_other_block_has() -> None:
    runtime = FakeRuntime()
    arena = HostArena(runtime)
    blocks = [arena.allocate(size) for size in SIZES]
    assert [block.numel() for block in blocks] == list(SIZES)
    assert not any(block.data_ptr() % PAGE for block in blocks)
    assert [runtime.registered[block.data_ptr()] for block in blocks] == [PAGE, PAGE, 2 * PAGE, PAGE, 9 << 20]
    assert arena.size_bytes == sum(runtime.registered.values())


def test_memory_is_there_before_it_is_registered() -> None:
    runtime = FakeRuntime()
    arena = HostArena(runtime)
    blocks = [arena.allocate(size) for size in SIZES]
    assert (runtime.num_registered, runtime.absent_pages) == (len(blocks), 0)


def test_a_failed_registration_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(limit=PAGE)
    arena = HostArena(runtime)
    blocks = [arena.allocate(PAGE) for _ in range(3)]
    assert [block.fill_(1).sum().item() for block in blocks] == [PAGE] * 3, "it is ordinary memory"
    assert runtime.last_error == 0, "the next launch would raise it"
    said = f"cannot pin 4.0 KiB of host memory (CUDA error {OUT_OF_MEMORY}, out of memory): copies will be slower"
    assert [record.message for record in caplog.records] == [said], "said once"
    assert list(runtime.registered) == [blocks[0].data_ptr()]
    arena.close()
    assert not runtime.registered
    assert runtime.last_error == 0, "what was not registered is not unregistered either"


def test_what_others_have_registered_stays_theirs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime()
    arena = HostArena(runtime)
    really = runtime.cudaHostRegister

    def after_another(address: int, size_bytes: int, flags: int) -> int:
        really(address, PAGE, flags)
        return really(address, size_bytes, flags)

    monkeypatch.setattr(runtime, "cudaHostRegister", after_another)
    block = arena.allocate(2 * PAGE)
    assert runtime.last_error == 0
    assert f"CUDA error {ALREADY_REGISTERED}" in caplog.text
    arena.close()
    assert list(runtime.registered) == [block.data_ptr()]


def test_closing_unregisters_everything() -> None:
    """So that an engine which is opened again can pin the same memory."""
    runtime = FakeRuntime()
    for _ in range(3):
        arena = HostArena(runtime)
        blocks = [arena.allocate(size) for size in SIZES]
        assert len(runtime.registered) == len(blocks)
        arena.close()
        arena.close()
        assert not runtime.registered
        assert runtime.last_error == 0
        assert [block.fill_(1).sum().item() for block in blocks] == list(SIZES), "it is ordinary memory"


@pytest.mark.parametrize("registers", [True, False])
def test_an_interrupted_registration_is_undone(registers: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An interrupt during the call is raised when it returns, before its code can be looked at."""
    runtime = FakeRuntime(limit=1 << 30 if registers else 0)
    arena = HostArena(runtime)
    really = runtime.cudaHostRegister

    def interrupted(address: int, size_bytes: int, flags: int) -> int:
        really(address, size_bytes, flags)
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "cudaHostRegister", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arena.allocate(PAGE)
    assert bool(runtime.registered) == registers
    arena.close()
    assert not runtime.registered
    assert runtime.last_error == 0
    assert not caplog.records


def test_threads_allocate_at_the_same_time() -> None:
    runtime = FakeRuntime()
    arena = HostArena(runtime)
    start = threading.Barrier(4)

    def allocate() -> None:
        start.wait()
        for _ in range(50):
            arena.allocate(PAGE + 1)

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arena.size_bytes == 4 * 50 * 2 * PAGE == sum(runtime.registered.values())
    arena.close()
    assert not runtime.registered


def test_without_a_runtime_nothing_is_registered(caplog: pytest.LogCaptureFixture) -> None:
    arena = HostArena(None)
    assert arena.allocate(5000).data_ptr() % PAGE == 0
    assert arena.size_bytes == 2 * PAGE
    arena.close()
    assert not caplog.records
