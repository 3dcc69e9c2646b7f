import dataclasses

import pytest

from flexgen.errors import OptionError
from flexgen.plan.model import KVGroupSpec
from flexgen.plan.price.work import PassLoad, PassWork, busiest, ideal_seconds, price


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


@pytest.mark.parametrize(("home", "device", "crosses"), [("host", "sim", 1), ("disk", "cuda", 1), ("device", "sim", 0), ("host", "cpu", 0)])
@pytest.mark.parametrize("exact", [0, 25])
def test_what_prompts_go_on_from_crosses_the_link(make_spec, make_policy, home, device, crosses, exact):
    """Seven tokens of two layers and five of one, in few bits or as they are computed with."""
    groups = (
        KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0, exact_bytes_per_token=exact),
        KVGroupSpec(num_layers=1, bytes_per_token=10, attention_flops_per_pair=4.0, exact_bytes_per_token=exact, window=6),
    )
    at_home = {"prompt_tokens": {home: 10}, "num_prompts": {home: 2}, "next_tokens": {home: 3}, "attended_tokens": {home: [30, 18]}}
    load = load_of(**at_home, prompt_pairs=[30, 30])
    spec, policy = make_spec(groups=groups), make_policy(device=device)
    alone, after = (price(each, spec, policy, PassWork()) for each in (load, dataclasses.replace(load, earlier_tokens={home: [7, 5]})))
    stored, sent = (2 * 7 + 5) * 10, (2 * 7 + 5) * (exact or 10)
    assert after.host_to_device_bytes - alone.host_to_device_bytes == sent * crosses
    assert after.gathered_bytes == (stored + 3 * sent) * crosses, "read in pages, written, read and written again"
    assert after.host_memory_bytes - alone.host_memory_bytes == (stored + 4 * sent) * crosses, "and read by the link"
    assert alone.gathered_bytes == 0
    others = ("host_to_device_bytes", "gathered_bytes", "host_memory_bytes")
    assert dataclasses.replace(after, **{name: getattr(alone, name) for name in others}) == alone


def test_the_price_of_host_kv_that_the_device_attends_to(make_spec, make_policy):
    """Whole pages cross the link, half of the last one for nothing; what is new goes back; the host computes nothing."""
    policy = make_policy(device="sim", host_attention=False, page_tokens=16)
    work = price(load_of(), make_spec(), policy, PassWork())
    brought = 3 * 10 * (30 + 3 * 15 / 2)
    assert (work.host_to_device_bytes, work.device_to_host_bytes) == (brought, 13 * 30)
    assert (work.step_flops, work.step_bytes, work.host_step_flops, work.host_step_bytes) == (3 * 4.0 * 30, 900, 0, 0)
    assert work.host_memory_bytes == 3 * brought + 13 * 30
    again = price(load_of(repeated_tokens={"host": [16]}), make_spec(), policy, PassWork())
    assert work.host_to_device_bytes - again.host_to_device_bytes == 3 * 10 * 16, "a page that two sequences share"
    assert again.step_bytes == work.step_bytes
    on_disk = load_of(prompt_tokens={"disk": 10}, num_prompts={"disk": 2}, next_tokens={"disk": 3}, attended_tokens={"disk": [30]})
    assert price(on_disk, make_spec(), policy, PassWork()).host_step_bytes == 900, "the host attends to what comes from disk"


def test_the_last_pages_of_low_bit_kv_cross_as_they_are(make_spec, make_policy):
    groups = (KVGroupSpec(num_layers=3, bytes_per_token=10, attention_flops_per_pair=4.0, exact_bytes_per_token=32),)
    policy = make_policy(device="sim", host_attention=False, page_tokens=16)
    work = price(load_of(), make_spec(groups=groups), policy, PassWork())
    assert work.host_to_device_bytes == 3 * (10 * 30 + 3 * 16 * 32)


@pytest.mark.parametrize(("ring_bytes", "number"), [(0, 1), (3 * 1000, 1), (3 * 525, 1), (3 * 524, 2), (3 * 100, 6)])
def test_the_ring_bounds_the_next_tokens_of_a_micro_batch(make_spec, make_policy, ring_bytes, number):
    """Pages of 525 bytes in a layer; and one micro-batch of prompts."""
    policy = make_policy(device="sim", host_attention=False, page_tokens=16, kv_ring_bytes=ring_bytes)
    assert price(load_of(), make_spec(), policy, PassWork()).num_micro_batches == 1 + number


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
    assert sparse.host_step_bytes == dense.host_step_bytes, "all that is seen"
    on_disk = {"prompt_tokens": {"disk": 10}, "num_prompts": {"disk": 2}, "next_tokens": {"disk": 3}, "attended_tokens": {"disk": [seen]}}
    read = [
        price(load_of(**on_disk), make_spec(groups=(group,), sparse_attention=each), make_policy(), PassWork()) for each in (None, share)
    ]
    assert read[0] == dataclasses.replace(read[1], host_sparse_step_bytes=0), "there values are read with the keys"


@pytest.mark.parametrize(("seen", "sparsely"), [(30_000, 1.0), (1920, 1.0), (960, 8 / 9), (300, 0.4), (192, 0.0), (30, 0.0)])
@pytest.mark.parametrize("home", ["host", "disk", "device"])
def test_what_counts_as_attended_to_sparsely(make_spec, make_policy, home, seen, sparsely):
    """Three next tokens, a tenth of the positions, at least 64 each: of 320 positions four fifths are left out instead of nine tenths."""
    group = KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0, value_bytes_per_token=4, queries_per_key=2)
    load = load_of(prompt_tokens={home: 10}, num_prompts={home: 2}, next_tokens={home: 3}, attended_tokens={home: [seen]})
    dense, sparse = (
        price(load, make_spec(groups=(group,), sparse_attention=share), make_policy(device="sim"), PassWork()) for share in (None, 0.1)
    )
    name, all_of_it = ("sparse_step_bytes", "step_bytes") if home == "device" else ("host_sparse_step_bytes", "host_step_bytes")
    assert getattr(dense, name) == 0
    assert getattr(sparse, name) == pytest.approx(2 * 10 * seen * sparsely)
    assert getattr(sparse, all_of_it) == getattr(dense, all_of_it) == 2 * 10 * seen


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
