"""Machines with numbers of their own choice, for tests."""

from flexgen.base.quantities import GIB
from flexgen.plan.machine import DiskRequest, Machine, Overheads, Rate

OVERHEADS = Overheads(per_pass=5e-3, per_sequence=1e-5, per_unit=3e-4, per_layer_and_micro_batch=3e-4, per_gathered_row=2e-5)


def steady(rate):
    """A rate that is always the same."""
    return Rate(rate, rate)


def machine_of(*, dense=None, **changes):
    """Two cores, a link and a disk; `dense` is dtype -> [(rows, FLOP/s)], other rates are plain numbers."""
    dense = dense or {"bfloat16": [(64, 5.6e11), (256, 8e11), (1024, 8e11)], "float32": [(64, 1e11), (512, 2e11)]}
    values = {
        "name": "test",
        "device": "cpu",
        "origin": "datasheet",
        "date": "2026-01-01",
        "cores": 2,
        "host_bytes": 24 * GIB,
        "device_bytes": 0,
        "disk_bytes": 100 * GIB,
        "disk_read": 2e9,
        "disk_write": 1e9,
        "disk_core_seconds_per_byte": 7e-12,
        "disk_request": DiskRequest(seconds=4e-5, core_seconds=2e-5),
        "disk_slowdown": 1.0,
        "compute_slowdown": 1.0,
        "host_memory": 30e9,
        "host_to_device": 20e9,
        "device_to_host": 10e9,
        "attention": {"bfloat16": 5e10},
        "decode_attention": {"host": {"bfloat16": ((1.0, steady(9e9)), (8.0, steady(5e9)))}},
        "elementwise": {"bfloat16": 30e9},
        "casts": {"float16 bfloat16": 8e9},
        "overheads": OVERHEADS,
        "dense": {dtype: tuple((rows, steady(rate)) for rows, rate in points) for dtype, points in dense.items()},
    }
    values |= changes
    for name in ("disk_read", "disk_write", "host_memory", "host_to_device", "device_to_host"):
        if isinstance(values[name], (int, float)):
            values[name] = steady(values[name])
    for name in ("attention", "elementwise", "casts"):
        values[name] = {key: steady(rate) if isinstance(rate, (int, float)) else rate for key, rate in values[name].items()}
    return Machine(**values)
