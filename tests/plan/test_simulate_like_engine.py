"""The simulation admits as the engine's own schedule does, on the engine's own page lists."""

import heapq

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.engine.admission import Admission, Homes
from flexgen.engine.prefixes import PrefixStore
from flexgen.engine.schedule import SCHEDULES, Quota
from flexgen.engine.sequence import LiveSequence
from flexgen.kv.cache import KVCache
from flexgen.kv.format import PlainKV
from flexgen.kv.pages import KVGroup, Pool
from flexgen.passes.geometry import KVGeometry
from flexgen.plan.model import KVGroupSpec
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions
from flexgen.plan.workload import Workload
from flexgen.request import TokenRequest

TOKEN_BYTES = 2 * 16  # of KV, over two layers


def engine_passes(policy, workload):
    """(prompt tokens, next tokens) of each pass, by the engine's parts."""
    group = KVGroup(
        layers=(0, 1), geometry=KVGeometry(key_heads=1, key_dim=4, value_heads=1, value_dim=4),
        page_tokens=policy.page_tokens, format=PlainKV(torch.bfloat16),
    )  # fmt: skip
    sizes = {tier: getattr(policy, f"kv_{tier}_bytes") for tier in ("device", "host", "disk")}
    pools = {tier: Pool((group,), [size // group.page_bytes], reserves_ahead=[tier == "disk"]) for tier, size in sizes.items() if size}
    cache = KVCache((group,), pools)
    admission = Admission(cache, Homes({tier: getattr(policy.kv, tier) for tier in cache.pools}), PrefixStore(cache))
    quota = Quota(policy.prefill_tokens)
    waiting, live, passes = [], [], []
    for index, (prompt_len, output_len) in enumerate(zip(workload.prompt_lens, workload.output_lens, strict=True)):
        scored = {} if output_len else {"num_prompt_logprobs": 1, "alternatives": (2,), "first_scored": prompt_len}
        request = TokenRequest(index=index, prompt_token_ids=(1,) * prompt_len, max_tokens=output_len, **scored)
        sequence = LiveSequence(request, output_len)
        if admission.can_ever_fit(sequence):
            heapq.heappush(waiting, (-sequence.remaining, index, sequence))

    def enter(sequence):
        if admission.admit(sequence):
            live.append(sequence)
            return True
        return False

    while waiting or live:
        old = list(live)
        admission.begin_pass(old)
        candidates = (each[2] for each in sorted(waiting))
        for _ in range(SCHEDULES[policy.schedule](candidates, len(live), policy, quota, enter)):
            heapq.heappop(waiting)
        if not live:
            continue
        passes.append((sum(each.num_new for each in live if each not in old), len(old)))
        for sequence in list(live):
            assert cache.reserve(sequence.kv, len(sequence.tokens)), "the projection was wrong"
            sequence.num_stored = len(sequence.tokens)
            if sequence.request.max_tokens:
                sequence.append(1)
                cache.trim(sequence.kv, sequence.num_stored)
            if sequence.num_generated == sequence.request.max_tokens:
                cache.release(sequence.kv)
                live.remove(sequence)
    return passes


@settings(max_examples=200)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=14),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    page_tokens=st.integers(1, 5),
    pages=st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(any),
    quota=st.integers(1, 40),
    micro_batch_tokens=st.integers(1, 40),
    max_num_seqs=st.integers(1, 12),
)
def test_admits_like_the_engine(make_spec, make_policy, lengths, schedule, page_tokens, pages, quota, micro_batch_tokens, max_num_seqs):
    spec = make_spec(kv_groups=(KVGroupSpec(num_layers=2, bytes_per_token=16, attention_flops_per_pair=4.0),))
    workload = Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths))
    policy = make_policy(
        schedule=schedule,
        page_tokens=page_tokens,
        kv_host_bytes=pages[0] * page_tokens * TOKEN_BYTES,
        kv_disk_bytes=pages[1] * page_tokens * TOKEN_BYTES,
        kv=Fractions(host=pages[0] / sum(pages), disk=pages[1] / sum(pages)),
        prefill_tokens=quota,
        micro_batch_tokens=micro_batch_tokens,
        max_num_seqs=max_num_seqs,
    )
    played = [(work.num_prompt_tokens, work.num_tokens - work.num_prompt_tokens) for work in simulate(spec, policy, workload).passes()]
    assert played == engine_passes(policy, workload)
