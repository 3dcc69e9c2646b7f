import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.base.quantities import GIB, MIB
from flexgen.errors import CapacityError, OptionError
from flexgen.plan.model import KVGroupSpec, UnitSpec
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions
from flexgen.plan.price.copies import copies_bytes
from flexgen.plan.price.memory import FRAGMENTATION, activation_bytes, footprint, scratch_bytes
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.price.weights import unit_homes
from flexgen.plan.search.ideal import budgets_of
from flexgen.plan.search.solve import solve, space_of
from flexgen.plan.workload import Workload

JOB = Workload(prompt_lens=(256,) * 192, output_lens=(32,) * 192)


@pytest.fixture(scope="module")
def plan(llama_3b, make_machine, make_limits, make_options, process_bytes):
    """Resolve with a few things changed."""

    def run(
        workload=JOB, spec=llama_3b, limits=None, process_bytes=process_bytes, kv_tiers=("device", "host", "disk"), machine=None, **options
    ):
        space = space_of(
            make_options(**options),
            spec,
            make_machine(**(machine or {})),
            make_limits(**(limits or {})),
            workload,
            process_bytes=process_bytes,
            kv_tiers=kv_tiers,
        )
        return solve(space).policy

    return run


def tiny_spec(make_spec):
    """7 million parameters, stored in bfloat16 and computed in float32."""
    units = [UnitSpec(name=f"layers.{each}", disk_bytes=1_600_000, decoded_bytes=3_200_000, flops_per_token=1.6e6) for each in range(6)]
    units += [UnitSpec(name="head", disk_bytes=4_200_000, decoded_bytes=8_400_000, flops_per_token=4.2e6, head=True)]
    return make_spec(
        units=tuple(units),
        kv_groups=(KVGroupSpec(num_layers=6, bytes_per_token=2048, attention_flops_per_pair=1024.0),),
        embedding_bytes=0,
        embedding_row_bytes=512,
        hidden_size=256,
        intermediate_size=1024,
        vocab_size=8192,
    )


# What it chooses


def test_a_model_of_6_gb_in_4_gib(plan, llama_3b, make_limits, process_bytes):
    policy = plan(machine={"host_to_device": None, "device_to_host": None})
    played = simulate(llama_3b, policy, JOB)
    assert 30 <= played.live.max() <= 95
    assert 1 <= policy.prefill_tokens // 256 <= 4
    assert policy.weights.disk > 0.6
    assert policy.weights.device == policy.kv.device == policy.kv_device_bytes == policy.device_ring_bytes == 0
    assert 512 <= policy.micro_batch_tokens <= 1024
    assert policy.max_num_seqs >= played.live.max()
    assert not policy.embedding_resident
    assert (policy.device, policy.dtype, policy.schedule) == ("cpu", "bfloat16", "diagonal")
    largest = max(unit.disk_bytes for unit in llama_3b.units)
    assert policy.host_ring_bytes >= 3 * largest
    # Nothing worth having is left over.
    assert sum(footprint(policy, llama_3b, make_limits(), process_bytes=process_bytes)["host"].values()) > 3.95 * GIB


def test_everything_stays_in_memory_where_it_fits(plan, llama_3b):
    policy = plan(limits={"host_bytes": 20 * GIB})
    assert policy.weights == Fractions(host=1.0)
    assert policy.embedding_resident
    assert (policy.host_ring_bytes, policy.max_num_seqs) == (0, 192)
    assert simulate(llama_3b, policy, JOB).work.disk_read_bytes == 0


def test_a_device_that_holds_everything_gets_everything(plan):
    fast = {"dense": {"bfloat16": [(1, 1e14)]}, "attention": {"bfloat16": 5e13}}
    policy = plan(limits={"device": "cuda", "device_bytes": 24 * GIB, "host_bytes": 8 * GIB}, machine=fast)
    assert policy.weights == policy.kv == Fractions(device=1.0)
    assert policy.kv_device_bytes > 0
    assert (policy.device_ring_bytes, policy.host_ring_bytes, policy.kv_host_bytes) == (0, 0, 0)


