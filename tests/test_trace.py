"""Traces of real runs: complete, consistent with the report, and without influence on answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from traces import Trace, read_trace
from transformers import AutoConfig

from flexgen import LLM, OptionError, SamplingParams
from flexgen.base.recorder import (
    COMPUTE,
    DEVICE_COMPUTE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    IO,
    KV_TO_DEVICE,
    PASSES,
    URGENT_TO_DEVICE,
    WEIGHTS_TO_DEVICE,
    Recorder,
)
from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest

POOL = 8 << 20
BASE = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=0.4, disk=0.6), kv=Fractions(host=1.0), kv_device_bytes=0,
    kv_host_bytes=POOL, kv_disk_bytes=0, host_ring_bytes=4 << 20, device_ring_bytes=0, workspace_bytes=1 << 20,
    embedding_resident=False, schedule="diagonal", max_num_seqs=6, prefill_tokens=128, micro_batch_tokens=24, page_tokens=16,
    compute_threads=1, io_threads=2,
)  # fmt: skip
ON_DISK = {"kv_disk_bytes": POOL, "kv_staging_bytes": 1 << 20, "kv_tail_bytes": 4 << 20}
POLICIES = {
    "cpu": BASE,
    "cpu, KV on disk": replace(BASE, kv=Fractions(disk=1.0), kv_host_bytes=0, **ON_DISK),
    "cpu, decoded": replace(BASE, dtype="float64", host_ring_bytes=8 << 20),
    "sim": replace(
        BASE, device="sim", weights=Fractions(device=0.2, host=0.3, disk=0.5), kv=Fractions(device=0.4, host=0.3, disk=0.3),
        kv_device_bytes=POOL, device_ring_bytes=4 << 20, **ON_DISK,
    ),
}  # fmt: skip
LENGTHS = [(3, 4), (40, 3), (17, 2), (60, 5), (5, 1), (33, 4), (20, 3), (9, 2)]  # (prompt, answer)


def requests() -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(5, 400, (length,), generator=generator).tolist()) for length, _ in LENGTHS]
    return [
        TokenRequest(index=index, prompt_token_ids=prompt, max_tokens=count)
        for index, (prompt, (_, count)) in enumerate(zip(prompts, LENGTHS, strict=True))
    ]


@contextlib.contextmanager
def engine_of(folder: Path, policy: Policy, offload_dir: Path, recorder: Recorder | None, *, overlap: bool = True) -> Iterator[Engine]:
    model = assemble_model(folder, AutoConfig.from_pretrained(folder), getattr(torch, policy.dtype))
    backend = SimulatedDevice(96 << 20, max_delay_seconds=0.0002) if policy.device == "sim" else None
    with Engine(model, policy, backend=backend, offload_dir=offload_dir, poison=True, overlap=overlap, recorder=recorder) as engine:
        yield engine


@dataclass
class Traced:
    """A run with a trace: its answers, the bytes of its report, and how many units a pass has."""

    trace: Trace
    answers: dict[int, tuple[int, ...]]
    moved: dict[str, int]
    waits: dict[str, float]
    num_passes: int
    num_units: int


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


@pytest.fixture(scope="module")
def traced(policy: Policy, novels_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("traced")
    recorder = Recorder(folder / "trace.json")
    with engine_of(novels_opt, policy, folder, recorder) as engine:
        log = engine.new_log()  # before anything is loaded, so that it counts all that the trace shows
        answers = {each.index: each.token_ids for each in engine.generate(requests(), log=log)}
    recorder.close()
    return Traced(
        read_trace(folder / "trace.json"), answers, log.bytes_moved(), log.passes.waits, log.passes.num_passes, engine.runner.num_units
    )


def test_answers_are_the_same_without_a_trace(traced: Traced, policy: Policy, novels_opt: Path, tmp_path: Path) -> None:
    with engine_of(novels_opt, policy, tmp_path, None) as engine:
        assert {each.index: each.token_ids for each in engine.generate(requests())} == traced.answers


def test_every_micro_batch_computes_every_unit_once_in_every_pass(traced: Traced) -> None:
    passes = traced.trace.slices[PASSES]
    assert [each["name"] for each in passes] == [f"pass {number}" for number in range(traced.num_passes)]
    units = [each["args"] for each in traced.trace.slices[COMPUTE] if "micro_batch" in each["args"]]
    begun = Counter((each["pass_index"], each["micro_batch"], each["unit"]) for each in units if not each["resumed"])
    assert begun == {
        (number, batch, unit): 1
        for number, told in enumerate(passes)
        for batch in range(told["args"]["micro_batches"])
        for unit in range(-1, traced.num_units)
    }
    rows = {(each["pass_index"], each["micro_batch"]): each["rows"] for each in units}
    for number, told in enumerate(passes):
        assert sum(count for (which, _), count in rows.items() if which == number) == told["args"]["rows"]


def test_what_resumes_had_begun_and_the_pass_has_it_all(traced: Traced, policy: Policy) -> None:
    seen: set[tuple[int, int, int]] = set()
    resumed = 0
    passes = [(each["ts"], each["ts"] + each["dur"]) for each in traced.trace.slices[PASSES]]
    for each in sorted(traced.trace.slices[COMPUTE], key=lambda each: each["ts"]):
        if "micro_batch" not in (args := each["args"]):
            continue
        key = (args["pass_index"], args["micro_batch"], args["unit"])
        assert args["resumed"] == (key in seen)
        resumed += args["resumed"]
        seen.add(key)
        start, end = passes[args["pass_index"]]
        assert start <= each["ts"] <= each["ts"] + each["dur"] <= end
    assert (resumed > 0) == (policy.kv.disk > 0 or policy.device == "sim"), "where attention is computed elsewhere"


def test_what_a_device_computes_has_a_track_of_its_own(traced: Traced, policy: Policy) -> None:
    """Here it computes at once, so that it is the host's track, without the waits."""
    computed = [each for each in traced.trace.slices[COMPUTE] if not each["name"].startswith("wait")]
    found = traced.trace.slices.get(DEVICE_COMPUTE, [])
    if policy.device != "sim":
        assert not found
        return
    assert [(each["name"], each["args"]) for each in found] == [(each["name"], each["args"]) for each in computed]
    for host, device in zip(computed, found, strict=True):
        assert device["ts"] <= host["ts"]
        assert host["ts"] + host["dur"] <= device["ts"] + device["dur"] + 1, "rounding aside"
    ends = [(each["ts"] + each["dur"], each["ts"]) for each in found if "micro_batch" in each["args"]]
    assert all(end <= start + 1 for (end, _), (_, start) in itertools.pairwise(ends)), "one stream"


