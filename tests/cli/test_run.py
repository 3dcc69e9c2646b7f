"""The command: flags to values, exit codes, what is printed where.  The engine is fake."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from fakes import CONTEXT, POISON, FakeEngine, fake_text, write_model_folder
from typer.testing import CliRunner

from flexgen import cli
from flexgen.base.files import create
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import FLAGS, engine_command
from flexgen.errors import CapacityError, EngineError, StageError, StorageError
from flexgen.hub.model_files import ModelFiles
from flexgen.jobs.reading import index_of
from flexgen.options import EngineOptions
from flexgen.plan.formats import FormatChoice, FormatPrice, Formats
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.quantize.cache import conversion_of
from flexgen.quantize.settings import QuantizeSettings

HANGS_SECONDS = 120  # nothing here takes as long, on however busy a machine
GOOD = {"id": "a", "prompt": "abc", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", GOOD, {**GOOD, "id": "b", "prompt": "de"})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def flexgen(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


# -- run --------------------------------------------------------------------------------------------------------------------------------


def test_run(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 0, done.output
    assert {record["id"]: record["text"] for record in records(output)} == {"a": fake_text("abc", 4), "b": fake_text("de", 4)}
    assert "2 lines, 0 of them bad, 0 done before, 2 to answer: 5 prompt and at most 8 output tokens" in done.stderr
    assert f"temperature 1, top_p 1, top_k 0, up to the context of {CONTEXT} (/v1/completions: 16 tokens)" in done.stderr
    assert "plan: cpu, float32, diagonal schedule" in done.stderr
    assert done.stdout.startswith(f"done in 2.0 s (after 0.1 s of loading): {output}: 2 of 2 lines answered, 0 with errors\n")
    assert "overlap" not in done.stdout
    assert "plan: cpu" not in done.stdout
    assert engines[0].closed


def test_every_option_reaches_the_engine(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[EngineOptions] = []

    def open_engine(files: object, options: EngineOptions, workload: Workload) -> FakeEngine:
        seen.append(options)
        return FakeEngine(workload)

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    wanted: dict[str, Any] = {
        "device": "sim", "dtype": "float32", "device_mem": "1GiB", "host_mem": "50%", "disk": "3GB", "offload_dir": str(tmp_path),
        "weights": "host=1", "kv": "host=.5,disk=.5", "host_attention": "off", "kv_format": "k8v4", "sparse_attention": 0.25,
        "max_num_seqs": 3, "micro_batch_tokens": 5, "prefill_tokens": 7,
        "schedule": "diagonal", "prefix_sharing": False, "load_format": "dummy", "max_model_len": 33, "seed": 9, "max_logprobs": 7,
        "verify_reads": True, "max_request_seconds": 1.5, "max_job_seconds": 2.5, "trace": str(tmp_path / "trace.json"),
        "trace_passes": "1:2",
    }  # fmt: skip
    parts = [("--" + name.replace("_", "-"), value) for name, value in wanted.items()]
    switches = {flag: {True: flag, False: f"--no-{flag.removeprefix('--')}"} for flag, _ in parts}
    flags = [part for flag, value in parts for part in ((switches[flag][value],) if isinstance(value, bool) else (flag, value))]
    done = flexgen("run", model_folder, source, "-o", output, *flags)
    assert done.exit_code == 0, done.output
    assert seen == [EngineOptions(**wanted)]
    assert set(wanted) == set(FLAGS) - {"revision", "weight_format", "allow_formats", "cpu_compute", "stages", "interface"}


def test_lists_may_be_given_in_parts() -> None:
    seen: list[EngineOptions] = []

    def body(options: EngineOptions) -> int:
        seen.append(options)
        return 0

    app = typer.Typer()
    app.command()(engine_command(body))
    words = "--weights host=.25 --weights disk=.75 --kv host=.5 --kv disk=.5 --allow-formats k8v4 --allow-formats int4,kv-int8"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    assert seen == [EngineOptions(weights="host=.25,disk=.75", kv="host=.5,disk=.5", allow_formats=["int4", "kv-int8", "k8v4"])]


def test_products_in_int8_are_for_a_cpu(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    refused = flexgen("run", model_folder, source, "-o", output, "--device", "sim", "--cpu-compute", "int8")
    assert refused.exit_code == 2
    assert "--cpu-compute 'int8': products run on sim; give --device 'cpu', or leave --cpu-compute out" in refused.stderr
    assert flexgen("run", model_folder, source, "-o", output, "--device", "cpu", "--cpu-compute", "int8").exit_code == 0
    assert len(engines) == 1


def test_bad_lines_give_exit_code_1(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", GOOD, "bad", {"prompt": [POISON], "max_tokens": 1})
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 1
    assert "1 of 3 lines answered, 2 with errors; the same command with --retry-errors tries those again" in done.stdout
    assert len(records(output)) == 3
    again = flexgen("run", model_folder, source, "-o", output)
    assert again.exit_code == 1  # they still have no answer
    assert f"nothing was left to do: {output}: 1 of 3 lines answered, 2 with errors (3 done before); the same" in again.stderr
    assert "3 done before, 0 to answer" in again.stderr
    assert len(engines) == 1


def test_a_run_whose_lines_all_failed_did_something(model_folder: Path, tmp_path: Path, output: Path) -> None:
    done = flexgen("run", model_folder, write(tmp_path / "in.jsonl", "bad", "worse"), "-o", output)
    assert (done.exit_code, f"\ndone: {output}: 0 of 2 lines answered" in done.stderr) == (1, True), done.stderr
    assert "nothing was left to do" not in done.stderr


def test_max_tokens_is_for_bare_lines_that_do_not_say(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    lines = [{"prompt": "a"}, {"prompt": "a", "max_tokens": 9}, {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "a"}}]
    done = flexgen("run", model_folder, write(tmp_path / "in.jsonl", *lines), "-o", output, "--max-tokens", 5)
    assert done.exit_code == 0
    usages = [record.get("usage") or record["response"]["body"]["usage"] for record in records(output)]
    assert sorted(usage["completion_tokens"] for usage in usages) == [5, 9, 16]
    assert "top_k 0, 5 tokens (/v1/completions" in done.stderr


def test_sampling_of_lines_that_do_not_say(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    chat = {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "ab", "max_tokens": 8}}
    lines = [{"prompt": "ab", "max_tokens": 8}, chat, {"prompt": "ab", "max_tokens": 8, "temperature": 1}]
    source = write(tmp_path / "in.jsonl", *lines)
    done = flexgen("run", model_folder, source, "-o", output, "--temperature", 0, "--top-p", 0.5)
    assert done.exit_code == 0, done.output
    assert "defaults of lines that leave them out: greedy" in done.stderr
    plain, body, sampled = records(output)
    assert plain["text"] == fake_text("ab", 8) == body["response"]["body"]["choices"][0]["text"]
    assert sampled["text"] != plain["text"]
    done = flexgen("run", model_folder, source, "-o", output)
    assert (done.exit_code, "begun with default temperature 0.0, now it is 1.0" in done.stderr) == (3, True)


@pytest.mark.parametrize(("flags", "warns"), [([], True), (["--max-tokens", 5], False)])
def test_answers_that_nothing_bounds_are_warned_of(
    model_folder: Path,
    tmp_path: Path,
    output: Path,
    engines: list[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    warns: bool,
) -> None:
    monkeypatch.setattr("flexgen.cli.defaults._LONG_ANSWER", 40)
    source = write(tmp_path / "in.jsonl", {"prompt": "abc"}, {"prompt": "abc"}, GOOD)
    done = flexgen("run", model_folder, source, "-o", output, *flags)
    said = f"warning: 2 lines set no max_tokens, and there is no --max-tokens: an answer may have up to {CONTEXT - 3} tokens"
    assert (said in done.stderr) == warns
    silent = flexgen("run", model_folder, source, "-o", output, "--fresh", "--progress", "none", *flags)
    assert (silent.stderr.startswith(said), silent.stderr.count("\n")) == (warns, int(warns)), "warnings, and nothing but them"
    output.unlink()
    assert "warning" not in flexgen("run", model_folder, write(source, GOOD), "-o", output, "--fresh").stderr


def test_defaults_of_generation_config_are_said(tmp_path: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    settings = {
        "temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "repetition_penalty": 1.1, "typical_p": 0.9, "suppress_tokens": [None, True],
    }  # fmt: skip
    folder = write_model_folder(tmp_path / "model", generation_config=settings)
    done = flexgen("run", folder, source, "-o", output)
    assert "temperature 0.6, top_p 1, top_k 20, repetition_penalty 1.1, 7 tokens (" in done.stderr
    assert "typical_p=0.9, which is not supported yet" in done.stderr
    assert "suppress_tokens=[null, true], which is not supported yet" in done.stderr


def test_metrics(model_folder: Path, source: Path, output: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    metrics = tmp_path / "metrics.json"
    assert flexgen("run", model_folder, source, "-o", output, "--metrics", metrics).exit_code == 0
    written = json.loads(metrics.read_text())
    assert written.pop("job") == {"lines": 2, "answered": 2, "failed": 0, "done_before": 0, "answers_resumed": 0, "tokens_kept": 0}
    assert written == json.loads(engines[0].report().to_json())


def test_what_takes_long_is_said_before_it_begins(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    said = flexgen("run", model_folder, source, "-o", output).stderr.splitlines()
    reading = f"reading configuration and tokenizer of {model_folder} ...", f"reading requests from {source} ..."
    assert said[:4] == ["loading libraries ...", reading[0], "tracing the model's layers ...", reading[1]]


def test_verbose_ends_with_all_figures(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("run", model_folder, source, "-o", output, "--verbose")
    assert done.stdout.startswith("done in")
    assert "overlap 0.90   plan 0.80   efficiency 0.72" in done.stdout
    done = flexgen("bench", "throughput", model_folder, "--input-len", 4, "--output-len", 5, "-v")
    assert "overlap 0.90   plan 0.80   efficiency 0.72" in done.stdout


def test_progress_json(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("run", model_folder, source, "-o", output, "--progress", "json")
    assert done.exit_code == 0
    assert done.stderr == ""
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events[-6:]] == ["message", "plan", "message", "progress", "message", "report"]
    assert events[0] == {"event": "message", "text": "loading libraries ..."}


def test_progress_none(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("run", model_folder, source, "-o", output, "--progress", "none")
    assert done.stderr == ""
    assert done.stdout.startswith("done in 2.0 s")


def test_progress_none_drops_no_warning(tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    model = write_model_folder(tmp_path / "model", generation_config={"typical_p": 0.5})
    source = write(tmp_path / "in.jsonl", GOOD, GOOD)
    done = flexgen("run", model, source, "-o", output, "--progress", "none")
    assert done.exit_code == 0
    unsupported, repeated = done.stderr.splitlines()
    assert "generation_config.json asks for typical_p" in unsupported
    assert repeated == f"{source}: 1 line has the id of an earlier line; all are answered"


def test_dry_run(model_folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_job(files: object, options: object, workload: Workload) -> Plan:
        return FakeEngine(workload).plan

    monkeypatch.setattr("flexgen.session.session.plan_job", plan_job)
    source = write(tmp_path / "in.jsonl", GOOD)
    done = flexgen("run", model_folder, source, "-o", output, "--dry-run")
    assert done.exit_code == 0
    assert all(line.endswith(" ...") for line in done.stderr.splitlines())  # steps are no part of the result
    assert "1 to answer" in done.stdout
    assert "..." not in done.stdout
    silent = flexgen("run", model_folder, source, "-o", output, "--dry-run", "--progress", "none")
    assert (silent.stdout, silent.stderr) == (done.stdout, "")
    assert "plan: cpu" in done.stdout
    assert flexgen("run", model_folder, write(source, GOOD, "bad"), "-o", output, "--dry-run").exit_code == 1
    assert list(tmp_path.iterdir()) == [source]


# -- refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--device", "tpu"], "known: auto, cpu, cuda, sim"),
        (["--max-num-seqs", "0"], "positive"),
        (["--max-num-seqs", "many"], "Invalid value for '--max-num-seqs': 'many' is not a whole number"),
        (["--max-num-seqs", "1.5"], "'1.5' is not a whole number"),
        (["--sparse-attention", "10%"], "Invalid value for '--sparse-attention': '10%' is not a number; write 0.1"),
        (["--sparse-attention", "10"], "--sparse-attention must be a share above 0 and up to 1"),
        (["--top-p", "high"], "'high' is not a number"),
        (["--allow-formats", "int4", "--allow-formats", "int5"], "--allow-formats: 'int5' is unknown"),
        (["--weights", "host=.5", "--weights", "host=.5"], "--weights 'host=.5,host=.5': host is there twice"),
        (["--kv", ""], "--kv '': '' is not a share"),
        (["--weight-format", "flexgen-v0"], "--weight-format 'flexgen-v0' is for comparisons"),
        (["--progress", "fancy"], "known: auto"),
        (["--no-such-flag"], "no-such-flag"),
        (["--max-model-len", "1000"], "context of 64"),
        (["--metrics", "/no/such/folder/m.json"], "there is no folder"),
        (["--max-tokens", "0"], "Invalid value for '--max-tokens': 0 is less than 1"),
        (["--temperature", "-1"], "--temperature -1.0: temperature must be a finite number"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "2"], "--top-p 2.0: top_p must be a number from 0 to 1"),
        (["--host-mem", "10"], "--host-mem '10' is 10 B, and at least 64.0 MiB is needed: did you mean 10GiB?"),
        (["--disk", "100"], "--disk '100' is 100 B"),
        (["--max-job-seconds", "8x"], "not a time"),
        (["--max-request-seconds", "0"], "--max-request-seconds must be a positive number"),
        (["--metrics", "/dev/null"], "--metrics /dev/null is not a regular file"),
        (["--metrics", "n" * 256], "File name too long"),
        (["--chat-template-kwargs", "[" * 100_000], "is not valid JSON: "),
    ],
)
def test_usage_errors(model_folder: Path, source: Path, output: Path, flags: list[str], word: str) -> None:
    done = flexgen("run", model_folder, source, "-o", output, *flags)
    assert done.exit_code == 2, done.output
    assert word in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_paths_that_cannot_be(model_folder: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for given, out, code in (
        (source, source, 2),
        (tmp_path / "none", tmp_path / "o", 2),
        (tmp_path, tmp_path / "o", 2),
        (source, tmp_path, 3),
        (source, tmp_path / ("n" * 256), 3),
        (source, tmp_path / "loop", 3),
        (tmp_path / ("n" * 300), tmp_path / "o", 2),
    ):
        done = flexgen("run", model_folder, given, "-o", out)
        assert done.exit_code == code, done.output
    assert len(source.read_text().splitlines()) == 2


def test_what_is_refused_before_the_start_gives_3(source: Path, output: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = flexgen("run", "/no/such/model", source, "-o", output)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "\nflexgen: /no/such/model does not exist: there is no folder /no/such" in done.stderr

    def open_engine(*args: object) -> None:
        raise CapacityError("KV cache needs 31.2 GiB")

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 3
    assert done.stderr.endswith("flexgen: KV cache needs 31.2 GiB\n")
    assert not output.exists()
    output.write_text("precious")
    for flags in ([], ["--fresh"]):
        done = flexgen("run", model_folder, source, "-o", output, *flags)
        assert done.exit_code == 3
        assert "not written by this job" in done.stderr
        assert output.read_text() == "precious"


def test_what_stops_a_run_gives_75_and_the_same_command_goes_on(
    model_folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine]
) -> None:
    source = write(tmp_path / "in.jsonl", *({**GOOD, "id": n} for n in range(10)))
    answer = FakeEngine._answer

    def failing(engine: FakeEngine, request: Any) -> Any:
        if request.index == index_of(6):
            raise EngineError("the disk is gone")
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", failing)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 75
    assert "flexgen: the disk is gone\n5 of 10 lines are done; the same command goes on from there" in done.stderr
    assert engines[0].closed
    assert [record["id"] for record in records(output)] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(FakeEngine, "_answer", answer)
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 0
    assert [record["id"] for record in records(output)] == list(range(10))


@pytest.mark.parametrize(
    "place", ["flexgen.session.session.open_engine", "flexgen.jobs.runner.Job.answer", "flexgen.jobs.folder.job_paths"]
)
def test_a_stage_that_is_lost_gives_75_at_any_time(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def lose(*args: object, **kwargs: object) -> None:
        raise StageError("rank 1 on beta does not answer")

    monkeypatch.setattr(place, lose)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 75
    assert "flexgen: rank 1 on beta does not answer\n" in done.stderr
    assert "the same command goes on" in done.stderr


def test_the_command_is_a_module() -> None:
    for module in ("flexgen", "flexgen.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert re.fullmatch(r"flexgen \d+\.\d+\.\S+\n", done.stdout)


def code_of_main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of the command in this process."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # main sets it; here it goes away with the test
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_a_bug_shows_its_traceback_and_gives_70(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli, "app", broken)
    assert code_of_main(monkeypatch) == 70
    assert "ZeroDivisionError: oops" in capsys.readouterr().err


class Panic(BaseException):
    """As PyO3's PanicException: no Exception."""


