"""RequestLengths: the workload of requests that are seen one by one."""

from __future__ import annotations

from flexgen.plan.workload import Workload
from flexgen.request import TokenRequest
from flexgen.session.lengths import RequestLengths
from flexgen.text.common_prefixes import NO_PREFIXES, PrefixCensus


def request(prompt: tuple[int, ...], max_tokens: int) -> TokenRequest:
    return TokenRequest(index=0, prompt_token_ids=prompt, max_tokens=max_tokens)


def test_what_an_earlier_run_generated_is_prompt() -> None:
    lengths = RequestLengths(None)
    lengths.add(request((1, 2), 5), 3)
    lengths.add(request((1, 2), 5), 5)  # all of it was generated, and its end was not stored
    lengths.add(request((1,), 0))
    assert lengths.workload() == Workload(prompt_lens=(5, 7, 1), output_lens=(2, 1, 0))
    assert lengths.common_prefixes() is NO_PREFIXES


def test_what_prompts_have_in_common() -> None:
    lengths = RequestLengths(PrefixCensus(2))
    lengths.add(request((1, 2, 3), 1))
    lengths.add(request((1, 2, 4), 1))
    assert lengths.workload().shared_lens == (0, 2)
    assert [(point.length, point.num_requests) for point in lengths.common_prefixes().path((1, 2, 9))] == [(2, 2)]


def test_scored_positions() -> None:
    lengths = RequestLengths(None)
    lengths.add(TokenRequest(index=0, prompt_token_ids=(1, 2, 3), max_tokens=0, num_prompt_logprobs=4))
    lengths.add(request((1, 2, 3), 1))
    workload = lengths.workload()
    assert workload.scored_lens == (2, 0)
    assert workload.num_likeliest == 4
    lengths.add(TokenRequest(index=10, prompt_token_ids=(1, 2), max_tokens=0, num_prompt_logprobs=-1))
    lengths.add(TokenRequest(index=11, prompt_token_ids=(1, 2), max_tokens=0, num_prompt_logprobs=7))
    assert lengths.workload().num_likeliest == -1


def test_answers_that_may_end_early() -> None:
    lengths = RequestLengths(None)
    lengths.add(TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=3, stop_token_ids=frozenset({2})))
    lengths.add(request((1,), 3))
    assert lengths.workload().may_end_early
