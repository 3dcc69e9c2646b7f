"""The sampler: greedy and filtered choices against transformers, independence of neighbours, failures of single rows."""

import math
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flexgen.engine.sampler import sample, uniform
from flexgen.errors import RequestError


@dataclass
class Row:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


GREEDY = Row(temperature=0.0)


def random_logits(rows: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_greedy_takes_the_first_of_the_largest(dtype):
    logits = random_logits(8, 1000).to(dtype)
    logits[:, 700] = logits[:, 300] = 50.0
    assert sample(logits, [GREEDY] * 8, range(8)) == [300] * 8


def test_no_rows():
    assert sample(torch.empty(0, 10), [], []) == []


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="for 1 requests"):
        sample(torch.zeros(2, 10), [GREEDY], [0, 1])


def reference_support(logits: torch.Tensor, row: Row) -> set[int]:
    """The tokens that transformers' warpers leave, in its order: temperature, top-k, top-p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(row.temperature)(None, logits[None])
    if row.top_k > 0:
        scores = TopKLogitsWarper(row.top_k)(None, scores)
    if row.top_p < 1:
        scores = TopPLogitsWarper(row.top_p)(None, scores)
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("row", [Row(top_k=5), Row(top_p=0.7), Row(temperature=0.6, top_p=0.5), Row(temperature=1.7, top_k=20, top_p=0.8)])
def test_support_is_that_of_transformers(row):
    for seed in range(5):
        logits = random_logits(1, 50, seed=seed)[0].double()
        wanted = reference_support(logits, row)
        seen = set(sample(logits.expand(3000, -1), [row] * 3000, range(3000)))
        probabilities = torch.softmax(logits / row.temperature, -1)
        likely = {token for token in wanted if probabilities[token] > 0.005}  # 3000 draws cannot miss these
        assert likely <= seen <= wanted


@pytest.mark.parametrize("vocab", [300, 5000])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_wide_nucleus(vocab, scale):
    """A flat distribution needs more candidates than are looked at first."""
    from flexgen.engine.sampler import _nucleus

    weights = np.exp(random_logits(1, vocab, scale=scale)[0].double().numpy())
    nucleus = _nucleus(weights, 0.9)
    order = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order])
    size = int(np.searchsorted(cumulative, 0.9 * cumulative[-1])) + 1
    assert nucleus.tolist() == sorted(order[:size].tolist())


def test_ties_of_top_k_stay():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    seen = {sample(logits, [Row(top_k=2)], [position])[0] for position in range(200)}
    assert seen == {1, 2, 3}


def test_top_p_keeps_at_least_one():
    assert sample(random_logits(1, 100), [Row(top_p=1e-9)], [0]) == sample(random_logits(1, 100), [GREEDY], [0])


def test_tiny_temperature_is_greedy():
    logits = random_logits(4, 100)
    assert sample(logits, [Row(temperature=5e-324)] * 4, range(4)) == sample(logits, [GREEDY] * 4, range(4))


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    count = 20000
    seen = Counter(sample(probabilities.log().expand(count, -1), [Row(seed=3)] * count, range(count)))
    for token, probability in enumerate(probabilities.tolist()):
        assert abs(seen[token] / count - probability) < 5 * math.sqrt(probability / count)


def test_uniform_is_fixed_for_ever():
    """Answers of past runs depend on these numbers."""
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)
    values = np.array([uniform(seed, position) for seed in range(40) for position in range(40)])
    assert len(set(values)) == 1600
    assert abs(values.mean() - 0.5) < 0.03
    assert 0 <= values.min() < values.max() < 1


def test_samples_depend_on_seed_and_position_only():
    logits = random_logits(6, 500)
    rows = [Row(seed=11), GREEDY, Row(seed=11, top_p=0.9), Row(seed=12, top_k=40), Row(temperature=0.3), Row(seed=-5)]
    together = sample(logits, rows, [4, 5, 6, 7, 8, 9])
    alone = [sample(logits[i : i + 1].clone(), [rows[i]], [4 + i])[0] for i in range(6)]
    backwards = sample(logits.flip(0), rows[::-1], [9, 8, 7, 6, 5, 4])[::-1]
    assert together == alone == backwards


def test_seed_and_position_matter():
    logits = torch.zeros(50, 10000)
    assert len(set(sample(logits, [Row(seed=1)] * 50, range(50)))) > 45
    assert len(set(sample(logits, [Row(seed=seed) for seed in range(50)], [0] * 50))) > 45


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_that_is_not_finite_fails_alone(bad, dtype):
    logits = random_logits(4, 1000).to(dtype)
    rows = [GREEDY, GREEDY, Row(), Row(top_p=0.9)]
    clean = sample(logits, rows, range(4))
    for poisoned in range(4):
        broken = logits.clone()
        broken[poisoned, 123] = bad
        tokens = sample(broken, rows, range(4))
        assert isinstance(tokens[poisoned], RequestError)
        assert tokens[poisoned].code == "non_finite_logits"
        assert tokens[:poisoned] + tokens[poisoned + 1 :] == clean[:poisoned] + clean[poisoned + 1 :]


def test_logits_are_not_changed():
    logits = random_logits(3, 200)
    before = logits.clone()
    sample(logits, [GREEDY, Row(top_k=3), Row(top_p=0.5)], range(3))
    assert torch.equal(logits, before)


def test_a_large_mixed_batch_is_quick():
    logits = random_logits(64, 128256).bfloat16()
    rows = [GREEDY, Row(), Row(top_p=0.95), Row(top_k=50)] * 16
    sample(logits, rows, range(64))
    start = time.perf_counter()
    sample(logits, rows, range(64))
    assert time.perf_counter() - start < 2.0  # about 0.1 s on two cores; the bound leaves room for busy machines