def test_bytes_are_those_of_the_report(traced: Traced, policy: Policy) -> None:
    trace, moved = traced.trace, traced.moved
    threads = [track for track in trace.slices if track.startswith(IO)]
    assert len(threads) == policy.io_threads
    read, written = (sum(trace.bytes_of(track, verb) for track in threads) for verb in ("read", "write"))
    assert read + trace.bytes_of(COMPUTE, "gather embedding rows") == moved["disk_read"]
    assert written == moved["disk_write"]
    assert trace.bytes_of("weights from disk") + trace.bytes_of("KV from disk") == read
    assert trace.bytes_of("KV to disk") == written
    assert (written > 0) == (policy.kv.disk > 0)
    if policy.device == "sim":
        bulk, urgent = trace.bytes_of(HOST_TO_DEVICE), trace.bytes_of(URGENT_TO_DEVICE)
        assert bulk + urgent == moved["host_to_device"]
        assert bulk > urgent > 0
        assert trace.bytes_of(DEVICE_TO_HOST) == moved["device_to_host"] > 0
        assert len(trace.named(WEIGHTS_TO_DEVICE, "unit")) >= traced.num_passes


def test_pages_that_come_to_the_device_have_a_track(novels_qwen3: Path, tmp_path: Path) -> None:
    policy = replace(BASE, device="sim", device_ring_bytes=4 << 20, host_attention=False, kv_ring_bytes=1 << 20)
    recorder = Recorder(tmp_path / "trace.json")
    with engine_of(novels_qwen3, policy, tmp_path, recorder) as engine:
        list(engine.generate(requests()))
    recorder.close()
    trace = read_trace(tmp_path / "trace.json")
    brought = trace.named(KV_TO_DEVICE, "KV of layer")
    assert brought
    assert {each["name"] for each in trace.named("host attention", "KV of next tokens")} == {
        each["name"].replace("KV", "KV of next tokens") for each in brought
    }
    assert any(trace.counters["ring of kv-link"])
    copied = trace.bytes_of(HOST_TO_DEVICE) + trace.bytes_of(URGENT_TO_DEVICE)
    assert copied == engine.runner.bytes_moved()["host_to_device"]
    assert trace.bytes_of(KV_TO_DEVICE) <= copied * 1.1, "parts of a layer are padded"


def test_waits_are_red_and_as_long_as_the_report_says(traced: Traced) -> None:
    for cause in ("weights", "attention"):
        found = traced.trace.named(COMPUTE, f"wait for {cause}")
        assert all(each["cname"] == "terrible" for each in found)
        assert sum(each["dur"] for each in found) >= 1e6 * traced.waits.get(cause, 0.0) - 10 * (len(found) + 1), "rounding aside"
    others = [each for each in traced.trace.slices[COMPUTE] if not each["name"].startswith("wait for")]
    assert not any("cname" in each for each in others)


