"""The command: flags to values, exit codes, what is printed where.  The engine is fake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTEXT, POISON, FakeEngine, fake_text
from typer.testing import CliRunner

from flexgen import cli
from flexgen.errors import CapacityError, EngineError
from flexgen.llm import Plan
from flexgen.options import EngineOptions
from flexgen.plan.workload import Workload

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
    assert f"temperature 1, top_p 1, top_k 0, up to the context of {CONTEXT}; /v1/completions: 16 tokens" in done.stderr
    assert "plan: cpu, float32, diagonal schedule" in done.stderr
    assert "2 lines answered, 0 with errors" in done.stderr
    assert "overlap 0.90   plan 0.80   efficiency 0.72" in done.stdout
    assert "plan: cpu" not in done.stdout
    assert engines[0].closed


def test_every_option_reaches_the_engine(
    model_folder: Path, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[EngineOptions] = []

    def open_engine(files: object, options: EngineOptions, workload: Workload) -> FakeEngine:
        seen.append(options)
        return FakeEngine(workload)

    monkeypatch.setattr("flexgen.llm.open_engine", open_engine)
    wanted: dict[str, Any] = {
        "device": "sim", "dtype": "float32", "device_mem": "1GiB", "host_mem": "50%", "disk": "3GB", "offload_dir": str(tmp_path),
        "weights": "host=1", "kv": "host=.5,disk=.5", "max_num_seqs": 3, "micro_batch_tokens": 5, "prefill_tokens": 7,
        "schedule": "diagonal", "load_format": "dummy", "max_model_len": 33, "seed": 9,
    }  # fmt: skip
    flags = [part for name, value in wanted.items() for part in ("--" + name.replace("_", "-"), value)]
    done = flexgen("run", model_folder, source, "-o", output, *flags)
    assert done.exit_code == 0, done.output
    assert seen == [EngineOptions(**wanted)]
    assert set(wanted) == set(cli._FLAGS) - {"revision"}


def test_bad_lines_give_exit_code_1(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    source = write(tmp_path / "in.jsonl", GOOD, "bad", {"prompt": [POISON], "max_tokens": 1})
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 1
    assert len(records(output)) == 3
    again = flexgen("run", model_folder, source, "-o", output)
    assert again.exit_code == 1  # they still have no answer
    assert "3 done before, 0 to answer" in again.stderr
    assert len(engines) == 1


def test_max_tokens_is_for_bare_lines_that_do_not_say(model_folder: Path, tmp_path: Path, output: Path, engines: list[FakeEngine]) -> None:
    lines = [{"prompt": "a"}, {"prompt": "a", "max_tokens": 9}, {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "a"}}]
    done = flexgen("run", model_folder, write(tmp_path / "in.jsonl", *lines), "-o", output, "--max-tokens", 5)
    assert done.exit_code == 0
    usages = [record.get("usage") or record["response"]["body"]["usage"] for record in records(output)]
    assert sorted(usage["completion_tokens"] for usage in usages) == [5, 9, 16]
    assert "top_k 0, 5 tokens; /v1/completions" in done.stderr


def test_defaults_of_generation_config_are_said(tmp_path: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    from fakes import write_model_folder

    settings = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "repetition_penalty": 1.1}
    folder = write_model_folder(tmp_path / "model", generation_config=settings)
    done = flexgen("run", folder, source, "-o", output)
    assert "temperature 0.6, top_p 1, top_k 20, 7 tokens;" in done.stderr
    assert "repetition_penalty=1.1, which is not supported yet" in done.stderr


def test_metrics(model_folder: Path, source: Path, output: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    metrics = tmp_path / "metrics.json"
    assert flexgen("run", model_folder, source, "-o", output, "--metrics", metrics).exit_code == 0
    written = json.loads(metrics.read_text())
    assert written.pop("job") == {"lines": 2, "answered": 2, "failed": 0, "done_before": 0}
    assert written == json.loads(engines[0].report().to_json())


def test_progress_json(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("run", model_folder, source, "-o", output, "--progress", "json")
    assert done.exit_code == 0
    assert done.stderr == ""
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events == ["message", "plan", "progress", "report", "message"]


def test_progress_none(model_folder: Path, source: Path, output: Path, engines: list[FakeEngine]) -> None:
    done = flexgen("run", model_folder, source, "-o", output, "--progress", "none")
    assert done.stderr == ""
    assert done.stdout.startswith("2 requests")


def test_dry_run(model_folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_plan(files: object, options: object, workload: Workload) -> Plan:
        engine = FakeEngine(workload)
        return Plan(spec=engine.spec, machine=engine.machine, policy=engine.policy)

    monkeypatch.setattr("flexgen.llm.make_plan", make_plan)
    source = write(tmp_path / "in.jsonl", GOOD)
    done = flexgen("run", model_folder, source, "-o", output, "--dry-run")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "1 to answer" in done.stdout
    assert "plan: cpu" in done.stdout
    assert flexgen("run", model_folder, write(source, GOOD, "bad"), "-o", output, "--dry-run").exit_code == 1
    assert list(tmp_path.iterdir()) == [source]


# -- refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--device", "tpu"], "known: auto, cpu, cuda, sim"),
        (["--max-num-seqs", "0"], "positive"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--progress", "fancy"], "known: auto"),
        (["--no-such-flag"], "no-such-flag"),
        (["--max-model-len", "1000"], "context of 64"),
        (["--metrics", "/no/such/folder/m.json"], "there is no folder"),
        (["--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_usage_errors(model_folder: Path, source: Path, output: Path, flags: list[str], word: str) -> None:
    done = flexgen("run", model_folder, source, "-o", output, *flags)
    assert done.exit_code == 2, done.output
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_paths_that_cannot_be(model_folder: Path, source: Path, tmp_path: Path) -> None:
    for given, out, code in (
        (source, source, 2),
        (tmp_path / "none", tmp_path / "o", 2),
        (tmp_path, tmp_path / "o", 2),
        (source, tmp_path, 3),
    ):
        done = flexgen("run", model_folder, given, "-o", out)
        assert done.exit_code == code, done.output
    assert len(source.read_text().splitlines()) == 2


def test_what_is_refused_before_the_start_gives_3(source: Path, output: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = flexgen("run", "/no/such/model", source, "-o", output)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("flexgen: /no/such/model is not a folder")

    def open_engine(*args: object) -> None:
        raise CapacityError("KV cache needs 31.2 GiB")

    monkeypatch.setattr("flexgen.llm.open_engine", open_engine)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 3
    assert done.stderr.endswith("flexgen: KV cache needs 31.2 GiB\n")
    output.unlink()
    output.write_text("precious")
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 3
    assert "not written by flexgen" in done.stderr


def test_what_stops_a_run_gives_75_and_the_same_command_goes_on(
    model_folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine]
) -> None:
    source = write(tmp_path / "in.jsonl", *({**GOOD, "id": n} for n in range(10)))
    answer = FakeEngine._answer

    def failing(engine: FakeEngine, request: Any) -> Any:
        if request.index == 6:
            raise EngineError("the disk is gone")
        return answer(engine, request)

    monkeypatch.setattr(FakeEngine, "_answer", failing)
    done = flexgen("run", model_folder, source, "-o", output)
    assert done.exit_code == 75
    assert "flexgen: the disk is gone\n5 of 10 lines are done; the same command goes on from there" in done.stderr
    assert engines[0].closed
    monkeypatch.setattr(FakeEngine, "_answer", answer)
    assert flexgen("run", model_folder, source, "-o", output).exit_code == 0
    assert len(records(output)) == 10


def test_a_bug_shows_its_traceback_and_gives_70(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # main sets it; here it goes away with the test
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 70
    assert "ZeroDivisionError: oops" in capsys.readouterr().err


def test_ctrl_c_closes_and_gives_130(model_folder: Path, tmp_path: Path, output: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({**GOOD, "id": n} for n in range(10)))
    script = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
import flexgen.llm, flexgen.cli, fakes
class Engine(fakes.FakeEngine):
    def _answer(self, request):
        if request.index == 6:
            print("now", flush=True)
            time.sleep(60)
        return super()._answer(request)
    def close(self):
        print("closed", flush=True)
flexgen.llm.open_engine = lambda files, options, workload: Engine(workload)
flexgen.cli.main()
"""
    command = [sys.executable, "-c", script, "run", str(model_folder), str(source), "-o", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (130, "closed\n"), stderr
    assert "5 of 10 lines are done" in stderr
    assert "Traceback" not in stderr
    assert len(records(output)) == 5


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
