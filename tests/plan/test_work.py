import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import OptionError
from flexgen.options import DTYPE_BYTES
from flexgen.plan.model import KVGroupSpec, UnitSpec
from flexgen.plan.policy import DECODED_AT_ONCE, DECODING_BYTES, SCRATCH_UNITS, Fractions
from flexgen.plan.price.memory import scratch_bytes
from flexgen.plan.price.work import (
    PassLoad,
    PassWork,
    busiest,
    ideal_seconds,
    price,
    unit_homes,
    weight_bytes,
    weights_work,
)

MB = 10**6


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    parts=st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10)).filter(any),
)
def test_homes_honour_the_shares_to_within_one_unit_at_every_depth(make_spec, sizes, parts):
    units = tuple(UnitSpec(name=str(number), disk_bytes=size, decoded_bytes=size, flops_per_token=1.0) for number, size in enumerate(sizes))
    spec = make_spec(units=units)
    shares = dict(zip(("device", "host", "disk"), (part / sum(parts) for part in parts), strict=True))
    homes = unit_homes(spec, Fractions(**shares))
    for depth in range(1, len(sizes) + 1):
        for tier, share in shares.items():
            at_home = sum(size for size, home in zip(sizes[:depth], homes, strict=False) if home == tier)
            assert abs(at_home - share * sum(sizes[:depth])) <= max(sizes)


def test_homes_are_spread_over_the_depth(make_spec):
    assert unit_homes(make_spec(layers=7), Fractions(host=0.25, disk=0.75)) == ("disk", "host", "disk", "disk") * 2


def test_units_stay_encoded_where_that_takes_less_memory(make_spec):
    def unit(number, disk_bytes):
        return UnitSpec(name=str(number), disk_bytes=disk_bytes, decoded_bytes=40, flops_per_token=1.0, plain=disk_bytes == 40)

    spec = make_spec(units=tuple(unit(number, size) for number, size in enumerate([10, 40, 10, 80, 10, 10])))
    assert unit_homes(spec, Fractions(encoded=1.0)) == ("encoded", "host", "encoded", "host", "encoded", "encoded")
    assert unit_homes(spec, Fractions(host=0.5, encoded=0.5)).count("encoded") == 2
    mixed = unit_homes(make_spec(layers=7, decoded=4, unit_bytes=10_000), Fractions(host=0.25, encoded=0.25, disk=0.5))
    assert [mixed.count(home) for home in ("host", "encoded", "disk")] == [2, 2, 4]


def test_encoded_weights_are_decoded_in_every_pass(make_spec):
    unit = UnitSpec(name="q", disk_bytes=MB, decoded_bytes=4 * MB, flops_per_token=1.0, plain=False)
    spec = make_spec(units=(unit,))
    assert weights_work(spec, ("encoded",), "cpu") == PassWork(host_memory_bytes=5 * MB, decoded_bytes=4 * MB, num_streamed_units=1)
    assert weights_work(spec, ("encoded",), "cuda") == PassWork(
        host_to_device_bytes=4 * MB, host_memory_bytes=9 * MB, decoded_bytes=4 * MB, num_streamed_units=1
    )
    by_device = make_spec(units=(dataclasses.replace(unit, encoded_bytes=MB),))
    assert weights_work(by_device, ("encoded",), "cuda") == weights_work(by_device, ("host",), "cuda")
    assert [weight_bytes(spec, (home,), "cuda")[home] for home in ("device", "host", "encoded")] == [4 * MB, 4 * MB, MB]
    assert weight_bytes(by_device, ("host",), "cuda")["host"] == MB


def test_bytes_at_home_in_memory_are_decoded(make_spec):
    spec = make_spec(decoded=40)
    homes = ("device", "host", "disk", "host")
    assert weight_bytes(spec, homes, "sim") == {"device": 40_000, "host": 80_000, "encoded": 0, "disk": 1000}
    assert weight_bytes(spec, ("encoded", "host", "disk", "encoded"), "cpu") == {"device": 0, "host": 40_000, "encoded": 2000, "disk": 1000}
    # What needs no decoding stays as it was read.
    spec = make_spec(units=(UnitSpec(name="read", disk_bytes=8192, decoded_bytes=5000, flops_per_token=1.0),))
    assert weight_bytes(spec, ("host",), "cpu")["host"] == weight_bytes(spec, ("encoded",), "cpu")["encoded"] == 8192


