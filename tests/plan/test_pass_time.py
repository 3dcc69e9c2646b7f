import dataclasses

import numpy as np
import pytest

from flexgen.errors import OptionError
from flexgen.plan.machine import LAYER_OPERATIONS, DiskRequest, Overheads, Rate, int8_name
from flexgen.plan.model import KVGroupSpec, UnitSpec
from flexgen.plan.play.simulate import simulate
from flexgen.plan.price.pass_time import (
    DECODING_OF_CASTS,
    LOGIT_BYTES,
    PASSES_PER_LOGIT,
    Expectation,
    decoding_rate,
    elementwise_bytes,
    estimated_on_device,
    rate_at,
)
from flexgen.plan.price.work import PassWork
from flexgen.plan.workload import Workload

NOTHING = Overheads(per_pass=0, per_sequence=0, per_unit=0, per_layer_and_micro_batch=0, per_gathered_row=0)


def test_rates_between_rows_are_interpolated_and_few_rows_cost_as_much_as_the_fewest():
    curve = ((64.0, Rate(2.0, 1.0)), (128.0, Rate(4.0, 3.0)))
    np.testing.assert_allclose(rate_at(curve, np.array([32.0, 64.0, 96.0, 128.0, 1000.0])), [0.5, 1.0, 2.0, 3.0, 3.0])


def test_each_part_of_a_pass_by_hand(make_spec, make_machine, make_policy):
    spec = make_spec(hidden_size=100, intermediate_size=1000)  # three layers of 1,000 bytes, 2,000 FLOPs per token; a head of 500
    machine = make_machine(
        dense={"bfloat16": [(1, 1e6)]},
        attention={"bfloat16": 1e5},
        elementwise={"bfloat16": 1e9},
        casts={"float16 bfloat16": 1e4},
        disk_read=1e3,
        disk_write=5e2,
        disk_core_seconds_per_byte=1e-3,
        disk_request=DiskRequest(seconds=0.02, core_seconds=0.04),
        host_memory=1e5,
        overheads=Overheads(per_pass=10.0, per_sequence=0.5, per_unit=0.25, per_layer_and_micro_batch=0.125, per_gathered_row=0.01),
    )
    work = PassWork(
        disk_read_bytes=2000, disk_write_bytes=1000, attention_flops=3e5, host_step_flops=9e9, host_step_bytes=18e9, decoded_bytes=5e4,
        host_memory_bytes=1e6, num_tokens=8, num_sequences=6, num_sampled=4, num_scored=10, num_micro_batches=2, num_streamed_units=3,
        num_disk_requests=50,
    )  # fmt: skip
    expectation = Expectation(spec, machine, "bfloat16")
    resources = expectation.resources(work, make_policy(embedding_resident=False))
    compute = (
        8 * 6000 / 1e6
        + (4 + 10) * 500 / 1e6
        + 10 * spec.vocab_size * PASSES_PER_LOGIT * LOGIT_BYTES / 1e9
        + 8 * 3 * elementwise_bytes(100, 1000, "bfloat16") / 1e9
        + 3.0
    )
    compute += 18e9 / 9e9 + 5e4 / 1e4 + (2000 * 1e-3 + 50 * 0.04) / 2 + 2 * 3 * 0.125 + 3 * 0.25 + 6 * 0.5 + 8 * 0.01
    assert resources["disk"] == pytest.approx(2.0 + 2.0 + 1.0)
    assert resources["compute"] == pytest.approx(compute)
    assert resources["host_memory"] == pytest.approx(10.0)
    assert resources["lead"] == resources["host_compute"] == 0  # part of computing, on a CPU
    assert expectation.seconds(work, make_policy(embedding_resident=False)) == pytest.approx(max(compute, 10.0) + 10.0)


def test_each_format_is_decoded_at_its_own_rate(make_spec, make_machine):
    machine = make_machine(casts={"float16 bfloat16": 8e9, "int4 bfloat16": 2e9, "float16 float32": 1e12})

    def rate(**fields):
        return decoding_rate(make_spec(**fields), machine, "bfloat16")

    assert [rate(decoded_from={"int4": 100}), rate(number_format="int4")] == pytest.approx([2e9, 2e9])
    assert rate(decoded_from={"int4": 300, "float16": 100}) == pytest.approx(400 / (300 / 2e9 + 100 / 8e9))
    assert rate(decoded_from={"float32": 100}) == pytest.approx(8e9), "casts of other dtypes count as the fastest"
    assert rate(decoded_from={"int3": 100}) == pytest.approx(DECODING_OF_CASTS * 8e9), "formats that were not measured do not"
    assert decoding_rate(make_spec(), make_machine(casts={}, host_memory=3e9), "bfloat16") == pytest.approx(1e9)


