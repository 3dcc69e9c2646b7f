"""What requests hold and bring."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.test_simulate import TOKEN

from flexgen.plan.model import KVGroupSpec
from flexgen.plan.price.requests import RequestLoad, attended_tokens, earlier_tokens, held_kv_bytes
from flexgen.plan.workload import Workload


def test_pages_round_up_and_windows_free_them(make_spec):
    groups = (KVGroupSpec(num_layers=1, bytes_per_token=1, attention_flops_per_pair=1.0, window=7),)
    assert held_kv_bytes(make_spec(groups=groups), 4, 13).tolist() == [0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 12]
    assert held_kv_bytes(make_spec(), 4, 5).tolist() == [0, 4 * TOKEN, 4 * TOKEN, 4 * TOKEN, 4 * TOKEN, 8 * TOKEN]


@pytest.mark.parametrize("window", [1, 5, 9, 10, 12, 40])
def test_the_tokens_that_next_tokens_see_are_counted_one_by_one(window):
    seen = sum(min(10 + step, window) for step in range(1, 7))
    assert attended_tokens(np.array([10.0]), np.array([7.0]), window).item() == seen


@settings(max_examples=300)
@given(found=st.integers(0, 40), own=st.integers(1, 60), window=st.integers(1, 80), chunk_tokens=st.integers(1, 70), whole=st.booleans())
def test_what_chunks_go_on_from_is_counted_one_by_one(found, own, window, chunk_tokens, whole):
    size = own if whole else chunk_tokens
    starts = [start for start in range(0, own, size) if min(size, own - start) > 1 or found + start == 0]
    seen = sum(min(found + start, window - 1) for start in starts)
    assert earlier_tokens(np.array([found]), np.array([own]), window, np.array([size])).item() == seen
    assert earlier_tokens(np.array([float(found)]), np.array([float(own)]), float(window), float(size)).item() == seen


def test_the_load_of_a_prompt_in_chunks(make_spec):
    """Of 10 tokens in chunks of 4, the second sees 4 before it, the third 8; a prompt after a prefix of 6 sees that."""
    job = Workload(prompt_lens=(10, 8), output_lens=(3, 1), shared_lens=(0, 6))
    assert RequestLoad.of(make_spec(), job).earlier_tokens == {}
    load = RequestLoad.of(make_spec(), job, 4)
    assert {home: each.tolist() for home, (each,) in load.earlier_tokens.items()} == {"host": [4 + 8, 6], "disk": [0, 6]}
    assert load.mean().at("host", 8).earlier_tokens == {"host": [8 * 18 / 4]}
    assert load.mean().at("disk", 8).earlier_tokens == {"disk": [8 * 6 / 4]}
    assert load.mean().at("device", 8).earlier_tokens == {}


def test_the_mean_of_a_live_sequence_is_that_of_all_passes(make_spec):
    load = RequestLoad.of(make_spec(), Workload(prompt_lens=(10, 4), output_lens=(3, 1), shared_lens=(0, 2)))
    assert load.prompt_tokens.tolist() == [10, 2]
    assert load.next_tokens.tolist() == [2, 0]
    assert load.attended_tokens[0].tolist() == [11 + 12, 0]
    mean = load.mean()
    assert (mean.prompt_tokens, mean.num_prompts, mean.next_tokens) == (12 / 4, 2 / 4, 2 / 4)
    assert mean.attended_tokens == (23 / 4,)
    assert mean.at("host", 8).attended_tokens == {"host": [46]}
    assert (mean.num_sampled, mean.num_scored) == (4 / 4, 0)


def test_a_prompt_that_is_only_scored_is_a_pass_without_a_token(make_spec):
    workload = Workload(prompt_lens=(10, 17, 9), output_lens=(0, 0, 2), shared_lens=(0, 16, 0), scored_lens=(4, 1, 0))
    assert (workload.answer_lens, workload.sampled_lens) == ((1, 1, 2), (0, 0, 2))
    assert (workload.output_tokens, workload.scored_tokens, workload.paced_tokens) == (2, 5, 2)
    load = RequestLoad.of(make_spec(), workload)
    assert load.num_sampled.tolist() == [0, 0, 2]
    assert load.num_scored.tolist() == [4, 1, 0]
    # The second has one token of its own after what others computed: a next token, as far as computing goes.
    assert load.num_prompts.tolist() == [1, 0, 1]
    assert load.prompt_tokens.tolist() == [10, 0, 9]
    assert load.next_tokens.tolist() == [0, 1, 1]
    assert load.prompt_pairs[0].tolist() == [55, 0, 45]
    assert load.attended_tokens[0].tolist() == [0, 17, 10]
    mean = load.mean()
    assert (mean.num_prompts, mean.next_tokens) == (2 / 4, 2 / 4)


def test_scores_are_of_all_requests_or_of_none():
    assert Workload(prompt_lens=(3, 4), output_lens=(1, 1), scored_lens=(0, 0)).scored_lens == ()
    with pytest.raises(ValueError, match="the lengths of each kind are of all requests or of none: scored_lens"):
        Workload(prompt_lens=(3, 4), output_lens=(1, 1), scored_lens=(1,))
    only_scored = Workload(prompt_lens=(3, 4), output_lens=(0, 0), scored_lens=(2, 3))
    assert (only_scored.output_tokens, only_scored.paced_tokens) == (0, 7)


def test_a_last_page_in_the_dtype_of_computing_counts_once_for_each_sequence(make_spec):
    group = KVGroupSpec(num_layers=2, bytes_per_token=3, attention_flops_per_pair=4.0, exact_bytes_per_token=10)
    spec = make_spec(groups=(group,), kv_format="int4")
    assert held_kv_bytes(spec, 16, 33).tolist() == [0, *[2 * 16 * (3 + 10)] * 16, *[2 * 16 * (6 + 10)] * 16, 2 * 16 * (9 + 10)]
    assert (spec.kv_bytes_per_token, spec.exact_kv_bytes_per_token) == (6, 20)
    assert spec.kv_bytes(33) == 2 * (33 * 3 + 16 * 10)
