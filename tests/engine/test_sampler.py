"""The sampler: every setting against a plain reference and transformers, independence of neighbours, failures of single rows."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.engine.sampler import lowest_of_largest, sample
from flexgen.errors import RequestError
from flexgen.kernels.philox import exponentials
from flexgen.request import TokenRequest


def asks(**how: Any) -> TokenRequest:
    return TokenRequest(index=0, max_tokens=1, **({"prompt_token_ids": (0,), "temperature": 1.0} | how))


GREEDY = asks(temperature=0.0)


def at(positions: Iterable[int]) -> list[Sequence[int]]:
    """Answers so long that rows come to these positions, up to a constant; what is in them matters to penalties only."""
    return [range(position) for position in positions]


def random_logits(rows: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_greedy_takes_the_first_of_the_largest(dtype):
    logits = random_logits(8, 1000).to(dtype)
    logits[:, 700] = logits[:, 300] = 50.0
    assert sample(logits, [GREEDY] * 8, at(range(8))) == [300] * 8


@given(st.lists(st.sampled_from([-1e30, -2.0, -0.0, 0.0, 1.0, 1.5, 1e30, math.inf, -math.inf, math.nan]), min_size=1, max_size=40))
def test_the_lowest_of_the_largest(values: list[float]) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        row = torch.tensor(values, dtype=dtype)
        wanted = int(np.argmax(row.double().numpy())) if all(map(math.isfinite, values)) else None
        assert lowest_of_largest(row) == wanted


def test_no_rows():
    assert sample(torch.empty(0, 10), [], []) == []


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="for 1 requests"):
        sample(torch.zeros(2, 10), [GREEDY], at([0, 1]))


def reference_support(logits: torch.Tensor, row: TokenRequest) -> set[int]:
    """The tokens that transformers' warpers leave, in vLLM's order: temperature, min-p, top-k, top-p."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(row.temperature)(None, logits[None])
    if row.min_p > 0:
        scores = MinPLogitsWarper(row.min_p)(None, scores)
    if row.top_k > 0:
        scores = TopKLogitsWarper(row.top_k)(None, scores)
    if row.top_p < 1:
        scores = TopPLogitsWarper(row.top_p)(None, scores)
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    "row",
    [
        asks(top_k=5),
        asks(top_p=0.7),
        asks(min_p=0.05),
        asks(temperature=0.6, top_p=0.5),
        asks(temperature=1.7, top_k=20, top_p=0.8),
        asks(temperature=1.4, min_p=0.03, top_k=12, top_p=0.9),
    ],
)
def test_support_is_that_of_transformers(row):
    for seed in range(5):
        logits = random_logits(1, 50, seed=seed)[0].double()
        wanted = reference_support(logits, row)
        seen = set(sample(logits.expand(3000, -1), [row] * 3000, at(range(3000))))
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
    seen = {sample(logits, [asks(top_k=2)], at([position]))[0] for position in range(200)}
    assert seen == {1, 2, 3}


def test_top_p_keeps_at_least_one():
    assert sample(random_logits(1, 100), [asks(top_p=1e-9)], [[]]) == sample(random_logits(1, 100), [GREEDY], [[]])


def test_tiny_temperature_is_greedy():
    logits = random_logits(4, 100)
    assert sample(logits, [asks(temperature=5e-324)] * 4, at(range(4))) == sample(logits, [GREEDY] * 4, at(range(4)))


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    count = 20000
    seen = Counter(sample(probabilities.log().expand(count, -1), [asks(seed=3)] * count, at(range(count))))
    for token, probability in enumerate(probabilities.tolist()):
        assert abs(seen[token] / count - probability) < 5 * math.sqrt(probability / count)


def test_random_numbers_are_fixed():
    """Answers of past runs depend on them."""
    assert exponentials(0, 1, 3).tolist() == [1.5518317520229494, 1.5345817685527228, 0.2798468700184203]
    assert exponentials(-1, 7, 5).tolist() == exponentials(2**64 - 1, 7, 5).tolist()
    assert exponentials(5, 9, np.array([1, 4])).tolist() == exponentials(5, 9, 6)[[1, 4]].tolist()


def test_random_numbers_are_exponential():
    values = np.concatenate([exponentials(seed, position, 1000) for seed in range(8) for position in range(8)])
    assert len(set(values)) == len(values)
    assert values.min() > 0
    assert abs(values.mean() - 1) < 0.02  # five standard errors
    assert abs((values > 1).mean() - math.exp(-1)) < 0.01


