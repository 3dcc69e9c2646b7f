"""The recorder of traces: its file is whole at any time, and nothing that threads record is lost or mixed up."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traces import Trace, read_trace

from flexgen.base import recorder as recording
from flexgen.base.recorder import COMPUTE, IO, PASSES, WAITING, Recorder, check_trace
from flexgen.errors import OptionError, StorageError

HANGS_SECONDS = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    made = Recorder(path)
    yield made
    made.close()


def written(recorder: Recorder, path: Path) -> Trace:
    recorder.close()
    return read_trace(path)


def until(path: Path, text: str) -> None:
    """Wait until the file has a text."""
    for _ in range(100 * HANGS_SECONDS):
        if text in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"{text} was never written")


def test_slices_nest_and_have_their_colour_and_arguments(recorder: Recorder, path: Path) -> None:
    outer = recorder.now()
    inner = recorder.now()
    recorder.slice(COMPUTE, "wait for weights", inner, WAITING, unit=3)
    recorder.slice(COMPUTE, "unit 3", outer)
    recorder.counter("ring", 7)
    recorder.counter("ring", 0)
    trace = written(recorder, path)
    first, second = trace.slices[COMPUTE]
    assert (first["name"], first["cname"], first["args"]) == ("wait for weights", "terrible", {"unit": 3})
    assert (second["name"], "cname" in second, second["args"]) == ("unit 3", False, {})
    assert second["ts"] <= first["ts"] <= first["ts"] + first["dur"] <= second["ts"] + second["dur"]
    assert trace.counters == {"ring": [7, 0]}


def test_tracks_are_shown_from_passes_down_to_threads(recorder: Recorder, path: Path) -> None:
    for track in (f"{IO} 0", "something else", COMPUTE, f"{IO} 1", PASSES):
        recorder.slice(track, "x", recorder.now())
    recorder.close()
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [names[each] for each in sorted(names)] == [PASSES, COMPUTE, f"{IO} 0", f"{IO} 1", "something else"]


def test_the_file_is_whole_while_it_grows(recorder: Recorder, path: Path) -> None:
    assert read_trace(path).slices == {}, "from the start"
    for name in ("first", "second"):
        recorder.slice(COMPUTE, name, recorder.now())
        until(path, name)
        assert [each["name"] for each in read_trace(path).slices[COMPUTE]][-1] == name


KILLED = """
import os, signal, sys, time
from pathlib import Path
from flexgen.base.recorder import Recorder

path = Path(sys.argv[1])
recorder = Recorder(path)
while "event 500" not in path.read_text():
    for number in range(1000):
        recorder.slice("compute", f"event {number}", recorder.now())
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_trace_of_a_killed_process_loads(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False, timeout=HANGS_SECONDS)
    assert done.returncode == -signal.SIGKILL
    assert len(read_trace(path).slices["compute"]) > 500


def test_threads_record_at_once(recorder: Recorder, path: Path) -> None:
    def work(track: str) -> None:
        for number in range(500):
            recorder.transfer("weights from disk", f"unit {number}", 0, bytes=1)
            recorder.slice(track, f"read unit {number}", recorder.now(), bytes=2)

    threads = [threading.Thread(target=work, args=(f"{IO} {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace = written(recorder, path)
    assert trace.bytes_of("weights from disk") == 4 * 500
    for index in range(4):
        assert [each["name"] for each in trace.slices[f"{IO} {index}"]] == [f"read unit {number}" for number in range(500)]


def test_transfers_of_a_queue_take_place_one_after_another(recorder: Recorder, path: Path) -> None:
    submitted = [recorder.now(), recorder.now()]
    time.sleep(0.002)
    recorder.transfer("KV to disk", "first", submitted[0])
    time.sleep(0.002)
    recorder.transfer("KV to disk", "second", submitted[1])
    first, second = written(recorder, path).slices["KV to disk"]
    assert first["ts"] == submitted[0]
    assert second["ts"] == first["ts"] + first["dur"]
    assert second["dur"] >= 2000


def test_passes_may_be_chosen(path: Path) -> None:
    recorder = Recorder(path, range(1, 3))
    recorder.slice(COMPUTE, "loading", recorder.now())
    for number in range(5):
        begun = recorder.begin_pass()
        recorder.counter("ring", number)
        recorder.slice(PASSES, f"pass {number}", begun)
    trace = written(recorder, path)
    assert {track: [each["name"] for each in slices] for track, slices in trace.slices.items()} == {PASSES: ["pass 1", "pass 2"]}
    assert trace.counters == {"ring": [1, 2]}


def test_a_trace_that_becomes_too_large_ends(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(recording, "MOST_BYTES", 200_000)
    recorder = Recorder(path)
    recorder.begin_pass()
    for number in range(10_000):
        recorder.slice(COMPUTE, f"event {number}", recorder.now())
    trace = written(recorder, path)
    assert 0 < len(trace.slices[COMPUTE]) < 10_000
    assert path.stat().st_size <= 200_000 + len(recording._END)
    (said,) = caplog.messages
    assert "the trace ends in pass 0: it has 195.3 KiB, which is the most: choose passes with trace_passes" in said


def test_events_that_come_too_fast_are_left_out_and_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "WRITE_SECONDS", HANGS_SECONDS)
    monkeypatch.setattr(recording, "MOST_WAITING", 100)
    recorder = Recorder(path)
    for _ in range(130):
        recorder.slice(COMPUTE, "x", recorder.now())
    assert len(written(recorder, path).slices[COMPUTE]) == 100
    assert "30 events left out" in caplog.text


def test_a_full_disk_ends_the_trace_and_not_the_run(
    recorder: Recorder, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.slice(COMPUTE, "written", recorder.now())
    until(path, '"written"')
    really = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if len(data) > 100:
            return really(descriptor, data[:50], offset)  # what still fits
        if len(data) > len(recording._END):
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    recorder.slice(COMPUTE, "lost", recorder.now())
    trace = written(recorder, path)
    assert [each["name"] for each in trace.slices[COMPUTE]] == ["written"]
    assert "the trace ends in pass -1: No space left on device" in caplog.text


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "trace.json"
    with pytest.raises(StorageError, match=r"the folder .*missing is missing"):
        Recorder(missing)
    with pytest.raises(OptionError, match=r"^trace='.*trace.json': .*cannot be written: the folder .*missing is missing"):
        check_trace(str(missing))
    with pytest.raises(OptionError, match="is a folder"):
        check_trace(str(tmp_path))
    check_trace(None)
    check_trace(str(tmp_path / "trace.json"))
    assert not any(tmp_path.iterdir()), "a check leaves nothing"


def test_an_earlier_trace_is_replaced(path: Path) -> None:
    path.write_text("old" * 10_000)
    assert written(Recorder(path), path).slices == {}
    assert list(path.parent.iterdir()) == [path]