def test_a_small_device_streams_through_both_rings(plan, llama_3b):
    policy = plan(limits={"device": "sim", "device_bytes": 2 * GIB, "host_bytes": 3 * GIB})
    assert policy.weights.disk > 0
    largest = max(unit.disk_bytes for unit in llama_3b.units)
    assert policy.device_ring_bytes >= 3 * largest
    assert policy.host_ring_bytes >= 3 * largest


def test_the_ring_of_a_device_holds_two_layers_where_these_are_a_small_part_of_it(plan, llama_3b):
    """Else the link would be idle while the units of one layer wait for attention."""
    for device_bytes in (2 * GIB, 5 * GIB):
        policy = plan(limits={"device": "sim", "device_bytes": device_bytes, "host_bytes": 8 * GIB}, weights="host=1", kv="host=1")
        layer = llama_3b.decoded_bytes / 28
        assert policy.device_ring_bytes == pytest.approx(min(2 * layer, 0.15 * device_bytes), rel=1e-3)


def test_kv_goes_to_disk_only_where_it_may(plan):
    job = Workload(prompt_lens=(2000,) * 64, output_lens=(400,) * 64)
    limits = {"host_bytes": 2 * GIB, "disk_bytes": 100 * GIB}
    fast = {
        "disk_read": 8e9,
        "disk_write": 8e9,
        "dense": {"bfloat16": [(1, 1e15)]},
        "attention": {"bfloat16": 1e15},
    }
    assert plan(job, limits=limits, machine=fast).kv_disk_bytes > 0
    assert plan(job, limits=limits, machine=fast, kv_tiers=("device", "host")).kv_disk_bytes == 0
    assert plan(job, limits=limits | {"offload_in_memory": True}, machine=fast).kv_disk_bytes == 0


def test_a_tiny_model_fits_beside_the_interpreter(plan, make_spec, make_limits, process_bytes):
    spec, limits = tiny_spec(make_spec), {"host_bytes": 600 * MIB}
    job = Workload(prompt_lens=(100,) * 500, output_lens=(50,) * 500)
    policy = plan(job, spec=spec, limits=limits, dtype="float32")
    assert policy.weights == Fractions(host=1.0)
    assert simulate(spec, policy, job).num_refused == 0
    streaming = plan(job, spec=spec, limits=limits, dtype="float32", weights="disk=1")
    assert streaming.workspace_bytes > scratch_bytes(spec, ["disk"] * 7, "cpu") == 3 * 8_400_000
    for each in (policy, streaming):
        assert sum(footprint(each, spec, make_limits(**limits), process_bytes=process_bytes)["host"].values()) <= 600 * MIB


def test_a_slower_disk_wants_no_fewer_sequences(plan, llama_3b):
    live = [simulate(llama_3b, plan(machine={"disk_read": rate}), JOB).live.mean() for rate in (4e9, 0.3e9)]
    assert live[1] >= live[0]


@pytest.mark.slow  # test_optimal.py has a sample of smaller problems in every run
@pytest.mark.parametrize("lengths", [[(256, 32)] * 96, [(64, 64), (400, 16), (128, 100)] * 30], ids=["equal", "mixed"])
def test_chooses_as_well_as_brute_force(plan, llama_3b, make_machine, lengths):
    job = Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths))
    machine = make_machine(host_to_device=None)

    def seconds(policy):
        return simulate(llama_3b, policy, job).seconds(Expectation(llama_3b, machine, policy.dtype), policy).sum()

    best = min(
        seconds(plan(job, weights=f"host={share / 20:g},disk={1 - share / 20:g}", prefill_tokens=quota))
        for share, quota in itertools.product(range(9), (256, 400, 512, 768, 1024, 1536, 2048, 4096))
    )
    assert seconds(plan(job)) <= 1.025 * best  # it gives up as much for shorter passes


def test_nothing_known_of_the_job(plan):
    assert plan(Workload(prompt_lens=(), output_lens=())).max_num_seqs > 1