def test_attention_has_a_track_where_it_is_computed_beside_the_pass(traced: Traced, policy: Policy) -> None:
    tracks = {track for track in traced.trace.slices if "attention" in track}
    on_host = {"host attention", "host attention in order"} if policy.device == "sim" else set[str]()
    assert tracks == ({"disk attention"} if policy.kv.disk else set()) | on_host
    for track in tracks - {"host attention in order"}:
        assert traced.trace.named(track, "attention of layer 0")
    if on_host:
        assert traced.trace.named("host attention in order", "KV of prompts of layer 0")
    assert traced.trace.named(COMPUTE, "attention of layer 0"), "of prompts everywhere, and of next tokens whose pages are beside"


def test_decoding_is_shown(traced: Traced, policy: Policy) -> None:
    decoded = traced.trace.named(COMPUTE, "decode unit")
    if policy.dtype == "float64":
        assert len(decoded) >= traced.num_passes
        assert all(each["args"]["bytes"] > 0 for each in decoded)


def test_rings_are_counted_and_never_exceeded(traced: Traced, policy: Policy) -> None:
    assert 0 < max(traced.trace.counters["ring of disk-link"]) <= policy.host_ring_bytes
    if policy.device == "sim":
        assert 0 < max(traced.trace.counters["ring of device-link"]) <= policy.device_ring_bytes


def test_a_run_that_fails_leaves_its_trace(novels_opt: Path, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace.json")

    def interrupt(answers: object) -> None:
        raise KeyboardInterrupt

    with engine_of(novels_opt, BASE, tmp_path, recorder) as engine, pytest.raises(KeyboardInterrupt):
        list(engine.generate(requests(), on_pass=interrupt))
    assert [each["name"] for each in read_trace_when(tmp_path / "trace.json", '"pass 0"').slices[PASSES]] == ["pass 0"]
    recorder.close()
    assert len(read_trace(tmp_path / "trace.json").slices[PASSES]) == 1


def read_trace_when(path: Path, text: str) -> Trace:
    """Read the trace of a recorder that is not closed, once it has a text."""
    for _ in range(600):
        if text in path.read_text():
            return read_trace(path)
        threading.Event().wait(0.1)
    pytest.fail(f"{text} was never written")


# -- LLM ------------------------------------------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
HOW: dict[str, Any] = {"dtype": "float32", "device": "cpu", "host_mem": "2GiB"}


def test_engines_that_replace_each_other_share_a_trace(novels_opt: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with LLM(novels_opt, **HOW, trace=path) as llm:
        assert not path.exists(), "made when there is work"
        first = llm.generate(["The old house"], GREEDY)
        llm.model.shrink()
        llm.model._engine.close()
        second = llm.generate(["The old house"], GREEDY)
    assert first[0].outputs[0].token_ids == second[0].outputs[0].token_ids
    assert [each["name"] for each in read_trace(path).slices[PASSES]] == [f"pass {number}" for number in range(12)]
    assert json.loads(path.read_text())["otherData"] == {"model": str(novels_opt)}
    assert not [thread.name for thread in threading.enumerate() if thread.name == "flexgen-trace"]


def test_passes_are_chosen_by_an_option(novels_opt: Path, tmp_path: Path) -> None:
    with LLM(novels_opt, **HOW, trace=tmp_path / "trace.json", trace_passes="2:4") as llm:
        llm.generate(["The old house"], GREEDY)
    trace = read_trace(tmp_path / "trace.json")
    assert [each["name"] for each in trace.slices[PASSES]] == ["pass 2", "pass 3"]
    assert {each["args"]["pass_index"] for each in trace.slices[COMPUTE] if "micro_batch" in each["args"]} == {2, 3}


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"trace='.*/missing/trace.json': .*the folder .*missing is missing"):
        LLM(tmp_path / "no model", trace=tmp_path / "missing" / "trace.json")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trace_passes": "1:2"}, "trace_passes='1:2' chooses the passes of a trace, and there is none"),
        ({"trace": "t.json", "trace_passes": "5:5"}, "trace_passes must be a range of passes such as '10:20', or None, not the text '5:5'"),
        ({"trace": "t.json", "trace_passes": "5"}, "not the text '5'"),
        ({"trace": "t.json", "trace_passes": "-3:"}, "not the text '-3:'"),
        ({"trace": "a\0b"}, "trace must be the path of a file"),
    ],
)
def test_options_that_mean_nothing(options: Callable[..., Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        options(**given)
    assert said in str(caught.value)


def test_ends_of_ranges_may_be_left_out(options: Callable[..., Any]) -> None:
    for given, kept in (("3:", "3:"), (":7", "0:7"), (" 02 : 4 ", "2:4"), (":", "0:")):
        assert options(trace="t.json", trace_passes=given).trace_passes == kept


@pytest.fixture
def options() -> Callable[..., Any]:
    from flexgen.options import EngineOptions

    return EngineOptions
