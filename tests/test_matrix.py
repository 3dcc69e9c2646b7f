"""Placement cannot change answers: every home, schedule, block and micro-batch size, on a CPU device and on the hostile
simulated one, gives the tokens of transformers' `generate` in float32."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.admission import LengthForecast
from flexgen.engine.engine import Engine
from flexgen.engine.sampler import sample
from flexgen.engine.sampling import Sampler
from flexgen.errors import StorageError
from flexgen.kv.host import HostView
from flexgen.kv.link import KVLink
from flexgen.kv.pages import PagePool
from flexgen.kv.read_ahead import ReadAhead
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import Generated, PartialAnswer, TokenRequest, TokenResult
from tests.models.parity import DISTURBANCE, SAFETY, in_float64

# Prompts of one token, of whole pages, of whole micro-batches and one more, of several micro-batches.
PROMPT_LENS = (1, 2, 16, 17, 33, 64, 65, 3, 129, 150)
MAX_TOKENS = (20, 1, 7, 16, 2, 20, 12, 5, 3, 9)
SAMPLING = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "seed": 1},
    {"temperature": 1.3, "top_k": 40, "seed": -7},
    {"temperature": 0.9, "top_p": 0.5, "top_k": 10, "seed": 2**40},
    {"temperature": 0.8, "min_p": 0.02, "repetition_penalty": 1.3, "seed": 5, "num_logprobs": 2},
    {"frequency_penalty": 0.6, "presence_penalty": 0.8, "logit_bias": ((17, 4.0), (40, -100.0)), "num_logprobs": 0},
    {"bad_words_token_ids": ((11,), (17, 23)), "allowed_token_ids": tuple(range(5, 400)), "repetition_penalty": 0.8},
)
CROWD = [(27 + index, 20 - index) for index in range(6)]  # (prompt, answer): two pages each at first, three soon
PAGE_TOKENS = 16
FIRST_SAMPLED = 100  # indices of requests that change logits or draw


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, what it is asked, and what transformers answers."""

    folder: Path
    config: Any
    requests: tuple[TokenRequest, ...]
    answers: dict[int, tuple[int, ...]]
    crowd: tuple[TokenRequest, ...]  # another job
    crowd_answers: dict[int, tuple[int, ...]]
    token_bytes: int  # of KV

    def pool_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.token_bytes


MODELS = ("novels_qwen3", "novels_opt")


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = request.getfixturevalue(request.param)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, config.vocab_size, (length,), generator=generator).tolist())

    greedy = [
        TokenRequest(index=index, prompt_token_ids=prompt(length), max_tokens=max_tokens)
        for index, (length, max_tokens) in enumerate(zip(PROMPT_LENS, MAX_TOKENS, strict=True))
    ]
    sampled = [
        TokenRequest(index=FIRST_SAMPLED + i, prompt_token_ids=prompt(20 + i), max_tokens=8, **how) for i, how in enumerate(SAMPLING)
    ]
    crowd = [TokenRequest(index=i, prompt_token_ids=prompt(length), max_tokens=answer) for i, (length, answer) in enumerate(CROWD)]
    with torch.no_grad():
        answers = {each.index: _generate(model, each) for each in greedy} | {each.index: _draw(model, each) for each in sampled}
        crowd_answers = {each.index: _generate(model, each) for each in crowd}
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    token_bytes = config.num_hidden_layers * 2 * heads * head_dim * 4
    return Checkpoint(folder, config, (*greedy, *sampled), answers, tuple(crowd), crowd_answers, token_bytes)


def _generate(model: Any, request: TokenRequest) -> tuple[int, ...]:
    ids = torch.tensor([request.prompt_token_ids])
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
        max_new_tokens=request.max_tokens, min_new_tokens=request.max_tokens,
    )  # fmt: skip
    return tuple(done[0, ids.shape[1] :].tolist())


def _draw(model: Any, request: TokenRequest) -> tuple[int, ...]:
    """Samples from transformers' logits, each forward from scratch."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        logits = model(torch.tensor([tokens])).logits[:, -1]
        tokens += sample(logits, [request], [tokens[len(request.prompt_token_ids) :]])
    return tuple(tokens[len(request.prompt_token_ids) :])


@pytest.mark.matrix(1)
def test_answers_are_decided_by_more_than_rounding(checkpoint: Checkpoint) -> None:
    """The other tests compare tokens one by one, on whatever processor."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, attn_implementation="eager").eval()
    disturbed = in_float64(loaded, disturbance=SAFETY * DISTURBANCE)
    with torch.no_grad():
        for each in checkpoint.requests:
            assert (_generate if each.index < FIRST_SAMPLED else _draw)(disturbed, each) == checkpoint.answers[each.index]
        assert {each.index: _generate(disturbed, each) for each in checkpoint.crowd} == checkpoint.crowd_answers