def test_a_device_that_decodes_is_sent_the_encoded_bytes(make_spec):
    unit = UnitSpec(name="q", disk_bytes=MB, decoded_bytes=4 * MB, flops_per_token=1.0, plain=False)
    encoded = dataclasses.replace(unit, encoded_bytes=MB)
    assert (unit.carried_bytes, encoded.carried_bytes) == (4 * MB, MB)
    work = weights_work(make_spec(units=(encoded,)), ("disk",), "cuda")
    assert (work.host_to_device_bytes, work.decoded_bytes, work.host_memory_bytes) == (MB, 0, 2 * MB)
    work = weights_work(make_spec(units=(unit,)), ("disk",), "cuda")
    assert (work.host_to_device_bytes, work.decoded_bytes, work.host_memory_bytes) == (4 * MB, 4 * MB, 10 * MB)
    on_cpu = [weights_work(make_spec(units=(each,)), ("disk",), "cpu") for each in (unit, encoded)]
    assert on_cpu[0] == on_cpu[1]


def test_weights_move_once_per_pass(make_spec):
    spec = make_spec(unit_bytes=MB)
    homes = ("device", "host", "disk", "disk")
    assert weights_work(spec, homes, "cuda") == PassWork(
        disk_read_bytes=2 * MB, host_to_device_bytes=3 * MB, host_memory_bytes=5 * MB, num_streamed_units=3
    )
    assert weights_work(spec, ("host", "host", "disk", "disk"), "cpu") == PassWork(
        disk_read_bytes=2 * MB, host_memory_bytes=2 * MB, num_streamed_units=2
    )


def test_decoded_weights_cross_the_link(make_spec):
    work = weights_work(make_spec(unit_bytes=MB, decoded=2), ("disk", "host", "device", "device"), "sim")
    memory = MB + (MB + 2 * MB) + 4 * MB
    assert work == PassWork(
        disk_read_bytes=MB, host_to_device_bytes=4 * MB, host_memory_bytes=memory, decoded_bytes=2 * MB, num_streamed_units=2
    )


def test_decoding_draws_on_the_memory_of_a_cpu(make_spec):
    spec = make_spec(unit_bytes=MB, decoded=2)
    work = weights_work(spec, ("disk", "host", "host", "host"), "cpu")
    assert work.host_memory_bytes == MB + (MB + 2 * MB)  # the disk's transfer; read and written by the decoder


def load_of(**changes):
    """Two prompts of 5 tokens and three next tokens that see 10 tokens each."""
    values = {
        "prompt_tokens": {"host": 10},
        "num_prompts": {"host": 2},
        "next_tokens": {"host": 3},
        "prompt_pairs": [2 * 15],
        "attended_tokens": {"host": [30]},
        "num_sampled": 5,
    }
    return PassLoad(**(values | changes))


def test_the_price_of_a_pass_on_a_cpu(make_spec, make_policy):
    work = price(load_of(), make_spec(), make_policy(embedding_resident=False), PassWork(disk_read_bytes=4000, host_memory_bytes=4000))
    assert work == PassWork(
        disk_read_bytes=4000 + 13 * 16,  # an embedding row per token
        dense_flops=13 * 6000 + 5 * 500,
        attention_flops=3 * 4.0 * 30,  # layers x FLOPs x the prompts' pairs
        host_step_flops=3 * 4.0 * 30,  # and those of next tokens
        host_step_bytes=3 * 10 * 30,
        host_memory_bytes=4000 + 3 * 10 * 30 + 13 * 30,  # KV read by next tokens; KV written
        num_tokens=13,
        num_prompt_tokens=10,
        num_sequences=5,
        num_sampled=5,
        num_micro_batches=1,
    )


def test_scored_positions_pass_through_the_head(make_spec, make_policy):
    load = load_of(num_sampled=3, num_scored=8)  # neither prompt is answered, and all but two of their positions are scored
    work = price(load, make_spec(), make_policy(), PassWork())
    assert work.dense_flops == 13 * 6000 + (3 + 8) * 500
    assert (work.num_sequences, work.num_sampled, work.num_scored) == (5, 3, 8)


