"""Tokens chosen on a device, all rows at once, are those that the host chooses row by row; and nothing waits on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.devices.packed import PackedCopies
from flexgen.devices.staging import Staging
from flexgen.engine.device_sampler import start_sampling
from flexgen.engine.sampler import Sampled
from flexgen.engine.sampling import Sampler
from flexgen.errors import RequestError
from flexgen.request import TokenRequest
from tests.devices.counting import CountingDevice
from tests.devices.counting import device as device  # a fixture
from tests.engine.test_sampler import GREEDY, VOCAB, any_request, asks, random_logits

HOST = PackedCopies(Staging(None))
Answers = Sequence[Sequence[int]]


class Even:
    """A guide that allows even tokens, beginning with twice the number of generated ones."""

    def prepare(self, token_ids: Sequence[int]) -> None:
        pass

    def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = np.arange(VOCAB + 7)
        return (ids % 2 == 0) & (ids >= 2 * len(token_ids))

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        return False

    def forget(self) -> None:
        pass


def batched(logits: torch.Tensor, requests: Sequence[TokenRequest], generated: Answers) -> list[Sampled | RequestError]:
    """By the operations of a device, on the host's memory."""
    return start_sampling(logits, requests, generated, HOST)()


def by_rows(logits: torch.Tensor, requests: Sequence[TokenRequest], generated: Answers) -> list[Sampled | RequestError]:
    return Sampler(HOST).start(logits, requests, generated)()


