import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.base.quantities import GIB
from flexgen.plan.model import KVGroupSpec
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions
from flexgen.plan.price.weights import unit_homes, weights_work
from flexgen.plan.price.work import PassLoad, PassWork, price
from flexgen.plan.workload import Workload

TOKEN = 30  # KV bytes of a token of the small model


def jobs(lengths):
    return Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths))


def scored_jobs(lengths):
    """Jobs of (prompt, answer or 0, scored positions)."""
    prompts, outputs, scored = zip(*lengths, strict=True)
    return Workload(prompt_lens=prompts, output_lens=outputs, scored_lens=scored)


def carried(played):
    """(prompt tokens, next tokens) of each pass."""
    return [(work.num_prompt_tokens, work.num_tokens - work.num_prompt_tokens) for work in played.passes()]


# Golden lists


def test_diagonal_admits_by_quota_and_refills(make_spec, make_policy):
    # Room for 12 tokens; a sequence of 3 + 3 holds 3, 4, 5 tokens in its three passes.
    policy = make_policy(kv_host_bytes=12 * TOKEN, prefill_tokens=3)
    played = simulate(make_spec(), policy, jobs([(3, 3)] * 5))
    assert carried(played) == [(3, 0), (3, 1), (3, 2), (3, 2), (3, 2), (0, 2), (0, 1)]
    assert played.kv_bytes["host"].tolist() == [TOKEN * each for each in (3, 7, 12, 12, 12, 9, 5)]
    assert played.live.tolist() == [1, 2, 3, 3, 3, 2, 1]


def test_diagonal_waits_where_the_projection_would_not_fit(make_spec, make_policy):
    # Two fit at once, but both would grow: 2 x 3 tokens now, 2 x 5 two passes later.
    policy = make_policy(kv_host_bytes=9 * TOKEN)
    assert carried(simulate(make_spec(), policy, jobs([(3, 3)] * 3))) == [(3, 0), (3, 1), (0, 2), (3, 1), (0, 1), (0, 1)]


def test_zigzag_fills_only_an_empty_block(make_spec, make_policy):
    policy = make_policy(kv_host_bytes=10 * TOKEN, schedule="zigzag")
    assert carried(simulate(make_spec(), policy, jobs([(3, 3)] * 3))) == [(6, 0), (0, 2), (0, 2), (3, 0), (0, 1), (0, 1)]


def test_a_zigzag_block_enters_whatever_the_quota(make_spec, make_policy):
    policy = make_policy(max_num_seqs=4, prefill_tokens=3, schedule="zigzag")
    assert carried(simulate(make_spec(), policy, jobs([(3, 2)] * 5))) == [(12, 0), (0, 4), (3, 0), (0, 1)]


def test_row_runs_one_micro_batch_to_its_end(make_spec, make_policy):
    policy = make_policy(micro_batch_tokens=7, schedule="row")
    assert carried(simulate(make_spec(), policy, jobs([(3, 2)] * 3))) == [(6, 0), (0, 2), (3, 0), (0, 1)]


def test_the_longest_answers_come_first(make_spec, make_policy):
    policy = make_policy(max_num_seqs=1)
    assert carried(simulate(make_spec(), policy, jobs([(5, 1), (2, 3), (7, 2)]))) == [(2, 0), (0, 1), (0, 1), (7, 0), (0, 1), (5, 0)]


SHARED = Workload(prompt_lens=(10,) * 4, output_lens=(2,) * 4, shared_lens=(0, 8, 8, 8))