# What is pinned stays


def test_pins_stay(plan):
    policy = plan(weights="host=.2,disk=.8", kv="host=1", max_num_seqs=7, prefill_tokens=300, micro_batch_tokens=99, schedule="diagonal")
    assert policy.weights == Fractions(host=0.2, disk=0.8)
    assert policy.kv == Fractions(host=1.0)
    assert (policy.max_num_seqs, policy.prefill_tokens, policy.micro_batch_tokens, policy.schedule) == (7, 300, 99, "diagonal")


def test_a_cap_beyond_the_job_is_kept(plan):
    assert plan(Workload(prompt_lens=(10,), output_lens=(5,)), max_num_seqs=64).max_num_seqs == 64


def test_pinned_shares_of_kv_set_the_pools(plan):
    policy = plan(kv="host=.25,disk=.75", limits={"disk_bytes": 100 * GIB})
    assert policy.kv_disk_bytes == pytest.approx(3 * policy.kv_host_bytes, abs=4)
    policy = plan(kv="device=.5,host=.5", limits={"device": "sim", "device_bytes": 2 * GIB})
    assert policy.kv_device_bytes == pytest.approx(policy.kv_host_bytes, abs=4)


def test_kv_in_a_folder_in_memory_counts_as_host_memory(plan, llama_3b, make_limits, process_bytes):
    limits = {"disk_bytes": 100 * GIB, "offload_in_memory": True}
    policy = plan(kv="host=.5,disk=.5", limits=limits)
    used = footprint(policy, llama_3b, make_limits(**limits), process_bytes=process_bytes)
    assert used["host"]["KV in a memory file system"] == policy.kv_disk_bytes > 0
    assert sum(used["host"].values()) <= 4 * GIB


def test_schedules_set_their_own_quota(plan):
    zigzag, row = plan(schedule="zigzag"), plan(schedule="row", micro_batch_tokens=1024)
    assert zigzag.prefill_tokens == zigzag.max_num_seqs * 256
    assert row.prefill_tokens == 1024


# Budgets


@pytest.mark.matrix(1)
@pytest.mark.parametrize("device", ["cpu", "sim", "cuda"])
@settings(max_examples=10)
@given(
    host=st.floats(0.6, 12),
    device_gib=st.floats(0.3, 8),
    disk=st.sampled_from([0, 50 * GIB]),
    schedule=st.sampled_from(["diagonal", "zigzag", "row"]),
    pins=st.fixed_dictionaries(
        {},
        optional={
            "max_num_seqs": st.integers(1, 300),
            "prefill_tokens": st.integers(1, 20_000),
            "micro_batch_tokens": st.integers(16, 4096),
            "weights": st.sampled_from(["disk=1", "host=.5,disk=.5", "host=1"]),
            "kv": st.sampled_from(["host=1", "host=.3,disk=.7"]),
        },
    ),
    lengths=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 200)), min_size=1, max_size=40),
)
def test_budgets_are_never_exceeded(plan, llama_3b, make_limits, process_bytes, device, host, device_gib, disk, schedule, pins, lengths):
    limits = {
        "device": device,
        "host_bytes": int(host * GIB),
        "device_bytes": 0 if device == "cpu" else int(device_gib * GIB),
        "disk_bytes": disk,
    }
    job = Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths))
    if schedule != "diagonal":
        pins = {name: value for name, value in pins.items() if name != "prefill_tokens"}  # has no meaning there
    try:
        policy = plan(job, limits=limits, schedule=schedule, **pins)
    except CapacityError:
        return
    used = footprint(policy, llama_3b, make_limits(**limits), process_bytes=process_bytes)
    for tier, parts in used.items():
        assert sum(parts.values()) <= limits[f"{tier}_bytes"], tier
        assert min(parts.values()) >= 0
    sizes = JobSizes(llama_3b, job, policy.page_tokens)
    assert policy.workspace_bytes >= activation_bytes(llama_3b, sizes, policy)
    assert (policy.copies_in_bytes, policy.copies_out_bytes) == copies_bytes(llama_3b, sizes, policy)
    copied = policy.copies_in_bytes, policy.copies_in_bytes + policy.copies_out_bytes
    assert (used.get("device", {}).get("copies", 0), used["host"]["copies"]) == copied
    played = simulate(llama_3b, policy, job)
    assert played.num_refused < len(job)
    for tier, held in played.kv_bytes.items():
        assert held.max(initial=0) <= getattr(policy, f"kv_{tier}_bytes")


