"""Blocks in flight cannot change answers: one, two and three of them give the answers of the engine on one machine.

A stand-in runs the whole model in this process (whole_model.py); the stages themselves are tested where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen.engine.admission import LengthForecast
from flexgen.engine.engine import Engine
from flexgen.engine.pipeline import PipelineEngine
from flexgen.errors import RequestError
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions
from flexgen.request import Generated, TokenRequest
from flexgen.text.common_prefixes import CommonPrefixes, PrefixCensus
from tests.engine.test_guided import Sum
from tests.engine.whole_model import POLICY, WholeModel, assert_alike, assert_all_free, pipeline_engine, requests, tokens

ON_DISK: dict[str, Any] = {
    "kv": Fractions(host=0.5, disk=0.5), "kv_disk_bytes": 4 << 20, "kv_staging_bytes": 1 << 20, "kv_tail_bytes": 1 << 20
}  # fmt: skip
POLICIES = {
    "host": POLICY,
    "disk": replace(POLICY, **ON_DISK),
    "zigzag": replace(POLICY, schedule="zigzag"),
    "row": replace(POLICY, schedule="row"),
}


class EndsWith:
    """A stop string, after so many tokens."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, token_ids: Sequence[int]) -> str | None:
        return "end" if len(token_ids) >= self._count else None


def alike() -> list[TokenRequest]:
    """An instruction, of which groups of requests have further pages in common, and choices that are scored after a context."""
    instruction = tokens(35, 100)
    groups = [(*instruction, *tokens(32, 101 + group)) for group in range(3)]
    asked = [
        TokenRequest(index=index, prompt_token_ids=(*groups[index % 3], *tokens(1 + index, 200 + index)), max_tokens=4)
        for index in range(9)
    ]
    context = tokens(33, 300)
    return asked + [
        TokenRequest(
            index=20 + index, prompt_token_ids=(*context, *tokens(3, 310 + index)), max_tokens=0, num_prompt_logprobs=1,
            first_scored=len(context),
        )
        for index in range(5)
    ]  # fmt: skip


def common(asked: Sequence[TokenRequest]) -> CommonPrefixes:
    census = PrefixCensus(POLICY.page_tokens)
    for each in asked:
        census.add(each.sharable, each.offered)
    return census.common()


# Each of these makes its requests anew, because guides remember what they were asked.
KINDS: dict[str, Callable[[], list[TokenRequest]]] = {
    "greedy": requests,
    "drawn": lambda: requests(temperature=0.9, top_p=0.9, top_k=30, seed=7),
    "penalties": lambda: requests(temperature=0.7, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    "log probabilities": lambda: requests(num_logprobs=3, temperature=0.5, seed=1),
    "scored": lambda: requests(num_prompt_logprobs=2, num_logprobs=1),
    "only scored": lambda: [replace(each, max_tokens=0) for each in requests(num_prompt_logprobs=2)],
    "guided": lambda: [replace(each, guide=Sum(length=1 + each.index % 4)) if each.index % 2 else each for each in requests()],
    "failing guide": lambda: [
        replace(each, guide=Sum(error=RequestError("no", code="c"))) if each.index == 4 else each for each in requests()
    ],
    "stop strings": lambda: [replace(each, stops=EndsWith(1 + each.index % 5)) for each in requests()],
    "stop tokens": lambda: requests(stop_token_ids=frozenset(range(5, 60))),
    "resumed": lambda: [
        replace(each, generated=Generated(token_ids=tokens(min(each.index % 4, each.max_tokens), each.index))) for each in requests()
    ],
    "never fit": lambda: [*requests(), *(replace(each, index=50 + each.index, prompt_token_ids=(5,) * 9000) for each in requests()[:3])],
    "alike": alike,
}  # fmt: skip


@pytest.fixture(scope="module")
def single(novels_opt: Path) -> Iterator[Engine]:
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    with Engine(model, POLICY, poison=True) as engine:
        yield engine


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} blocks".format)
def opened(request: pytest.FixtureRequest, novels_opt: Path) -> Iterator[tuple[PipelineEngine, WholeModel]]:
    with pipeline_engine(novels_opt, replace(POLICY, num_blocks=request.param)) as found:
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_one_machine(kind: str, single: Engine, opened: tuple[PipelineEngine, WholeModel]) -> None:
    engine, stages = opened
    stages.most_in_flight = 0
    wanted, found = list(single.generate(KINDS[kind]())), list(engine.generate(KINDS[kind]()))
    assert len(wanted) == len(KINDS[kind]())
    assert_alike(found, wanted)
    assert_all_free(engine, stages)
    assert stages.most_in_flight == len(engine.blocks)
    assert engine.log.counts.output_tokens == single.log.counts.output_tokens
    assert engine.log.counts.scored_tokens == single.log.counts.scored_tokens