def policy(device: str, **changed: Any) -> Policy:
    return Policy(**({
        "device": device, "dtype": "float32", "weights": Fractions(host=1), "kv": Fractions(host=1), "kv_device_bytes": 0,
        "kv_host_bytes": 0, "kv_disk_bytes": 0, "host_ring_bytes": 4 << 20, "device_ring_bytes": 0 if device == "cpu" else 4 << 20,
        "copies_in_bytes": 0 if device == "cpu" else 2 << 20, "copies_out_bytes": 0 if device == "cpu" else 2 << 20,
        "workspace_bytes": 1 << 20, "embedding_resident": False, "schedule": "diagonal", "max_num_seqs": 7, "prefill_tokens": 128,
        "micro_batch_tokens": 64, "page_tokens": PAGE_TOKENS, "compute_threads": 1, "io_threads": 2,
    } | changed))  # fmt: skip


class Run:
    """One engine and what it answered; checks on the way that no budget is exceeded and nothing unwritten is read."""

    def __init__(self, checkpoint: Checkpoint, chosen: Policy, folder: Path, *, device_bytes: int = 0) -> None:
        self.policy, self.requests = chosen, checkpoint.requests
        self.backend = SimulatedDevice(device_bytes, max_delay_seconds=0.0002) if chosen.device == "sim" else None
        model = assemble_model(checkpoint.folder, checkpoint.config, torch.float32)
        self.engine = Engine(model, chosen, backend=self.backend, offload_dir=folder, poison=True)
        for pool in self.engine.cache.pools.values():
            if isinstance(pool, PagePool):
                for memory in pool.memory:
                    memory.keys.fill_(0xFF)  # NaN
                    memory.values.fill_(0xFF)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("flexgen")], "threads that nobody ended"

    def results(self, requests: Any = None) -> dict[int, TokenResult]:
        results = {result.index: result for result in self.engine.generate(self.requests if requests is None else requests)}
        self.check_budgets()
        return results

    def answers(self) -> dict[int, tuple[int, ...]]:
        return {index: result.token_ids for index, result in self.results().items()}

    def check_budgets(self) -> None:
        chosen, cache = self.policy, self.engine.cache
        granted = {"device": chosen.kv_device_bytes, "host": chosen.kv_host_bytes, "disk": chosen.kv_disk_bytes}
        for tier, pool in cache.pools.items():
            size = sum(count * group.page_bytes for count, group in zip(pool.num_pages, cache.groups, strict=True))
            assert cache.peak_bytes[tier] <= size <= granted[tier]
            assert cache.used_bytes[tier] == 0
            free = [pages.num_free for pages in pool.free]
            assert free == pool.num_pages, "every page came back"
        if self.backend is not None:
            model, homes = self.engine.runner.model, self.engine.runner.homes
            kept = [layout for layout, home in zip(model.layouts, homes, strict=True) if home == "device"]
            kept += [model.residents, *(table.layout for table in model.tables if chosen.embedding_resident)]
            resident = sum(layout.decoded_bytes for layout in kept)
            granted = chosen.kv_device_bytes + chosen.device_ring_bytes + chosen.copies_in_bytes + chosen.kv_ring_bytes
            assert self.backend.used_bytes <= resident + granted + 1024


@pytest.fixture(autouse=True)
def _staging_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    really = ReadAhead._take
    problems: list[str] = []

    def take(ahead: ReadAhead, batch: Any, group: int) -> Any:
        staged = really(ahead, batch, group)
        with ahead._lock:
            if ahead._staged and ahead._in_use > ahead._limit_bytes and not ahead._starved():
                problems.append(f"{ahead._in_use} of {ahead._limit_bytes} bytes")
        return staged

    monkeypatch.setattr(ReadAhead, "_take", take)
    yield
    assert not problems