def test_beside_a_device_the_host_works_on_its_own(make_spec, make_machine, make_policy):
    machine = make_machine(decode_attention={"host": {"bfloat16": ((1.0, Rate(2e3, 1e3)),)}}, overheads=NOTHING)
    work = PassWork(host_step_flops=5e3, host_step_bytes=5e3, num_tokens=1, num_sampled=1, num_micro_batches=1)
    resources = Expectation(make_spec(), machine, "bfloat16").resources(work, make_policy(device="cuda"))
    assert resources["host_compute"] == pytest.approx(5.0)
    assert resources["compute"] < 1e-3


def test_what_slows_each_other_down_beside_a_device(make_spec, make_machine, make_policy):
    """The two directions of a link, the link and attention on the host, that and reading; each at its own pace once the other has ended."""
    machine = make_machine(
        decode_attention={"host": {"bfloat16": ((1.0, Rate(1e3, 1e3)),)}}, host_to_device=1e3, device_to_host=1e3, disk_read=1e3,
        duplex_slowdown=1.25, link_slowdown=2.0, host_slowdown=1.5, disk_slowdown=4.0, compute_slowdown=3.0,
        disk_core_seconds_per_byte=0.0, overheads=NOTHING,
    )  # fmt: skip
    expectation, policy = Expectation(make_spec(), machine, "bfloat16"), make_policy(device="cuda")

    def seconds(**work):
        found = expectation.resources(PassWork(**work), policy)
        return [float(found[name]) for name in ("host_to_device", "device_to_host", "host_compute", "disk")]

    assert seconds(host_to_device_bytes=8e3) == pytest.approx([8, 8 * 0.25, 8 * 2 / 3, 0])
    assert seconds(host_to_device_bytes=8e3, device_to_host_bytes=4e3)[:2] == pytest.approx([9, 6])
    attended = {"host_step_flops": 6e3, "host_step_bytes": 6e3}
    assert seconds(**attended) == pytest.approx([6 * 1.5 / 2, 0, 6, 6 * 3 * 3 / 4])
    both = seconds(host_to_device_bytes=8e3, **attended)
    assert both[0] == pytest.approx(8 + 4.5)  # the host ends after 9 seconds, 4.5 of which the link lost
    assert both[2] == pytest.approx(6 + 16 / 3)
    busy = expectation.busy(PassWork(host_to_device_bytes=8e3, **attended), policy)
    assert float(busy["host_compute"]) == pytest.approx(6 + 16 / 3)
    assert float(busy["disk"]) == 0


@pytest.mark.parametrize(
    ("decoded_from", "wanted", "estimated"),
    [
        ({"int4": 10}, 3.0, []),
        ({"int4": 10, "float16": 10}, 3.0, []),  # the host casts plain numbers
        ({"int3": 10}, 6e3 * 1.5 / 1e3, ["int3"]),  # reads half a byte for each that it writes, at the rate of elementwise operations
        ({"int4": 10, "int3": 30}, (3.0 + 3 * 9.0) / 4, ["int3"]),
        ({"float16": 10}, 0.0, []),
        ({}, 0.0, []),  # bfloat16, as computed
    ],
)
def test_what_a_device_decodes_takes_time_there(make_spec, make_machine, make_policy, decoded_from, wanted, estimated):
    machine = make_machine(device_casts={"int4 bfloat16": Rate(4e3, 2e3)}, elementwise={"bfloat16": 1e3}, overheads=NOTHING)
    units = [dataclasses.replace(unit, disk_bytes=500, encoded_bytes=500, plain=False) for unit in make_spec().units[:3]]
    spec = make_spec(units=(*units, make_spec().units[3]), decoded_from=decoded_from)
    work = PassWork(device_decoded_bytes=6e3, num_micro_batches=1)
    compute = Expectation(spec, machine, "bfloat16").apart(work, make_policy(device="cuda"))["compute"]
    assert float(compute) == pytest.approx(wanted)
    assert estimated_on_device(spec, machine, "bfloat16") == estimated
    assert estimated_on_device(make_spec(decoded_from=decoded_from), machine, "bfloat16") == [], "the host decodes all of it"