def test_small_changes_of_logits_seldom_change_a_token():
    """In how many draws a token changes is about the size of the changes, whatever the size of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator, dtype=torch.float64)
    changed = logits + 1e-3 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    rows = [asks(seed=seed) for seed in range(500)]
    first, second = (sample(row.expand(500, -1), rows, at([0] * 500)) for row in (logits, changed))
    assert len(set(first)) > 300
    assert sum(one != other for one, other in zip(first, second, strict=True)) <= 5


def test_samples_depend_on_seed_and_position_only():
    logits = random_logits(6, 500)
    rows = [asks(seed=11), GREEDY, asks(seed=11, top_p=0.9), asks(seed=12, top_k=40), asks(temperature=0.3), asks(seed=-5)]
    together = sample(logits, rows, at([4, 5, 6, 7, 8, 9]))
    alone = [sample(logits[i : i + 1].clone(), [rows[i]], at([4 + i]))[0] for i in range(6)]
    backwards = sample(logits.flip(0), rows[::-1], at([9, 8, 7, 6, 5, 4]))[::-1]
    assert together == alone == backwards


def test_seed_and_position_matter():
    logits = torch.zeros(50, 10000)
    assert len(set(sample(logits, [asks(seed=1)] * 50, at(range(50))))) > 45
    assert len(set(sample(logits, [asks(seed=seed) for seed in range(50)], [[]] * 50))) > 45


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_that_is_not_finite_fails_alone(bad, dtype):
    logits = random_logits(4, 1000).to(dtype)
    rows = [GREEDY, GREEDY, asks(), asks(top_p=0.9)]
    clean = sample(logits, rows, at(range(4)))
    for poisoned in range(4):
        broken = logits.clone()
        broken[poisoned, 123] = bad
        tokens = sample(broken, rows, at(range(4)))
        assert isinstance(tokens[poisoned], RequestError)
        assert tokens[poisoned].code == "non_finite_logits"
        assert tokens[:poisoned] + tokens[poisoned + 1 :] == clean[:poisoned] + clean[poisoned + 1 :]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "wild",
    [
        {"repetition_penalty": 1e-320}, {"repetition_penalty": 1e308, "temperature": 0.0}, {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan}, {"presence_penalty": -1e308, "frequency_penalty": -1e308}, {"logit_bias": ((0, math.nan),)},
        {"logit_bias": ((0, math.inf),)}, {"logit_bias": ((0, 1e308), (1, 1.0)), "temperature": 1e-320}, {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e38, "temperature": 1e-320}, {"temperature": 1e308}, {"top_p": 5e-324}, {"min_p": 5e-324}, {"top_k": 2**70},
        {"seed": 2**70}, {"min_tokens": 10**30, "stop_token_ids": frozenset(range(100))}, {"allowed_token_ids": (10**6,)},
        {"stop_token_ids": frozenset({2**70}), "min_tokens": 9}, {"logit_bias": ((2**70, 1.0),)},
    ],
    ids=lambda wild: str(wild)[:60],
)  # fmt: skip
def test_no_setting_gives_a_token_that_is_none(wild: dict[str, Any]) -> None:
    """A token of the vocabulary or an error; neighbours get what they get without it."""
    logits = random_logits(3, 100)
    rows = [asks(seed=1), asks(prompt_token_ids=tuple(range(100)), **wild), asks(repetition_penalty=1.3, seed=2)]
    past = [[], [0, 1, 1, 1, 1, 1, 1, 1], [5]]
    tokens = sample(logits, rows, past)
    assert isinstance(tokens[1], RequestError) or 0 <= tokens[1] < 100
    assert [tokens[0], tokens[2]] == sample(logits[[0, 2]], [rows[0], rows[2]], [past[0], past[2]])


@pytest.mark.parametrize("penalty", [1e-38, 1e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e308])
def test_penalties_within_their_bounds_never_overflow(penalty: float, temperature: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0]])
    (token,) = sample(logits, [asks(prompt_token_ids=(0, 1, 2), repetition_penalty=penalty, temperature=temperature)], [[0, 1]])
    assert token in (0, 1, 2)


def test_an_overflow_is_the_row_s_error() -> None:
    (error,) = sample(torch.ones(1, 5), [asks(repetition_penalty=1e-320)], [[0]])
    assert isinstance(error, RequestError)
    assert error.code == "non_finite_logits"


def test_an_exception_is_the_row_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.engine.sampler.process_logits", lambda *args: [][0])
    logits = random_logits(2, 50)
    tokens = sample(logits, [asks(), asks(presence_penalty=1.0)], [[], []])
    assert tokens[0] == sample(logits[:1], [asks()], [[]])[0]
    assert isinstance(tokens[1], RequestError)
    assert (tokens[1].code, str(tokens[1])) == ("internal_error", "IndexError: list index out of range")


def test_logits_are_not_changed():
    logits = random_logits(3, 200)
    before = logits.clone()
    sample(logits, [GREEDY, asks(top_k=3), asks(top_p=0.5)], at(range(3)))
    assert torch.equal(logits, before)


# -- all settings together ------------------------------------------------------------------------------------------------------------

VOCAB = 40
token_ids = st.integers(0, VOCAB - 1)


@st.composite
def any_request(draw: st.DrawFn) -> TokenRequest:
    """Any mixture of settings, each of them mostly on."""
    allowed = draw(st.none() | st.lists(token_ids, min_size=1, max_size=12, unique=True))
    biases = draw(st.dictionaries(token_ids, st.floats(-8, 8), max_size=5))
    words = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=4))
    return TokenRequest(
        index=0,
        prompt_token_ids=tuple(draw(st.lists(token_ids, min_size=1, max_size=6))),
        max_tokens=99,
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0.3, 3)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_p=draw(st.sampled_from([0.1, 0.6, 0.95, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 17, VOCAB, 99])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        seed=draw(st.integers(-5, 5)),
        stop_token_ids=frozenset(draw(st.lists(token_ids, max_size=3))),
        min_tokens=draw(st.integers(0, 8)),
        logit_bias=tuple(biases.items()),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words_token_ids=tuple(map(tuple, words)),
    )


def plain_weights(logits: list[float], request: TokenRequest, generated: list[int]) -> list[float]:
    """What each token weighs when the token is drawn, one step after the other, one token at a time."""
    scores = list(logits)
    for token_id in range(VOCAB):
        words = [word for word in request.bad_words_token_ids if word[-1] == token_id and len(word) <= len(generated) + 1]
        completes = any(word[:-1] == tuple(generated[len(generated) - len(word) + 1 :]) for word in words)
        early_stop = token_id in request.stop_token_ids and len(generated) < request.min_tokens
        if (request.allowed_token_ids is not None and token_id not in request.allowed_token_ids) or completes or early_stop:
            scores[token_id] = -math.inf
        scores[token_id] += dict(request.logit_bias).get(token_id, 0.0)
        if token_id in request.prompt_token_ids or token_id in generated:
            penalty = request.repetition_penalty
            scores[token_id] = scores[token_id] / penalty if scores[token_id] > 0 else scores[token_id] * penalty
        count = generated.count(token_id)
        scores[token_id] -= count * request.frequency_penalty + (count > 0) * request.presence_penalty
    best = max(scores)
    if best == -math.inf:
        return [0.0] * VOCAB
    if request.temperature == 0:
        return [float(token_id == scores.index(best)) for token_id in range(VOCAB)]
    weights = [math.exp((score - best) / request.temperature) for score in scores]
    weights = [weight if weight >= request.min_p else 0.0 for weight in weights]
    if 0 < request.top_k < VOCAB:
        least = sorted(weights)[-request.top_k]
        weights = [weight if weight >= least else 0.0 for weight in weights]
    mass, kept = 0.0, set()
    for token_id in sorted(range(VOCAB), key=lambda i: (-weights[i], i)):
        if mass < request.top_p * sum(weights):
            kept.add(token_id)
        mass += weights[token_id]
    return [weight if token_id in kept else 0.0 for token_id, weight in enumerate(weights)]


@given(any_request(), st.integers(0, 10**6), st.lists(st.integers(0, 9), max_size=8))
def test_any_settings_together(request: TokenRequest, seed: int, generated: list[int]) -> None:
    """The very token that a plain reference draws with the same random numbers."""
    logits = random_logits(1, VOCAB, seed=seed).double()
    (token,) = sample(logits, [request], [generated])
    weights = plain_weights(logits[0].tolist(), request, generated)
    if not any(weights):
        assert isinstance(token, RequestError)
        assert token.code == "no_token_allowed"
        return
    noise = exponentials(request.seed, len(request.prompt_token_ids) + len(generated), VOCAB)
    assert token == max(range(VOCAB), key=lambda token_id: weights[token_id] / noise[token_id])


@given(st.lists(st.tuples(any_request(), st.lists(st.integers(0, 9), max_size=8)), min_size=2, max_size=5), st.integers(0, 10**6))
def test_neighbours_do_not_matter(rows: list[tuple[TokenRequest, list[int]]], seed: int) -> None:
    logits = random_logits(len(rows), VOCAB, seed=seed)
    before = logits.clone()
    together = sample(logits, [request for request, _ in rows], [generated for _, generated in rows])
    for row, (request, generated) in enumerate(rows):
        (alone,) = sample(logits[row : row + 1], [request], [generated])
        assert str(together[row]) == str(alone)
    assert torch.equal(logits, before)


def test_a_row_whose_every_token_is_masked_fails_alone() -> None:
    logits = random_logits(3, 10)
    rows = [GREEDY, asks(allowed_token_ids=(4,), bad_words_token_ids=((4,),)), asks(temperature=0.0, allowed_token_ids=(4,))]
    tokens = sample(logits, rows, [[], [], []])
    assert isinstance(tokens[1], RequestError)
    assert (tokens[0], tokens[2]) == (int(logits[0].argmax()), 4)