@pytest.mark.parametrize(
    ("tokens", "key_heads", "at_a_time"),
    [(4000, 1, 2 * 4000 * 4096), (4000, 8, 16 * MIB), (40_000, 8, 2 * 40_000 * 512), (1000, 8, 2 * 1000 * 4096)],
)
def test_sparse_attention_needs_memory_to_compute_generated_tokens_again(llama_3b, make_policy, tokens, key_heads, at_a_time):
    """Keys and values of a layer in one piece (4,096 bytes a token), and those of some key heads in float32, twice, beside the scores."""
    groups = tuple(dataclasses.replace(group, key_heads=key_heads) for group in llama_3b.kv_groups)
    sparse = dataclasses.replace(llama_3b, kv_groups=groups, sparse_attention=0.1)
    job = Workload(prompt_lens=(tokens - 50,) * 4, output_lens=(50,) * 4)
    dense, more = (activation_bytes(spec, JobSizes(spec, job, 16), make_policy(page_tokens=16)) for spec in (llama_3b, sparse))
    assert more - dense == pytest.approx(FRAGMENTATION * (tokens * 4096 + 2 * at_a_time + 10 * 4 * MIB), abs=1)


@pytest.mark.parametrize(("num_seqs", "tokens", "wanted"), [(1, 100, 10 * 100 * 4096), (4, 100, 40 * 100 * 4096), (400, 300, 64 * MIB)])
def test_attention_on_a_device_needs_memory_of_its_own(llama_3b, make_policy, num_seqs, tokens, wanted):
    """A few copies of a layer's keys and values (4,096 bytes a token), or of as many sequences as are attended to at a time."""
    job, tiny = Workload(prompt_lens=(tokens - 10,) * 400, output_lens=(10,) * 400), dataclasses.replace(llama_3b, vocab_size=1)
    host, device = (
        activation_bytes(tiny, JobSizes(tiny, job, 16), make_policy(page_tokens=16, max_num_seqs=num_seqs, device=device))
        for device in ("cpu", "cuda")
    )
    drawn = 10 * num_seqs * 8  # from one logit of each
    assert device - host == pytest.approx(FRAGMENTATION * (wanted + drawn), abs=1)


@pytest.mark.parametrize(("numbers", "wanted"), [(100, 512 * 100 * 2), (100_000, 512 * 100_000 * 2), (1_000_000, 256 * MIB)])
def test_experts_on_a_device_need_memory_of_their_own(llama_3b, make_policy, numbers, wanted):
    """As much as a micro-batch of 512 tokens can need, or as is used at a time."""
    job = Workload(prompt_lens=(256,) * 64, output_lens=(8,) * 64)
    experts = dataclasses.replace(llama_3b, expert_numbers_per_token=numbers)

    def needed(spec, device):
        policy = make_policy(device=device, max_num_seqs=64, prefill_tokens=1024, page_tokens=16)
        assert policy.micro_batch_tokens == 512
        return activation_bytes(spec, JobSizes(spec, job, 16), policy)

    assert needed(experts, "cuda") - needed(llama_3b, "cuda") == pytest.approx(FRAGMENTATION * wanted, abs=1)
    assert needed(experts, "cpu") == needed(llama_3b, "cpu")