@pytest.mark.parametrize(
    ("operations", "per_operation", "more"),
    [
        (0, 0.01, 0.0),  # of another flexgen, which did not count them
        (3 * LAYER_OPERATIONS + 40, 0.01, 0.4),
        (3 * LAYER_OPERATIONS - 10, 0.01, -0.1),
        (3 * LAYER_OPERATIONS + 40, 0.0, 0.0),  # not measured, as on a CPU
        (1, 1.0, -0.375),  # nothing is launched before it is asked for
    ],
)
def test_launches_beyond_those_of_a_measured_layer_take_the_host_time(
    make_spec, make_machine, make_policy, operations, per_operation, more
):
    """Four micro-batches of three layers; the launches of a layer that was measured are part of its 0.125 s."""
    costs = dataclasses.replace(NOTHING, per_layer_and_micro_batch=0.125, per_operation=per_operation)
    expectation = Expectation(make_spec(operations=operations), make_machine(overheads=costs), "bfloat16")
    work = PassWork(num_micro_batches=4, attention_flops=5e10)  # a second of the device
    resources = expectation.resources(work, make_policy(device="cuda"))
    issuing = 4 * (3 * 0.125 + more)
    assert float(resources["lead"]) == pytest.approx(issuing)
    assert float(resources["compute"]) == pytest.approx(1.0)
    assert float(expectation.seconds(work, make_policy(device="cuda"))) == pytest.approx(max(1.0, issuing)), "beside each other"


def test_earlier_keys_and_values_are_gathered_by_the_host(make_spec, make_machine, make_policy):
    expectation = Expectation(make_spec(), make_machine(host_memory=1e3, overheads=NOTHING), "bfloat16")
    resources = expectation.resources(PassWork(gathered_bytes=5e3), make_policy(device="cuda"))
    assert float(resources["host_compute"]) == pytest.approx(5.0)


def test_experts_see_their_share_of_the_rows(make_spec, make_machine, make_policy):
    machine = make_machine(dense={"bfloat16": [(64, 1e6), (512, 8e6)]}, overheads=NOTHING)
    units = (UnitSpec(name="experts", disk_bytes=16_000, decoded_bytes=16_000, flops_per_token=2000.0),)  # an eighth of them
    spec = make_spec(units=units, hidden_size=1, intermediate_size=1)
    work = PassWork(num_tokens=512, num_micro_batches=1)
    compute = Expectation(spec, machine, "bfloat16").resources(work, make_policy())["compute"]
    assert compute == pytest.approx(512 * 2000 / 1e6, rel=1e-3)  # 64 rows each


def test_the_head_scores_the_rows_of_each_micro_batch_together(make_spec, make_machine, make_policy):
    """Few rows are computed at a lower rate: those of a micro-batch count (half of them, by this head's FLOPs), not those of the pass."""
    machine = make_machine(dense={"bfloat16": [(32, 1e6), (256, 8e6)]}, elementwise={"bfloat16": 1e30}, overheads=NOTHING)
    expectation = Expectation(make_spec(), machine, "bfloat16")

    def compute(num_micro_batches):
        work = PassWork(num_scored=512, num_micro_batches=num_micro_batches)
        return expectation.resources(work, make_policy())["compute"]

    assert compute(1) == pytest.approx(512 * 500 / 8e6)
    assert compute(8) == pytest.approx(512 * 500 / 1e6)


def test_passes_of_a_job_add_up_to_counted_passes(llama_3b, make_machine, make_policy):
    job = Workload(prompt_lens=(256,) * 12, output_lens=(8,) * 12)
    policy = make_policy(prefill_tokens=512)
    expectation = Expectation(llama_3b, make_machine(), "bfloat16")
    played = simulate(llama_3b, policy, job)
    apart = [float(expectation.seconds(work, policy)) for work in played.passes()]
    np.testing.assert_allclose(played.seconds(expectation, policy), apart)


