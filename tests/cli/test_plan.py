"""`flexgen plan` and `flexgen profile`, as typed."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from machines import machine_of
from typer.testing import CliRunner, Result

from flexgen.cli import app
from flexgen.plan.machine import Machine, read_machine

NOVELS = Path(__file__).parent.parent.parent / "models" / "novels-opt-7m"


@pytest.fixture(scope="module", autouse=True)
def hasty_plans() -> None:
    """These tests search with all of the usual effort."""


def flexgen(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_plan_in_words() -> None:
    done = flexgen("plan", "opt-30b", "--machine", "t4-gcp", "--prompt-len", 512, "--gen-len", 32, "--num-requests", 300)
    assert done.exit_code == 0, done.output
    for part in (
        "facebook/opt-30b on t4-gcp (by the rates of the FlexGen paper: Sheng et al. 2023, ",
        "tokens/s",
        "(the bottleneck",
        "9,600 output tokens",
        "what would help, at the margin",
        "host     ",
        "device   ",
    ):
        assert part in done.stdout


def test_a_plan_as_json() -> None:
    done = flexgen(
        "plan", "llama-3-8b", "--machine", "rtx4090-64gb", "--num-requests", 100, "--json", "--kv", "host=1", "--host-mem", "32GiB"
    )
    plan = json.loads(done.stdout)
    assert set(plan) == {"model", "machine", "limits", "policy", "forecast", "formats", "faster_format", "other_formats"}
    assert plan["formats"]["chosen"] == {"weights": "auto", "kv": "auto"}
    assert plan["faster_format"] is None
    assert plan["limits"]["host_bytes"] == 32 << 30
    assert plan["policy"]["kv"] == {"device": 0.0, "host": 1.0, "encoded": 0.0, "disk": 0.0}
    assert sum(plan["forecast"]["memory_bytes"]["host"].values()) <= 32 << 30
    assert plan["forecast"]["num_requests"] == 100
    assert read_machine(json.dumps(plan["machine"])).name == "rtx4090-64gb"


QUICK = ("--schedule", "zigzag", "--kv", "host=1", "--micro-batch-tokens", 512)  # little is left to search


def test_a_plan_for_kv_in_fewer_bits() -> None:
    job = ("plan", "llama-3-8b", "--machine", "rtx4090-64gb", "--num-requests", 100, *QUICK)
    assert "int4, 40.0 KiB per token" in flexgen(*job, "--kv-format", "int4").stdout
    policy = json.loads(flexgen(*job, "--kv-format", "int8", "--json").stdout)["policy"]
    assert policy["kv_format"] == "int8"
    refused = flexgen(*job, "--kv-format", "int3")
    assert refused.exit_code == 2
    assert "--kv-format 'int3' is unknown; known: auto, int8, k8v4, int4" in refused.stderr


def test_who_attends_to_kv_on_the_host_is_said_and_may_be_pinned() -> None:
    job = ("plan", "llama-3-8b", "--machine", "rtx4090-64gb", "--num-requests", 100, *QUICK)
    for value, where in (("on", "host"), ("off", "device")):
        done = flexgen(*job, "--host-attention", value)
        assert f"pages of 16 tokens; attention to host KV on the {where}\n" in done.stdout
        policy = json.loads(flexgen(*job, "--host-attention", value, "--json").stdout)["policy"]
        assert (policy["host_attention"], policy["kv_ring_bytes"] > 0) == (value == "on", value == "off")
    on_device = flexgen("plan", "llama-3-8b", "--machine", "rtx4090-64gb", "--num-requests", 10, "--kv", "device=1")
    assert on_device.exit_code == 0
    assert "attention to host KV" not in on_device.stdout


def test_shorter_requests_and_what_they_cost() -> None:
    job = ("plan", "opt-30b", "--machine", "t4-gcp", "--num-requests", 200, "--weights", "host=1", *QUICK)
    told = flexgen(*job, "--pareto").stdout.splitlines()
    curve = [line.split() for line in told[told.index("what shorter requests cost:") + 2 :] if line.startswith("  ")]
    assert len(curve) >= 2
    rates = [float(next(cell for cell in cells if "." in cell)) for cells in curve]
    assert rates == sorted(rates)
    points = json.loads(flexgen(*job, "--pareto", "--json").stdout)["pareto"]
    assert [f"{point['tokens_per_s']:.2f}" for point in points] == [f"{rate:.2f}" for rate in rates]
    shortest = float(points[0]["request_seconds"])
    kept = json.loads(flexgen(*job, "--max-request-seconds", 1.05 * shortest, "--json").stdout)
    assert kept["forecast"]["request_seconds"] <= 1.05 * shortest
    assert "pareto" not in kept


def test_what_fits_the_device_is_said() -> None:
    fits = flexgen("plan", "opt-125m", "--machine", "rtx4090-64gb", "--num-requests", 20)
    assert "an engine made for that (vLLM, SGLang) will be faster" in fits.stdout


def test_rates_that_are_estimated_are_said_to_be() -> None:
    job = ("--machine", "rtx3060-12gb-32gb", "--num-requests", 50, *QUICK)
    note = "note: how fast the device decodes mxfp4 was not measured: it is estimated from the rate of its memory"
    assert note in flexgen("plan", "gpt-oss-20b", *job).stdout
    assert "how fast the device decodes" not in flexgen("plan", "llama-3-8b", *job).stdout


def test_a_machine_without_bfloat16_computes_in_float16() -> None:
    job = ("plan", "llama-3-8b", "--machine", "t4-gcp", "--num-requests", 50, *QUICK)
    auto = flexgen(*job)
    assert "plan: cuda, float16," in auto.stdout
    assert "t4-gcp has no units for bfloat16" in auto.stderr
    assert auto.stderr.count("bfloat16") == 2, "once"
    asked = flexgen(*job, "--dtype", "bfloat16")
    assert "has no rates for bfloat16 (known: float16, float32)" in asked.stderr
    assert "bfloat16" not in flexgen("plan", "opt-6.7b", *job[2:]).stderr


def test_what_a_narrower_dtype_would_gain_is_said_where_it_is_much() -> None:
    job = ("plan", "opt-30b", "--machine", "t4-gcp", "--num-requests", 200, "--weights", "host=1", *QUICK)
    wide, narrow = (json.loads(flexgen(*job, "--json", "--dtype", dtype).stdout) for dtype in ("float32", "float16"))
    faster = wide["faster_format"]
    assert faster["dtype"] == "float16"
    assert faster["speedup"] == pytest.approx(wide["forecast"]["seconds"] / narrow["forecast"]["seconds"])
    told = flexgen(*job, "--dtype", "float32").stdout
    assert f"in float16 the job would go {faster['speedup']:.1f} times as fast: --dtype float16" in told
    assert "--dtype" not in flexgen(*job).stdout


def test_a_format_of_weights_is_chosen_among_those_that_are_allowed() -> None:
    """Weights that stream from disk, of which a quarter would stream faster."""
    job = ("plan", "opt-30b", "--machine", "t4-gcp", "--num-requests", 50, "--weights", "disk=1", *QUICK)
    own, rounded = (json.loads(flexgen(*job, "--json", *more).stdout) for more in ((), ("--allow-formats", "int8,int4")))
    assert rounded["formats"]["chosen"] == {"weights": "int4", "kv": "auto"}
    prices = {price["formats"]["weights"]: price for price in rounded["formats"]["prices"]}
    assert prices["auto"]["seconds"] == own["forecast"]["seconds"]
    assert prices["int4"]["seconds"] == rounded["forecast"]["seconds"]
    assert prices["auto"]["conversion_seconds"] == 0 < prices["int4"]["conversion_seconds"] < prices["int8"]["conversion_seconds"]
    gains = {gain["name"]: gain["speedup"] for gain in own["other_formats"]}
    for name in ("int8", "int4"):
        assert gains[name] == pytest.approx(prices["auto"]["seconds"] / prices[name]["seconds"], rel=0.25)
    assert not {gain["name"] for gain in rounded["other_formats"]} & {"int8", "int4"}
    told = flexgen(*job, "--allow-formats", "int8, int4").stdout
    assert "  formats  weights in int4 " in told
    assert "of converting: the fastest of the 3 that are allowed" in told
    assert "`flexgen run` with --allow-formats int8,int4 or with --weight-format int4 runs this plan" in told
    assert "in formats that are not allowed the job would go about so many times as fast" in flexgen(*job).stdout


def test_the_time_of_a_conversion_counts() -> None:
    job = ("plan", "opt-30b", "--machine", "t4-gcp", "--num-requests", 2, "--weights", "disk=1", "--json", *QUICK)
    short, long = (json.loads(flexgen(*job, "--allow-formats", "int4", "--gen-len", number).stdout)["formats"] for number in (1, 16))
    assert (short["chosen"]["weights"], long["chosen"]["weights"]) == ("auto", "int4")
    assert min(short["prices"], key=lambda price: price["seconds"])["formats"]["weights"] == "int4"


def test_formats_of_kv_are_chosen_too() -> None:
    """KV that is too large for the host in full, beside weights that all stream."""
    placed = ("--weights", "disk=1", "--kv", "host=1", "--host-mem", "24GiB", "--micro-batch-tokens", 4096, "--prefill-tokens", 16384)
    job = ("plan", "llama-3-8b", "--machine", "16gb-gpu-64gb", "--gen-len", 200, "--num-requests", 400, *placed, "--json")
    found = json.loads(flexgen(*job, "--allow-formats", "k8v4,kv-int8").stdout)
    prices = {price["formats"]["kv"]: price["seconds"] for price in found["formats"]["prices"]}
    assert set(prices) == {"auto", "int8", "k8v4"}
    assert found["formats"]["chosen"]["kv"] != "auto"
    assert found["policy"]["kv_format"] == found["formats"]["chosen"]["kv"]
    own = json.loads(flexgen(*job).stdout)
    assert "k8v4" in {gain["name"] for gain in own["other_formats"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--allow-formats", "int3"), "--allow-formats: 'int3' is unknown; known: int8, int4, kv-int8, k8v4, kv-int4"),
        (("--allow-formats", "int8", "--weight-format", "int4"), "leaves int8 of --allow-formats 'int8' nothing to choose: leave out one"),
        (("--allow-formats", "int8,k8v4", "--kv-format", "int4"), "leaves k8v4 of --allow-formats 'int8,k8v4' nothing to choose"),
        (("--allow-formats", "int8", "--load-format", "dummy"), "converts a checkpoint, and --load-format 'dummy' reads none"),
    ],
)
def test_formats_that_cannot_be_chosen(flags: tuple[str, ...], message: str) -> None:
    done = flexgen("plan", "opt-30b", "--machine", "t4-gcp", *flags)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_a_dtype_that_was_not_measured_is_not_spoken_of(measured: list[tuple[Any, ...]], tmp_path: Path) -> None:
    plan = ("plan", NOVELS, "--device", "cpu", "--dtype", "float32", "--host-mem", "2GiB", "--json")
    assert json.loads(flexgen(*plan).stdout)["faster_format"] is None
    assert [dtypes for _, dtypes, *_ in measured] == [("float32",)]


@pytest.mark.parametrize("formats", [(), ("--weight-format", "int4"), ("--allow-formats", "int8,int4")])
def test_a_plan_for_a_folder_on_a_measured_machine(tmp_path: Path, formats: tuple[str, ...]) -> None:
    (tmp_path / "box.json").write_text(machine_of(dense={"bfloat16": [(64, 5e11)], "float32": [(64, 1e11)]}).to_json())
    lines = [{"prompt": "It was a dark and stormy night", "max_tokens": 12}, {"prompt": "Once", "max_tokens": 7}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ("--input", tmp_path / "in.jsonl", "--json", "--host-mem", "2GiB")
    done = flexgen("plan", NOVELS, "--machine", tmp_path / "box.json", *job, *formats)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["forecast"]
    assert told["num_requests"] == 2
    assert 0 < told["output_tokens"] <= 19


def test_lines_that_cannot_be_answered_are_left_out_of_a_plan(tmp_path: Path) -> None:
    (tmp_path / "box.json").write_text(machine_of().to_json())
    job = ("plan", NOVELS, "--machine", tmp_path / "box.json", "--input", tmp_path / "in.jsonl", "--json", "--host-mem", "2GiB")
    (tmp_path / "in.jsonl").write_text('{"prompt": 7}\n{"prompt": "Once", "max_tokens": 7}\nnothing\n')
    done = flexgen(*job)
    assert json.loads(done.stdout)["forecast"]["num_requests"] == 1
    assert "2 of 3 lines are bad and left out" in done.stderr
    (tmp_path / "in.jsonl").write_text("nothing\n")
    done = flexgen(*job)
    assert done.exit_code == 2
    assert "none of its 1 line can be answered" in done.stderr


def test_a_common_beginning_is_computed_once() -> None:
    job = ("plan", "opt-30b", "--machine", "t4-gcp", "--prompt-len", 1000, "--gen-len", 4, "--num-requests", 200, "--json", *QUICK)
    seconds = [
        json.loads(flexgen(*job, *more).stdout)["forecast"]["seconds"]
        for more in ((), ("--prefix-len", 0), ("--prefix-len", 960), ("--prefix-len", 960, "--no-prefix-sharing"))
    ]
    assert seconds[0] == seconds[1] == seconds[3] > 2 * seconds[2]


def test_the_flags_that_read_an_input_are_those_of_run() -> None:
    """All of `run` that decide about lengths; the others are of answering."""
    answering = {"output", "dry_run", "metrics", "progress", "strict", "state", "retry_errors", "fresh", "accept_changes", "keep_going"}
    answering |= {"checkpoint_seconds", "temperature", "top_p", "verbose", "workers", "lease_seconds", "attempts"}
    own = {"machine", "prompt_len", "prefix_len", "gen_len", "num_requests", "pareto", "as_json", "machines", "link"}
    commands = {command.name or command.callback.__name__: command.callback for command in app.registered_commands if command.callback}
    run, plan = (set(inspect.signature(commands[name]).parameters) for name in ("run", "plan"))
    assert run - answering == plan - own


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = [{"messages": [{"role": "user", "content": "Hello " * number}], "max_tokens": 9} for number in (1, 5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "chat.jinja").write_text("{{ extra }} {% for m in messages %}{{ m.content }}{% endfor %}")
    return tmp_path


def forecast_of(*arguments: object) -> dict[str, Any]:
    done = flexgen("plan", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["forecast"]


def test_an_input_is_read_as_run_would(chats: Path) -> None:
    (chats / "box.json").write_text(machine_of().to_json())
    job = (NOVELS, "--machine", chats / "box.json", "--input", chats / "in.jsonl", "--host-mem", "2GiB")
    template = ("--chat-template", chats / "chat.jinja")
    short, long = (
        forecast_of(*job, *template, "--chat-template-kwargs", json.dumps({"extra": extra}))["prompt_tokens"]
        for extra in ("", "word " * 50)
    )
    assert long >= short + 100
    text = forecast_of(*job, "--input-format", "text", "--max-tokens", 5)
    assert text["num_requests"] == 2
    assert text["output_tokens"] <= 10
    assert text["prompt_tokens"] > short


def test_an_input_for_a_shipped_model_needs_a_tokenizer_and_no_network(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    job = ("--machine", "t4-gcp", "--input", chats / "in.jsonl", "--tokenizer", NOVELS, "--chat-template", chats / "chat.jinja", *QUICK)
    lengths = [forecast_of(model, *job)["prompt_tokens"] for model in ("opt-30b", "facebook/OPT-30B", "opt-175b")]
    assert lengths[0] == lengths[1] == lengths[2] > 10
    assert not list(Path(tempfile.gettempdir()).glob("flexgen-plan-*"))


def test_a_machine_of_a_few_figures(tmp_path: Path) -> None:
    (tmp_path / "box.json").write_text('{"host_bytes": "64GB", "host_memory": 80e9, "disk_read": "7GB/s", "flops": 2e12}')
    told = flexgen("plan", "Qwen/Qwen3-32B", "--machine", tmp_path / "box.json", "--num-requests", 20)
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("Qwen/Qwen3-32B on box (by its datasheet)\nplan: cpu, bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["opt-1.3b", "--prefix-len", "600"], "--prefix-len 600 is more than a prompt has (--prompt-len 512)"),
        (["opt-1.3b", "--input-format", "text"], "--input-format is for the lines of an --input"),
        (["opt-1.3b", "--tokenizer", "x"], "--tokenizer is for the lines of an --input"),
        (["opt-1.3b", "--input", __file__, "--input-format", "csv"], "--input-format 'csv' is unknown; known: jsonl, text"),
        (["opt-1.3b", "--input", __file__, "--chat-template-kwargs", "[1]"], "is not a JSON object"),
        (["opt-1.3b", "--input", __file__, "--chat-template-kwargs", "{"], "is not valid JSON: "),
        (["opt-1.3b", "--input", __file__, *("--chat-template-kwargs", '{"a": 1}') * 2], "an earlier --chat-template-kwargs has 'a', too"),
        (["opt-13b", "--weight-format", "flexgen-v0"], "--weight-format 'flexgen-v0' is for comparisons, and no run converts to it"),
        (["opt-1.3b", "--input", __file__, "--prefix-len", "16"], "leave out --prefix-len"),
        (["opt-1.3b", "--input", __file__, "--tokenizer", "/nowhere"], "/nowhere does not exist: there is no nowhere in /"),
        (["opt-13"], "nor is it in the catalogue: opt-1"),
        (["opt-1.3b", "--machine", "t4"], "neither a file nor a known machine"),
        (["opt-1.3b", "--prompt-len", "2000", "--gen-len", "49"], "--prompt-len 2000 and --gen-len 49 exceed the context of 2048"),
        (["opt-1.3b", "--max-tokens", "5"], "use --gen-len"),
        (["opt-1.3b", "--input", "nowhere.jsonl"], "there is no such file"),
        (["opt-1.3b", "--input", __file__], "needs the tokenizer of opt-1.3b"),
        (["opt-1.3b", "--input", __file__, "--gen-len", "5"], "leave out --gen-len"),
        (["deepseek-v3", "--host-mem", "2GiB"], "GiB are missing"),
    ],
)
def test_plans_that_cannot_be_made(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    more = [] if "--machine" in arguments else ["--machine", "t4-gcp"]
    done = flexgen("plan", *arguments, *more)
    assert done.exit_code in (2, 3)
    assert message in done.stderr
    assert "Traceback" not in done.output


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What was measured, without measuring; what is kept goes to a home of its own."""
    calls: list[tuple[Any, ...]] = []

    def measure(device: str, dtypes: tuple[str, ...], folder: Path, *, quick: bool, **_: int) -> Machine:
        calls.append((device, tuple(dtypes), folder, quick))
        return machine_of(device=device, dense={dtype: [(64, 5e11)] for dtype in dtypes}, busy_cores=1.5)

    monkeypatch.setattr("flexgen.profile.measure.measure", measure)
    monkeypatch.setattr("flexgen.profile.int8.with_int8", lambda machine, *_, **__: machine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_a_profile_is_shown_kept_and_written(measured: list[tuple[Any, ...]], tmp_path: Path) -> None:
    done = flexgen("profile", tmp_path, "--device", "cpu", "--quick", "-o", tmp_path / "box.json")
    assert done.exit_code == 0, done.output
    assert measured == [("cpu", ("bfloat16", "float32"), tmp_path, True)] * 2
    for part in ("disk read", "linear, bfloat16, 64 rows", "500.00 GFLOP/s", "other programs kept at least 1.5 cores busy"):
        assert part in done.stdout
    for part in ("other programs kept 1.5 cores busy meanwhile: measuring again (2 of at most 3 times)", "two measurements agree"):
        assert part in done.stderr
    assert len(list((tmp_path / "cache" / "flexgen").iterdir())) == 2
    assert read_machine((tmp_path / "box.json").read_text()).busy_cores == 1.5
    done = flexgen("profile", tmp_path, "--device", "cpu", "--dtype", "float64", "--json")
    assert set(json.loads(done.stdout)["dense"]) == {"float64"}


def test_a_disturbed_profile_does_not_replace_a_good_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = iter([machine_of(disk_read=1e9), machine_of(disk_read=0.4e9, host_memory=40e9, busy_cores=1.2)])
    monkeypatch.setattr("flexgen.profile.measure.measure", lambda *_, **__: next(found))
    monkeypatch.setattr("flexgen.profile.int8.with_int8", lambda machine, *_, **__: machine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    profile = ("profile", tmp_path, "--device", "cpu", "--dtype", "bfloat16", "--json")
    assert [line.split()[0] for line in flexgen(*profile).stderr.splitlines()] == ["loading", "kept"]  # and nothing else
    done = flexgen(*profile)
    kept = read_machine(done.stdout)
    assert (kept.disk_read.typical, kept.host_memory.typical, kept.busy_cores) == (1e9, 40e9, 0.0)
    assert "of each rate, the better of now and before is kept (1 of " in done.stderr
    for path in (tmp_path / "cache" / "flexgen").iterdir():
        assert json.loads(path.read_text())["machine"] == json.loads(kept.to_json())


def test_a_profile_that_cannot_be_measured(measured: list[tuple[Any, ...]], tmp_path: Path) -> None:
    assert "--dtype 'int3' is unknown" in flexgen("profile", tmp_path, "--dtype", "int3").stderr
    assert "--device 'tpu' is unknown" in flexgen("profile", tmp_path, "--device", "tpu").stderr
    assert flexgen("profile", tmp_path / "nowhere").exit_code == 2
    assert not measured