@dataclass(frozen=True)
class Case:
    """A point of the matrix; `kv` in tokens per tier."""

    device: str
    weights: dict[str, float]
    kv: dict[str, int]
    schedule: str
    max_num_seqs: int
    micro_batch_tokens: int
    embedding_resident: bool = False
    host_attention: bool = True

    def __str__(self) -> str:
        weights = ",".join(f"{tier}={share}" for tier, share in self.weights.items())
        kv = ",".join(f"{tier}={tokens}" for tier, tokens in self.kv.items())
        where = "" if self.host_attention else " attended to on the device"
        size = f"block {self.max_num_seqs} micro-batch {self.micro_batch_tokens}"
        return f"{self.device} {self.schedule} weights {weights} kv {kv}{where} {size}"

    def policy(self, checkpoint: Checkpoint) -> Policy:
        total = sum(self.kv.values())
        sizes = {f"kv_{tier}_bytes": checkpoint.pool_bytes(tokens) for tier, tokens in self.kv.items()}
        return policy(
            self.device, weights=Fractions(**self.weights), kv=Fractions(**{tier: n / total for tier, n in self.kv.items()}), **sizes,
            kv_staging_bytes=checkpoint.pool_bytes(256) // 2 if "disk" in self.kv else 0,
            kv_tail_bytes=checkpoint.pool_bytes(3 * PAGE_TOKENS) if "disk" in self.kv else 0, schedule=self.schedule,
            max_num_seqs=self.max_num_seqs, micro_batch_tokens=self.micro_batch_tokens, embedding_resident=self.embedding_resident,
            host_attention=self.host_attention, kv_ring_bytes=0 if self.host_attention else checkpoint.pool_bytes(ROOM) // 4,
        )  # fmt: skip


ROOM, TIGHT = 2048, 336  # tokens of KV: for everything at once; for two or three sequences
# In every run: together these have every device, tier and schedule, and pools with much and with little room.
ALWAYS = [
    Case("cpu", {"disk": 1.0}, {"disk": ROOM}, "diagonal", 16, 64),
    Case("sim", {"device": 0.2, "host": 0.3, "disk": 0.5}, {"device": ROOM, "host": ROOM, "disk": ROOM}, "diagonal", 16, 64),
    Case("cpu", {"disk": 1.0}, {"host": ROOM}, "row", 16, 64),
    Case("sim", {"host": 0.6, "disk": 0.4}, {"device": ROOM, "host": ROOM, "disk": ROOM}, "zigzag", 16, 32),
    Case("sim", {"host": 0.5, "disk": 0.5}, {"device": TIGHT, "host": TIGHT, "disk": TIGHT}, "diagonal", 16, 64),
    Case("sim", {"host": 0.5, "disk": 0.5}, {"host": ROOM}, "diagonal", 16, 64, host_attention=False),
]
CASES = [
    *ALWAYS,
    # each tier alone
    Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 4096, embedding_resident=True),
    Case("cpu", {"disk": 1.0}, {"host": ROOM}, "diagonal", 5, 64),
    Case("sim", {"device": 1.0}, {"device": ROOM}, "diagonal", 5, 64, embedding_resident=True),
    Case("sim", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 64),
    Case("sim", {"disk": 1.0}, {"disk": ROOM}, "diagonal", 5, 64),
    # mixed
    Case("cpu", {"host": 0.5, "disk": 0.5}, {"host": ROOM, "disk": ROOM}, "diagonal", 16, 32),
    Case("sim", {"device": 0.5, "disk": 0.5}, {"device": 640, "host": ROOM}, "diagonal", 7, 17),
    # schedules
    Case("cpu", {"host": 0.3, "disk": 0.7}, {"host": ROOM}, "zigzag", 6, 64),
    Case("sim", {"device": 0.4, "host": 0.6}, {"host": ROOM}, "row", 16, 128),
    Case("cpu", {"host": 1.0}, {"disk": ROOM}, "zigzag", 5, 16),
    # block and micro-batch sizes; pools that hold a few sequences only
    Case("cpu", {"host": 0.9, "disk": 0.1}, {"host": TIGHT}, "diagonal", 16, 64),
    Case("cpu", {"disk": 1.0}, {"host": TIGHT, "disk": TIGHT}, "diagonal", 16, 8),
    Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 1, 64),
    Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 1),
    Case("sim", {"device": 1.0}, {"host": ROOM}, "diagonal", 16, 16),
    # attention on the device to KV on the host
    Case("sim", {"device": 0.5, "disk": 0.5}, {"device": 640, "host": ROOM, "disk": ROOM}, "diagonal", 16, 17, host_attention=False),
    Case("sim", {"host": 1.0}, {"host": TIGHT}, "zigzag", 16, 5, host_attention=False),
    Case("sim", {"disk": 1.0}, {"host": ROOM}, "row", 16, 128, host_attention=False),
]


