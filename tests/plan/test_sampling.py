"""Jobs that are too large to be played again and again, extrapolated from samples."""

import dataclasses
import random

import pytest

from flexgen.base.quantities import GIB
from flexgen.plan.play.answer_lengths import expected
from flexgen.plan.play.sampling import PLAYED_REQUESTS, SEARCH_BLOCKS, SEARCH_REQUESTS, Samples, play_sample
from flexgen.plan.play.simulate import simulate
from flexgen.plan.workload import Workload


@pytest.mark.parametrize(("kv_bytes", "prefill_tokens"), [(3 * GIB, 1024), (60 * GIB, 8192)])
@pytest.mark.parametrize("unknown", [False, True])
def test_large_jobs_are_extrapolated(llama_3b, make_machine, make_policy, kv_bytes, prefill_tokens, unknown):
    draw = random.Random(3)
    lengths = [(draw.randrange(50, 400), draw.randrange(8, 64)) for _ in range(30_000)]
    workload = Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths))
    if unknown:
        workload = expected(dataclasses.replace(workload, may_end_early=True))
    most = kv_bytes // llama_3b.kv_bytes(300)
    policy = make_policy(kv_host_bytes=kv_bytes, max_num_seqs=most, prefill_tokens=prefill_tokens, page_tokens=16)
    exact = simulate(llama_3b, policy, workload).busiest_seconds(make_machine(), "bfloat16")
    searched, played = Samples(workload).of(policy.max_num_seqs), Samples.played_once(workload).of(policy.max_num_seqs)
    for sample, least, tolerance in ((searched, SEARCH_REQUESTS, 0.13 if unknown else 0.05), (played, PLAYED_REQUESTS // 2, 0.04)):
        assert max(least, SEARCH_BLOCKS * policy.max_num_seqs) <= sample.queue.num_requests < len(workload)
        played = play_sample(llama_3b, policy, sample)
        guessed = played.extrapolated([job.busiest_seconds(make_machine(), "bfloat16") for job in played.jobs])
        assert guessed == pytest.approx(exact, rel=tolerance)