def assert_same(found: Sequence[Sampled | RequestError], wanted: Sequence[Sampled | RequestError]) -> None:
    """The same tokens and errors, and log probabilities up to the order of their sums."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, RequestError) or isinstance(other, RequestError):
            assert (type(one), str(one)) == (type(other), str(other))
            assert isinstance(one, RequestError)
            assert isinstance(other, RequestError)
            assert one.code == other.code
            continue
        assert one.token_id == other.token_id
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert (one.logprobs.token_ids, one.logprobs.rank) == (other.logprobs.token_ids, other.logprobs.rank)
            assert one.logprobs.logprobs == pytest.approx(other.logprobs.logprobs, rel=1e-13, abs=1e-13)


def rounded_logits(seed: int, rows: int, kind: str) -> torch.Tensor:
    """Rows without ties, with many, all equal, at the ends of float32, and with numbers that are not finite."""
    logits = random_logits(rows, VOCAB, seed=seed)
    if kind == "bfloat16":
        return logits.bfloat16()
    if kind == "ties":
        return logits.round()
    if kind == "equal":
        return torch.full_like(logits, -2.5)
    if kind == "extreme":
        return logits * 1e37
    if kind == "not finite":
        bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
        logits[torch.arange(rows), torch.arange(rows) * 7 % VOCAB] = bad[torch.arange(rows) % 4]
    return logits.double() if kind == "float64" else logits


KINDS = ("float32", "float64", "bfloat16", "ties", "equal", "extreme", "not finite")


@st.composite
def any_row(draw: st.DrawFn) -> tuple[TokenRequest, list[int]]:
    """Every setting on or off by itself, so that the kinds of rows mix."""
    request, plain = draw(any_request()), GREEDY
    fields = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "min_tokens")
    fields += ("stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words_token_ids", "prompt_token_ids", "seed")
    request = replace(request, **{name: getattr(plain, name) for name in fields if draw(st.booleans())})
    guide, num_logprobs = draw(st.sampled_from([None, None, Even()])), draw(st.sampled_from([None, None, 0, 1, 5, VOCAB + 3, -1]))
    return replace(request, guide=guide, num_logprobs=num_logprobs), draw(st.lists(st.integers(0, 9), max_size=8))


@given(st.lists(any_row(), min_size=1, max_size=6), st.integers(0, 10**6), st.sampled_from(KINDS))
def test_any_rows_together(rows: list[tuple[TokenRequest, list[int]]], seed: int, kind: str) -> None:
    logits = rounded_logits(seed, len(rows), kind)
    before, requests, generated = logits.clone(), [request for request, _ in rows], [past for _, past in rows]
    found = batched(logits, requests, generated)
    assert_same(found, by_rows(logits, requests, generated))
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "the model's logits are not changed"
    for row, (request, past) in enumerate(rows):
        (alone,) = batched(logits[row : row + 1], [request], [past])
        assert repr(alone) == repr(found[row]), "to the last bit, whatever is beside it"


def mixed(count: int, **how: Any) -> list[TokenRequest]:
    """Rows of all kinds, again and again."""
    kinds = [
        GREEDY, asks(), asks(top_p=0.9, num_logprobs=3), asks(top_k=20, num_logprobs=3), asks(temperature=0.7, top_k=50, top_p=0.6),
        asks(min_p=0.1), replace(GREEDY, repetition_penalty=1.4, num_logprobs=0), asks(presence_penalty=1.5, top_p=0.3),
        replace(GREEDY, allowed_token_ids=(3, 7, 90)), asks(logit_bias=((5, 9.0), (6, -9.0)), num_logprobs=-1),
    ]  # fmt: skip
    return [replace(kinds[row % len(kinds)], seed=row, **how) for row in range(count)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [97, 1000, 4096])
def test_vocabularies(dtype: torch.dtype, vocab: int) -> None:
    logits, generated = random_logits(30, vocab, seed=1).to(dtype), [list(range(row % 11)) for row in range(30)]
    assert_same(batched(logits, mixed(30), generated), by_rows(logits, mixed(30), generated))


def test_rows_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, generated = random_logits(41, 500), [[row] for row in range(41)]
    wanted = batched(logits, mixed(41), generated)
    for rows in (1, 2, 7):
        monkeypatch.setattr("flexgen.engine.device_rows.SAMPLED_BLOCK_BYTES", rows * 500 * 8)
        assert repr(batched(logits, mixed(41), generated)) == repr(wanted)


def test_wide_and_flat_distributions() -> None:
    """Nuclei of many tokens, and of one."""
    rows = [asks(top_p=top_p, temperature=temperature, seed=7) for top_p in (1e-9, 0.5, 0.999) for temperature in (1e-3, 1.0, 1e300)]
    logits = random_logits(len(rows), 3000)
    generated = [[] for _ in rows]
    assert_same(batched(logits, rows, generated), by_rows(logits, rows, generated))


def test_ties_of_top_k_stay() -> None:
    logits, rows = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).expand(300, -1), [asks(top_k=2)] * 300
    found = batched(logits, rows, [range(position) for position in range(300)])
    assert {each.token_id for each in found if isinstance(each, Sampled)} == {1, 2, 3}
    assert_same(found, by_rows(logits, rows, [range(position) for position in range(300)]))


@pytest.mark.parametrize(
    "wild",
    [
        {"repetition_penalty": 1e-320}, {"repetition_penalty": math.nan}, {"presence_penalty": -1e308, "frequency_penalty": -1e308},
        {"logit_bias": ((0, math.nan),)}, {"logit_bias": ((0, 1e308), (1, 1.0)), "temperature": 1e-320}, {"temperature": 5e-324},
        {"temperature": 1e308}, {"top_p": 5e-324}, {"min_p": 5e-324}, {"top_k": 2**70}, {"top_k": -1}, {"seed": 2**70},
        {"min_tokens": 10**30, "stop_token_ids": frozenset(range(100))}, {"allowed_token_ids": (10**6,)},
        {"stop_token_ids": frozenset({2**70}), "min_tokens": 9}, {"logit_bias": ((2**70, 1.0),)}, {"allowed_token_ids": (2**70,)},
    ],
    ids=lambda wild: str(wild)[:60],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_settings_that_no_one_means(wild: dict[str, Any]) -> None:
    logits, past = random_logits(3, 100), [[], [0, 1, 1, 1, 1, 1, 1, 1], [5]]
    rows = [asks(seed=1), asks(prompt_token_ids=tuple(range(100)), **wild), asks(repetition_penalty=1.3, seed=2)]
    assert_same(batched(logits, rows, past), by_rows(logits, rows, past))


def test_an_exception_is_the_row_s_error() -> None:
    class Broken(Even):
        def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
            raise IndexError("a test says so")

    class Refusing(Even):
        def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
            raise RequestError("cannot go on", code="constraint_failed")

    logits = random_logits(4, VOCAB)
    logits[3, 5] = math.nan
    rows = [asks(), asks(guide=Broken()), replace(GREEDY, guide=Refusing()), asks(guide=Broken())]
    found = batched(logits, rows, [[]] * 4)
    assert [getattr(each, "code", None) for each in found] == [None, "internal_error", "constraint_failed", "non_finite_logits"]
    assert_same(found, by_rows(logits, rows, [[]] * 4))


# -- on the simulated device --------------------------------------------------------------------------------------------------------------


def test_the_host_waits_once_for_a_batch(device: CountingDevice) -> None:
    """For its results; what the requests ask for goes to the device in one copy."""
    logits, generated = random_logits(30, 500), [list(range(row % 9)) for row in range(30)]
    requests = [*mixed(28), asks(guide=Even()), replace(GREEDY, guide=Even())]
    logits_there, before = logits.to(device.device), device.synchronisations
    finish = Sampler(PackedCopies(Staging(device))).start(logits_there, requests, generated)
    assert (device.num_in, device.num_out, device.num_waits) == (1, 1, 0)
    found = finish()
    assert (device.num_in, device.num_out, device.num_waits, device.synchronisations) == (1, 1, 1, before)
    assert_same(found, by_rows(logits, requests, generated))


def test_several_batches_may_be_started(device: CountingDevice) -> None:
    sampler, batches = Sampler(PackedCopies(Staging(device))), [random_logits(12, 200, seed=seed) for seed in range(4)]
    generated = [[3, 4]] * 12
    waiting = [sampler.start(logits.to(device.device), mixed(12), generated) for logits in batches]
    for logits, finish in zip(batches, waiting, strict=True):
        assert_same(finish(), by_rows(logits, mixed(12), generated))


def test_rows_that_take_the_likeliest_token_need_nothing_on_the_device(device: CountingDevice) -> None:
    logits = random_logits(5, 50).bfloat16()
    found = Sampler(PackedCopies(Staging(device))).start(logits.to(device.device), [GREEDY] * 5, [[]] * 5)()
    assert_same(found, by_rows(logits, [GREEDY] * 5, [[]] * 5))
    assert (device.num_in, device.num_out) == (0, 1)


def test_no_rows(device: CountingDevice) -> None:
    assert Sampler(PackedCopies(Staging(device))).start(torch.empty(0, 9).to(device.device), [], [])() == []
    assert Sampler(HOST).start(torch.empty(0, 9), [], [])() == []