@pytest.mark.matrix(5, always=[f"{model}-{case}" for case, model in zip(ALWAYS, itertools.cycle(MODELS), strict=False)], by="case")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_are_those_of_transformers(checkpoint: Checkpoint, case: Case, tmp_path: Path) -> None:
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        assert run.answers() == checkpoint.answers
        assert run.engine.log.counts.preemptions == 0, "forecasts were right"
        assert not any(tmp_path.iterdir()), "spill files are unlinked"


@pytest.mark.matrix(1)
def test_pages_of_next_tokens_come_to_the_device(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every layer and micro-batch, but where a pass also computes what they see; the host attends to those alone."""
    lent: list[int] = []
    attended: list[int] = []
    really, on_host = KVLink.lend, HostView._attend_steps

    def lend(link: KVLink, pages: Any, layer: int) -> Any:
        lent.append(layer)
        return really(link, pages, layer)

    def attend_steps(view: HostView, call: Any, group: int) -> Any:
        attended.append(call.layer)
        return on_host(view, call, group)

    monkeypatch.setattr(KVLink, "lend", lend)
    monkeypatch.setattr(HostView, "_attend_steps", attend_steps)
    case = Case("sim", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 64, host_attention=False)
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        assert run.answers() == checkpoint.answers
        num_passes = run.engine.log.passes.num_passes
    layers = checkpoint.config.num_hidden_layers
    assert set(lent) == set(range(layers))
    assert len(lent) >= (num_passes - 2) * layers
    assert len(attended) < len(lent) / 4


@pytest.mark.matrix(1)
def test_a_second_run_of_the_same_engine(checkpoint: Checkpoint, tmp_path: Path) -> None:
    case = Case("sim", {"host": 0.5, "disk": 0.5}, {"device": ROOM, "host": ROOM}, "diagonal", 5, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        assert run.answers() == checkpoint.answers
        partial = run.engine.generate(checkpoint.requests)
        next(partial)
        partial.close()  # abandoned between two passes
        assert run.answers() == checkpoint.answers


@pytest.mark.matrix(2, always=["novels_qwen3-cpu-host-diagonal", "novels_opt-sim-disk-diagonal"], by="device")
@pytest.mark.parametrize(
    ("device", "tier", "schedule"),
    [
        ("cpu", "host", "diagonal"),
        ("cpu", "disk", "diagonal"),
        ("sim", "device", "diagonal"),
        ("sim", "host", "diagonal"),
        ("sim", "disk", "diagonal"),
        ("sim", "host", "zigzag"),
        ("cpu", "host", "row"),
        ("sim", "host, attended to on the device", "diagonal"),
    ],
)
def test_wrong_forecasts_are_repaired(
    checkpoint: Checkpoint, device: str, tier: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that last longer than expected run the pools dry: sequences are preempted and computed again."""
    monkeypatch.setattr(LengthForecast, "expect", lambda self, max_tokens: 1)
    home, _, elsewhere = tier.partition(",")
    case = Case(device, {"host": 0.7, "disk": 0.3}, {home: 12 * PAGE_TOKENS}, schedule, 16, 256, host_attention=not elsewhere)
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        results = run.results(checkpoint.crowd)
        assert {index: result.token_ids for index, result in results.items()} == checkpoint.crowd_answers
        preemptions = run.engine.log.counts.preemptions
        assert preemptions == sum(result.num_preemptions for result in results.values()) > 0


@pytest.mark.matrix(1, always=["novels_qwen3-sim-zigzag"], by="device")
@pytest.mark.parametrize(("device", "schedule"), [("cpu", "diagonal"), ("sim", "zigzag"), ("cpu", "row")])
def test_a_request_that_never_fits_fails_alone(checkpoint: Checkpoint, device: str, schedule: str, tmp_path: Path) -> None:
    """Too long a prompt, and too long an answer; before, among and after others."""
    case = Case(device, {"host": 1.0}, {"host": 192}, schedule, 16, 64)
    too_long = TokenRequest(index=7000, prompt_token_ids=tuple(range(5, 205)), max_tokens=1)
    too_many = TokenRequest(index=7001, prompt_token_ids=(5, 6), max_tokens=200)
    just_fits = TokenRequest(index=7002, prompt_token_ids=(5,) * 191, max_tokens=2)
    requests = [too_long, *checkpoint.requests[:4], too_many, *checkpoint.requests[4:], just_fits]
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        results = run.results(requests)
    for refused in (too_long, too_many):
        error = results.pop(refused.index).error
        assert error is not None
        assert error.code == "kv_cache_too_small"
    assert len(results.pop(just_fits.index).token_ids) == 2
    assert {index: result.token_ids for index, result in results.items()} == checkpoint.answers
    assert run.engine.log.counts.errors == 2


def test_only_requests_that_never_fit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    case = Case("cpu", {"host": 1.0}, {"host": 64}, "diagonal", 16, 64)
    requests = [TokenRequest(index=i, prompt_token_ids=(5,) * 100, max_tokens=3) for i in range(3)]
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        assert all(result.error is not None for result in run.results(requests).values())
        assert run.results([]) == {}


def test_a_row_that_is_not_finite_fails_alone(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = (3, 101)  # request indices whose second token has no finite logits

    start = Sampler.start

    def broken(sampler: Sampler, logits: torch.Tensor, requests: Any, generated: Any) -> Any:
        for row, (request, past) in enumerate(zip(requests, generated, strict=True)):
            if request.index in doomed and len(past) == 1:
                logits[row, 17] = torch.nan
        return start(sampler, logits, requests, generated)

    monkeypatch.setattr(Sampler, "start", broken)
    case = Case("cpu", {"host": 0.5, "disk": 0.5}, {"host": ROOM}, "diagonal", 16, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        results = run.results()
    for index in doomed:
        failed = results.pop(index)
        assert failed.finish_reason == "error"
        assert failed.error is not None
        assert failed.error.code == "non_finite_logits"
    assert {index: result.token_ids for index, result in results.items()} == {
        index: answer for index, answer in checkpoint.answers.items() if index not in doomed
    }


def test_a_stop_token_ends_the_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = checkpoint.answers[0]
    stop = whole[len(whole) // 2]
    wanted = whole[: whole.index(stop) + 1]
    request = TokenRequest(
        index=0, prompt_token_ids=checkpoint.requests[0].prompt_token_ids, max_tokens=20, stop_token_ids=frozenset({stop})
    )
    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 4, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        result = run.results([request])[0]
    assert (result.token_ids, result.finish_reason) == (wanted, "stop")


def test_a_stop_string_ends_the_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Whatever finds it, the engine asks after each token, with all tokens of that answer."""
    asked: list[list[int]] = []

    def stops(token_ids: Any) -> str | None:
        asked.append(list(token_ids))
        return "found" if len(token_ids) == 4 else None

    request = replace(checkpoint.requests[0], stops=stops)
    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 4, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        result = run.results([request])[0]
    whole = checkpoint.answers[0]
    assert (result.token_ids, result.finish_reason, result.stop_string) == (whole[:4], "stop", "found")
    assert asked == [list(whole[:count]) for count in range(1, 5)]


# -- interruptions --------------------------------------------------------------------------------------------------------------------


def assert_same_answer(got: TokenResult, wanted: TokenResult) -> None:
    assert (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    assert (got.logprobs is None) == (wanted.logprobs is None)
    for one, other in zip(got.logprobs or (), wanted.logprobs or (), strict=True):
        assert (one.token_ids, one.rank) == (other.token_ids, other.rank)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def begun(request: TokenRequest, whole: TokenResult, count: int) -> TokenRequest:
    """The request after an earlier run has generated `count` tokens."""
    logprobs = None if whole.logprobs is None else whole.logprobs[:count]
    return replace(request, generated=Generated(token_ids=whole.token_ids[:count], logprobs=logprobs))


RESUMED = [
    Case("cpu", {"host": 0.5, "disk": 0.5}, {"host": ROOM}, "diagonal", 16, 64),
    Case("cpu", {"host": 1.0}, {"disk": ROOM}, "zigzag", 9, 33),
    Case("sim", {"host": 0.5, "disk": 0.5}, {"device": ROOM, "host": ROOM, "disk": ROOM}, "diagonal", 16, 64),
]


@pytest.mark.matrix(1)
@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_an_answer_goes_on_wherever_it_was_cut(checkpoint: Checkpoint, case: Case, tmp_path: Path) -> None:
    """Every answer, cut at every token, all in one run; what is computed again is counted as such."""
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        whole = run.results()
        cut = [(request, count) for request in checkpoint.requests for count in range(len(whole[request.index].token_ids))]
        requests = [replace(begun(request, whole[request.index], count), index=i) for i, (request, count) in enumerate(cut)]
        results = run.results(requests)
        counts = run.engine.log.counts
    assert len(results) == len(cut)
    for index, (request, _) in enumerate(cut):
        assert_same_answer(results[index], whole[request.index])
    assert counts.output_tokens == sum(len(whole[request.index].token_ids) - count for request, count in cut)
    assert counts.recomputed_tokens == sum(len(request.prompt_token_ids) + count - 1 for request, count in cut if count)


@pytest.mark.matrix(1)
def test_a_resumed_answer_may_be_preempted(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And be computed a third time; penalties and log probabilities still count all of it."""
    monkeypatch.setattr(LengthForecast, "expect", lambda self, max_tokens: 1)
    requests = [replace(each, repetition_penalty=1.2, frequency_penalty=0.3, num_logprobs=1) for each in checkpoint.crowd]
    roomy, tight = (Case("cpu", {"host": 1.0}, {"host": tokens}, "diagonal", 16, 256) for tokens in (ROOM, 12 * PAGE_TOKENS))
    with Run(checkpoint, roomy.policy(checkpoint), tmp_path) as run:
        whole = run.results(requests)
        assert run.engine.log.counts.preemptions == 0
    with Run(checkpoint, tight.policy(checkpoint), tmp_path) as run:
        results = run.results([begun(request, whole[request.index], 3) for request in requests])
        counts = run.engine.log.counts
    for index, wanted in whole.items():
        assert_same_answer(results[index], wanted)
    assert counts.preemptions > 0
    assert counts.recomputed_tokens > sum(len(request.prompt_token_ids) + 2 for request in requests), "preemptions count, too"


def test_an_answer_that_had_come_to_its_end_is_given_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 4, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        whole = run.results()
        results = run.results([begun(request, whole[request.index], request.max_tokens) for request in checkpoint.requests])
        assert run.engine.log.passes.num_passes == 0
    assert results == whole


class Interrupted(Exception):
    """What a caller may raise."""


@pytest.mark.matrix(1)
@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_is_interrupted_again_and_again(checkpoint: Checkpoint, every: int, tmp_path: Path) -> None:
    """Only results and what `on_pass` once told live on, even if it was told some passes before; answers are those of a whole run."""
    case = Case("sim", {"host": 0.5, "disk": 0.5}, {"device": 640, "host": ROOM}, "diagonal", 7, 64)
    done: dict[int, TokenResult] = {}
    kept: dict[int, Generated] = {}
    passes = 0

    def on_pass(live: Any) -> None:
        nonlocal passes
        passes += 1
        if passes % every == 0:
            kept.update({each.index: each.generated for each in live})
        if passes % every == every // 2:
            raise Interrupted

    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        whole = run.results()
        interruptions = 0
        while len(done) < len(whole):
            left = [request for request in checkpoint.requests if request.index not in done]
            try:
                for result in run.engine.generate(
                    [replace(request, generated=kept.get(request.index, Generated())) for request in left], on_pass=on_pass
                ):
                    done[result.index] = result
            except Interrupted:
                interruptions += 1
    assert interruptions >= 20 // every
    for index, wanted in whole.items():
        assert_same_answer(done[index], wanted)


def test_what_a_pass_tells(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """After each pass the beginning of every answer that goes on; nothing is gathered for those who do not look."""
    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 5, 64)
    told: dict[int, list[Generated]] = {}

    def look(live: Any) -> None:
        for each in live:
            assert isinstance(each, PartialAnswer)
            assert each.index not in finished, "results come first"
            told.setdefault(each.index, []).append(each.generated)

    finished: dict[int, TokenResult] = {}
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        for result in run.engine.generate(checkpoint.requests, on_pass=look):
            finished[result.index] = result
    for request in checkpoint.requests:
        result = finished[request.index]
        beginnings = [begun(request, result, count).generated for count in range(1, len(result.token_ids))]
        assert told.get(request.index, []) == beginnings


@pytest.mark.matrix(3, always=["novels_qwen3-cpu-40"])
@pytest.mark.parametrize("num_reads", [0, 40, 150])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_failing_disk_ends_the_run(
    checkpoint: Checkpoint, device: str, num_reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an error, not by hanging; and the engine can be closed."""
    really, left = os.preadv, [num_reads]

    def failing(fd: int, buffers: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return really(fd, buffers, offset)

    case = Case(device, {"disk": 1.0}, {"disk": ROOM}, "diagonal", 16, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20) as run:
        run.engine.load()
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(StorageError, match="Input/output error"):
            run.results()
        monkeypatch.undo()