def test_a_slower_machine_is_expected_to_take_longer(llama_3b, make_machine, make_policy):
    job = Workload(prompt_lens=(256,) * 12, output_lens=(8,) * 12)
    played, policy = simulate(llama_3b, make_policy(), job), make_policy()
    fast = make_machine()
    total = played.seconds(Expectation(llama_3b, fast, "bfloat16"), policy).sum()
    for name in ("disk_read", "dense", "overheads"):
        slow = {
            "disk_read": lambda: dataclasses.replace(fast, disk_read=Rate(2e9, 2e8)),
            "dense": lambda: make_machine(dense={"bfloat16": [(64, 1e11)]}),
            "overheads": lambda: dataclasses.replace(fast, overheads=dataclasses.replace(fast.overheads, per_pass=1.0)),
        }[name]()
        assert played.seconds(Expectation(llama_3b, slow, "bfloat16"), policy).sum() > total


@pytest.mark.parametrize(("disk_bytes", "flops"), [(2e9, 1e12), (8e9, 1e12), (2e9, 8e12), (0, 1e12), (2e9, 0)])
def test_reading_and_computing_slow_each_other_down_while_both_go_on(make_spec, make_machine, make_policy, disk_bytes, flops):
    machine = make_machine(
        disk_read=1e9,
        disk_slowdown=1.5,
        compute_slowdown=1.1,
        disk_core_seconds_per_byte=0.0,
        overheads=NOTHING,
        attention={"bfloat16": 1e12},
    )
    expectation = Expectation(make_spec(), machine, "bfloat16")
    work, policy = PassWork(disk_read_bytes=disk_bytes, attention_flops=flops), make_policy()
    apart = expectation.apart(work, policy)
    disk, compute = apart["disk"], apart["compute"]
    assert (disk, compute) == pytest.approx((disk_bytes / 1e9, flops / 1e12))
    # Played in small steps.
    clock, step = 0.0, 1e-4
    while disk > 1e-9 or compute > 1e-9:
        both = disk > 1e-9 and compute > 1e-9
        disk, compute, clock = disk - step / (1.5 if both else 1), compute - step / (1.1 if both else 1), clock + step
    assert expectation.seconds(work, policy) == pytest.approx(clock, abs=1e-3)
    busy = expectation.busy(work, policy)
    assert max(busy["disk"], busy["compute"]) == pytest.approx(clock, abs=1e-3)
    assert all(busy[name] <= 1.5 * apart[name] + 1e-9 for name in ("disk", "compute"))


def test_low_bit_kv_has_a_rate_of_its_own_or_that_of_its_numbers(make_spec, make_machine, make_policy):
    """Where it was not measured, a byte holds as many numbers as exact KV has bytes for."""
    group = KVGroupSpec(num_layers=3, bytes_per_token=5, attention_flops_per_pair=4.0, exact_bytes_per_token=16)
    spec, plain = make_spec(groups=(group,), kv_format="int4"), ((1.0, Rate(2e3, 1e3)),)
    work = PassWork(host_step_flops=5e3, host_step_bytes=5e3, num_tokens=1, num_sampled=1, num_micro_batches=1)
    for rates, seconds in (
        ({}, 16.0),
        ({"bfloat16 int8": ((1.0, Rate(1.0, 1.0)),)}, 16.0),
        ({"bfloat16 int4": ((1.0, Rate(4e3, 2e3)),)}, 2.5),
    ):
        machine = make_machine(decode_attention={"host": {"bfloat16": plain, **rates}}, overheads=NOTHING)
        resources = Expectation(spec, machine, "bfloat16").resources(work, make_policy(device="cuda"))
        assert resources["host_compute"] == pytest.approx(seconds)


SPARSE = {
    "bfloat16": ((1.0, Rate(2e3, 1e3)), (4.0, Rate(2e3, 5e2))),
    "bfloat16 sparse 0.1": ((1.0, Rate(9e3, 4e3)), (4.0, Rate(9e3, 1e3))),
    "bfloat16 int4": ((1.0, Rate(4e3, 2e3)),),
}