@pytest.mark.parametrize(
    "error", [Panic("poisoned"), EOFError("too short"), BrokenPipeError(32, "Broken pipe"), GeneratorExit(), OSError(5)]
)
def test_no_crash_ends_as_if_lines_were_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    """Wherever a command crashes, and whatever with."""

    def crash(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("flexgen.jobs.folder.find_job", crash)
    monkeypatch.setattr("sys.argv", ["flexgen", "status", "x"])
    assert code_of_main(monkeypatch) == 70
    assert f"{type(error).__name__}" in capsys.readouterr().err


def test_a_crash_that_nobody_can_be_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise ZeroDivisionError("oops")

    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(cli, "app", crash)
        monkeypatch.setattr("sys.stderr", full)
        code = code_of_main(monkeypatch)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert code == 70


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried")])
def test_memory_that_runs_out_while_loading_can_be_resumed(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def open_engine(*arguments: object) -> FakeEngine:
        raise error

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    done = flexgen("run", model_folder, source, "-o", output)
    assert (done.exit_code, "flexgen: memory ran out" in done.stderr) == (75, True)


# -- signals ------------------------------------------------------------------------------------------------------------------------------

SLOW = f"""
import signal, sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import flexgen, flexgen.session.session, flexgen.cli, fakes
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell that runs the tests in the background ignores some
    signal.signal(number, signal.SIG_DFL)
class Engine(fakes.FakeEngine):
    def generate(self, requests, on_pass=None, **more):
        for count, result in enumerate(super().generate(requests, **more), 1):
            yield result
            if count % 4 == 0:
                if count == 8:
                    print("now", flush=True)
                    sys.stdin.readline()
                on_pass(())
    def close(self):
        print("closed", flush=True)
flexgen.session.session.open_engine = lambda files, options, workload: Engine(workload)
flexgen.cli.main()
"""


def run_slowly(signals: list[int], model_folder: Path, source: Path, output: Path) -> tuple[int, str, str]:
    """A run that gets signals within its second pass, which ends after the last; (exit code, stdout after that, stderr)."""
    command = [sys.executable, "-c", SLOW, "run", str(model_folder), str(source), "-o", str(output)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signals[0])
        stderr = ""
        while "stopping after this pass" not in stderr:
            stderr += process.stderr.readline()
        for number in signals[1:]:
            process.send_signal(number)
            process.wait(timeout=HANGS_SECONDS)
        stdout, rest = process.communicate("\n" if len(signals) == 1 else None, timeout=HANGS_SECONDS)
    return process.returncode, stdout, stderr + rest


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", *({**GOOD, "id": n} for n in range(10)))


@pytest.mark.matrix(1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_pass_and_the_same_command_goes_on(
    model_folder: Path, ten: Path, output: Path, number: int, code: int, engines: list[FakeEngine]
) -> None:
    returned, stdout, stderr = run_slowly([number], model_folder, ten, output)
    assert (returned, stdout) == (code, "closed\n"), stderr
    assert f"stopped by {signal.Signals(number).name}\n8 of 10 lines are done; the same command goes on" in stderr
    assert "Traceback" not in stderr
    assert len(records(output)) == 8
    assert flexgen("run", model_folder, ten, "-o", output).exit_code == 0
    assert len(records(output)) == 10


def test_a_second_signal_stops_at_once(model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine]) -> None:
    returned, stdout, stderr = run_slowly([signal.SIGTERM, signal.SIGINT], model_folder, ten, output)
    assert (returned, stdout) == (130, ""), stderr
    assert "stopped at once" in stderr
    assert not output.exists()
    done = flexgen("run", model_folder, ten, "-o", output)
    assert done.exit_code == 0
    assert len(records(output)) == 10


def test_signals_that_were_ignored_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup flexgen run ...`"""
    from flexgen.cli.signals import StopSignals

    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, previous)


# -- what a job keeps ---------------------------------------------------------------------------------------------------------------------


def test_export_and_status(model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine], tmp_path: Path) -> None:
    for command in ("status", "export"):
        done = flexgen(command, output)
        assert (done.exit_code, "there is no job" in done.stderr) == (3, True)
    assert flexgen("run", model_folder, ten, "-o", output).exit_code == 0
    done = flexgen("status", output)
    assert done.exit_code == 0
    assert f"{output}: not running (finished)\n  10 of 10 lines done (0 with errors)" in done.stdout
    status = json.loads(flexgen("status", output, "--json").stdout)
    assert (status["lines"], status["answered"], status["failed"], status["output_tokens"]) == (10, 10, 0, 40)
    before = output.read_bytes()
    output.unlink()
    assert flexgen("export", output, "--order", "done").exit_code == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(before.splitlines())
    assert flexgen("export", output).exit_code == 0
    assert output.read_bytes() == before
    assert flexgen("export", output, "--to", "-").stdout.encode() == before
    assert flexgen("export", output, "--to", tmp_path / "copy").exit_code == 0
    assert (tmp_path / "copy").read_bytes() == before
    assert flexgen("export", output, "--order", "random").exit_code == 2
    folder = output.with_name("out.jsonl.flexgen")
    assert flexgen("status", folder).exit_code == 0
    assert flexgen("export", folder).exit_code == 2
    assert flexgen("export", folder, "--to", "-").stdout.encode() == before


def test_a_lost_output_is_made_again_without_the_model(model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine]) -> None:
    flexgen("run", model_folder, ten, "-o", output)
    before = output.read_bytes()
    output.unlink()
    assert flexgen("run", model_folder, ten, "-o", output).exit_code == 0
    assert output.read_bytes() == before
    assert len(engines) == 1


def test_fresh(model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine]) -> None:
    flexgen("run", model_folder, ten, "-o", output)
    before = output.read_bytes()
    assert "0 done before" in flexgen("run", model_folder, ten, "-o", output, "--fresh", "--seed", 5).stderr
    assert output.read_bytes() == before
    assert len(engines) == 2


def test_changes_are_refused_unless_accepted(model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine]) -> None:
    flexgen("run", model_folder, ten, "-o", output)
    done = flexgen("run", model_folder, ten, "-o", output, "--seed", 5)
    assert (done.exit_code, "begun with --seed 0, now it is 5" in done.stderr) == (3, True)
    done = flexgen("run", model_folder, ten, "-o", output, "--seed", 5, "--accept-changes")
    assert (done.exit_code, "begun with --seed 0, now it is 5" in done.stderr) == (0, True)
    assert flexgen("run", model_folder, ten, "-o", output, "--host-mem", "50%", "--schedule", "zigzag").exit_code == 3  # seed 5 now


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats that weights are converted to; nothing is written, and the model computes with what it has."""
    found: list[str] = []

    def converted(files: ModelFiles, options: EngineOptions) -> ModelFiles:
        if options.weight_format == "auto":
            return files
        found.append(options.weight_format)
        return replace(files, conversion=conversion_of(files, QuantizeSettings(weight_format=options.weight_format)))

    monkeypatch.setattr("flexgen.llm.in_weight_format", converted)
    return found


def test_another_format_is_refused_before_weights_are_converted(
    model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine], conversions: list[str]
) -> None:
    """By the names of the options, with both values and what can be done."""
    run = ("run", model_folder, ten, "-o", output)
    assert flexgen(*run, "--weight-format", "int4").exit_code == 0
    remedy = "--accept-changes goes on with the new one, --fresh starts anew, another output keeps both\n"
    for name in ("int8", "auto"):
        done = flexgen(*run, "--weight-format", name)
        said = f"\nflexgen: {output} was begun with --weight-format int4, now it is {name}: the earlier value goes on, {remedy}"
        assert (done.exit_code, done.stderr.endswith(said)) == (3, True), done.stderr
    done = flexgen(*run, "--weight-format", "int8", "--kv-format", "k8v4", "--seed", 3)
    assert done.exit_code == 3
    said = "--weight-format int4, now it is int8; --kv-format auto, now it is k8v4; --seed 0, now it is 3: the earlier values go on"
    assert f"was begun with {said}" in done.stderr
    assert conversions == ["int4"]
    assert flexgen(*run, "--weight-format", "int4").exit_code == 0
    assert flexgen(*run, "--weight-format", "int8", "--accept-changes").exit_code == 0
    assert flexgen(*run, "--weight-format", "int4", "--fresh").exit_code == 0
    assert conversions == ["int4", "int4", "int8", "int4"]


def test_other_weights_are_refused_before_they_are_converted(
    model_folder: Path, tmp_path: Path, ten: Path, output: Path, engines: list[FakeEngine], conversions: list[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    run = ("run", model, ten, "-o", output, "--weight-format", "int4")
    assert flexgen(*run).exit_code == 0
    os.utime(model / "model.safetensors", ns=(1, 1))
    done = flexgen(*run)
    assert (done.exit_code, conversions) == (3, ["int4"])
    assert "was begun with other files of weights (weights in int4, groups of 32): the earlier value goes on" in done.stderr


@pytest.mark.parametrize("begun_by", ["this version", "an earlier one"])
def test_a_converted_folder_is_the_same_model_under_any_name(
    model_folder: Path, tmp_path: Path, ten: Path, output: Path, engines: list[FakeEngine], conversions: list[str], begun_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run = (ten, "-o", output, "--weight-format", "int4")
    assert flexgen("run", "model", *run).exit_code == 0
    if begun_by == "an earlier one":  # which kept the name, too
        with contextlib.closing(sqlite3.connect(output.with_name("out.jsonl.flexgen") / "job.sqlite", isolation_level=None)) as database:
            database.execute("UPDATE facts SET value = replace(value, '\"files ', '\"model at files ') WHERE name = 'identity'")
            (kept,) = database.execute("SELECT value FROM facts WHERE name = 'identity'").fetchone()
            assert json.loads(kept)["answers"]["model"].startswith("model at files ")
    for name in ("./model/", tmp_path / "model", "model"):
        done = flexgen("run", name, *run)
        assert (done.exit_code, "nothing was left to do" in done.stderr) == (0, True), done.output
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    refused = flexgen("run", "model", *run)
    assert (refused.exit_code, "was begun with other files of weights" in refused.stderr) == (3, True), refused.output


def test_a_job_without_answers_takes_another_format(
    model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine], conversions: list[str]
) -> None:
    source = write(tmp_path / "in.jsonl", "bad")
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 1
    assert flexgen("run", model_folder, source, "-o", output, "--weight-format", "int4").exit_code == 1
    assert conversions == ["int4"]


def test_formats_are_chosen_once_per_job(model_folder: Path, ten: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen for the first run; later runs keep them, and a list without them is refused."""
    seen: list[EngineOptions] = []

    def open_engine(files: object, options: EngineOptions, workload: Workload) -> FakeEngine:
        seen.append(options)
        return FakeEngine(workload)

    def choosing(kv: str) -> Any:
        prices = (FormatPrice(formats=Formats("auto", "auto"), seconds=50.0), FormatPrice(formats=Formats("auto", kv), seconds=20.0))
        return lambda *job: replace(FakeEngine(job[-1]).plan, formats=FormatChoice(chosen=Formats("auto", kv), prices=prices))

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    monkeypatch.setattr("flexgen.session.session.choose_formats", choosing("k8v4"))
    run = ("run", model_folder, ten, "-o", output, "--allow-formats")
    dry = flexgen(*run, "k8v4", "--dry-run")
    assert (
        "  formats  KV in k8v4 20.0 s: the fastest of the 2 that are allowed\n           the others: weights as stored 50.0 s" in dry.stdout
    )
    done = flexgen(*run, "k8v4")
    assert done.exit_code == 0, done.output
    assert "formats  KV in k8v4 20.0 s: the fastest of the 2" in done.stderr
    monkeypatch.setattr("flexgen.session.session.choose_formats", choosing("int8"))
    write(ten, *ten.read_text().splitlines(), GOOD)
    refused = flexgen(*run, "kv-int8")
    assert (refused.exit_code, "was begun with KV in k8v4, which the formats that are allowed (kv-int8) leave out" in refused.stderr) == (
        3,
        True,
    )
    done = flexgen(*run, "kv-int8,k8v4")
    assert done.exit_code == 0, done.output
    assert f"{output} goes on as it was begun: KV in k8v4" in done.stderr
    assert [options.kv_format for options in seen] == ["k8v4", "k8v4"]
    assert flexgen("run", model_folder, ten, "-o", output, "--kv-format", "k8v4").exit_code == 0
    write(ten, *ten.read_text().splitlines(), GOOD)
    assert flexgen(*run, "kv-int8", "--accept-changes").exit_code == 0
    assert seen[-1].kv_format == "int8"


def test_errors_can_be_retried(
    model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", GOOD, {"prompt": [POISON], "max_tokens": 1}, "bad")
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 1
    monkeypatch.setattr("fakes.POISON", -1)  # what ailed the model is over
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 1
    done = flexgen("run", model_folder, source, "-o", output, "--retry-errors")
    assert done.exit_code == 1
    assert "1 done before, 1 to answer" in done.stderr
    assert [("error" in record) for record in records(output)] == [False, False, True]


def test_strict(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", GOOD, "bad", GOOD)
    done = flexgen("run", model_folder, source, "-o", output, "--strict")
    assert done.exit_code == 3
    assert "--strict found 2 faults; the first are\nline 2: " in done.stderr
    assert "line 3: an earlier line has the same id" in done.stderr
    assert not output.exists()
    assert engines == []


def test_from_stdin_to_stdout(model_folder: Path, source: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    lines = source.read_text()
    state = tmp_path / "state"
    done = CliRunner().invoke(cli.app, ["run", str(model_folder), "-", "-o", "-", "--state", str(state)], input=lines)
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["a", "b"]
    assert "done in 2.0 s (after 0.1 s of loading): standard output: 2 of 2 lines answered" in done.stderr
    again = CliRunner().invoke(cli.app, ["run", str(model_folder), "-", "-o", "-", "--state", str(state)])
    assert (again.exit_code, again.stdout) == (0, done.stdout)
    assert len(engines) == 1
    other = CliRunner().invoke(cli.app, ["run", str(model_folder), "-", "-o", "-", "--state", str(state)], input="{}\n")
    assert (other.exit_code, "answers another input" in other.stderr) == (3, True)


# -- an input that is something else ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [("text,label\na,1\nb,2\n", "comma-separated"), ("foo\n" * 100, "first 100 lines all fail"), ("[1, 2]", "JSON array")],
)
def test_a_refused_input_leaves_nothing(model_folder: Path, tmp_path: Path, output: Path, content: str, said: str) -> None:
    source = tmp_path / "in"
    source.write_text(content)
    piped = CliRunner().invoke(cli.app, ["run", str(model_folder), "-", "-o", str(output)], input=content)
    for done in (
        flexgen("run", model_folder, source, "-o", output),
        flexgen("run", model_folder, source, "-o", output, "--dry-run"),
        piped,
    ):
        assert (done.exit_code, said in done.stderr) == (3, True)
        assert list(tmp_path.iterdir()) == [source]


def test_what_is_wrong_with_the_model_is_said_first(tmp_path: Path, output: Path) -> None:
    source, model = tmp_path / "in", tmp_path / "model"
    source.write_text("[1, 2]")
    model.mkdir()
    done = flexgen("run", model, source, "-o", output)
    assert (done.exit_code, "JSON array" in done.stderr, "config.json" in done.stderr) == (3, False, True)
    assert sorted(tmp_path.iterdir()) == [source, model]


def test_a_refused_input_takes_nothing_away(
    model_folder: Path, source: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]
) -> None:
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 0
    before = output.read_bytes()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("text,label\na,1\nb,2\n")
    for more in ([], ["--fresh"], ["--accept-changes"]):
        assert flexgen("run", model_folder, wrong, "-o", output, *more).exit_code == 3
        assert output.read_bytes() == before
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 0
    assert len(engines) == 1


def test_going_on_though_all_lines_fail(model_folder: Path, tmp_path: Path, output: Path) -> None:
    source = tmp_path / "in"
    source.write_text("foo\n" * 100)
    assert flexgen("run", model_folder, source, "-o", output, "--keep-going").exit_code == 1
    assert len(records(output)) == 100
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 1  # they are done


def test_the_input_format_may_be_mended(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = tmp_path / "in"
    source.write_text("ab\ncd\n")
    assert flexgen("run", model_folder, source, "-o", output, "--max-tokens", 2).exit_code == 1
    assert flexgen("run", model_folder, source, "-o", output, "--max-tokens", 2, "--input-format", "text").exit_code == 0
    assert all("error" not in record for record in records(output))


def test_a_mended_line_of_standard_input(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    lines = source.read_text()
    command = ["run", str(model_folder), "-", "-o", str(output)]
    assert CliRunner().invoke(cli.app, command, input=lines.replace("prompt", "promt", 1)).exit_code == 1
    assert CliRunner().invoke(cli.app, command, input=lines).exit_code == 0
    assert all("error" not in record for record in records(output))
    assert CliRunner().invoke(cli.app, command).exit_code == 0  # what is kept is what was mended


def test_a_pipe_is_kept_as_standard_input_is(
    model_folder: Path, source: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(pipe.write_bytes, gzip.compress(source.read_bytes()))
        done = flexgen("run", model_folder, pipe, "-o", output)
        writing.result()
    assert done.exit_code == 0, done.stderr
    assert [record["id"] for record in records(output)] == ["a", "b"]
    assert flexgen("run", model_folder, pipe, "-o", output, "--dry-run").exit_code == 2


def test_inputs_that_are_no_files(model_folder: Path, source: Path, output: Path) -> None:
    for model, given, said in (
        (source, model_folder, "the model comes first"),
        (source, "facebook/opt-125m", "the model comes first"),
        (model_folder, model_folder, "the folder of a model"),
        (model_folder, "/dev/null", "a device"),
        (model_folder, "missing.jsonl", "no such file"),
    ):
        done = flexgen("run", model, given, "-o", output)
        assert (done.exit_code, said in done.stderr) == (2, True), done.stderr


def test_from_stdin_to_stdout_without_a_folder(
    model_folder: Path, source: Path, tmp_path: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "a tmp"
    monkeypatch.setattr("tempfile.tempdir", str(home))
    home.mkdir()
    command = ["run", str(model_folder), "-", "-o", "-"]
    done = CliRunner().invoke(cli.app, command, input=source.read_text())
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["a", "b"]
    assert "until it is done, the job is kept in" in done.stderr
    assert not list(home.glob("flexgen-job-*"))
    answer = FakeEngine._answer

    def failing(engine: FakeEngine, request: Any) -> Any:
        raise EngineError("the disk is gone")

    monkeypatch.setattr(FakeEngine, "_answer", failing)
    failed = CliRunner().invoke(cli.app, command, input=source.read_text())
    monkeypatch.setattr(FakeEngine, "_answer", answer)
    (state,) = home.glob("flexgen-job-*")
    assert (failed.exit_code, f"goes on with --state '{state}' and nothing as its input (</dev/null)" in failed.stderr) == (75, True)
    again = CliRunner().invoke(cli.app, [*command, "--state", str(state)])
    assert (again.exit_code, again.stdout) == (0, done.stdout)


def test_from_stdin_to_a_file(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = CliRunner().invoke(cli.app, ["run", str(model_folder), "-", "-o", str(output)], input=source.read_text())
    assert done.exit_code == 0, done.output
    assert len(records(output)) == 2
    assert (output.with_name("out.jsonl.flexgen") / "input").read_text() == source.read_text()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--fresh", "--retry-errors"], "nothing to do"),
        (["--fresh", "--accept-changes"], "nothing to do"),
        (["--dry-run", "--fresh"], "leave out --fresh"),
        (["--dry-run", "--retry-errors"], "leave out --retry-errors"),
        (["--state", "/no/such/folder/state"], "there is no folder"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds"),
    ],
)
def test_flags_that_have_no_meaning_together(model_folder: Path, source: Path, output: Path, flags: list[str], word: str) -> None:
    done = flexgen("run", model_folder, source, "-o", output, *flags)
    assert (done.exit_code, word in done.stderr) == (2, True), done.stderr
    assert flexgen("run", model_folder, "-", "-o", output, "--dry-run").exit_code == 2
    assert flexgen("run", model_folder, source, "-o", "-", "--progress", "json").exit_code == 2


def test_a_disk_that_is_full_when_the_output_is_made(
    model_folder: Path, source: Path, output: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == "export.fsync":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexgen.base.failpoints._hook", fail)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 75
    assert "No space left on device\n2 of 2 lines are done; the same command goes on" in done.stderr
    assert not output.exists()
    monkeypatch.setattr("flexgen.base.failpoints._hook", None)
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 0
    assert len(engines) == 1
    assert len(records(output)) == 2


def full(*arguments: object, **more: object) -> Any:
    raise OSError(28, "No space left on device")


def full_for_metrics(temporary: Path, target: Path) -> Any:
    return full() if target.name == "metrics.json" else create(temporary, target)


def full_for_spilled_kv(*arguments: object) -> Any:
    try:
        full()
    except OSError as error:
        raise StorageError(f"the offload folder cannot be used: {error}") from error


def full_for_sqlite(*arguments: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


def full_for_commits(name: str) -> None:
    if name == "store.commit":
        full_for_sqlite()


@pytest.mark.parametrize(("place", "failure"), [
    ("flexgen.base.files.create", full),  # the output is tried
    ("flexgen.base.files.create", full_for_metrics),
    ("flexgen.jobs.folder.open_private", full),
    ("flexgen.jobs.folder.os.pwrite", full),
    ("flexgen.hub.private_folder.tempfile.TemporaryDirectory", full),  # of the model's config
    ("flexgen.jobs.database.open_private", full),
    ("flexgen.base.failpoints._hook", full_for_commits),
    ("flexgen.session.session.open_engine", full_for_spilled_kv),
    ("flexgen.jobs.runs.RunRecorder.start", full_for_sqlite),
])  # fmt: skip
def test_a_disk_that_is_full_before_the_start_is_no_other_condition_than_later(
    model_folder: Path, source: Path, output: Path, tmp_path: Path, engines: list[FakeEngine], place: str, failure: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever finds it, on the command's way to its first answer: every run ends with 75, and goes on when there is room."""
    run = ("run", model_folder, source, "-o", output, "--metrics", tmp_path / "metrics.json")
    with monkeypatch.context() as broken:
        broken.setattr(place, failure)
        for _ in range(2):
            done = flexgen(*run)
            assert done.exit_code == 75, done.output
            assert "No space left on device" in done.stderr or "database or disk is full" in done.stderr
            assert "the same command goes on" in done.stderr
            assert output.with_name("out.jsonl.flexgen").exists() == (place == "flexgen.jobs.runs.RunRecorder.start")
    assert flexgen(*run).exit_code == 0


def broken(*arguments: object, **more: object) -> Any:
    raise OSError(5, "Input/output error", "in.jsonl")


def broken_for_sqlite(*arguments: object) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
    raise error


def broken_at(point: str) -> Any:
    return lambda name: broken() if name == point else None


@pytest.mark.parametrize(("place", "failure"), [
    ("flexgen.base.files.create", broken),
    ("flexgen.cli.options.Path.is_dir", broken),  # of the model
    ("flexgen.jobs.folder.os.pwrite", broken),
    ("flexgen.hub.model_files.followed", broken),
    ("flexgen.jobs.mistaken.open_input", broken),
    ("flexgen.base.failpoints._hook", broken_at("input.read")),
    ("flexgen.base.failpoints._hook", broken_at("store.commit")),
    ("flexgen.jobs.runs.RunRecorder.start", broken_for_sqlite),
])  # fmt: skip
def test_an_input_output_error_before_the_start_is_no_other_condition_than_later(
    model_folder: Path, source: Path, output: Path, engines: list[FakeEngine], place: str, failure: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = ("run", model_folder, source, "-o", output)
    with monkeypatch.context() as patched:
        patched.setattr(place, failure)
        done = flexgen(*run)
        assert done.exit_code == 75, done.output
        assert "Input/output error" in done.stderr or "disk I/O error" in done.stderr
        assert "the same command goes on" in done.stderr
    assert flexgen(*run).exit_code == 0


def forbidden(*arguments: object, **more: object) -> Any:
    raise PermissionError(13, "Permission denied", "secret")


@pytest.mark.parametrize("place", [
    "flexgen.jobs.folder.open_private",
    "flexgen.jobs.mistaken.open_input",
    "flexgen.hub.model_files.followed",  # what a model's file is
    "flexgen.hub.resolve.check_regular",  # which translates no such error
])  # fmt: skip
def test_what_may_not_be_read_or_written_is_refused_before_the_start(
    model_folder: Path, source: Path, output: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, forbidden)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 3, done.output
    assert "Permission denied" in done.stderr
    assert "goes on" not in done.stderr
    assert not output.with_name("out.jsonl.flexgen").exists()


def test_what_may_no_longer_be_read_stops_a_run_that_goes_on(
    model_folder: Path, ten: Path, output: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = FakeEngine._answer
    with monkeypatch.context() as patched:
        patched.setattr(
            FakeEngine, "_answer", lambda engine, request: (forbidden if request.index == index_of(6) else answer)(engine, request)
        )
        done = flexgen("run", model_folder, ten, "-o", output)
    assert done.exit_code == 75, done.output
    assert "Permission denied: 'secret'\n5 of 10 lines are done; the same command goes on from there" in done.stderr
    assert flexgen("run", model_folder, ten, "-o", output).exit_code == 0


def test_a_broken_disk_that_nobody_expected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("flexgen.jobs.folder.find_job", broken)
    monkeypatch.setattr("sys.argv", ["flexgen", "status", "x"])
    assert code_of_main(monkeypatch) == 75
    said = "Input/output error: 'in.jsonl'\nthe same command goes on when it can be read and written again"
    assert said in capsys.readouterr().err


def test_a_full_disk_that_nobody_expected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("flexgen.jobs.folder.find_job", full)
    monkeypatch.setattr("sys.argv", ["flexgen", "status", "x"])
    assert code_of_main(monkeypatch) == 75
    assert "No space left on device\nthe same command goes on when there is room" in capsys.readouterr().err


@pytest.mark.parametrize(("num_failures", "code"), [(1, 0), (2, 0), (3, 75)])
def test_when_memory_runs_out_fewer_sequences_are_alive(
    model_folder: Path, ten: Path, output: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int, code: int
) -> None:
    """Four at once, two, one; then there is nothing left to give up."""
    seen: list[int | None] = []

    class Starving(FakeEngine):
        def generate(self, requests: Any, **more: Any) -> Any:
            results = super().generate(requests, **more)
            yield next(results)
            if len(seen) <= num_failures:
                raise MemoryError("no more")
            yield from results

    def open_engine(files: object, options: EngineOptions, workload: Workload) -> FakeEngine:
        seen.append(options.max_num_seqs)
        return Starving(workload, max_num_seqs=options.max_num_seqs or 4)

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    done = flexgen("run", model_folder, ten, "-o", output)
    assert done.exit_code == code, done.stderr
    assert seen == [None, 2, 1][: num_failures + 1]
    assert len(records(output)) == (10 if code == 0 else num_failures)
    assert "memory ran out (no more)" in done.stderr
    assert "going on with at most 2 sequences" in done.stderr


def test_the_help_tells_the_exit_codes() -> None:
    said = " ".join(flexgen("run", "--help").stdout.split())
    for code in ExitCode:
        assert f"{code.value} {code.meaning}" in said


# -- the rest ---------------------------------------------------------------------------------------------------------------------------


def test_bench_throughput(model_folder: Path, tmp_path: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fakes.POISON", -1)  # random prompts may have any id
    figures = tmp_path / "figures.json"
    flags = ["--num-prompts", 6, "--input-len", 10, "--output-len", 5, "--output-json", figures, "--max-num-seqs", 8]
    done = flexgen("bench", "throughput", model_folder, *flags)
    assert done.exit_code == 0, done.output
    written = json.loads(figures.read_text())
    assert (written["num_requests"], written["total_num_tokens"], written["prompt_tokens"], written["output_tokens"]) == (6, 90, 60, 30)
    assert written["tokens_per_second"] == pytest.approx(90 / written["elapsed_time"])
    assert written["requests_per_second"] == pytest.approx(6 / written["elapsed_time"])
    assert written["efficiency"] == 0.72
    assert "total tokens/s" in done.stdout
    assert "Total num output tokens:  30" in done.stdout
    assert len(engines) == 1
    assert engines[0].workload == Workload(prompt_lens=(10,) * 6, output_lens=(5,) * 6)


def test_bench_beyond_the_context(model_folder: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("bench", "throughput", model_folder, "--input-len", 60, "--output-len", 5)
    assert done.exit_code == 2
    assert "65 tokens exceed the context of 64" in done.stderr
    assert engines == []


def test_help_loads_nothing_heavy() -> None:
    script = "import sys; from flexgen import cli; sys.argv[1:] = ['run', '--help']\ntry: cli.main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "transformers", "numpy", "huggingface_hub", "tokenizers", "scipy", "numba"}
    assert "--host-mem" in done.stdout
