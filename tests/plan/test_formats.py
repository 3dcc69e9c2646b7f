"""The choice among formats: how far prices decide, what each costs, and how near the estimates are to what formats store."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from machines import machine_of

from flexgen.base.quantities import GIB
from flexgen.errors import CapacityError, StorageError, UnsupportedModelError
from flexgen.options import EngineOptions
from flexgen.plan.formats import FormatPrice, Formats, best_of
from flexgen.plan.known.machines import limits_of
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.model import ModelSpec
from flexgen.plan.tell.formats import (
    FormatJob,
    conversion_seconds,
    converted,
    in_kv_format,
    jobs_in_formats,
    plan_in_formats,
    specs_of,
)
from flexgen.plan.workload import Workload


def price(weights: str, kv: str, seconds: float | None, **more: Any) -> FormatPrice:
    return FormatPrice(formats=Formats(weights, kv), seconds=seconds, **more)


def test_the_fastest_is_taken() -> None:
    assert best_of([price("auto", "auto", 100), price("int4", "auto", 50), price("int8", "k8v4", 70)]) == Formats("int4", "auto")


def test_about_as_fast_is_not_worth_other_answers() -> None:
    prices = [price("int4", "int4", 100), price("int4", "k8v4", 104), price("int8", "k8v4", 104.9), price("auto", "auto", 105.1)]
    assert best_of(prices) == Formats("int8", "k8v4")
    assert best_of([*prices, price("auto", "auto", 105)]) == Formats("auto", "auto")


def test_a_conversion_counts_once_it_is_needed() -> None:
    stored = price("auto", "auto", 100)
    assert best_of([stored, price("int4", "auto", 30, conversion_seconds=80)]) == stored.formats
    assert best_of([stored, price("int4", "auto", 30, conversion_seconds=40)]) == Formats("int4", "auto")


def test_requests_that_never_fit_make_no_plan_fast() -> None:
    assert best_of([price("auto", "auto", 10, num_refused=5), price("auto", "k8v4", 100)]) == Formats("auto", "k8v4")


def test_what_is_not_possible_is_not_taken() -> None:
    assert best_of([price("auto", "auto", 10), price("int4", "auto", None, problem="no room")]) == Formats("auto", "auto")


def test_formats_in_words() -> None:
    assert [str(Formats(*each)) for each in (("auto", "auto"), ("int4", "auto"), ("auto", "k8v4"), ("int8", "int4"))] == [
        "weights as stored", "weights in int4", "KV in k8v4", "weights in int8 and KV in int4",
    ]  # fmt: skip


def test_every_combination_is_described() -> None:
    own, asked = catalogue_spec("opt-125m"), list[tuple[str, str]]()

    def describe(options: EngineOptions) -> ModelSpec:
        asked.append((options.weight_format, options.kv_format))
        if options.weight_format == "int8":
            raise UnsupportedModelError("no weights can be rounded")
        spec = own if options.weight_format == "auto" else converted(own, options.weight_format)
        return spec if options.kv_format == "auto" else in_kv_format(spec, options.kv_format)

    stored, found = specs_of(EngineOptions(allow_formats="int4,int8,k8v4"), describe)
    assert stored == own
    assert asked == [("auto", "auto"), ("auto", "k8v4"), ("int8", "auto"), ("int4", "auto")]
    assert {(each.weights, each.kv) for each in found} == {(weights, kv) for weights in ("auto", "int8", "int4") for kv in ("auto", "k8v4")}
    assert found[Formats("int4", "k8v4")] == in_kv_format(converted(own, "int4"), "k8v4")
    assert isinstance(found[Formats("int8", "k8v4")], UnsupportedModelError)


def job_of(spec: ModelSpec, host_bytes: int) -> FormatJob:
    machine = machine_of()
    options = EngineOptions(device="cpu", dtype=spec.dtype, schedule="zigzag", host_mem=str(host_bytes))
    limits = limits_of(machine, options)
    workload = Workload(prompt_lens=(32,) * 8, output_lens=(8,) * 8)
    arguments: dict[str, Any] = {"options": options, "workload": workload}
    return FormatJob(arguments=arguments | {"spec": spec, "machine": machine, "limits": limits, "process_bytes": GIB // 2})


def test_a_plan_says_what_every_format_would_take() -> None:
    spec = dataclasses.replace(catalogue_spec("opt-125m"), dtype="bfloat16")
    problem = FormatJob(problem=UnsupportedModelError("no weights can be rounded"))
    plan = plan_in_formats({Formats("auto", "auto"): job_of(spec, 2 * GIB), Formats("int8", "auto"): problem})
    assert plan.formats is not None
    assert plan.formats.chosen == Formats("auto", "auto")
    taken, refused = plan.formats.prices
    assert taken.seconds == plan.forecast.seconds
    assert (refused.seconds, refused.problem) == (None, "no weights can be rounded")


def test_what_is_in_the_way_of_some_formats_leaves_the_others() -> None:
    """A model that cannot be converted, no room, and a cache that is damaged."""
    spec = dataclasses.replace(catalogue_spec("opt-125m"), dtype="bfloat16")
    problems = {"int8": UnsupportedModelError("no weights can be rounded"), "int4": StorageError("the cache is damaged")}

    def arguments(formats: Formats, spec: ModelSpec) -> Any:
        if formats.kv != "auto":
            raise CapacityError("there is no room")
        return job_of(spec, 2 * GIB).arguments

    def left(formats: Formats, spec: ModelSpec) -> float:
        if formats.weights != "auto":
            raise problems[formats.weights]
        return 0.0

    asked = {
        Formats("auto", "auto"): spec,
        Formats("auto", "k8v4"): spec,
        Formats("int4", "auto"): spec,
        Formats("int8", "auto"): problems["int8"],
    }
    plan = plan_in_formats(jobs_in_formats(spec, asked, arguments, left))
    assert plan.formats is not None
    assert plan.formats.chosen == Formats("auto", "auto")
    assert {str(price.formats): price.problem for price in plan.formats.prices} == {
        "weights as stored": None, "KV in k8v4": "there is no room", "weights in int4": "the cache is damaged",
        "weights in int8": "no weights can be rounded",
    }  # fmt: skip


def test_a_part_of_a_conversion_takes_its_part_of_the_time() -> None:
    spec = dataclasses.replace(catalogue_spec("opt-125m"), dtype="bfloat16")
    jobs = jobs_in_formats(spec, {Formats("int4", "auto"): spec}, lambda _, spec: job_of(spec, 2 * GIB).arguments, lambda *_: 0.25)
    (job,) = jobs.values()
    assert job.conversion_seconds == 0.25 * conversion_seconds(spec, spec, job.arguments["machine"])


def test_where_nothing_fits_the_stored_formats_say_what_is_missing() -> None:
    spec = dataclasses.replace(catalogue_spec("opt-125m"), dtype="bfloat16")
    with pytest.raises(CapacityError, match="missing"):
        plan_in_formats({Formats("auto", "auto"): job_of(spec, GIB // 2), Formats("int8", "auto"): job_of(spec, GIB // 2)})


def test_a_conversion_reads_rounds_and_writes() -> None:
    own = catalogue_spec("opt-125m")
    four, machine = converted(own, "int4"), machine_of(disk_read=1e9, disk_write=0.5e9, cores=2)
    seconds = conversion_seconds(own, four, machine)
    assert seconds > own.checkpoint_bytes / 1e9 + four.checkpoint_bytes / 0.5e9
    assert conversion_seconds(own, four, machine_of(disk_read=1e9, disk_write=0.5e9, cores=20)) < seconds


def test_a_conversion_takes_as_long_whatever_products_are_computed_in() -> None:
    own, machine = catalogue_spec("opt-125m"), machine_of()
    in_int8 = tuple(
        unit if unit.head else dataclasses.replace(unit, decoded_bytes=unit.decoded_bytes // 2, int8_flops_per_token=unit.flops_per_token)
        for unit in own.units
    )
    assert own.dtype == "float16"
    seconds = (conversion_seconds(dataclasses.replace(own, units=units), own, machine) for units in (own.units, in_int8))
    assert next(seconds) == pytest.approx(next(seconds), rel=0.01)


def test_estimates_are_near_what_formats_store() -> None:
    import torch

    from flexgen.session.shipped import described

    own = catalogue_spec("opt-125m")
    sparse = described("opt-125m", torch.float16, sparse=0.1)
    for name in ("int8", "k8v4", "int4"):
        exact = described("opt-125m", torch.float16, kv=name, sparse=0.1)
        about = in_kv_format(sparse, name)
        values = (each.kv_groups[0].value_bytes_per_token for each in (about, exact))
        assert next(values) == pytest.approx(next(values), rel=0.02)
        assert about.kv_bytes_per_token == pytest.approx(exact.kv_bytes_per_token, rel=0.02)
        assert (about.tail_bytes_per_token, about.kv_format) == (exact.tail_bytes_per_token, exact.kv_format)
    for name in ("int8", "int4"):
        exact = described("opt-125m", torch.float16, weight_format=name)
        assert converted(own, name).streamed_bytes == pytest.approx(exact.streamed_bytes, rel=0.05)