@pytest.mark.parametrize(
    ("share", "kv_format", "flops_per_byte", "seconds"),
    [
        (0.1, None, 1.0, 2000 / 1e3 + 6000 / 4e3),
        (0.1, None, 2.0, 2000 / 750 + 6000 / 2500),  # half way between the points, by logarithms
        (0.1, None, 4.0, 2000 / 5e2 + 6000 / 1e3),
        (0.2, None, 1.0, 8000 / 1e3),  # without a rate it counts as dense
        (0.1, "int4", 1.0, 8000 / 2e3),
        (None, None, 1.0, 8000 / 1e3),
    ],
)
@pytest.mark.parametrize("place", ["host", "device"])
def test_sparse_attention_has_a_rate_of_its_own(make_spec, make_machine, make_policy, place, share, kv_format, flops_per_byte, seconds):
    """Of 8,000 bytes of KV that next tokens see 6,000 count as attended to sparsely."""
    where, resource = ("host_", "host_compute") if place == "host" else ("", "compute")
    steps = {"step_flops": 8000 * flops_per_byte, "step_bytes": 8000, "sparse_step_bytes": 6000 if share else 0}
    machine = make_machine(decode_attention={place: SPARSE}, overheads=NOTHING)
    expectation = Expectation(make_spec(sparse_attention=share, kv_format=kv_format), machine, "bfloat16")
    work = PassWork(**{where + name: value for name, value in steps.items()})
    assert expectation.resources(work, make_policy(device="cuda"))[resource] == pytest.approx(seconds)


def test_what_sparse_attention_saves_is_known_where_it_has_a_rate(make_spec, make_machine):
    machine = make_machine(decode_attention={"host": SPARSE}, overheads=NOTHING)
    work = PassWork(
        host_step_flops=np.array([1000, 8000]), host_step_bytes=np.array([1000, 8000]), host_sparse_step_bytes=np.array([0, 6000])
    )

    def share_of_dense(share, work=work):
        return Expectation(make_spec(sparse_attention=share), machine, "bfloat16").sparse_over_dense(work)

    assert share_of_dense(0.1) == pytest.approx((3000 / 1e3 + 6000 / 4e3) / 9)
    assert share_of_dense(0.1, PassWork()) == 1
    assert share_of_dense(0.2) is None
    assert share_of_dense(None) is None


def in_int8(spec, layers):
    """The first layers of a spec, whose weights take 2 bytes each, computed in int8."""
    units = [
        dataclasses.replace(unit, decoded_bytes=unit.decoded_bytes // 2, int8_flops_per_token=unit.flops_per_token, plain=False)
        if number < layers
        else unit
        for number, unit in enumerate(spec.units)
    ]
    return dataclasses.replace(spec, units=tuple(units), decoded_from={int8_name("bfloat16"): 1})


def test_products_in_int8_have_a_rate_of_their_own(make_spec, make_machine, make_policy):
    spec = in_int8(make_spec(), 2)
    machine = make_machine(
        dense={"bfloat16": [(1, 1e6)], "bfloat16 int8": [(4, 2e6), (8, 4e6)]}, elementwise={"bfloat16": 1e30}, overheads=NOTHING
    )
    work = PassWork(num_tokens=16, num_sampled=4, num_micro_batches=2)
    seconds = Expectation(spec, machine, "bfloat16").resources(work, make_policy())["compute"]
    assert seconds == pytest.approx(16 * 4000 / 4e6 + 16 * 2000 / 1e6 + 4 * 500 / 1e6)
    with pytest.raises(OptionError, match="no rates for products in int8 beside bfloat16: measure it again"):
        Expectation(spec, make_machine(dense={"bfloat16": [(1, 1e6)]}), "bfloat16")


def test_rounding_comes_after_decoding(make_spec, make_machine):
    """In numbers per second: 4 of the format, each of 2 bytes, and 6 that are rounded, each of one."""
    machine = make_machine(casts={"mxfp4 bfloat16": 8.0, int8_name("bfloat16"): 6.0})
    for name, rate in (("float16", 6.0), ("bfloat16", 6.0), ("mxfp4", 1 / (1 / 4 + 1 / 6))):
        assert decoding_rate(make_spec(decoded_from={int8_name(name): 1}), machine, "bfloat16") == pytest.approx(rate)
    assert decoding_rate(make_spec(decoded_from={int8_name("bfloat16"): 1}), make_machine(), "bfloat16") == pytest.approx(30e9 / 4)