@pytest.mark.parametrize(
    ("room", "passes"),
    [
        (1000, [(16, 0), (0, 4)]),
        # 8 of 25 tokens are set aside; the first holds 11 of the rest, each of the others 3.
        (25, [(14, 0), (0, 3), (2, 0), (0, 1)]),
        # The first needs everything.
        (11, [(10, 0), (0, 1), (6, 0), (0, 3)]),
    ],
)
def test_what_prompts_share_is_computed_and_held_once(make_spec, make_policy, room, passes):
    policy = make_policy(kv_host_bytes=room * TOKEN, schedule="zigzag")
    played = simulate(make_spec(), policy, SHARED)
    assert carried(played) == passes
    alone = simulate(make_spec(), policy, jobs([(10, 2)] * 4))
    (group,) = make_spec().kv_groups
    pairs_saved = 3 * (8 * 9 // 2)
    saved = alone.total().attention_flops - played.total().attention_flops
    assert saved == pairs_saved * group.num_layers * group.attention_flops_per_pair
    assert played.num_refused == 0


def test_shared_lengths_are_of_all_requests():
    assert SHARED.take([0, 2]).found_lens == (0, 8)
    assert jobs([(3, 2)]).found_lens == (0,)
    with pytest.raises(ValueError, match="the lengths of each kind are of all requests or of none: shared_lens"):
        Workload(prompt_lens=(3,), output_lens=(1,), shared_lens=(0, 0))


def test_prompts_that_are_only_scored_leave_after_their_pass(make_spec, make_policy):
    """Room for two at a time; nothing is sampled, and nothing is held beyond a pass."""
    policy = make_policy(kv_host_bytes=20 * TOKEN)
    played = simulate(make_spec(), policy, scored_jobs([(10, 0, 9)] * 5))
    assert carried(played) == [(20, 0), (20, 0), (10, 0)]
    assert played.kv_bytes["host"].tolist() == [20 * TOKEN, 20 * TOKEN, 10 * TOKEN]
    assert [(work.num_sampled, work.num_scored, work.num_sequences) for work in played.passes()] == [(0, 18, 2), (0, 18, 2), (0, 9, 1)]


def test_prompts_are_scored_in_their_first_pass(make_spec, make_policy):
    played = simulate(make_spec(), make_policy(), scored_jobs([(10, 3, 5), (4, 0, 3)]))
    assert [(work.num_sampled, work.num_scored) for work in played.passes()] == [(1, 8), (1, 0), (1, 0)]


def test_choices_of_one_more_token_are_computed_like_next_tokens(make_spec, make_policy):
    """A context of 8 tokens, and three choices after it: their prompts are one and two tokens longer."""
    choices = Workload(prompt_lens=(8, 9, 9, 10), output_lens=(0,) * 4, shared_lens=(0, 8, 8, 8), scored_lens=(1, 1, 1, 2))
    (work,) = simulate(make_spec(), make_policy(), choices).passes()
    assert (work.num_prompt_tokens, work.num_tokens, work.num_sequences, work.num_sampled, work.num_scored) == (10, 12, 4, 0, 5)
    (group,) = make_spec().kv_groups
    assert work.attention_flops == (36 + 9 + 10) * group.num_layers * group.attention_flops_per_pair
    assert work.host_step_bytes == 2 * 9 * group.num_layers * group.bytes_per_token


def test_the_quota_is_a_bucket(make_spec, make_policy):
    # 5 tokens a pass: two prompts of 3 overdraw it by 1, so that the next pass has 4, and the third 3.
    played = simulate(make_spec(), make_policy(prefill_tokens=5), jobs([(3, 4)] * 6))
    assert carried(played) == [(6, 0), (6, 2), (3, 4), (3, 5), (0, 4), (0, 2), (0, 1)]


def test_a_prompt_beyond_the_quota_is_paid_for_later(make_spec, make_policy):
    # 9 + 2 tokens against 4 a pass leave -7: the live sequence decodes alone until the bucket is above 0 again.
    played = simulate(make_spec(), make_policy(prefill_tokens=4), jobs([(2, 5), (9, 4), (2, 3), (2, 3)]))
    assert carried(played) == [(11, 0), (0, 2), (2, 2), (2, 3), (0, 3), (0, 1)]
    # An empty block does not wait.
    played = simulate(make_spec(), make_policy(prefill_tokens=4), jobs([(2, 1), (9, 1), (2, 1), (2, 1)]))
    assert carried(played) == [(11, 0), (2, 0), (2, 0)]


def test_what_can_never_fit_is_refused_and_the_rest_is_served(make_spec, make_policy):
    played = simulate(make_spec(), make_policy(kv_host_bytes=6 * TOKEN), jobs([(3, 2), (9, 2), (3, 2)]))
    assert played.num_refused == 1
    assert played.total().num_prompt_tokens == 6
    assert simulate(make_spec(), make_policy(kv_host_bytes=0), jobs([(1, 1)])).num_passes == 0


def test_two_homes_fill_in_proportion(make_spec, make_policy):
    policy = make_policy(kv_host_bytes=30 * TOKEN, kv_disk_bytes=90 * TOKEN, kv=Fractions(host=0.25, disk=0.75))
    played = simulate(make_spec(), policy, jobs([(10, 1)] * 8))
    assert {tier: used.tolist() for tier, used in played.kv_bytes.items()} == {"host": [20 * TOKEN], "disk": [60 * TOKEN]}


# Against a plain simulation, one sequence at a time


class Sequence:
    """`output_len` is the number of passes: one also for a prompt that is only scored."""

    def __init__(self, prompt_len, output_len, num_scored=0):
        self.prompt_len, self.output_len, self.is_answered = prompt_len, max(output_len, 1), output_len > 0
        self.num_scored = num_scored
        self.age, self.home = 0, ""

    def tokens(self, later=0):
        return self.prompt_len + self.age + later if self.age + later < self.output_len else 0


def pages_held(spec, policy, tokens):
    """Bytes of the pages from the first that any later token may see, at their most so far."""
    total = 0
    for group in spec.kv_groups:
        pages = -(-tokens // policy.page_tokens)
        if group.window:
            pages = min(pages, -(-group.window // policy.page_tokens) + 1)
        total += pages * policy.page_tokens * group.num_layers * group.bytes_per_token
    return total


def held_by(spec, policy, sequence, later=0):
    if sequence.home == "disk" and sequence.tokens(later):
        return max(pages_held(spec, policy, sequence.prompt_len + age) for age in range(sequence.output_len))
    return pages_held(spec, policy, sequence.tokens(later))


def fits(spec, policy, live, new, home):
    """Whether no future pass holds more than the home's pool."""
    pool = getattr(policy, f"kv_{home}_bytes")
    new.home = home
    neighbours = [each for each in live if each.home == home]
    return all(sum(held_by(spec, policy, each, later) for each in [*neighbours, new]) <= pool for later in range(new.output_len))


def plain_simulation(spec, policy, workload):
    """The work of each pass, and the KV held."""
    tiers = [tier for tier in ("device", "host", "disk") if getattr(policy, f"kv_{tier}_bytes")]
    scored = workload.scored_lens or (0,) * len(workload)
    waiting = [Sequence(*lengths) for lengths in zip(workload.prompt_lens, workload.output_lens, scored, strict=True)]
    waiting.sort(key=lambda each: -each.output_len)
    waiting = [each for each in waiting if any(fits(spec, policy, [], each, tier) for tier in tiers)]
    live, works, held = [], [], []
    credit, given = 0, dict.fromkeys(tiers, 0)
    while waiting or live:
        credit = min(credit + policy.prefill_tokens, policy.prefill_tokens)
        live = [each for each in live if each.age < each.output_len]
        new = []
        while waiting and (policy.schedule == "diagonal" or not live) and len(live) + len(new) < policy.max_num_seqs:
            candidate = waiting[0]
            if policy.schedule == "diagonal" and credit <= 0:
                break
            if policy.schedule == "row" and new and sum(each.prompt_len for each in [*new, candidate]) > policy.micro_batch_tokens:
                break
            by_need = sorted(tiers, key=lambda tier: given[tier] - getattr(policy.kv, tier) * (sum(given.values()) + 1))
            home = next((tier for tier in by_need if fits(spec, policy, live + new, candidate, tier)), None)
            if home is None:
                break
            candidate.home = home
            given[home] += candidate.prompt_len + candidate.output_len - 1
            credit -= candidate.prompt_len
            new.append(waiting.pop(0))
        if not live and not new:
            continue
        works.append(plain_price(spec, policy, tiers, live, new))
        live += new
        held.append({tier: sum(held_by(spec, policy, each) for each in live if each.home == tier) for tier in tiers})
        for each in live:
            each.age += 1
    return works, held


def plain_earlier(policy, group, new):
    """The tokens before all chunks but the first of these prompts, which none shares; one token alone is computed as a next token is."""
    starts = [start for each in new for start in range(0, each.prompt_len, policy.micro_batch_tokens) if each.prompt_len - start > 1]
    return sum(min(start, (group.window or 10**9) - 1) for start in starts) if policy.micro_batch_tokens > 1 else 0


def plain_price(spec, policy, tiers, decoding, new):
    pairs, attended = Counter(), {tier: Counter() for tier in tiers}
    for number, group in enumerate(spec.kv_groups):
        window = group.window or 10**9
        for each in new:
            pairs[number] += sum(min(position + 1, window) for position in range(each.prompt_len))
        for each in decoding:
            attended[each.home][number] += min(each.tokens(), window)
    groups = range(len(spec.kv_groups))
    apart = [tier for tier in tiers if tier != "device" and policy.device != "cpu"]
    load = PassLoad(
        prompt_tokens={tier: sum(each.prompt_len for each in new if each.home == tier) for tier in tiers},
        num_prompts={tier: sum(each.home == tier for each in new) for tier in tiers},
        next_tokens={tier: sum(each.home == tier for each in decoding) for tier in tiers},
        prompt_pairs=[pairs[number] for number in groups],
        attended_tokens={tier: [attended[tier][number] for number in groups] for tier in tiers},
        earlier_tokens={
            tier: [plain_earlier(policy, group, [each for each in new if each.home == tier]) for group in spec.kv_groups] for tier in apart
        },
        num_sampled=sum(each.is_answered for each in [*decoding, *new]),
        num_scored=sum(each.num_scored for each in new),
    )
    return price(load, spec, policy, weights_work(spec, unit_homes(spec, policy.weights), policy.device))


SMALL_JOBS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=14).map(scored_jobs)


@settings(max_examples=150, deadline=None)
@given(
    workload=SMALL_JOBS,
    schedule=st.sampled_from(["diagonal", "zigzag", "row"]),
    device=st.sampled_from(["cpu", "sim"]),
    window=st.none() | st.integers(1, 10),
    page_tokens=st.integers(1, 5),
    room=st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(any),
    quota=st.integers(1, 40),
    micro_batch_tokens=st.integers(1, 40),
    max_num_seqs=st.integers(1, 12),
)
def test_agrees_with_a_plain_simulation(
    make_spec, make_policy, workload, schedule, device, window, page_tokens, room, quota, micro_batch_tokens, max_num_seqs
):
    groups = (
        KVGroupSpec(num_layers=2, bytes_per_token=10, attention_flops_per_pair=4.0),
        KVGroupSpec(num_layers=1, bytes_per_token=10, attention_flops_per_pair=4.0, window=window),
    )
    spec = make_spec(groups=groups)
    policy = make_policy(
        device=device,
        schedule=schedule,
        page_tokens=page_tokens,
        kv_host_bytes=room[0] * TOKEN,
        kv_disk_bytes=room[1] * TOKEN * (device == "cpu"),
        kv_device_bytes=room[1] * TOKEN * (device == "sim"),
        prefill_tokens=quota,
        micro_batch_tokens=micro_batch_tokens,
        max_num_seqs=max_num_seqs,
        kv=Fractions(host=room[0] / sum(room), **{"disk" if device == "cpu" else "device": room[1] / sum(room)}),
        weights=Fractions(host=0.5, disk=0.5),
        embedding_resident=False,
    )
    works, held = plain_simulation(spec, policy, workload)
    played = simulate(spec, policy, workload)
    assert played.passes() == works
    assert [
        dict(zip(played.kv_bytes, row, strict=True)) for row in zip(*(each.tolist() for each in played.kv_bytes.values()), strict=True)
    ] == held


@settings(max_examples=100, deadline=None)
@given(
    workload=SMALL_JOBS,
    schedule=st.sampled_from(["diagonal", "zigzag", "row"]),
    room=st.integers(25, 200),
    cap=st.integers(1, 9),
    quota=st.integers(12, 60),
)
def test_everything_is_computed_once_and_within_the_bounds(make_spec, make_policy, workload, schedule, room, cap, quota):
    policy = make_policy(kv_host_bytes=room * TOKEN, max_num_seqs=cap, prefill_tokens=quota, schedule=schedule)
    played = simulate(make_spec(), policy, workload)
    total = played.total()
    assert played.num_refused == 0
    assert total.num_prompt_tokens == workload.prompt_tokens
    assert total.num_sampled == workload.output_tokens
    assert total.num_scored == workload.scored_tokens
    assert total.num_tokens == workload.prompt_tokens + sum(workload.answer_lens) - len(workload)
    assert played.kv_bytes["host"].max() <= room * TOKEN
    assert played.live.max() <= cap
    if schedule == "diagonal":
        assert max(prompts for prompts, _ in carried(played)) < quota + max(workload.prompt_lens)
    assert played.live.min() > 0


def test_a_large_job_of_many_lengths_is_conserved(make_spec, make_policy):
    draw = random.Random(5)
    workload = jobs([(draw.randrange(1, 500), draw.randrange(1, 256)) for _ in range(10_000)])
    played = simulate(make_spec(), make_policy(kv_host_bytes=60_000 * TOKEN, prefill_tokens=2000, page_tokens=16), workload)
    assert int(np.sum(played.work.num_sampled)) == workload.output_tokens
    assert int(np.sum(played.work.num_prompt_tokens)) == workload.prompt_tokens
    assert played.kv_bytes["host"].max() <= 60_000 * TOKEN


def test_an_empty_job_has_no_passes(make_spec, make_policy, make_machine):
    played = simulate(make_spec(), make_policy(), jobs([]))
    assert (played.num_passes, played.passes(), played.total(), played.busiest_seconds(make_machine(), "bfloat16")) == (
        0,
        [],
        PassWork(),
        0.0,
    )


def test_the_diagonal_beats_the_zigzag_where_passes_are_bound_by_the_disk(llama_3b, make_policy, make_machine):
    workload = jobs([(128, 128)] * 400)
    diagonal = make_policy(kv_host_bytes=2 * GIB, prefill_tokens=128, page_tokens=16)
    zigzag = dataclasses.replace(diagonal, schedule="zigzag", prefill_tokens=1 << 30)
    seconds = [simulate(llama_3b, policy, workload).busiest_seconds(make_machine(), "bfloat16") for policy in (diagonal, zigzag)]
    assert seconds[0] < 0.8 * seconds[1]
