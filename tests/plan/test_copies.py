"""The memory of copies between host and device: what a pass can have on its way at once."""

import dataclasses

import pytest

from flexgen.base.quantities import GIB, MIB
from flexgen.plan.model import KVGroupSpec
from flexgen.plan.policy import KV_BATCH_BYTES, KV_RING_BATCHES, PROMPTS_ON_THE_WAY, STEPS_ON_THE_WAY, Fractions
from flexgen.plan.price.copies import (
    ID_BYTES,
    INDEX_TENSORS,
    KV_RING_SHARE,
    RING_PADDING_BYTES,
    copies_bytes,
    longest_layer_bytes,
    with_ring,
)
from flexgen.plan.price.memory import FRAGMENTATION
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.workload import Workload

JOB = Workload(prompt_lens=(200,) * 40, output_lens=(56,) * 40)
RUNNING = 64  # tokens of a micro-batch
TOKEN = 4096  # bytes of KV in a layer
HEADS = 2 * 3072  # numbers of query and result: four FLOPs for each pair of them


@pytest.fixture
def sizes(llama_3b):
    return JobSizes(llama_3b, JOB, 16)


@pytest.fixture
def policy(make_policy):
    return make_policy(device="sim", micro_batch_tokens=RUNNING, max_num_seqs=10, page_tokens=16, embedding_resident=True)


def indices(running):
    """The bytes of page tables, ids and positions."""
    return (10 * (256 // 16 + INDEX_TENSORS) + running * INDEX_TENSORS * 2) * ID_BYTES


def near(into, out):
    """Both, with what the allocator loses, in whole pages."""
    return tuple(pytest.approx(FRAGMENTATION * size, abs=4096) for size in (into, out))


def test_a_cpu_copies_nothing(llama_3b, sizes, make_policy):
    assert copies_bytes(llama_3b, sizes, make_policy(device="cpu")) == (0, 0)


def test_next_tokens_and_a_few_prompts_are_on_their_way(llama_3b, sizes, policy):
    steps = 10 * 2 * HEADS * 2
    into = indices(RUNNING) + steps + PROMPTS_ON_THE_WAY * 256 * TOKEN
    out = steps + (10 + PROMPTS_ON_THE_WAY * RUNNING) * TOKEN
    assert copies_bytes(llama_3b, sizes, policy) == near(into, out)


def test_prompts_that_go_to_disk_are_whole(llama_3b, sizes, make_policy):
    spilling = make_policy(
        device="sim", micro_batch_tokens=RUNNING, max_num_seqs=10, page_tokens=16, embedding_resident=True, kv=Fractions(disk=1.0)
    )
    into = indices(200) + 10 * 2 * HEADS * 2 + PROMPTS_ON_THE_WAY * 256 * TOKEN
    assert copies_bytes(llama_3b, sizes, spilling) == near(into, 10 * 2 * HEADS * 2 + (10 + PROMPTS_ON_THE_WAY * 200) * TOKEN)


def test_where_all_kv_is_on_the_device_only_ids_and_embedding_rows_cross(llama_3b, sizes, make_policy):
    on_device = {"device": "sim", "micro_batch_tokens": RUNNING, "max_num_seqs": 10, "page_tokens": 16, "kv": Fractions(device=1.0)}
    assert copies_bytes(llama_3b, sizes, make_policy(**on_device, embedding_resident=True)) == near(indices(RUNNING), 0)
    gathering = make_policy(**on_device, embedding_resident=False)
    assert copies_bytes(llama_3b, sizes, gathering) == near(indices(RUNNING) + RUNNING * (3072 * 2 + 8192 + 8), 0)


def test_scores_come_back(llama_3b, make_policy):
    """Those of a pass: of as many prompts as there may be at once, or of all."""
    on_device = make_policy(
        device="sim", micro_batch_tokens=RUNNING, max_num_seqs=10, page_tokens=16, embedding_resident=True, kv=Fractions(device=1.0)
    )
    for number, alive in ((40, 10), (4, 4)):
        job = Workload(prompt_lens=(200,) * number, output_lens=(0,) * number, scored_lens=(199,) * number, num_likeliest=5)
        _, out = copies_bytes(llama_3b, JobSizes(llama_3b, job, 16), on_device)
        assert out == pytest.approx(FRAGMENTATION * alive * 199 * 8 * (1 + 2 * 5), abs=4096)


def test_new_keys_and_values_of_a_few_micro_batches_are_on_their_way_where_the_device_attends(llama_3b, sizes, policy):
    on_host, on_device = (copies_bytes(llama_3b, sizes, dataclasses.replace(policy, host_attention=each)) for each in (True, False))
    assert on_device[0] == on_host[0]
    assert on_device[1] - on_host[1] == pytest.approx(FRAGMENTATION * (STEPS_ON_THE_WAY - 1) * 10 * TOKEN, abs=8192)


LONGEST = (256 // 16 + 1) * 16 * TOKEN  # the pages of the longest sequence in a layer, one of them for windows


@pytest.mark.parametrize(
    ("device_bytes", "batch_bytes"),
    [(GIB, 10 * LONGEST), (100 * MIB, 100 * MIB * KV_RING_SHARE / KV_RING_BATCHES), (MIB, LONGEST), (0, LONGEST)],
)
def test_the_ring_holds_micro_batches_of_all_sequences_or_of_what_its_share_allows(llama_3b, sizes, policy, device_bytes, batch_bytes):
    ring = with_ring(dataclasses.replace(policy, host_attention=False), llama_3b, sizes, device_bytes).kv_ring_bytes
    assert ring == pytest.approx(KV_RING_BATCHES * batch_bytes + RING_PADDING_BYTES, abs=4096 + KV_RING_BATCHES)
    many = dataclasses.replace(policy, host_attention=False, max_num_seqs=10_000, micro_batch_tokens=4096)
    assert with_ring(many, llama_3b, sizes, 100 * GIB).kv_ring_bytes <= KV_RING_BATCHES * KV_BATCH_BYTES + 8192


def test_there_is_no_ring_where_nothing_comes(llama_3b, sizes, policy, make_policy):
    on_device = dataclasses.replace(policy, host_attention=False, kv=Fractions(device=1.0))
    for each in (policy, on_device, make_policy(device="cpu", host_attention=False)):
        assert with_ring(dataclasses.replace(each, kv_ring_bytes=5), llama_3b, sizes, GIB).kv_ring_bytes == 0


def test_windows_and_tails_count_in_the_ring(make_spec):
    sizes = JobSizes(make_spec(), JOB, 16)
    groups = (
        KVGroupSpec(num_layers=1, bytes_per_token=10, attention_flops_per_pair=4.0, exact_bytes_per_token=30),
        KVGroupSpec(num_layers=1, bytes_per_token=40, attention_flops_per_pair=4.0, window=40),
    )
    assert longest_layer_bytes(make_spec(groups=groups[:1]), sizes, 16) == 16 * (17 * 10 + 30)
    assert longest_layer_bytes(make_spec(groups=groups), sizes, 16) == max(16 * (17 * 10 + 30), 16 * 4 * 40)


def test_more_sequences_need_more(llama_3b, sizes, policy):
    few, many = copies_bytes(llama_3b, sizes, policy, 10), copies_bytes(llama_3b, sizes, policy, 40)
    assert few < many
    assert few == copies_bytes(llama_3b, sizes, policy)
