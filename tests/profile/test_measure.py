import dataclasses
import json
import os

import pytest
import torch
from machines import machine_of

from flexgen.base.quantities import KIB, MIB
from flexgen.errors import OptionError
from flexgen.formats.base import RANDOM_DEVIATION
from flexgen.formats.random_numbers import sampled_parts
from flexgen.formats.table import COMMON_CONFIGS
from flexgen.llm import LLM
from flexgen.options import KV_FORMATS
from flexgen.plan.machine import Rate, int8_name, read_machine
from flexgen.profile import compute, decoding, disk, int8, kept, overheads, sparse, timing
from flexgen.profile import measure as module
from flexgen.profile.kept import cached_machine, machine_key
from flexgen.profile.measure import measure
from flexgen.profile.timing import median_seconds
from flexgen.request import SamplingParams

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@pytest.fixture
def small(monkeypatch):
    """Measures little, so that it is quick."""
    monkeypatch.setattr(compute, "DENSE_ROWS", (16, 64))
    monkeypatch.setattr(compute, "DENSE_SHAPES", ((256, 256), (512, 128)))
    monkeypatch.setattr(disk, "READ_THREADS", (1, 2))
    monkeypatch.setattr(disk, "READ_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(disk, "LEAST_SUSTAINED_SECONDS", 0.05)
    monkeypatch.setattr(disk, "MOST_SUSTAINED_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(disk, "READ_SIZES", (256 * KIB, 1 * MIB))
    monkeypatch.setattr(disk, "FILE_BYTES", (4 * MIB, 8 * MIB))
    monkeypatch.setattr(overheads, "NUM_LAYERS", 2)
    monkeypatch.setattr(overheads, "NUM_SEQUENCES", 8)
    monkeypatch.setattr(overheads, "LAYER_WIDTH", 256)
    monkeypatch.setattr(overheads, "LAYER_TOKENS", 128)
    monkeypatch.setattr(overheads, "LAYER_PROMPT", 64)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_rate_is_found(small, tmp_path, dtype):
    machine = measure("cpu", [dtype], tmp_path, quick=True, max_bytes=16 * MIB)
    assert machine.cores == len(os.sched_getaffinity(0))
    rates = [machine.disk_read, machine.disk_write, machine.host_memory, machine.attention[dtype], machine.elementwise[dtype]]
    rates += [rate for _, rate in machine.dense[dtype]] + [rate for _, rate in machine.decode_attention["host"][dtype]]
    for rate in [*rates, *machine.casts.values()]:
        assert rate.best >= rate.typical > 1e6
        assert rate.spread >= 0
    assert (machine.host_to_device, machine.device_to_host) == (None, None)
    assert [rows for rows, _ in machine.dense[dtype]] == [16, 64]
    assert [round(flops) for flops, _ in machine.decode_attention["host"][dtype]] == [2 * each // BYTES[dtype] for each in (1, 4, 8)]
    formats = {f"{dtype} {kv}" for kv in KV_FORMATS if kv != "auto" and dtype != "float64"}
    assert set(machine.decode_attention["host"]) == {dtype, *formats}
    for name in formats:
        assert [rate.typical > 1e6 for _, rate in machine.decode_attention["host"][name]] == [True] * 3
    assert {name.split()[1] for name in machine.casts} == {dtype}
    assert 0 < machine.disk_core_seconds_per_byte < 1e-8
    assert min(machine.disk_slowdown, machine.compute_slowdown) >= 1
    assert all(seconds >= 0 for seconds in dataclasses.astuple(machine.overheads))
    assert machine.overheads.per_pass + machine.overheads.per_layer_and_micro_batch > 0
    assert not list(tmp_path.iterdir()), "what was measured with was left behind"
    assert read_machine(machine.to_json()) == machine


def test_several_dtypes_at_once(small, tmp_path):
    machine = measure("cpu", ["bfloat16", "float32"], tmp_path, quick=True, max_bytes=8 * MIB)
    assert set(machine.dense) == set(machine.attention) == {"bfloat16", "float32"}


def test_a_simulated_device_has_links(small, tmp_path):
    machine = measure("sim", ["float32"], tmp_path, quick=True, max_bytes=8 * MIB)
    assert machine.host_to_device.best > 1e6
    assert machine.device_to_host.best > 1e6


def test_a_rate_is_the_median_and_the_best_of_its_rounds():
    assert Rate.of([4.0, 1.0, 2.0]) == Rate(4.0, 2.0, 1.5)
    assert Rate.of([3.0, 1.0]) == Rate(3.0, 2.0, 1.0)
    assert Rate.of([5.0]) == Rate(5.0, 5.0, 0.0)


def test_an_unknown_dtype(tmp_path):
    with pytest.raises(OptionError, match="is not a dtype"):
        measure("cpu", ["float12"], tmp_path)


def test_a_file_system_without_direct_io(small, tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    assert measure("cpu", ["float32"], tmp_path, quick=True, max_bytes=8 * MIB).disk_read.typical > 1e6


def test_a_folder_that_cannot_be_written_to(small, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(tmp_path))
    with caplog.at_level("WARNING"):
        measure("cpu", ["float32"], tmp_path / "model", quick=True, max_bytes=8 * MIB)
    assert "is measured instead" in caplog.text


def test_plain_attention_is_attention():
    q, k, v = (torch.randn(2, 70, 16, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    torch.testing.assert_close(compute.plain_attention(q, k, v, block=32), expected)


def test_buffers_stay_below_what_is_allowed(monkeypatch):
    assert compute.shrunken((4096, 4096), 4, 128 * MIB) == (4096, 4096)
    out, features = compute.shrunken((8192, 3072), 4, 16 * MIB)
    assert out * features * 4 <= 16 * MIB


class Clock:
    """The time is what the calls say that they took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


def test_the_first_of_several_calls_is_not_counted(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def call(*seconds):
        """Takes the first time at the first call, and so on."""

        def run():
            clock.seconds += seconds[len(calls)]
            calls.append(None)

        calls.clear()
        return run

    assert median_seconds(call(0.5), 0.25) == 0.5
    assert len(calls) == 1, "a slow call is not repeated"
    assert median_seconds(call(4.0, 1.0, 2.0, 0.5), 8.0) == 1.0
    assert len(calls) == 4
    assert median_seconds(call(4.0, 1.0, 2.0), 6.0) == 1.5
    assert len(calls) == 3, "the time is over"


# The cache


def test_a_model_is_opened_with_rates_that_are_measured_and_kept(small, novels_opt, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with LLM(novels_opt, dtype="float32", device="cpu", host_mem="2GiB") as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1))
        machine = llm.report().machine
    (file,) = (tmp_path / "flexgen").iterdir()
    assert json.loads(file.read_text())["machine"] == machine
    assert (machine["origin"], [rows for rows, _ in machine["dense"]["float32"]]) == ("measured", [16, 64])


@pytest.fixture
def counted(monkeypatch):
    """How often the machine was measured."""
    calls = []

    def counting(device, dtypes, folder, **_):
        calls.append((device, dtypes, folder))
        return machine_of(device=device, disk_read=1e9 + len(calls), dense={dtype: [(64, 5e11), (128, 1e12)] for dtype in dtypes})

    monkeypatch.setattr(module, "measure", counting)
    return calls


def cached(tmp_path, device="cpu", dtype="float32", *, quick=True, **named):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    return cached_machine(device, dtype, folder, cache_dir=tmp_path / "cache", quick=quick, max_bytes=8 * MIB, **named)


def test_a_machine_is_measured_once(counted, tmp_path):
    first = cached(tmp_path)
    assert cached(tmp_path) == first
    assert len(counted) == 1
    cached(tmp_path, again=True)
    cached(tmp_path, dtype="float64")
    cached(tmp_path, device="sim")
    assert len(counted) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_formats_are_measured_when_a_model_first_needs_them(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FORMAT_SECONDS", 0.01)
    first = cached(tmp_path, quick=False)
    again = cached(tmp_path, formats=("mxfp4", "float16", "unknown"))  # one of them is a format, not a cast, and known
    assert again.casts.keys() - first.casts.keys() == {"mxfp4 float32"}
    assert again.casts["mxfp4 float32"].typical > 1e5
    assert cached(tmp_path, quick=False, formats=("mxfp4",)) == cached(tmp_path) == again, "it is kept, as thorough as it was"
    assert len(counted) == 1, "the rest is not measured again"


def test_every_number_of_rows_is_measured_however_little_time_there_is(small):
    curve = compute.dense_rates(torch.device("cpu"), torch.float32, 16 * MIB, 0.0)
    assert [rows for rows, _ in curve] == [16, 64]


def test_products_in_int8_are_measured_when_a_model_first_needs_them(small, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "PRODUCTS_SECONDS", 0.0)
    monkeypatch.setattr(int8, "BUSY_SECONDS", 0.01)
    first = cached(tmp_path, quick=False)
    again = cached(tmp_path, quick=False, formats=(int8_name("mxfp4"), int8_name("float16")))
    name = int8_name("float32")
    assert again.casts.keys() - first.casts.keys() == {"mxfp4 float32", name}
    assert again.dense.keys() - first.dense.keys() == {name}
    assert [rows for rows, _ in again.dense[name]] == [16, 64]
    assert min(rate.typical for rate in [again.casts[name], *(rate for _, rate in again.dense[name])]) > 1e6
    assert cached(tmp_path, quick=False, formats=(int8_name("float16"),)) == cached(tmp_path) == again
    assert len(counted) == 1, "the rest is not measured again"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sparse_attention_is_measured_when_a_model_first_needs_it(counted, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(sparse, "FORMAT_SECONDS", 0.01)
    plain = cached(tmp_path, dtype=dtype)
    first, again = (cached(tmp_path, dtype=dtype, sparse=share) for share in (0.25, 0.1))
    formats = ["", *(f" {kv}" for kv in KV_FORMATS if kv != "auto" and dtype != "float64")]
    for machine, before, share in ((first, plain, 0.25), (again, first, 0.1)):
        curves = {name: machine.decode_attention["host"][name] for name in machine.decode_attention["host"] if name.endswith(f" {share}")}
        assert machine.decode_attention["host"].keys() - before.decode_attention["host"].keys() == curves.keys()
        assert curves.keys() == {f"{dtype}{kv} sparse {share}" for kv in formats}
        assert [round(flops) for flops, _ in curves[f"{dtype} sparse {share}"]] == [2 * each // BYTES[dtype] for each in (1, 4, 8)]
        assert min(rate.typical for curve in curves.values() for _, rate in curve) > 1e6
    assert cached(tmp_path, dtype=dtype, sparse=0.25) == cached(tmp_path, dtype=dtype) == again, "it is kept"
    assert len(counted) == 1, "the rest is not measured again"


@pytest.mark.parametrize("name", COMMON_CONFIGS)
def test_examples_are_of_the_format_that_they_stand_for(name):
    number_format, encoding = decoding.example(name, 1 << 19)
    assert encoding.format.name == name
    decoded = torch.empty(encoding.shape)
    encoding.format.decode(sampled_parts(number_format, encoding), 0, decoded)
    assert decoded.isfinite().all()
    assert decoded.std().item() == pytest.approx(RANDOM_DEVIATION, rel=0.5)
    assert abs(decoded.mean().item()) < 0.2 * RANDOM_DEVIATION


def test_a_disturbed_measurement_warns_and_does_not_replace_a_better_one(tmp_path, monkeypatch, caplog):
    found = [machine_of(disk_read=2e9, host_memory=20e9), machine_of(disk_read=1e9, host_memory=40e9, busy_cores=1.5)]
    monkeypatch.setattr(module, "measure", lambda *_, **__: found.pop(0))
    cached(tmp_path)
    assert not caplog.records
    again = cached(tmp_path, again=True)
    assert (again.disk_read.typical, again.host_memory.typical, again.busy_cores) == (2e9, 40e9, 0.0)
    assert cached(tmp_path) == again
    assert "other programs kept 1.5 cores busy while this machine was measured" in caplog.text


def test_a_quick_measurement_does_not_serve_for_a_thorough_one(counted, tmp_path):
    cached(tmp_path)
    thorough = cached(tmp_path, quick=False)
    assert cached(tmp_path) == cached(tmp_path, quick=False) == thorough
    assert len(counted) == 2


@pytest.mark.parametrize("change", ["host", "processor", "cores", "torch"])
def test_another_machine_is_measured_again(counted, tmp_path, monkeypatch, change):
    cached(tmp_path)
    key = machine_key("cpu", "float32", tmp_path)
    monkeypatch.setattr(kept, "machine_key", lambda *_: key | {change: "another"})
    cached(tmp_path)
    assert len(counted) == 2


def test_the_key_names_what_matters(tmp_path):
    key = machine_key("cpu", "float32", tmp_path)
    assert {"host", "processor", "cores", "file_system", "torch", "dtype", "device"} <= set(key)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": 1, "machine": {}}', "not json"])
def test_a_spoiled_cache_is_measured_again(counted, tmp_path, text):
    first = cached(tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(text)
    cached(tmp_path)
    assert len(counted) == 2
    assert json.loads(file.read_text())["machine"]["name"] == first.name


def test_a_cache_that_cannot_be_written_is_done_without(counted, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with caplog.at_level("WARNING"):
        assert cached(tmp_path).cores > 0
    assert "are not kept" in caplog.text
