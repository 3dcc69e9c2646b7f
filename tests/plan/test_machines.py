import dataclasses
import json

import pytest

from flexgen.base.quantities import GIB
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.plan.known.machines import MACHINES, beside_checkpoint, find_machine, limits_of
from flexgen.plan.machine import CUDA_BYTES, Rate, read_machine


@pytest.mark.parametrize("name", MACHINES)
def test_a_shipped_machine_is_whole(name):
    machine = find_machine(name)
    assert machine.name == name
    assert machine.origin in ("datasheet", "paper")
    assert read_machine(machine.to_json()) == machine
    for dtype, curve in machine.dense.items():
        rows, rates = zip(*curve, strict=True)
        assert list(rows) == sorted(rows)
        assert all(rate.best >= rate.typical > 0 for rate in rates)
        assert [rate.typical for rate in rates] == sorted(rate.typical for rate in rates), f"{dtype}: more rows are never slower"
    assert machine.host_to_device.typical < machine.host_memory.typical


# As NVIDIA prints them, dense and with float32 sums: FLOP/s in 16 bits and in float32, memory in bytes/s; and the link one way.
PRINTED = {
    "t4-64gb": (65e12, 8.1e12, 300e9, 16e9),
    "l4-64gb": (242e12 / 2, 30.3e12, 300e9, 32e9),
    "a10g-64gb": (140e12 / 2, 35e12, 600e9, 32e9),
    "rtx3060-12gb-32gb": (2 * 12.74e12, 12.7e12, 360e9, 32e9),
    "rtx3090-64gb": (142e12 / 2, 35.6e12, 936e9, 32e9),
    "rtx4090-64gb": (330.3e12 / 2, 82.6e12, 1008e9, 32e9),
    "rtx5090-128gb": (419e12 / 2, 104.8e12, 1792e9, 64e9),
    "16gb-gpu-64gb": (2 * 22.06e12, 22e12, 288e9, 16e9),
    "a100-80gb-512gb": (312e12, 19.5e12, 2039e9, 32e9),
    "h100-80gb-512gb": (1979e12 / 2, 67e12, 3350e9, 64e9),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_figures_of_data_sheets(name):
    machine, (halves, wide, memory, link) = find_machine(name), PRINTED[name]
    assert machine.origin == "datasheet"
    assert "PCIe" in machine.source
    assert machine.dense_flops("float16") == pytest.approx(halves, rel=0.01)
    assert machine.dense_flops("float32") == pytest.approx(wide, rel=0.01)
    assert machine.dense["float16"][0][1].best == memory  # one row reads a number of two bytes for two FLOPs
    assert (machine.host_to_device.best, machine.host_to_device.typical) == (link, pytest.approx(0.85 * link))


def test_all_machines_of_data_sheets_are_compared():
    assert {"t4-gcp", *PRINTED} == set(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_a_t4_has_no_rates_for_bfloat16(name):
    machine = find_machine(name)
    rates = [machine.dense, machine.attention, machine.elementwise, *machine.decode_attention.values()]
    assert all(("bfloat16" in each) == (not name.startswith("t4-")) for each in rates)
    assert machine.source


def test_the_box_of_the_paper():
    machine = find_machine("t4-gcp")
    assert machine.origin == "paper"
    assert (machine.disk_read.typical, machine.disk_write.typical, machine.host_to_device.typical) == (2e9, 1e9, 12e9)
    assert machine.dense["float16"][-1][1].typical == 21.24e12


def test_a_machine_from_a_file(tmp_path, make_machine):
    machine = make_machine(name="another")
    (tmp_path / "box.json").write_text(machine.to_json())
    assert find_machine(str(tmp_path / "box.json")) == machine


def test_an_unknown_machine():
    with pytest.raises(OptionError, match=r"neither a file nor a known machine; did you mean t4-gcp\?"):
        find_machine("t4-gpc")
    with pytest.raises(OptionError, match="known: t4-gcp, "):
        find_machine("abacus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("cores"), "missing keys: cores"),
        (lambda fields: fields.update(colour="grey"), "unknown keys: colour"),
        (lambda fields: fields["overheads"].pop("per_pass"), "overheads: missing keys: per_pass"),
        (lambda fields: fields["overheads"].update(per_pass=-1), "overheads is .*not negative"),
        (lambda fields: fields.update(disk_read=3), "disk_read is 3"),
        (lambda fields: fields.update(disk_read=None), "disk_read is null"),
        (lambda fields: fields["disk_read"].update(typical=0), "disk_read is .*more than 0"),
        (lambda fields: fields["disk_read"].update(typical=-2e9), "disk_read is .*not negative"),
        (lambda fields: fields["host_memory"].update(best=float("nan")), "host_memory is .*not negative"),
        (lambda fields: fields.update(host_bytes="lots"), 'host_bytes is "lots"'),
        (lambda fields: fields.update(cores=0), "cores is 0: more than 0"),
        (lambda fields: fields.update(cores=1.5), "cores is 1.5: a whole number"),
        (lambda fields: fields.update(device="tpu"), "device is .*known: cpu, cuda, sim"),
        (lambda fields: fields["dense"].update(bfloat16=[]), "dense is .*a curve needs a point"),
        (lambda fields: fields.update(origin="hearsay"), "origin is .*known: measured"),
    ],
)
def test_a_spoiled_machine(make_machine, change, message):
    fields = json.loads(make_machine().to_json())
    change(fields)
    with pytest.raises(OptionError, match=message):
        read_machine(json.dumps(fields))


def test_budgets_of_a_machine_that_is_not_this_one(make_machine):
    machine = make_machine(host_bytes=64 * GIB, device="cuda", device_bytes=16 * GIB, disk_bytes=100 * GIB)
    limits = limits_of(machine, EngineOptions())
    assert (limits.host_bytes, limits.device_bytes, limits.disk_bytes) == (int(0.8 * 64 * GIB), int(0.9 * 16 * GIB), 80 * GIB)
    limits = limits_of(machine, EngineOptions(host_mem="50%", device_mem="4GiB", disk="0GiB"))
    assert (limits.host_bytes, limits.device_bytes, limits.disk_bytes) == (32 * GIB, 4 * GIB, 0)
    with pytest.raises(OptionError, match="host_mem='65GiB' is more than the machine has"):
        limits_of(machine, EngineOptions(host_mem="65GiB"))
    with pytest.raises(OptionError, match="device='cpu': machine 'test' computes on 'cuda'"):
        limits_of(machine, EngineOptions(device="cpu"))
    with pytest.raises(OptionError, match="has no device tier"):
        limits_of(make_machine(), EngineOptions(device_mem="1GiB"))


def test_cuda_takes_its_part_of_a_device(make_machine):
    machine = make_machine(device="cuda", device_bytes=16 * GIB)
    limits = limits_of(machine, EngineOptions(device_mem="4GiB"))
    assert (limits.device_bytes, limits.device_overhead_bytes) == (4 * GIB, CUDA_BYTES)
    assert limits_of(make_machine(), EngineOptions()).device_overhead_bytes == 0
    with pytest.raises(OptionError, match=r"device_mem='300MiB' \(300.0 MiB\) has no room for a model: CUDA's context and libraries alone"):
        limits_of(machine, EngineOptions(device_mem="300MiB"))


def test_a_checkpoint_takes_its_part_of_the_disk():
    machine = find_machine("16gb-gpu-64gb")
    limits = limits_of(machine, EngineOptions())
    assert beside_checkpoint(limits, 500 * 10**9, EngineOptions()).disk_bytes == int(0.8 * (machine.disk_bytes - 500 * 10**9))
    assert beside_checkpoint(limits, 2 * machine.disk_bytes, EngineOptions()).disk_bytes == 0
    asked = EngineOptions(disk="100GiB")
    assert beside_checkpoint(limits_of(machine, asked), 500 * 10**9, asked).disk_bytes == 100 * GIB


def test_the_best_rate_over_all_rows(make_machine):
    machine = make_machine()
    assert machine.dense_flops("bfloat16") == 8e11
    faster = dataclasses.replace(machine, dense={"bfloat16": ((64.0, Rate(9e11, 1e11)), (128.0, Rate(8e11, 8e11)))})
    assert faster.dense_flops("bfloat16") == 9e11
