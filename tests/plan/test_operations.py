"""Single operations have the prices by which whole passes are planned."""

from __future__ import annotations

import dataclasses

import pytest
from machines import machine_of, steady

from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.machine import Machine
from flexgen.plan.price.operations import OperationPrices

MACHINE = machine_of(
    device="cuda", dense={"float16": [(1, 1e12), (100, 1e14)]}, attention={"float16": 5e13}, elementwise={"float16": 5e11},
    decode_attention={"host": {"float16": ((1.0, steady(4e10)),)}, "device": {"float16": ((1.0, steady(3e11)),)}},
)  # fmt: skip


def seconds(
    kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0, place: str = "device", machine: Machine = MACHINE,
    model: str = "opt-125m",
) -> float:  # fmt: skip
    return OperationPrices(catalogue_spec(model), machine, "float16", place).seconds(kind, flops, nbytes, rows)


def test_products_by_rows_or_by_bytes() -> None:
    assert seconds("product", flops=2e12, rows=1) == pytest.approx(2.0)
    assert seconds("product", flops=2e12, rows=100) == pytest.approx(0.02)
    assert seconds("product", flops=2e12, rows=0.1) == pytest.approx(2.0), "a row is the least"
    assert seconds("product", flops=1.0, nbytes=1e12, rows=100) == pytest.approx(2.0)


def test_the_memory_of_either_place() -> None:
    assert seconds("memory", nbytes=1e12) == pytest.approx(2.0)
    assert seconds("memory", nbytes=3e10, place="host") == pytest.approx(1.0)


def test_attention_of_either_place() -> None:
    assert seconds("steps", flops=1.0, nbytes=3e11) == pytest.approx(1.0)
    assert seconds("steps", flops=1.0, nbytes=4e10, place="host") == pytest.approx(1.0)
    assert seconds("prompts", flops=1e14) == pytest.approx(2.0)


@pytest.mark.parametrize(("measured", "expected"), [(1e11, 10.0), (1e13, 2.0)])
def test_decoding_at_the_rate_of_the_device_but_no_faster_than_its_memory(measured: float, expected: float) -> None:
    machine = dataclasses.replace(MACHINE, device_casts={"mxfp4 float16": steady(measured)})
    assert seconds("decoding", nbytes=1e12, machine=machine, model="gpt-oss-20b") == pytest.approx(expected)
    assert seconds("decoding", nbytes=1e12) == pytest.approx(2.0), "a model of which nothing is decoded"
