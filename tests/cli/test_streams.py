"""Where the command's messages go decides about no answer: closed and full descriptors, terminals and readers that are gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeEngine, open_fakes, write_model_folder
from typer.testing import CliRunner

from flexgen import cli

COMMAND = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import flexgen, flexgen.session.session, flexgen.cli, fakes
flexgen.session.session.open_engine = lambda files, options, workload: fakes.FakeEngine(workload)
flexgen.cli.main()
"""
WAITING = COMMAND.replace("fakes.FakeEngine(workload)", "Engine(workload)").replace(
    "import flexgen,",
    """import fakes
class Engine(fakes.FakeEngine):
    def generate(self, *args, **more):
        print("the model works", file=sys.stderr)
        sys.stdin.readline()
        return super().generate(*args, **more)
import flexgen,""",
)
LINES = [{"id": "a", "prompt": "abc", "max_tokens": 4}, {"id": "b", "prompt": "de", "max_tokens": 4}]


def flexgen(cwd: Path, args: str, redirections: str = "") -> subprocess.CompletedProcess[str]:
    """The command with a fake engine, by a shell, which does what the redirections say."""
    line = f"exec {sys.executable} command.py {args} {redirections}"
    return subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an input, and a job that is done."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "command.py").write_text(COMMAND)
    write_model_folder(folder / "model")
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    with pytest.MonkeyPatch.context() as patch:
        open_fakes(patch, FakeEngine)
        patch.chdir(folder)
        assert CliRunner().invoke(cli.app, ["run", "model", "in.jsonl", "-o", "done.jsonl"]).exit_code == 0
    return folder


@pytest.fixture
def place(done: Path) -> Path:
    for path in done.glob("out*"):
        if path.is_file():
            path.unlink()
        else:
            subprocess.run(["rm", "-r", path], check=True)
    return done


def ids(path: Path) -> list[str | None]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_a_run_ends_as_it_would(place: Path) -> None:
    (place / "bad.jsonl").write_text((place / "in.jsonl").read_text() + "bad\n")
    ran = flexgen(place, "run model bad.jsonl -o out.jsonl --progress json --metrics out.json", ">/dev/full 2>/dev/full")
    assert ran.returncode == 1
    assert ids(place / "out.jsonl") == ["a", "b", None]
    assert json.loads((place / "out.json").read_text())["job"]["failed"] == 1


def test_a_terminal_that_is_gone(place: Path) -> None:
    """As nohup leaves it: SIGHUP is ignored, and whatever is written gives an error."""
    ours, theirs = os.openpty()
    command = [sys.executable, "command.py", "run", "model", "in.jsonl", "-o", "out.jsonl"]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with subprocess.Popen(command, cwd=place, start_new_session=True, **streams) as process:
            os.close(theirs)
            os.close(ours)
            assert process.wait(timeout=120) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert ids(place / "out.jsonl") == ["a", "b"]


def test_a_terminal_that_is_gone_is_no_place_for_the_result(place: Path) -> None:
    """Closed before the start, as any standard output may be, and no failure of a disk."""
    ours, theirs = os.openpty()
    command = [sys.executable, "command.py", "run", "no-such-model", "in.jsonl", "-o", "-"]
    os.close(ours)
    ran = subprocess.run(command, cwd=place, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(theirs)
    assert (ran.returncode, "standard output: its terminal is closed; give a file" in ran.stderr) == (3, True), ran.stderr


def test_no_file_of_a_job_is_opened_on_a_standard_descriptor(place: Path) -> None:
    watching = COMMAND.replace("flexgen.cli.main()", "")
    watching += """
import os
generate = fakes.FakeEngine.generate
def noting(*args, **more):
    with open("out-descriptors", "w") as file:
        print(*(os.readlink(f"/proc/self/fd/{number}") for number in range(3)), file=file)
    return generate(*args, **more)
fakes.FakeEngine.generate = noting
flexgen.cli.main()
"""
    (place / "watching.py").write_text(watching)
    line = f"exec {sys.executable} watching.py run model in.jsonl -o out.jsonl <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], cwd=place, timeout=120, check=False).returncode == 0
    assert (place / "out-descriptors").read_text().split() == ["/dev/null"] * 3


@pytest.mark.parametrize(
    ("args", "redirections", "said"),
    [
        ("in.jsonl -o -", ">&-", "standard output: it is closed"),
        ("in.jsonl -o -", "| sleep 0", "standard output: its reader has left"),
        ("- -o out.jsonl", "<&-", "standard input is closed"),
        ("in.jsonl -o out.jsonl --dry-run", ">&-", "standard output: it is closed"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused_before_the_work(place: Path, args: str, redirections: str, said: str) -> None:
    if redirections.startswith("|"):  # a reader who has left for certain
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "command.py", "run", "no-such-model", *args.split()]
        ran = subprocess.run(command, cwd=place, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
        os.close(writing)
    else:
        ran = flexgen(place, f"run no-such-model {args}", redirections)
    assert (ran.returncode, said in ran.stderr) == (3, True), ran.stderr
    assert not (place / "in.jsonl.flexgen").exists()


def test_a_disk_that_is_full_before_the_work_and_then_still_is(place: Path) -> None:
    """The condition is the same, and so is the exit code: the same command goes on when there is room."""
    ran = flexgen(place, "run no-such-model in.jsonl -o -", ">/dev/full")
    assert ran.returncode == 75
    assert ran.stderr.endswith(
        "standard output: No space left on device; give a file in place of -\nthe same command goes on when there is room\n"
    )
    assert not (place / "in.jsonl.flexgen").exists()


def test_files_that_may_not_grow_stop_every_run_alike(place: Path) -> None:
    """In the middle of making a job's database."""
    command = f"ulimit -f 24; exec {sys.executable} command.py run model in.jsonl -o out.jsonl --state out-state"
    for _ in range(2):
        ran = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True, timeout=120, check=False)
        assert (ran.returncode, "the same command goes on when there is room" in ran.stderr) == (75, True), ran.stderr
    assert flexgen(place, "run model in.jsonl -o out.jsonl --state out-state").returncode == 0
    assert ids(place / "out.jsonl") == ["a", "b"]


def test_answers_that_standard_output_does_not_take_are_kept(place: Path) -> None:
    """Its reader leaves while the model works."""
    command = [sys.executable, "-c", WAITING, "run", "model", "in.jsonl", "-o", "-", "--state", "out state", "--progress", "plain"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=place, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            if "the model works" in line:
                break
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate("\n", timeout=120)
    assert process.returncode == 75, stderr
    assert "standard output: its reader has left; the answers are kept: `flexgen export 'out state' --to FILE` writes them" in stderr
    assert "ignored" not in stderr
    exported = flexgen(place, "export 'out state' --to -")
    assert [json.loads(line)["id"] for line in exported.stdout.splitlines()] == ["a", "b"]


@pytest.mark.matrix(3, always=[">&--run --help", ">/dev/full-status done.jsonl", ">&- 2>&--export done.jsonl --to -"])
@pytest.mark.parametrize(
    "args", ["--help", "run --help", "--version", "status done.jsonl", "status done.jsonl --json", "export done.jsonl --to -"]
)
@pytest.mark.parametrize("redirections", [">&-", ">/dev/full", ">&- 2>&-"])
def test_results_that_cannot_be_written_do_not_count_as_told(done: Path, args: str, redirections: str) -> None:
    ran = flexgen(done, args, redirections)
    assert ran.returncode in (3, 75)
    if "2>&-" not in redirections:
        assert ran.stderr.startswith("flexgen: standard output: ")
    assert "ignored" not in ran.stderr
