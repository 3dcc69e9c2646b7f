"""`flexgen run --workers` and `flexgen work`: processes of the real command on a tiny model, and how a host is divided."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fakes import FakeEngine
from faults.trials import write_model
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexgen import cli
from flexgen.cli import workers as workers_module
from flexgen.cli.worker_places import Crew, WorkerPlace, cores_by_node, divide_cores, places_of
from flexgen.cli.workers import Children
from flexgen.errors import CapacityError, JobError, OptionError, StorageError
from flexgen.jobs.workers.members import FAILED, REFUSED, MemberFile, Process
from flexgen.options import EngineOptions

HANGS_SECONDS = 300
FLAGS = ("--device", "cpu", "--dtype", "float32", "--host-mem", "4GiB", "--max-num-seqs", "3", "--progress", "none")


def flexgen(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def begin(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flexgen", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> str:
    """What a process that ends well has said."""
    said, _ = process.communicate(timeout=HANGS_SECONDS)
    assert process.returncode == 0, said
    return said


def until(found: Callable[[], Any]) -> Any:
    """Wait for something to be there."""
    deadline = time.monotonic() + HANGS_SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "model"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        {"id": n, "prompt": [3 + (7 * n + k) % 90 for k in range(2 + n % 20)], "max_tokens": 1 + n % 30, "temperature": n % 2,
         "ignore_eos": True, "n": 1 + (n % 5 == 0)} for n in range(40)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def whole(tiny: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    end(begin("run", tiny, requests, "-o", output, *FLAGS))
    return output.read_bytes()


def status(output: Path) -> dict[str, Any]:
    found = flexgen("status", output, "--json")
    return json.loads(found.stdout) if found.exit_code == 0 else {"workers": []}


def answering(output: Path) -> list[int]:
    """The process ids of workers that answer."""
    return [each["process"] for each in status(output)["workers"] if each["state"] == "answering"]


def test_two_workers_of_which_one_is_killed(tiny: Path, requests: Path, whole: bytes, tmp_path: Path) -> None:
    output, metrics = tmp_path / "out.jsonl", tmp_path / "metrics.json"
    run = begin("run", tiny, requests, "-o", output, *FLAGS, "--workers", 2, "--metrics", metrics)
    os.kill(until(lambda: answering(output) or ([0] if run.poll() is not None else []))[0], signal.SIGKILL)
    end(run)
    assert output.read_bytes() == whole
    assert list(output.with_name("out.jsonl.flexgen").glob("workers")) == []
    found = json.loads(metrics.read_text())
    assert found["job"]["answered"] == found["job"]["lines"] == 40
    assert found["num_workers"] >= 2
    assert all(each["num_requests"] > 0 for each in found["workers"])
    whole_tokens = sum(line["usage"]["completion_tokens"] for line in map(json.loads, whole.splitlines()))
    assert 0 < found["output_tokens"] <= whole_tokens  # the worker that was killed has told of none
    assert "nothing was left to do" in flexgen("run", tiny, requests, "-o", output, *FLAGS[:-1], "plain", "--workers", 2).stderr


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_without_workers(tiny: Path, requests: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run = begin("run", tiny, requests, "-o", output, *FLAGS, "--workers", 2)
    workers = until(lambda: [each["process"] for each in status(output)["workers"]])
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=HANGS_SECONDS)
    assert run.returncode == 130, said
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    end(begin("run", tiny, requests, "-o", output, *FLAGS))
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_workers_that_are_started_by_hand(tiny: Path, requests: Path, whole: bytes, tmp_path: Path) -> None:
    """With the state of the job elsewhere, as where the output lies on a network file system."""
    output = tmp_path / "out.jsonl"
    run = begin("run", tiny, requests, "-o", output, *FLAGS[:-1], "plain", "--workers", 0, "--state", tmp_path / "state")
    until((tmp_path / "out.jsonl.flexgen" / "workers" / "current").exists)
    refused = begin("work", output, "--model", requests)
    assert refused.wait(timeout=HANGS_SECONDS) == 3, refused.communicate()[0]
    workers = [begin("work", output, "--max-num-seqs", 2), begin("work", output)]
    for each in workers:
        assert "no line is left" in end(each)
    assert f"waiting for workers; `flexgen work {output}` adds one" in end(run)
    assert output.read_bytes() == whole
    assert "there is no job of" in flexgen("work", output).stderr


# -- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--workers", "many"), "--workers 'many' is neither a number nor a list of devices such as cuda:0,cuda:1"),
        (("--workers", "cuda:0,cuda:0"), "names a device twice"),
        (("--workers", "2", "--dry-run"), "--dry-run plans for one process: leave out --workers"),
        (("--workers", "2", "--trace", "trace.json"), "--trace draws one engine"),
        (("--workers", "cuda:0", "--device", "cpu"), "--workers names GPUs, and --device is cpu"),
        (("--workers", "2", "--device", "cuda"), "name one for each, such as --workers cuda:0,cuda:1"),
        (("--workers", "2", "--lease-seconds", "0.5"), "--lease-seconds 0.5: workers that live may be silent for 1 seconds"),
    ],
)
def test_flags_that_contradict_each_other(
    model_folder: Path, requests: Path, tmp_path: Path, flags: Sequence[str], said: str, engines: list[FakeEngine], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = flexgen("run", model_folder, requests, "-o", tmp_path / "out.jsonl", *flags)
    assert (done.exit_code, said in done.stderr) == (2, True), done.output
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_for_so_many(model_folder: Path, requests: Path, tmp_path: Path) -> None:
    done = flexgen("run", model_folder, requests, "-o", tmp_path / "out.jsonl", "--workers", 100, "--host-mem", "3GiB", "--device", "cpu")
    assert (done.exit_code, "give fewer --workers or more --host-mem" in done.stderr) == (3, True), done.output
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_to_join(tmp_path: Path) -> None:
    done = flexgen("work", tmp_path / "out.jsonl")
    assert (done.exit_code, "begin it with `flexgen run ... --workers N`" in done.stderr) == (3, True), done.output


# -- how a host is divided --------------------------------------------------------------------------------------------------------------


def test_what_workers_may_be() -> None:
    assert Crew.parse("3") == Crew(count=3)
    assert Crew.parse("cuda:1, cuda:0") == Crew(count=2, devices=(1, 0))
    for text in ("", "-1", "cuda", "cuda:", "cuda:0,", "cpu", "1.5"):
        with pytest.raises(OptionError, match="neither a number nor a list"):
            Crew.parse(text)


@given(count=st.integers(1, 12), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_cores_are_divided_by_node(count: int, sizes: list[int]) -> None:
    nodes = [[100 * node + core for core in range(size)] for node, size in enumerate(sizes)]
    places = divide_cores(count, nodes)
    assert len(places) == count
    if sum(sizes) < count:
        assert set(places) == {()}
        return
    assert sorted(core for place in places for core in place) == sorted(core for node in nodes for core in node)
    assert all(places)
    if count >= len(nodes):
        assert all(len({core // 100 for core in place}) == 1 for place in places)


def test_nodes_are_read_from_the_system(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert cores_by_node(tmp_path) == [allowed]
    for node, cores in ((0, allowed[:1]), (1, [*allowed[1:], 5000])):
        folder = tmp_path / "sys/devices/system/node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(map(str, cores)) + "\n")
    assert cores_by_node(tmp_path) == [each for each in (allowed[:1], allowed[1:]) if each]
    (folder / "cpulist").write_text(f"{allowed[0]}-{allowed[-1] + 3}\n")  # a node that has cores of another
    assert cores_by_node(tmp_path) == [allowed]


def test_budgets_are_those_of_all_workers(tmp_path: Path) -> None:
    options = EngineOptions(device="cpu", host_mem="1GiB", disk="64MiB", offload_dir=str(tmp_path))
    places = places_of(Crew(count=2), options, 1 << 20)
    share = ((1 << 30) - (1 << 20)) // 2
    assert [place.flags for place in places] == [("--host-mem", str(share), "--disk", str(32 << 20))] * 2
    assert places_of(Crew(count=0), options, 0) == []
    of_devices = places_of(Crew(count=2, devices=(3, 1)), EngineOptions(host_mem="1GiB"), 0)
    assert [(place.device, place.flags[-2:]) for place in of_devices] == [(3, ("--device", "cuda")), (1, ("--device", "cuda"))]
    with pytest.raises(CapacityError, match="of host memory for 9 workers"):
        places_of(Crew(count=9), options, 1 << 29)


# -- the workers of a run ---------------------------------------------------------------------------------------------------------------


class FakeProcess:
    def __init__(self, code: int | None = None) -> None:
        FakeProcess.started.append(self)
        self.pid, self.code = 1000 + len(FakeProcess.started), code

    started: ClassVar[list[FakeProcess]] = []

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    """The processes that were started."""
    monkeypatch.setattr(FakeProcess, "started", [])
    monkeypatch.setattr(workers_module, "start_process", lambda *how: FakeProcess())
    monkeypatch.setattr(workers_module, "_ENDING_SECONDS", 0.1)
    return FakeProcess.started


def member(pid: int, **fields: Any) -> MemberFile:
    return MemberFile(worker=f"w{pid}", process=Process(host="h", boot="b", pid=pid, started="1"), **fields)


def children(tmp_path: Path, members: list[MemberFile], warnings: list[str], count: int = 2) -> Children:
    return Children(tmp_path / "out", [WorkerPlace(flags=())] * count, tmp_path, lambda: members, warnings.append)


def test_a_worker_that_dies_is_replaced(tmp_path: Path, processes: list[FakeProcess]) -> None:
    warnings: list[str] = []
    with children(tmp_path, [member(1001, lines=1), member(1003, leases=("0-0",))], warnings) as crew:
        assert len(processes) == 2
        for number in (0, 2):
            processes[number].code = -9
            crew.tend()
        assert len(processes) == 4
        assert "worker 1 (process 1001) was killed by signal 9; its lines go to others" in warnings[0]
        for process in processes:
            process.code = process.code or 0
        crew.tend()
        assert len(processes) == 4
    assert len(warnings) == 2


def test_workers_that_die_before_they_answer_are_not_replaced_for_ever(tmp_path: Path, processes: list[FakeProcess]) -> None:
    (tmp_path / "1.log").write_text("so it is\n")
    with children(tmp_path, [member(1001)], []) as crew:
        processes[0].code = -9
        crew.tend()
        processes[2].code = 70
        with pytest.raises(JobError, match="workers end before they answer anything; worker 1 ended with 70: so it is"):
            crew.tend()


def test_a_refusal_of_a_worker_is_one_of_the_run(tmp_path: Path, processes: list[FakeProcess]) -> None:
    (tmp_path / "2.log").write_text("flexgen: too little memory\n")
    with children(tmp_path, [], []) as crew:
        processes[1].code = 3
        with pytest.raises(JobError, match="worker 2 ended with 3: flexgen: too little memory"):
            crew.tend()


def test_a_failure_that_has_to_do_with_lines_is_no_refusal(tmp_path: Path, processes: list[FakeProcess]) -> None:
    """Such as memory that runs out for one sequence: the lines are to blame, and others go on."""
    with children(tmp_path, [member(1001, state=FAILED, lines=1)], []) as crew:
        processes[0].code = 3
        crew.tend()
        assert len(processes) == 3


def test_a_failing_disk_of_a_worker_stops_the_run(tmp_path: Path, processes: list[FakeProcess]) -> None:
    with children(tmp_path, [member(1001, state=REFUSED, reason="the disk is full", lines=3)], []) as crew:
        processes[0].code = 75
        with pytest.raises(StorageError, match="worker 1: the disk is full"):
            crew.tend()


def test_workers_that_somebody_stops_are_not_replaced(tmp_path: Path, processes: list[FakeProcess]) -> None:
    with children(tmp_path, [], []) as crew:
        processes[0].code = 143
        crew.tend()
        assert len(processes) == 2
        processes[1].code = 130
        with pytest.raises(JobError, match="all workers on this host were stopped"):
            crew.tend()


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path, processes: list[FakeProcess]) -> None:
    with children(tmp_path, [], []):
        pass
    assert [process.code for process in processes] == [-9, -9]


def test_each_worker_sees_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[FakeProcess]) -> None:
    seen: list[str] = []

    def start(command: object, stdin: object, log: object, cores: object, environment: dict[str, str]) -> FakeProcess:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return FakeProcess()

    monkeypatch.setattr(workers_module, "start_process", start)
    places = [WorkerPlace(flags=(), device=number) for number in (1, 0)]
    for visible in ("", "4,GPU-abc"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with Children(tmp_path, places, tmp_path, list, print):
            pass
    assert seen == ["1", "0", "GPU-abc", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(JobError, match="CUDA_VISIBLE_DEVICES has 1 device"):
        Children(tmp_path, places, tmp_path, list, print).__enter__()
