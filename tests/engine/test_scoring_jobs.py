"""Jobs that only score: what their passes compute is what the planner plays, they are packed full, and nothing outlives its pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.engine.packing import SMALL_REMAINDER
from flexgen.passes.plan import PassPlan
from flexgen.plan.play.simulate import simulate
from flexgen.plan.price.work import PassWork
from flexgen.plan.workload import Workload
from flexgen.report.pass_log import PassLog
from flexgen.request import TokenRequest, TokenResult
from flexgen.session.lengths import RequestLengths
from flexgen.text.choices import choice_requests
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from tests.test_matrix import PAGE_TOKENS, ROOM, Case, Checkpoint, Run

CHOICES = ((3,), (7, 9), (11, 12, 13), (7, 20))


@pytest.fixture(scope="module")
def checkpoint(novels_qwen3: Path) -> Checkpoint:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(novels_qwen3)
    token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    return Checkpoint(novels_qwen3, config, (), {}, (), {}, token_bytes)


def tokens(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 400, (length,), generator=generator).tolist())


def classifications(context_len: int, count: int) -> list[TokenRequest]:
    """Contexts of one length, each with four choices after it."""
    found: list[TokenRequest] = []
    for number in range(count):
        found += choice_requests(10 * number, tokens(context_len, number), CHOICES)
    return found


def echoes(prompt_len: int, count: int) -> list[TokenRequest]:
    return [
        TokenRequest(index=i, prompt_token_ids=tokens(prompt_len, i), max_tokens=0, num_prompt_logprobs=1, first_scored=1 + i % 3)
        for i in range(count)
    ]


def job(requests: Sequence[TokenRequest], *, shares: bool = True) -> tuple[Workload, CommonPrefixes]:
    """What a call plans for, and what its requests have in common."""
    lengths = RequestLengths(PrefixCensus(PAGE_TOKENS) if shares else None)
    for each in requests:
        lengths.add(each)
    return lengths.workload(), lengths.common_prefixes()


class CountingRun(Run):
    """A run that keeps the plans of its passes and their counted work."""

    def __init__(self, checkpoint: Checkpoint, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(checkpoint, case.policy(checkpoint), folder, device_bytes=64 << 20)
        self.plans: list[PassPlan] = []
        self.works: list[PassWork] = []
        run, add = self.engine.runner.run, PassLog.add

        def running(plan: PassPlan, *args: Any) -> Any:
            self.plans.append(plan)
            return run(plan, *args)

        def adding(passes: PassLog, seconds: float, work: PassWork, waits: Any) -> None:
            self.works.append(work)
            add(passes, seconds, work, waits)

        monkeypatch.setattr(self.engine.runner, "run", running)
        monkeypatch.setattr(PassLog, "add", adding)

    def __enter__(self) -> CountingRun:
        return self

    def scored(self, requests: Iterable[TokenRequest], prefixes: CommonPrefixes) -> dict[int, TokenResult]:
        results = {result.index: result for result in self.engine.generate(requests, prefixes=prefixes)}
        assert not [result.error for result in results.values() if result.error is not None]
        self.check_budgets()
        return results

    def planned(self, workload: Workload) -> list[PassWork]:
        return simulate(self.engine.runner.model.spec, self.policy, workload).passes()


def case(schedule: str = "zigzag", *, max_num_seqs: int = 100, micro_batch_tokens: int = 64, room: int = ROOM, device: str = "cpu") -> Case:
    return Case(device, {"host": 1.0}, {"host": room}, schedule, max_num_seqs, micro_batch_tokens)


JOBS = {
    "choices after whole pages": classifications(3 * PAGE_TOKENS, 4),
    "choices": classifications(41, 4),
    "echoes": echoes(30, 9),
    "both, and answers": [
        *classifications(20, 2),
        *(dataclasses.replace(each, index=100 + each.index, max_tokens=each.index % 3) for each in echoes(25, 6)),
    ],
}


@pytest.mark.parametrize("max_num_seqs", [100, 7])
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("name", JOBS)
def test_the_passes_are_those_that_the_planner_plays(
    checkpoint: Checkpoint, name: str, device: str, max_num_seqs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt is cut: the last token of one would be computed like a next token."""
    workload, prefixes = job(JOBS[name])
    chosen = case(max_num_seqs=max_num_seqs, device=device, micro_batch_tokens=4096)
    with CountingRun(checkpoint, chosen, tmp_path, monkeypatch) as run:
        results = run.scored(JOBS[name], prefixes)
        planned = run.planned(workload)
        shared = run.engine.log.counts.shared_prompt_tokens
    assert results.keys() == {each.index for each in JOBS[name]}
    assert shared == sum(workload.found_lens)
    assert len(run.works) == len(planned)
    for counted, played in zip(run.works, planned, strict=True):
        assert dataclasses.asdict(counted) == pytest.approx(dataclasses.asdict(played))
    assert sum(work.num_scored for work in run.works) == workload.scored_tokens