def test_cuda_itself_is_part_of_the_budget(plan, llama_3b, make_limits, process_bytes):
    limits = {"device": "cuda", "device_bytes": 4 * GIB, "device_overhead_bytes": GIB, "host_bytes": 8 * GIB}
    policy = plan(limits=limits)
    used = footprint(policy, llama_3b, make_limits(**limits), process_bytes=process_bytes)["device"]
    assert used["CUDA context and libraries"] == GIB
    assert sum(used.values()) <= 4 * GIB
    more = budgets_of(make_limits(**limits | {"device_overhead_bytes": 0}), llama_3b, process_bytes)
    assert more.device_bytes - budgets_of(make_limits(**limits), llama_3b, process_bytes).device_bytes == GIB
    with pytest.raises(CapacityError, match=r"of device memory \(CUDA context and libraries 1\.0 GiB, .* raise device_mem"):
        plan(limits=limits | {"device_bytes": GIB + 100 * MIB})


def test_products_in_int8_hold_the_codes_of_one_input(llama_3b, make_policy):
    """That of the widest layer and a whole micro-batch, beside sums."""
    units = tuple(dataclasses.replace(unit, int8_flops_per_token=unit.flops_per_token * (not unit.head)) for unit in llama_3b.units)
    job, policy = Workload(prompt_lens=(256,) * 64, output_lens=(8,) * 64), make_policy(max_num_seqs=64, prefill_tokens=1024)
    plain, more = (
        activation_bytes(spec, JobSizes(spec, job, policy.page_tokens), policy)
        for spec in (llama_3b, dataclasses.replace(llama_3b, units=units))
    )
    assert more - plain == pytest.approx(FRAGMENTATION * (512 * 8192 + 8 * MIB), abs=1)


def scoring_bytes(spec, policy, **job):
    """What the workspace has for scores: the difference to the same prompts without any."""
    workload = Workload(prompt_lens=(256,) * 64, output_lens=(0,) * 64, **job)
    plain = Workload(prompt_lens=(256,) * 64, output_lens=(0,) * 64)
    one, other = (activation_bytes(spec, JobSizes(spec, each, policy.page_tokens), policy) for each in (workload, plain))
    return one - other


def test_logits_of_scored_positions_are_held_in_slices(llama_3b, make_policy):
    large = dataclasses.replace(llama_3b, vocab_size=1 << 18)
    policy = make_policy(max_num_seqs=64, prefill_tokens=4096, page_tokens=16)
    every, last = (scoring_bytes(large, policy, scored_lens=(number,) * 64) for number in (256, 1))
    assert last < every < 160 * MIB < 4096 * large.vocab_size * 2
    # All log probabilities of each position are asked for: these are all held, at least those of a pass of one prompt.
    alone = make_policy(max_num_seqs=1, prefill_tokens=1, page_tokens=16)
    everything = scoring_bytes(large, alone, scored_lens=(256,) * 64, num_likeliest=-1)
    assert everything > 256 * large.vocab_size * 16
    assert scoring_bytes(large, alone, scored_lens=(256,) * 64, num_likeliest=5) < 160 * MIB


def test_prompts_that_are_only_scored_have_no_logits_to_sample_from(llama_3b, make_policy):
    policy = make_policy(max_num_seqs=64, page_tokens=16)
    answered, only_scored = (
        activation_bytes(llama_3b, JobSizes(llama_3b, Workload(prompt_lens=(256,) * 64, output_lens=(most,) * 64), 16), policy)
        for most in (1, 0)
    )
    assert answered - only_scored >= 64 * llama_3b.vocab_size * 4 * 2


def test_a_device_draws_tokens_from_a_part_of_the_logits_at_a_time(llama_3b, make_policy):
    """Ten tensors of 16 MiB, or of the logits of a smaller batch in float64."""
    job, large = Workload(prompt_lens=(256,) * 64, output_lens=(8,) * 64), dataclasses.replace(llama_3b, vocab_size=1 << 17)
    attended = {64: 64 * MIB, 4: 10 * 4 * 264 * 4096}
    for num_seqs, at_a_time in ((64, 16 * MIB), (4, 4 * MIB)):
        on_cpu, on_device = (
            activation_bytes(large, JobSizes(large, job, 16), make_policy(device=device, max_num_seqs=num_seqs, page_tokens=16))
            for device in ("cpu", "cuda")
        )
        assert on_device - on_cpu == pytest.approx(FRAGMENTATION * (10 * at_a_time + attended[num_seqs]), abs=1)


