import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from flexgen.options import DTYPE_BYTES
from flexgen.plan.model import UnitSpec
from flexgen.plan.policy import DECODED_AT_ONCE, DECODING_BYTES, DEVICE_SCRATCH_UNITS, SCRATCH_UNITS, Fractions
from flexgen.plan.price.memory import scratch_bytes
from flexgen.plan.price.weights import unit_homes, weight_bytes, weights_work
from flexgen.plan.price.work import PassWork

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
    assert [weight_bytes(spec, (home,), "cuda")[home] for home in ("device", "host", "encoded")] == [4 * MB, 977 * 4096, MB]
    assert weight_bytes(by_device, ("host",), "cuda")["host"] == 245 * 4096, "whole pages"


def test_bytes_at_home_in_memory_are_decoded(make_spec):
    spec = make_spec(decoded=40)
    homes = ("device", "host", "disk", "host")
    assert weight_bytes(spec, homes, "sim") == {"device": 40_000, "host": 2 * 10 * 4096, "encoded": 0, "disk": 1000}
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


def test_a_device_needs_temporary_tensors_while_it_decodes(make_spec):
    """For so many numbers as it decodes at once, or for those of the largest unit if these are fewer."""
    unit = UnitSpec(name="q", disk_bytes=MB, decoded_bytes=4 * MB, flops_per_token=1.0, plain=False, encoded_bytes=MB)
    large = dataclasses.replace(unit, decoded_bytes=64 * MB)
    size = DTYPE_BYTES[make_spec().dtype]
    for each, numbers in ((unit, 4 * MB // size), (large, min(64 * MB // size, DECODED_AT_ONCE))):
        spec = make_spec(units=(each,))
        assert scratch_bytes(spec, ("disk",), "cuda") == DEVICE_SCRATCH_UNITS * each.decoded_bytes + DECODING_BYTES * numbers
        assert scratch_bytes(spec, ("device",), "cuda") == MB + DECODING_BYTES * numbers
        assert scratch_bytes(spec, ("disk",), "cpu") == SCRATCH_UNITS * each.decoded_bytes