def test_the_price_of_host_kv_beside_a_device(make_spec, make_policy):
    work = price(load_of(), make_spec(), make_policy(device="sim"), PassWork())
    crossing = 3 * 3 * 8 * 2  # next tokens x layers x hidden x bytes: q one way, the result the other
    assert work.device_to_host_bytes == 13 * 30 + crossing
    assert work.host_to_device_bytes == crossing
    assert work.host_memory_bytes == 900 + 13 * 30


def test_gathered_rows_cross_the_link(make_spec, make_policy):
    resident, gathered = (
        price(load_of(), make_spec(), make_policy(device="sim", embedding_resident=each), PassWork()) for each in (True, False)
    )
    rows = PassWork(disk_read_bytes=13 * 16, host_to_device_bytes=13 * 16, host_memory_bytes=13 * 16)  # one per token
    for name in ("disk_read_bytes", "host_to_device_bytes", "host_memory_bytes"):
        assert getattr(gathered, name) - getattr(resident, name) == getattr(rows, name)


def test_the_price_of_device_kv(make_spec, make_policy):
    load = load_of(prompt_tokens={"device": 10}, num_prompts={"device": 2}, next_tokens={"device": 3}, attended_tokens={"device": [30]})
    work = price(load, make_spec(), make_policy(device="sim"), PassWork())
    assert (work.host_to_device_bytes, work.device_to_host_bytes, work.host_memory_bytes) == (0, 0, 0)
    assert (work.attention_flops, work.step_flops, work.step_bytes) == (3 * 4.0 * 30, 3 * 4.0 * 30, 900)
    assert work.num_micro_batches == 2  # prompts and next tokens apart


def test_the_price_of_kv_on_disk(make_spec, make_policy):
    load = load_of(prompt_tokens={"disk": 10}, num_prompts={"disk": 2}, next_tokens={"disk": 3}, attended_tokens={"disk": [30]})
    work = price(load, make_spec(), make_policy(page_tokens=16), PassWork())
    assert (work.disk_read_bytes, work.disk_write_bytes) == (900, 390)
    assert work.host_memory_bytes == 2 * (900 + 390)  # the disk's transfer, then the attention's
    assert work.num_disk_requests == 2 * 3 * (2 + 3 + 3 / 16)  # keys and values of three layers; a page is written when it is full


def test_the_price_of_padded_kv_on_disk(make_spec, make_policy):
    """The disk moves the padded bytes, keys and values in one request; attention reads the others."""
    groups = (KVGroupSpec(num_layers=3, bytes_per_token=10, attention_flops_per_pair=4.0, slot_bytes_per_token=15),)
    load = load_of(prompt_tokens={"disk": 10}, num_prompts={"disk": 2}, next_tokens={"disk": 3}, attended_tokens={"disk": [30]})
    work = price(load, make_spec(groups=groups), make_policy(page_tokens=16), PassWork())
    assert (work.disk_read_bytes, work.disk_write_bytes, work.host_step_bytes) == (1350, 585, 900)
    assert work.host_memory_bytes == (900 + 390) + (1350 + 585)
    assert work.num_disk_requests == 3 * (2 + 3 + 3 / 16)


def test_groups_of_layers_add_up(make_spec, make_policy):
    groups = (
        KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0),
        KVGroupSpec(num_layers=1, bytes_per_token=20, attention_flops_per_pair=8.0, window=4),
    )
    work = price(load_of(prompt_pairs=[30, 28], attended_tokens={"host": [30, 12]}), make_spec(groups=groups), make_policy(), PassWork())
    assert work.attention_flops == 2 * 4 * 30 + 1 * 8 * 28
    assert work.host_memory_bytes == 2 * 10 * 30 + 20 * 12 + 13 * 40


@pytest.mark.parametrize(
    ("share", "queries", "seen", "kept"), [(0.1, 1, 3000, 300), (0.1, 4, 3000, 1200), (0.1, 1, 900, 192), (0.5, 4, 900, 900)]
)
def test_values_that_are_left_out_are_not_read(make_spec, make_policy, share, queries, seen, kept):
    """Three next tokens, whose heads keep at least 64 positions each."""
    group = KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0, value_bytes_per_token=4, queries_per_key=queries)
    load = load_of(attended_tokens={"host": [seen]})
    dense, sparse = (price(load, make_spec(groups=(group,), sparse_attention=each), make_policy(), PassWork()) for each in (None, share))
    assert dense.host_step_bytes == 2 * 10 * seen
    assert dense.host_memory_bytes - sparse.host_memory_bytes == 2 * 4 * (seen - kept)
    assert sparse.host_step_bytes == dense.host_step_bytes, "choosing takes time, too"
    on_disk = {"prompt_tokens": {"disk": 10}, "num_prompts": {"disk": 2}, "next_tokens": {"disk": 3}, "attended_tokens": {"disk": [seen]}}
    read = [
        price(load_of(**on_disk), make_spec(groups=(group,), sparse_attention=each), make_policy(), PassWork()) for each in (None, share)
    ]
    assert read[0] == read[1], "there values are read with the keys"


