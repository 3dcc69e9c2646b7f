"""Machines described by a few figures."""

from __future__ import annotations

import json

import pytest

from flexgen.errors import OptionError
from flexgen.plan.known.machines import find_machine
from flexgen.plan.machine import Machine, read_machine

CPU = {"host_bytes": "64GB", "host_memory": 80e9, "disk_read": 7e9, "flops": 2e12}
GPU = CPU | {"device_bytes": "24GiB", "device_memory": 1008e9, "host_to_device": "32GB/s", "flops": {"bfloat16": 165e12, "float32": 82e12}}


@pytest.fixture
def find(tmp_path):
    def read(fields: object) -> Machine:
        (tmp_path / "my-box.json").write_text(json.dumps(fields))
        return find_machine(str(tmp_path / "my-box.json"))

    return read


def test_a_box_without_accelerator(find):
    machine = find(CPU)
    assert (machine.name, machine.device, machine.origin) == ("my-box", "cpu", "datasheet")
    assert (machine.host_bytes, machine.device_bytes, machine.disk_bytes, machine.cores) == (64 * 10**9, 0, 10**12, 16)
    assert (machine.host_to_device, machine.device_to_host) == (None, None)
    assert (machine.disk_read.best, machine.disk_write.best, machine.host_memory.best) == (7e9, 3.5e9, 80e9)
    assert machine.dense_flops("bfloat16") == machine.dense_flops("float16") == 2e12 == 2 * machine.dense_flops("float32")
    assert set(machine.decode_attention) == {"host"}
    assert machine.overheads.per_operation == 0, "what products cost contains their calls"
    assert read_machine(machine.to_json()) == machine


def test_a_box_with_accelerator(find):
    machine = find(GPU | {"name": "mine", "cores": 32, "disk_write": "5GB/s", "disk_bytes": "2TB"})
    assert (machine.name, machine.device, machine.cores) == ("mine", "cuda", 32)
    assert (machine.device_bytes, machine.disk_bytes, machine.disk_write.best) == (24 << 30, 2 * 10**12, 5e9)
    assert machine.host_to_device == machine.device_to_host
    assert set(machine.dense) == {"bfloat16", "float32"}
    assert set(machine.decode_attention) == {"host", "device"}
    assert 1e-6 < machine.overheads.per_operation < machine.overheads.per_layer_and_micro_batch / 40
    assert find(GPU | {"device_to_host": 20e9}).device_to_host.best == 20e9
    assert read_machine(machine.to_json()) == machine


def test_it_has_the_numbers_of_the_shipped_ones(find):
    shipped = find_machine("rtx4090-64gb")
    fields = GPU | {
        "source": "a data sheet",
        "device_bytes": 24 * 10**9,
        "disk_write": 5e9,
        "disk_bytes": "2TB",
        "flops": {"bfloat16": 165e12},
    }
    described = find(fields)
    assert described.source == "a data sheet"
    for name in ("disk_read", "disk_write", "host_memory", "host_to_device", "overheads", "device_bytes", "host_bytes"):
        assert getattr(described, name) == getattr(shipped, name)
    assert described.dense["bfloat16"] == shipped.dense["bfloat16"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "missing host_bytes, host_memory, disk_read, flops; a description needs at least"),
        ({key: value for key, value in CPU.items() if key != "flops"}, "of a machine: missing flops"),
        (CPU | {"device_bytes": "8GB"}, "of a machine: missing device_memory, host_to_device"),
        (CPU | {"disk_raed": 1e9}, "unknown field 'disk_raed'; did you mean disk_read?"),
        (CPU | {"colour": "grey"}, "unknown field 'colour'; known: host_bytes, "),
        (CPU | {"host_bytes": "lots"}, "host_bytes 'lots' is not a size"),
        (CPU | {"host_bytes": 0}, "host_bytes is 0: it is in bytes, and at least 16.0 MiB"),
        (CPU | {"host_bytes": 64}, "host_bytes is 64: it is in bytes"),
        (CPU | {"disk_read": 7}, "disk_read is 7: it is per second, and at least 1e+06"),
        (CPU | {"flops": 165}, "flops is 165: it is per second"),
        (CPU | {"disk_read": "fast/s"}, "disk_read 'fast' is not a size"),
        (CPU | {"disk_read": "7GB"}, 'disk_read is "7GB": it must be a number'),
        (CPU | {"disk_read": -1}, "disk_read is -1: it must be a number of at least 0"),
        (CPU | {"host_memory": None}, "host_memory is null"),
        (CPU | {"host_memory": True}, "host_memory is true"),
        (CPU | {"flops": float("inf")}, "flops is Infinity"),
        (CPU | {"flops": {}}, "flops is {}: a rate is needed"),
        (CPU | {"flops": {"int8": 1e12}}, 'flops is "int8": known dtypes: bfloat16'),
        (CPU | {"cores": 1.5}, "cores is 1.5: a whole number"),
        (CPU | {"name": 7}, "name is 7: text"),
        ([CPU], "it is not a JSON object"),
    ],
)
def test_a_description_that_cannot_be_meant(find, fields, message):
    with pytest.raises(OptionError) as caught:
        find(fields)
    assert message in str(caught.value)
    assert "my-box.json" in str(caught.value)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "box.json").write_text("[" * 100_000)
    with pytest.raises(OptionError, match="this is not the description of a machine"):
        find_machine(str(tmp_path / "box.json"))
