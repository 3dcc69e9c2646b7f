"""Sharing cannot change answers: with and without it, every home and schedule gives the same tokens in float32.

What transformers answers to the same requests is the business of test_matrix.py and models/test_parity.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.admission import Admission, LengthForecast
from flexgen.engine.blocks import Block
from flexgen.engine.engine import Engine
from flexgen.engine.sequence import LiveSequence
from flexgen.kv.pages import PagePool
from flexgen.plan.policy import Fractions
from flexgen.plan.price.work import PassWork
from flexgen.report.pass_log import PassLog
from flexgen.request import Generated, TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from tests.models import parity
from tests.models.test_parity import PLACES, REPRESENTATIVES, STREAMED, VARIANTS, ring_bytes
from tests.models.tiny_configs import tiny_config
from tests.test_matrix import PAGE_TOKENS, ROOM, Case, Checkpoint, Run


def tokens(length: int, seed: int, vocab_size: int = 120) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, vocab_size, (length,), generator=generator).tolist())


def nested(page: int, vocab_size: int = 120) -> list[TokenRequest]:
    """An instruction, one of three blocks of examples, an own end; two alone, and two alike that end with their shared page."""
    instruction = tokens(3 * page + 2, 1, vocab_size)
    blocks = [tokens(2 * page, 2 + block, vocab_size) for block in range(3)]
    prompts = [(*instruction, *blocks[place % 3], *tokens(1 + 5 * place % 23, 10 + place, vocab_size)) for place in range(9)]
    prompts += [(*instruction, *tokens(7, 30, vocab_size)), tokens(2 * page, 31, vocab_size), tokens(3, 32, vocab_size)]
    prompts += [(*tokens(4 * page, 33, vocab_size), 6)] * 2
    lengths = [3 + 7 * place % 11 for place in range(len(prompts))]
    return [TokenRequest(index=i, prompt_token_ids=p, max_tokens=n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]


def common(requests: Iterable[TokenRequest], page: int = PAGE_TOKENS) -> tuple[CommonPrefixes, int]:
    """(what the requests share, prompt tokens that one copy of it saves)."""
    census = PrefixCensus(page)
    saved = sum(census.add(request.prompt_token_ids) for request in requests)
    return census.common(), saved


@pytest.fixture(scope="module")
def checkpoint(novels_qwen3: Path) -> Checkpoint:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(novels_qwen3)
    token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    return Checkpoint(novels_qwen3, config, tuple(nested(PAGE_TOKENS)), {}, (), {}, token_bytes)


@pytest.fixture(scope="module")
def wanted(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TokenResult]:
    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path_factory.mktemp("alone")) as run:
        return run.results()


def test_answers_are_decided_by_more_than_rounding(checkpoint: Checkpoint, wanted: dict[int, TokenResult]) -> None:
    """The other tests compare tokens one by one, on whatever processor."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, attn_implementation="eager").eval()
    disturbed = parity.in_float64(loaded, disturbance=parity.SAFETY * parity.DISTURBANCE)
    answers = parity.generated(disturbed, list(checkpoint.requests))
    assert {index: list(result.token_ids) for index, result in wanted.items()} == answers.tokens


class SharingRun(Run):
    """A run that counts what its passes compute."""

    def __init__(self, *args: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        super().__init__(*args, **more)
        self.num_computed = 0
        add = PassLog.add

        def counting(passes: PassLog, seconds: float, work: PassWork, waits: Any) -> None:
            self.num_computed += work.num_tokens
            add(passes, seconds, work, waits)

        monkeypatch.setattr(PassLog, "add", counting)

    def shared(self, requests: Iterable[TokenRequest], prefixes: CommonPrefixes) -> dict[int, TokenResult]:
        results = {result.index: result for result in self.engine.generate(requests, prefixes=prefixes)}
        self.check_budgets()
        return results

    @property
    def num_shared(self) -> int:
        return self.engine.log.counts.shared_prompt_tokens


def num_tokens(requests: Iterable[TokenRequest]) -> int:
    """What is computed without sharing: of an answer all but the last token."""
    return sum(len(request.prompt_token_ids) + request.max_tokens - 1 for request in requests)


TIGHT = 14 * PAGE_TOKENS
CASES = [
    Case(device, {"host": 0.5, "disk": 0.5}, {tier: ROOM}, schedule, 16, micro_batch_tokens)
    for device, tier in (("cpu", "host"), ("cpu", "disk"), ("sim", "device"), ("sim", "host"), ("sim", "disk"))
    for schedule, micro_batch_tokens in (("diagonal", 64), ("zigzag", 33), ("row", 200))
] + [
    Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 4096),  # all of it in one micro-batch
    Case("sim", {"host": 1.0}, {"host": ROOM}, "zigzag", 16, 4096),
    Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 1),
    Case("sim", {"host": 1.0}, {"host": ROOM}, "diagonal", 3, 5),
    Case("sim", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 64, host_attention=False),
    Case("sim", {"host": 0.5, "disk": 0.5}, {"host": ROOM}, "zigzag", 16, 33, host_attention=False),
]