def test_a_scoring_job_is_planned(plan, llama_3b):
    """Contexts with choices: passes of many prompts, and no room for logits of all of them."""
    choices = Workload(
        prompt_lens=(256, 257, 258) * 100, output_lens=(0,) * 300, shared_lens=(0, 256, 256) * 100, scored_lens=(1, 1, 2) * 100
    )
    policy = plan(choices)
    played = simulate(llama_3b, policy, choices)
    assert (played.num_refused, played.total().num_sampled, played.total().num_scored) == (0, 0, 400)
    assert played.num_passes < 12


def test_the_budget_decides_whether_it_fits(plan):
    """Just above what the message asks for it fits."""
    with pytest.raises(CapacityError, match=r"needs at least [\d.]+ GiB of host memory .* raise host_mem to ") as caught:
        plan(limits={"host_bytes": 550 * MIB})
    needed = float(str(caught.value).partition("at least ")[2].split()[0])
    plan(limits={"host_bytes": int((needed + 0.02) * GIB)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "host=.9,disk=.1"}, r"give host a smaller share in weights="),
        ({"max_num_seqs": 5000}, r"lower max_num_seqs"),
        ({"prefill_tokens": 1 << 20, "max_num_seqs": 190, "limits": {"host_bytes": GIB}}, r"lower prefill_tokens"),
        ({"limits": {"device": "cuda", "device_bytes": 100 * MIB}}, r"of device memory .* raise device_mem"),
    ],
)
def test_what_cannot_fit_is_refused_with_advice(plan, changes, message):
    with pytest.raises(CapacityError, match=message) as caught:
        plan(**changes)
    assert "GiB are missing" in str(caught.value)


def test_one_request_that_fits_nowhere(plan):
    with pytest.raises(CapacityError, match=r"of host memory .*KV of one request [\d.]+ GiB"):
        plan(Workload(prompt_lens=(50_000,), output_lens=(10,)))


def test_a_request_that_fits_nowhere_does_not_stop_the_others(plan, llama_3b):
    job = Workload(prompt_lens=(100_000, 100, 100), output_lens=(1000, 10, 10))
    policy = plan(job)
    assert simulate(llama_3b, policy, job).num_refused == 1
    assert policy.workspace_bytes < 100 * MIB  # and no room is kept for it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "device=.5,disk=.5"}, "on a CPU device there is no device tier"),
        ({"kv": "device=1"}, "on a CPU device there is no device tier"),
        ({"dtype": "auto"}, "a plan needs one of"),
        ({"kv": "disk=1", "kv_tiers": ("host",)}, "KV can live on host here, not on disk"),
        ({"dtype": "float64"}, "no rates for float64"),
    ],
)
def test_options_that_cannot_be_honoured(plan, options, message):
    with pytest.raises(OptionError, match=message):
        plan(**options)


# The limit, and the text


def test_expected_time_is_never_below_the_ideal(plan, llama_3b, make_machine):
    for changes in ({}, {"limits": {"device": "sim", "device_bytes": 3 * GIB}}, {"schedule": "row"}):
        policy = plan(**changes)
        played = simulate(llama_3b, policy, JOB)
        expected = played.seconds(Expectation(llama_3b, make_machine(), policy.dtype), policy)
        assert expected.sum() >= played.busiest_seconds(make_machine(), "bfloat16")


def test_homes_of_the_footprint_are_those_of_the_simulation(plan, llama_3b, make_limits, process_bytes):
    policy = plan()
    homes = unit_homes(llama_3b, policy.weights)
    resident = sum(unit.decoded_bytes for unit, home in zip(llama_3b.units, homes, strict=True) if home == "host")
    assert footprint(policy, llama_3b, make_limits(), process_bytes=process_bytes)["host"]["weights"] == resident
    assert simulate(llama_3b, policy, JOB).passes()[-1].disk_read_bytes >= llama_3b.streamed_bytes - resident
