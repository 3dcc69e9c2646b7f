"""Guided answers in the engine: masks, what ends an answer, when guides are asked, and that nobody else notices.

The guides are stand-ins; that llguidance's are right is the business of text/test_guides.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from flexgen.engine.engine import Engine
from flexgen.engine.processors import changes_beside_guide, changes_logits, process_logits
from flexgen.engine.sampler import sample
from flexgen.engine.sequence import Finish, LiveSequence
from flexgen.errors import RequestError
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import Generated, TokenRequest, TokenResult

VOCAB = 50
POLICY = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=0.5, disk=0.5), kv=Fractions(host=1.0), kv_device_bytes=0,
    kv_host_bytes=4 << 20, kv_disk_bytes=0, host_ring_bytes=16 << 20, device_ring_bytes=0, workspace_bytes=0, embedding_resident=False,
    schedule="diagonal", max_num_seqs=4, prefill_tokens=16, micro_batch_tokens=12, page_tokens=16, compute_threads=1, io_threads=1,
)  # fmt: skip


class Sum:
    """Allows the tokens from the sum of those before (modulo 7) on, and is complete after `length`."""

    def __init__(self, size: int = VOCAB, length: int = 1000, error: Exception | None = None) -> None:
        self.size, self.length, self.error = size, length, error
        self.prepared: list[int] = []
        self.num_forgotten = 0

    def prepare(self, token_ids: Sequence[int]) -> None:
        self.prepared.append(len(token_ids))
        if self.error is not None:
            raise self.error

    def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
        if self.error is not None:
            raise self.error
        return np.arange(self.size) >= sum(token_ids) % 7

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        return len(token_ids) >= self.length

    def forget(self) -> None:
        self.num_forgotten += 1


def asks(**how: Any) -> TokenRequest:
    return TokenRequest(**({"index": 0, "prompt_token_ids": (1,), "max_tokens": 9, "guide": Sum()} | how))


# -- masks ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [VOCAB - 20, VOCAB, VOCAB + 20])
def test_only_what_is_allowed_keeps_its_logit(size: int) -> None:
    """The vocabulary may be smaller or larger than the model's head; beyond its end nothing is allowed."""
    logits = np.random.default_rng(0).normal(size=VOCAB)
    request = asks(guide=Sum(size))
    assert changes_logits(request)
    assert not changes_beside_guide(request)
    row = process_logits(logits, request, [9, 3])
    kept = np.isfinite(row)
    assert np.flatnonzero(kept).tolist() == list(range(5, min(size, VOCAB)))
    np.testing.assert_array_equal(row[kept], logits[kept])


def test_masks_combine() -> None:
    request = asks(allowed_token_ids=(2, 5, 6, 40), bad_words_token_ids=((6,),), min_tokens=5, stop_token_ids=frozenset({40}))
    assert np.flatnonzero(np.isfinite(process_logits(np.zeros(VOCAB), request, [9, 3]))).tolist() == [5]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"logit_bias": ((3, 0.5),)}, {"temperature": 0.7, "top_k": 5}], ids=str)
def test_tokens_are_chosen_among_the_allowed_as_if_there_were_no_others(how: dict[str, Any]) -> None:
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    past = [[place % 7] for place in range(200)]
    guided = sample(logits, [asks(seed=place, **how) for place in range(200)], past)
    masked = logits.clone()
    for place in range(200):
        masked[place, : place % 7] = -1e300
    plain = sample(masked, [asks(seed=place, guide=None, **how) for place in range(200)], past)
    assert guided == plain
    assert any(first != second for first, second in zip(guided, sample(logits, [asks(guide=None, **how)] * 200, past), strict=True))


def test_equal_logits_are_chosen_from_the_lowest() -> None:
    assert sample(torch.zeros(1, VOCAB), [asks()], [[4]]) == [4]
    assert sample(torch.zeros(1, VOCAB), [asks()], [[]]) == [0]


def test_a_request_without_any_token_left_says_why() -> None:
    (error,) = sample(torch.zeros(1, VOCAB), [asks(allowed_token_ids=(2,))], [[4]])
    assert isinstance(error, RequestError)
    assert error.code == "no_token_allowed"
    assert "structured_outputs" in str(error)


# -- ends -------------------------------------------------------------------------------------------------------------------------------


def stops_at_three(token_ids: Sequence[int]) -> str | None:
    return "three" if len(token_ids) == 3 else None