@pytest.mark.matrix(2, always=[str(CASES[0]), str(CASES[13])], by="case")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prefix_is_computed_once(
    checkpoint: Checkpoint, wanted: dict[int, TokenResult], case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, saved = common(checkpoint.requests)
    assert saved == (9 * 3 + 6 * 2 + 4) * PAGE_TOKENS
    with SharingRun(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20, monkeypatch=monkeypatch) as run:
        assert run.shared(checkpoint.requests, prefixes) == wanted
        assert run.engine.log.counts.preemptions == 0, "forecasts were right"
        assert run.num_shared == saved
        assert run.num_computed == num_tokens(checkpoint.requests) - saved
        assert run.results() == wanted, "and without it again"
        assert run.num_shared == 0


@pytest.mark.matrix(2, always=["diagonal-sim-kv4"], by="device")
@pytest.mark.parametrize(
    ("device", "kv"),
    [
        ("cpu", {"host": ROOM, "disk": ROOM}),
        ("sim", {"device": ROOM, "host": ROOM, "disk": ROOM}),
        ("cpu", {"host": TIGHT}),
        ("cpu", {"disk": TIGHT}),
        ("sim", {"host": TIGHT, "device": TIGHT}),
    ],
)
@pytest.mark.parametrize("schedule", ["diagonal", "zigzag"])
def test_several_homes_and_little_room(
    checkpoint: Checkpoint, wanted: dict[int, TokenResult], device: str, kv: dict[str, int], schedule: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every home has a copy of its own; where there is no room for what nobody uses just now, it is computed again."""
    prefixes, saved = common(checkpoint.requests)
    case = Case(device, {"host": 1.0}, kv, schedule, 16, 64)
    with SharingRun(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20, monkeypatch=monkeypatch) as run:
        assert run.shared(checkpoint.requests, prefixes) == wanted
        assert 0 < run.num_shared <= saved
        assert run.engine.log.counts.preemptions == 0, "forecasts were right"
        assert run.num_computed == num_tokens(checkpoint.requests) - run.num_shared


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_shared_pages_are_held_once(checkpoint: Checkpoint, tier: str, tmp_path: Path) -> None:
    """Ten sequences of 5 shared pages and one of their own, all alive at once, in a pool of 15 pages."""
    instruction = tokens(5 * PAGE_TOKENS, 1)
    requests = [TokenRequest(index=i, prompt_token_ids=(*instruction, *tokens(6, 10 + i)), max_tokens=8) for i in range(10)]
    case = Case("cpu", {"host": 1.0}, {tier: 15 * PAGE_TOKENS}, "zigzag", 10, 512)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        alone = run.results(requests)
        num_passes = run.engine.log.passes.num_passes
        results = {result.index: result for result in run.engine.generate(requests, prefixes=common(requests)[0])}
        run.check_budgets()
        assert results == alone
        assert run.engine.cache.peak_bytes[tier] == 15 * PAGE_TOKENS * checkpoint.token_bytes
        if tier == "disk":  # decoding alone would read the prefix for each of ten sequences in each of seven passes
            assert run.engine.log.bytes_moved()["disk_read"] < 7 * 10 * 5 * PAGE_TOKENS * checkpoint.token_bytes
        assert run.engine.log.passes.num_passes == 8 + (tier == "disk") < num_passes, "one block; on disk the others begin a pass later"


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("device", "tier", "schedule"),
    [("cpu", "host", "diagonal"), ("cpu", "disk", "diagonal"), ("sim", "device", "zigzag"), ("sim", "host", "diagonal")],
)
def test_preempted_sequences_share_again(
    checkpoint: Checkpoint, device: str, tier: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction = tokens(3 * PAGE_TOKENS, 1)
    requests = [TokenRequest(index=i, prompt_token_ids=(*instruction, *tokens(9 + i, 10 + i)), max_tokens=9 + i) for i in range(8)]
    monkeypatch.setattr(LengthForecast, "expect", lambda self, max_tokens: 1)
    case = Case(device, {"host": 1.0}, {tier: 12 * PAGE_TOKENS}, schedule, 16, 256)
    with SharingRun(checkpoint, case.policy(checkpoint), tmp_path, device_bytes=64 << 20, monkeypatch=monkeypatch) as run:
        alone = run.results(requests)
        run.num_computed = 0
        results = run.shared(requests, common(requests)[0])
        counts = run.engine.log.counts
    assert {i: result.token_ids for i, result in results.items()} == {i: result.token_ids for i, result in alone.items()}
    assert counts.preemptions > 0
    again = sum(results[i].num_preemptions for i in results)
    assert again == counts.preemptions
    assert run.num_shared > 7 * len(instruction), "those that come back find it, too"


def test_resumed_answers_share_their_prompts(checkpoint: Checkpoint, wanted: dict[int, TokenResult], tmp_path: Path) -> None:
    requests = [
        replace(request, generated=Generated(token_ids=wanted[request.index].token_ids[: request.index % 3]))
        for request in checkpoint.requests
    ]
    prefixes, saved = common(requests)
    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 16, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        results = {result.index: result for result in run.engine.generate(requests, prefixes=prefixes)}
        assert results == wanted
        assert run.engine.log.counts.shared_prompt_tokens == saved


def test_a_run_that_ends_early_leaves_nothing(checkpoint: Checkpoint, wanted: dict[int, TokenResult], tmp_path: Path) -> None:
    """Abandoned after any pass, and when requests never come that the census had counted."""
    prefixes, _ = common([*checkpoint.requests, *checkpoint.requests])
    case = Case("cpu", {"host": 1.0}, {"host": ROOM, "disk": ROOM}, "diagonal", 9, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        for stop in range(1, 12):
            partial = run.engine.generate(checkpoint.requests, prefixes=prefixes)
            for _ in range(stop):
                next(partial)
            partial.close()
            run.check_budgets()
        results = {result.index: result for result in run.engine.generate(checkpoint.requests, prefixes=prefixes)}
        run.check_budgets()
        assert results == wanted


def test_pages_of_another_size_are_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from flexgen.errors import EngineError

    case = Case("cpu", {"host": 1.0}, {"host": ROOM}, "diagonal", 9, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run, pytest.raises(EngineError, match="pages of 8 tokens"):
        list(run.engine.generate(checkpoint.requests, prefixes=common(checkpoint.requests, 8)[0]))


# -- every kind of attention ------------------------------------------------------------------------------------------------------------


def answered(model: Any, chosen: Any, requests: list[TokenRequest], prefixes: CommonPrefixes, folder: Path) -> tuple[dict[int, Any], int]:
    """(tokens of each answer, shared prompt tokens); every page comes back, and none is read before it is written."""
    backend = SimulatedDevice(32_000_000) if chosen.device == "sim" else None
    with Engine(model, chosen, backend=backend, offload_dir=folder, poison=True) as engine:
        for pool in engine.cache.pools.values():
            if isinstance(pool, PagePool):
                for memory in pool.memory:
                    memory.keys.fill_(0xFF)  # NaN
                    memory.values.fill_(0xFF)
        results = {result.index: result for result in engine.generate(requests, prefixes=prefixes)}
        assert not [result.error for result in results.values() if result.error is not None]
        assert all(used == 0 for used in engine.cache.used_bytes.values())
        return {index: result.token_ids for index, result in results.items()}, engine.log.counts.shared_prompt_tokens


@pytest.mark.matrix(2, always=["llama-cpu-host", "gemma3_text-cpu-disk", "deepseek_v3-sim-mixed"], by="place")
@pytest.mark.parametrize("place", ["cpu-host", *PLACES])
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_every_kind_of_attention(model_type: str, place: str, tmp_path: Path) -> None:
    """Prompts are longer than the tiny models' windows and chunks, and lie on both sides of what changes rotary frequencies."""
    config = tiny_config(model_type)
    reference = parity.build(config)
    parity.save(reference, tmp_path)
    device, weights, kv = ("cpu", STREAMED, Fractions(host=1.0)) if place == "cpu-host" else PLACES[place]
    model = parity.describe(tmp_path, config)
    chosen = parity.policy(device, weights=weights, kv=kv, ring_bytes=ring_bytes(model))
    requests = nested_within(64)
    prefixes, saved = common(requests, chosen.page_tokens)
    wanted = parity.expected(reference, requests)
    alone, _ = answered(model, chosen, requests, NO_PREFIXES, tmp_path)
    shared, num_shared = answered(parity.describe(tmp_path, config), chosen, requests, prefixes, tmp_path)
    parity.assert_same_tokens(alone, wanted)
    parity.assert_same_tokens(shared, wanted)
    assert num_shared > 0
    assert num_shared <= saved or model.recompute_length is not None, "those that are computed anew share again"


def nested_within(context: int) -> list[TokenRequest]:
    """Prompts of 9 to 47 tokens whose pages of 8 tokens are shared at several depths."""
    long, short = tokens(40, 1), tokens(8, 2)
    prompts = [(*long, *tokens(1 + place, 10 + place)) for place in range(4)]
    prompts += [(*long[:16], *tokens(3 + place, 20 + place)) for place in range(4)]
    prompts += [(*short, *tokens(1 + place, 30 + place)) for place in range(4)]
    return [TokenRequest(index=i, prompt_token_ids=p, max_tokens=min(9, context - len(p))) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope", "phi3", "gemma3-dynamic"])
def test_prompts_with_other_frequencies_do_not_share(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when sequences are computed again, at their new length or at their old one."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    config = tiny_config(model_type, **changes)
    reference = parity.build(config)
    parity.save(reference, tmp_path)
    outgrew = Block._outgrew

    def outgrew_or_unlucky(block: Block, sequence: LiveSequence) -> bool:
        return outgrew(block, sequence) or (sequence.num_generated == 5 and sequence.num_preemptions < 2)

    monkeypatch.setattr(Block, "_outgrew", outgrew_or_unlucky)
    model = parity.describe(tmp_path, config)
    requests = nested_within(64)
    wanted = parity.expected(reference, requests)
    chosen = parity.policy(weights=STREAMED, kv=Fractions(host=1.0), ring_bytes=ring_bytes(model))
    prefixes, _ = common(requests, chosen.page_tokens)
    shared, num_shared = answered(model, chosen, requests, prefixes, tmp_path)
    parity.assert_same_tokens(shared, wanted)
    assert num_shared > 0


def test_requests_of_a_prefix_run_together(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Interleaved in the input, in a pool that cannot keep every prefix: each is computed once all the same."""
    instructions = [tokens(4 * PAGE_TOKENS, seed) for seed in range(6)]
    requests = [TokenRequest(index=i, prompt_token_ids=(*instructions[i % 6], *tokens(5, 50 + i)), max_tokens=4) for i in range(24)]
    prefixes, saved = common(requests)
    case = Case("cpu", {"host": 1.0}, {"host": 12 * PAGE_TOKENS}, "diagonal", 6, 64)
    with Run(checkpoint, case.policy(checkpoint), tmp_path) as run:
        order: list[int] = []
        really = Admission.admit

        def admit(admission: Admission, sequence: LiveSequence) -> bool:
            if entered := really(admission, sequence):
                order.append(sequence.id % 6)
            return entered

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Admission, "admit", admit)
            list(run.engine.generate(requests, prefixes=prefixes))
        run.check_budgets()
        assert run.engine.log.counts.shared_prompt_tokens == saved
    assert order == sorted(order)
