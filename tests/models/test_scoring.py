"""Log probabilities of prompts are those of eager transformers, for every model type, on every home and under every schedule.

The tolerance is as in parity.py: what a disturbance of all parameters by some units of float32's roundoff does, times a safety factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.models.assemble import AssembledModel
from flexgen.models.scoring import Scorer, likeliest_ids
from flexgen.plan.policy import Policy
from flexgen.request import TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, PrefixCensus
from tests.models.parity import DISTURBANCE, SAFETY, build, describe, in_float64, policy, requests_for, save
from tests.models.test_parity import IN_MEMORY, PLACES, REPRESENTATIVES, STREAMED, SUPPORTED, VARIANTS, ring_bytes
from tests.models.tiny_configs import tiny_config

NUM_LIKELIEST = 3


@dataclass
class Exact:
    """The log probabilities of a float64 computation: per request all of them, (positions, vocab), and how far float32 may be from them."""

    logprobs: dict[int, torch.Tensor]
    tolerance: dict[int, float]


@torch.no_grad()
def exact(model: PreTrainedModel, requests: Iterable[TokenRequest]) -> Exact:
    precise, disturbed = in_float64(model), in_float64(model, disturbance=DISTURBANCE)
    found = Exact({}, {})
    for each in requests:
        ids = torch.tensor([each.prompt_token_ids])
        one, other = (_logprobs(it, ids) for it in (precise, disturbed))
        found.logprobs[each.index], found.tolerance[each.index] = one, SAFETY * (one - other).abs().max().item()
    return found


def _logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits[0], dim=-1)


def scored(requests: Iterable[TokenRequest], **changes: Any) -> list[TokenRequest]:
    return [replace(each, num_prompt_logprobs=NUM_LIKELIEST, **changes) for each in requests]


def results(
    model: AssembledModel, chosen: Policy, requests: list[TokenRequest], folder: Path | None = None, *, share: bool = False
) -> dict[int, TokenResult]:
    backend = SimulatedDevice(32_000_000) if chosen.device == "sim" else None
    census = PrefixCensus(chosen.page_tokens)
    for each in requests:
        census.add(each.sharable)
    with Engine(model, chosen, backend=backend, offload_dir=folder, poison=True) as engine:
        prefixes = census.common() if share else NO_PREFIXES
        found = {result.index: result for result in engine.generate(requests, prefixes=prefixes)}
        assert (engine.log.counts.shared_prompt_tokens > 0) == share
        assert all(not used for used in engine.cache.used_bytes.values()), "no page is kept"
    return found


def check(found: dict[int, TokenResult], requests: list[TokenRequest], wanted: Exact) -> None:
    """Every token is scored once, in order, and the likeliest tokens are those whose log probabilities are the largest."""
    assert found.keys() == {each.index for each in requests}
    for each in requests:
        logprobs, tolerance, result = wanted.logprobs[each.index], wanted.tolerance[each.index], found[each.index]
        assert result.error is None
        entries, targets = result.prompt_logprobs, (*each.prompt_token_ids[each.first_scored :], *each.alternatives)
        assert entries is not None
        assert [entry.token_ids[0] for entry in entries] == list(targets)
        rows = [*logprobs[each.first_scored - 1 : -1], *([logprobs[-1]] * len(each.alternatives))]
        for entry, row in zip(entries, rows, strict=True):
            assert len(entry.token_ids) == 1 + NUM_LIKELIEST
            assert torch.tensor(entry.logprobs, dtype=torch.float64).sub(row[list(entry.token_ids)]).abs().max() <= tolerance
            assert list(entry.logprobs[1:]) == sorted(entry.logprobs[1:], reverse=True)
            assert entry.logprobs[NUM_LIKELIEST] >= row.topk(NUM_LIKELIEST).values[-1] - tolerance
            place = entry.token_ids.index(entry.token_ids[0], 1) if entry.token_ids[0] in entry.token_ids[1:] else None
            assert entry.rank == place


@pytest.mark.matrix(8, always=["llama", "gpt2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("name", [*SUPPORTED, *VARIANTS])
def test_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS.get(name, (name, {}))
    config = tiny_config(model_type, **changes)
    reference = build(config)
    save(reference, tmp_path)
    model = describe(tmp_path, config)
    requests = scored(requests_for(model.spec.vocab_size), max_tokens=0)
    if name.endswith(("-longrope", "-dynamic")):
        requests = [each for each in requests if len(each.prompt_token_ids) <= 16]
    chosen = policy(weights=STREAMED, kv=IN_MEMORY, ring_bytes=ring_bytes(model))
    check(results(model, chosen, requests), requests, exact(reference, requests))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.matrix(4, always=[f"{model}-{place}" for model, place in zip(REPRESENTATIVES, PLACES, strict=False)])
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_places_do_not_change_scores(model_type: str, place: str, tmp_path: Path) -> None:
    """Requests with and without answers, scored as a whole and from the middle, are chunked and mixed; some share a beginning."""
    config = tiny_config(model_type)
    reference = build(config)
    save(reference, tmp_path)
    model = describe(tmp_path, config)
    device, weights, kv = PLACES[place]
    beginning = requests_for(model.spec.vocab_size)[-1].prompt_token_ids
    endings = [TokenRequest(index=10 + i, prompt_token_ids=(*beginning, 5 + i, 9, 4), max_tokens=0) for i in range(4)]
    requests = [
        *scored(requests_for(model.spec.vocab_size)),
        *scored(endings, first_scored=len(beginning)),
        *scored([replace(endings[0], index=20, max_tokens=2)]),
        *scored([replace(endings[1], index=21, alternatives=(4, 40, 4, 17))], first_scored=len(beginning) + 3),
        *scored([replace(endings[2], index=22, alternatives=(8,))], first_scored=len(beginning) + 1),
    ]
    chosen = policy(device, weights=weights, kv=kv, ring_bytes=ring_bytes(model))
    found = results(model, chosen, requests, tmp_path, share=True)
    check(found, requests, exact(reference, requests))
    assert {index: len(result.token_ids) for index, result in found.items()} == {each.index: each.max_tokens for each in requests}


def test_a_prompt_of_one_token_has_no_scores(tmp_path: Path) -> None:
    config = tiny_config("llama")
    save(build(config), tmp_path)
    model = describe(tmp_path, config)
    requests = scored([TokenRequest(index=0, prompt_token_ids=(5,), max_tokens=0)])
    found = results(model, policy(weights=IN_MEMORY, kv=IN_MEMORY, ring_bytes=ring_bytes(model)), requests)
    assert found[0].prompt_logprobs == ()
    assert found[0].finish_reason == "length"


def test_scores_that_are_not_finite_fail_alone(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=False)
    reference = build(config)
    embeddings: Any = reference.get_input_embeddings()
    embeddings.weight.data[7] = torch.nan
    save(reference, tmp_path)
    model = describe(tmp_path, config)
    prompts = {0: (5, 6, 8, 9), 1: (5, *range(8, 40), 7, 8, *range(8, 40)), 2: (7,) * 30}
    requests = scored(TokenRequest(index=index, prompt_token_ids=ids, max_tokens=index % 2) for index, ids in prompts.items())
    found = results(model, policy(weights=STREAMED, kv=IN_MEMORY, ring_bytes=ring_bytes(model)), requests)
    assert found[0].error is None
    for index in (1, 2):
        error = found[index].error
        assert error is not None
        assert error.code == "non_finite_logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_likeliest", [0, 1, 5, -1])
def test_ranges_of_the_vocabulary_add_up(dtype: torch.dtype, num_likeliest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few different numbers, so that many are equal: the lower id goes first."""
    monkeypatch.setattr("flexgen.models.scoring.SCORED_SLICE_BYTES", 700)
    monkeypatch.setattr("flexgen.models.scoring.BLOCK_BYTES", 400)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-6, 6, (11, 50), generator=generator).to(dtype) / 2
    targets = torch.randint(0, 50, (11,), generator=generator)
    scorer = Scorer(targets, num_likeliest)
    for start, stop in ((0, 7), (7, 8), (8, 50)):
        part = logits[:, start:stop]
        scorer.add(((rows, part[rows]) for rows in scorer.slices(stop - start, dtype.itemsize)), start)
    wanted = torch.log_softmax(logits.double(), dim=-1)
    order = wanted.sort(dim=-1, descending=True, stable=True).indices[:, : 50 if num_likeliest == -1 else num_likeliest]
    got = scorer.result()
    torch.testing.assert_close(got.logprobs, wanted.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(got.likeliest, order)
    torch.testing.assert_close(got.likeliest_logprobs, wanted.gather(1, order), rtol=0, atol=1e-6)


def test_alternatives_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows of one position's targets begin or end a slice or a block."""
    monkeypatch.setattr("flexgen.models.scoring.SCORED_SLICE_BYTES", 3 * 20 * 4)
    monkeypatch.setattr("flexgen.models.scoring.BLOCK_BYTES", 2 * 20 * 4)
    logits = torch.randn((8, 50), generator=torch.Generator().manual_seed(0))
    rows = [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 6, 7]
    targets = torch.randint(0, 50, (len(rows),), generator=torch.Generator().manual_seed(1))
    scorer = Scorer(targets, 2, rows)
    assert scorer.num_rows == 8
    for start, stop in ((0, 20), (20, 40), (40, 50)):
        scorer.add(((each, logits[each, start:stop]) for each in scorer.slices(stop - start, 4)), start)
    wanted = torch.log_softmax(logits.double(), dim=-1)[rows]
    got = scorer.result()
    torch.testing.assert_close(got.logprobs, wanted.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(got.likeliest, wanted.topk(2).indices)


def test_the_likeliest_among_equals_have_the_lowest_ids() -> None:
    numbers = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]])
    assert likeliest_ids(numbers, 4).tolist() == [[1, 2, 4, 3]]


@pytest.mark.parametrize("num_likeliest", [0, 1, 5, -1])
def test_a_device_scores_alike_without_waiting(num_likeliest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few different numbers, and alternatives."""
    monkeypatch.setattr("flexgen.models.scoring.BLOCK_BYTES", 400)
    generator = torch.Generator().manual_seed(0)
    logits, rows = torch.randint(-6, 6, (8, 50), generator=generator) / 2, [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7]
    targets = torch.randint(0, 50, (len(rows),), generator=generator)
    backend, found = SimulatedDevice(1 << 20), []
    for device in (torch.device("cpu"), backend.device):
        there, known, places = logits.to(device), targets.to(device), torch.tensor(rows).to(device)
        before = backend.synchronisations
        scorer = Scorer(known, num_likeliest, rows, places)
        for start, stop in ((0, 7), (7, 50)):
            scorer.add(((some, there[some, start:stop]) for some in scorer.slices(stop - start, 4)), start)
        found.append(scorer.result())
        assert backend.synchronisations == before
    for name in ("logprobs", "likeliest", "likeliest_logprobs"):
        assert torch.equal(getattr(found[1], name).cpu(), getattr(found[0], name)), name
    backend.close()