@pytest.mark.parametrize(
    ("length", "how", "wanted"),
    [
        (4, {}, None),
        (3, {}, Finish(reason="stop")),
        (3, {"max_tokens": 3}, Finish(reason="stop")),
        (4, {"max_tokens": 3}, Finish(reason="length")),
        (3, {"min_tokens": 3}, Finish(reason="stop")),
        (3, {"min_tokens": 4}, None),
        (3, {"stops": stops_at_three}, Finish(reason="stop", stop_string="three")),
        (9, {"stop_token_ids": frozenset({8})}, Finish(reason="stop")),
    ],
    ids=["goes on", "complete", "complete at the bound", "cut", "long enough", "too short", "stop string", "stop token"],
)
def test_what_ends_an_answer(length: int, how: dict[str, Any], wanted: Finish | None) -> None:
    sequence = LiveSequence(asks(guide=Sum(length=length), **how), 9)
    for token_id in (6, 7, 8):
        sequence.append(token_id)
    assert sequence.finish() == wanted


def test_an_answer_with_a_guide_may_end_early() -> None:
    assert asks().may_end_early
    assert not asks(guide=None).may_end_early


# -- the engine ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(novels_opt: Path) -> Iterator[Engine]:
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    with Engine(model, POLICY, poison=True) as engine:
        yield engine


def requests(guides: dict[int, Sum], **how: Any) -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(5, 120, (3 + 5 * index % 17,), generator=generator).tolist()) for index in range(8)]
    return [
        TokenRequest(**({"index": index, "prompt_token_ids": each, "max_tokens": 6, "guide": guides.get(index)} | how))
        for index, each in enumerate(prompts)
    ]


def answers(engine: Engine, asked: list[TokenRequest]) -> dict[int, TokenResult]:
    return {each.index: each for each in engine.generate(asked)}


def test_guides_are_asked_once_for_each_token_before_the_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    guides = {1: Sum(length=4), 4: Sum()}
    in_passes: list[int] = []
    run = engine.runner.run

    def noted(*args: Any) -> Any:
        in_passes.append(len(guides[1].prepared) + len(guides[4].prepared))
        return run(*args)

    monkeypatch.setattr(engine.runner, "run", noted)
    found = answers(engine, requests(guides))
    assert (guides[1].prepared, guides[4].prepared) == (list(range(4)), list(range(6)))
    assert in_passes[-1] == 10, "all were asked when the last pass began"
    assert [found[index].finish_reason for index in (1, 4)] == ["stop", "length"]
    assert len(found[1].token_ids) == 4
    assert [guide.num_forgotten for guide in guides.values()] == [1, 1]


def test_neighbours_do_not_notice(engine: Engine) -> None:
    plain = answers(engine, requests({}))
    guided = answers(engine, requests({1: Sum(length=4), 4: Sum()}))
    assert {index for index in plain if plain[index] == guided[index]} == {0, 2, 3, 5, 6, 7}
    sampled = [answers(engine, requests(guides, temperature=1.0, num_logprobs=2)) for guides in ({}, {1: Sum(length=2)})]
    assert all(sampled[0][index].token_ids == sampled[1][index].token_ids for index in plain if index != 1)


def test_log_probabilities_are_the_model_s_own(engine: Engine) -> None:
    """Not those among the allowed tokens: a forced token may be unlikely."""
    free = answers(engine, requests({}, num_logprobs=1, max_tokens=1))[3]
    forced = answers(engine, requests({3: Sum()}, num_logprobs=1, max_tokens=1, allowed_token_ids=(7,)))[3]
    assert free.logprobs is not None
    assert forced.logprobs is not None
    assert (forced.token_ids, forced.logprobs[0].token_ids[1]) == ((7,), free.logprobs[0].token_ids[0])
    assert forced.logprobs[0].logprobs[1] == pytest.approx(free.logprobs[0].logprobs[0])


def test_an_answer_goes_on_after_what_an_earlier_run_generated(engine: Engine) -> None:
    whole = answers(engine, requests({2: Sum()}))[2]
    asked = requests({2: Sum()})[2]
    resumed = TokenRequest(
        index=2, prompt_token_ids=asked.prompt_token_ids, max_tokens=6, guide=Sum(), generated=Generated(token_ids=whole.token_ids[:4])
    )
    assert answers(engine, [resumed])[2].token_ids == whole.token_ids
    complete = TokenRequest(
        index=2, prompt_token_ids=asked.prompt_token_ids, max_tokens=6, guide=Sum(length=4), generated=Generated(token_ids=(1, 2, 3, 4))
    )
    assert answers(engine, [complete])[2].finish_reason == "stop"


@pytest.mark.parametrize(
    "error", [RequestError("no more", code="constraint_failed"), ValueError("a bug")], ids=lambda each: type(each).__name__
)
def test_a_guide_that_fails_ends_its_own_request(engine: Engine, error: Exception) -> None:
    plain = answers(engine, requests({}))
    found = answers(engine, requests({1: Sum(error=error)}))
    failed = found.pop(1).error
    assert failed is not None
    assert failed.code == ("constraint_failed" if isinstance(error, RequestError) else "internal_error")
    assert all(found[index] == plain[index] for index in found)