def test_a_context_is_computed_once_within_its_pass(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole pages: the choices compute nothing but their own tokens, and those without the last."""
    requests = classifications(3 * PAGE_TOKENS, 5)
    with CountingRun(checkpoint, case(), tmp_path, monkeypatch) as run:
        alone = run.scored(requests, NO_PREFIXES)
        run.works.clear()
        shared = run.scored(requests, job(requests)[1])
    (work,) = run.works
    assert work.num_tokens == 5 * (3 * PAGE_TOKENS + sum(len(choice) - 1 for choice in CHOICES))
    assert (work.num_sampled, work.num_scored) == (0, 5 * (1 + sum(len(choice) - 1 for choice in CHOICES)))
    for index, result in alone.items():
        for one, other in zip(result.prompt_logprobs or (), shared[index].prompt_logprobs or (), strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_passes_are_filled_to_whole_micro_batches(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are cut where one is full; a small remainder waits for the next pass, a large one is computed."""
    requests = echoes(30, 40)
    with CountingRun(checkpoint, case("diagonal"), tmp_path, monkeypatch) as run:
        run.scored(requests, NO_PREFIXES)
    sizes = [[sum(each.length for each in batch.slices) for batch in plan.micro_batches] for plan in run.plans]
    assert len(sizes) > 4
    assert all(size == 64 for batches in sizes for size in batches[:-1])
    assert all(batches[-1] > SMALL_REMAINDER * 64 for batches in sizes[:-1])
    assert sum(map(sum, sizes)) == 40 * 29, "the last tokens are computed nowhere"


def test_prompts_are_admitted_as_if_their_kv_were_gone_after_the_pass(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pages each, in a pool of ten: a pass of five after a pass of five."""
    requests = echoes(2 * PAGE_TOKENS + 1, 15)
    with CountingRun(checkpoint, case(room=10 * PAGE_TOKENS), tmp_path, monkeypatch) as run:
        run.scored(requests, NO_PREFIXES)
    assert [work.num_sequences for work in run.works] == [5, 5, 5]


def test_contexts_in_little_room_are_still_computed_once(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context and its choices take six pages, of eight."""
    requests = classifications(3 * PAGE_TOKENS, 4)
    workload, prefixes = job(requests)
    with CountingRun(checkpoint, case(room=8 * PAGE_TOKENS), tmp_path, monkeypatch) as run:
        run.scored(requests, prefixes)
        assert run.engine.log.counts.shared_prompt_tokens == sum(workload.found_lens)
        assert run.engine.log.counts.preemptions == 0


def test_without_anything_to_score_nothing_is_computed(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        TokenRequest(index=0, prompt_token_ids=tokens(9, 0), max_tokens=0),
        TokenRequest(index=1, prompt_token_ids=tokens(9, 1), max_tokens=0, num_prompt_logprobs=0, first_scored=9),
        TokenRequest(index=2, prompt_token_ids=(5,), max_tokens=0, num_prompt_logprobs=0),
    ]
    with CountingRun(checkpoint, case(), tmp_path, monkeypatch) as run:
        results = run.scored(requests, job(requests)[1])
    assert run.works == []
    assert {index: (result.finish_reason, result.prompt_logprobs) for index, result in results.items()} == {
        0: ("length", None),
        1: ("length", ()),
        2: ("length", ()),
    }


def test_what_was_scored_is_reported(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = classifications(20, 2)
    with CountingRun(checkpoint, case(), tmp_path, monkeypatch) as run:
        run.scored(requests, NO_PREFIXES)
        counts, log = run.engine.log.counts, run.engine.log
    assert counts.output_tokens == 0
    assert counts.scored_tokens == 2 * (len(CHOICES) + sum(len(choice) - 1 for choice in CHOICES))
    assert list(log.generated) == [0] * len(requests)
    assert sum(log.scored) == sum(each.num_scored for each in requests)
    assert sorted(log.given) == sorted(each.num_computed for each in requests)