def test_ideal_seconds_divide_work_by_best_rates(make_machine):
    work = PassWork(
        disk_read_bytes=4e9,
        disk_write_bytes=5e8,
        host_to_device_bytes=10e9,
        device_to_host_bytes=1e9,
        dense_flops=8e11,
        attention_flops=1e11,
        host_memory_bytes=15e9,
    )
    seconds = ideal_seconds(work, make_machine(), "bfloat16")
    assert seconds == pytest.approx(
        {"disk_read": 2.0, "disk_write": 0.5, "host_to_device": 0.5, "device_to_host": 0.1, "compute": 3.0, "host_memory": 0.5}
    )
    assert tuple(seconds) == ("disk_read", "disk_write", "host_to_device", "device_to_host", "compute", "host_memory")
    assert busiest(seconds) == ("compute", 3.0)


def test_attention_of_unknown_rate_counts_as_dense(make_machine):
    work = PassWork(dense_flops=2e11, attention_flops=2e11)
    assert ideal_seconds(work, make_machine(), "float32")["compute"] == pytest.approx(2.0)


def test_an_unmeasured_dtype_is_named(make_machine):
    with pytest.raises(OptionError, match=r"no rates for float64 \(known: bfloat16, float32\)"):
        ideal_seconds(PassWork(), make_machine(), "float64")


def test_work_adds_up_field_by_field():
    one = PassWork(**{field.name: number for number, field in enumerate(dataclasses.fields(PassWork))})
    assert dataclasses.astuple(one + one) == tuple(2 * each for each in dataclasses.astuple(one))


def test_products_in_int8_are_work_of_their_own(make_spec, make_machine, make_policy):
    """The first of three layers, each of 2,000 FLOPs a token."""
    spec = make_spec()
    first = dataclasses.replace(spec.units[0], int8_flops_per_token=2000.0)
    spec = dataclasses.replace(spec, units=(first, *spec.units[1:]))
    load = PassLoad(
        prompt_tokens={"host": 7}, num_prompts={"host": 1}, next_tokens={"host": 0}, prompt_pairs=[28], attended_tokens={"host": [0]},
        num_sampled=1,
    )  # fmt: skip
    work = price(load, spec, make_policy(), PassWork())
    assert (work.dense_flops, work.int8_flops) == (7 * 4000 + 500, 7 * 2000)
    rates = {"bfloat16": [(1, 1e3)], "bfloat16 int8": [(1, 2e3)]}
    before = ideal_seconds(dataclasses.replace(work, int8_flops=0), make_machine(dense=rates), "bfloat16")["compute"]
    assert ideal_seconds(work, make_machine(dense=rates), "bfloat16")["compute"] == pytest.approx(before + 7.0)
    with pytest.raises(OptionError, match="no rates for products in int8"):
        ideal_seconds(work, make_machine(), "bfloat16")


def test_a_device_needs_temporary_tensors_while_it_decodes(make_spec):
    """For so many numbers as it decodes at once, or for those of the largest unit if these are fewer."""
    unit = UnitSpec(name="q", disk_bytes=MB, decoded_bytes=4 * MB, flops_per_token=1.0, plain=False, encoded_bytes=MB)
    large = dataclasses.replace(unit, decoded_bytes=64 * MB)
    size = DTYPE_BYTES[make_spec().dtype]
    for each, numbers in ((unit, 4 * MB // size), (large, min(64 * MB // size, DECODED_AT_ONCE))):
        spec = make_spec(units=(each,))
        assert scratch_bytes(spec, ("disk",), "cuda") == SCRATCH_UNITS * each.decoded_bytes + DECODING_BYTES * numbers
        assert scratch_bytes(spec, ("device",), "cuda") == MB + DECODING_BYTES * numbers
        assert scratch_bytes(spec, ("disk",), "cpu") == SCRATCH_UNITS * each.decoded_bytes