@pytest.mark.parametrize("name", POLICIES)
def test_wherever_kv_lives_and_whatever_the_schedule(name: str, single: Engine, novels_opt: Path, tmp_path: Path) -> None:
    with pipeline_engine(novels_opt, replace(POLICIES[name], num_blocks=2), tmp_path) as (engine, stages):
        assert_alike(list(engine.generate(requests())), list(single.generate(requests())))
        assert_all_free(engine, stages)
        assert engine.placement()["kv"].keys() == engine.runner.cache.pools.keys()
        assert all(0 < used <= 2 * 4 << 20 for used in engine.placement()["kv"].values())
        tails = [pool.tails for pool in engine.runner.cache.pools.values() if hasattr(pool, "tails")]  # type: ignore[attr-defined]
        assert all(not slots for each in tails for slots in each._slots), "tails are free again, although no page came back here"


def test_preemption_concerns_one_block(single: Engine, novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages run out, because all answers are expected to end at once."""
    asked = [TokenRequest(index=index, prompt_token_ids=tokens(8, index), max_tokens=40) for index in range(20)]
    wanted = list(single.generate(asked))
    monkeypatch.setattr(LengthForecast, "expect", lambda *_: 1)
    (group,) = single.cache.groups
    small = replace(POLICY, kv_host_bytes=9 * group.page_bytes, max_num_seqs=8, longest_sequence=64, num_blocks=2)
    with pipeline_engine(novels_opt, small) as (engine, stages):
        found = list(engine.generate(asked))
        assert sum(each.num_preemptions for each in found) == engine.log.counts.preemptions > 0
        assert {block for event, block in stages.events if event == "begin"} == {0, 1}
        assert_all_free(engine, stages)
    assert_alike(found, wanted)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_prefixes_are_shared_within_a_block(num_blocks: int, single: Engine, novels_opt: Path) -> None:
    """Requests with a context of their own go to the same block, so that each context is computed once, as on one machine."""
    asked = alike()
    prefixes = common(asked)
    wanted = list(single.generate(asked, prefixes=prefixes))
    most = replace(POLICY, max_num_seqs=5, num_blocks=num_blocks)
    with pipeline_engine(novels_opt, most) as (engine, stages):
        block_for, went = engine._block_for, dict[int, int]()

        def noted(request: TokenRequest) -> Any:
            block = block_for(request)
            went[request.index] = engine.blocks.index(block)
            return block

        engine._block_for = noted  # type: ignore[method-assign]
        found = list(engine.generate(asked, prefixes=prefixes))
        assert_all_free(engine, stages)
    assert_alike(found, wanted)
    assert engine.log.counts.shared_prompt_tokens > 0
    for group in ([0, 3, 6], [1, 4, 7], [2, 5, 8], [20, 21, 22, 23, 24]):
        assert len({went[index] for index in group}) == 1
    assert set(went.values()) == set(range(num_blocks)), "and the groups are spread"
    lost = single.log.counts.shared_prompt_tokens - engine.log.counts.shared_prompt_tokens
    assert lost <= 32 * (num_blocks - 1), "only the instruction is computed in every block"
