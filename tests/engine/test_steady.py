"""The middle of a job: passes carry what those of a full run carry there, whatever the schedule, the homes and the format of KV."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.steady import SteadyEngine
from flexgen.errors import EngineError
from flexgen.kv.low_bit import kv_format
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.work import PassWork
from flexgen.request import TokenRequest

PROMPT, ANSWER, NUM_REQUESTS, SKIPPED, PASSES = 20, 7, 40, 13, 9
BASE = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=0.5, disk=0.5), kv=Fractions(host=1.0), kv_host_bytes=8 << 20,
    host_ring_bytes=16 << 20, embedding_resident=False, schedule="diagonal", max_num_seqs=8, prefill_tokens=24, micro_batch_tokens=48,
    page_tokens=16, compute_threads=1, io_threads=1, longest_sequence=PROMPT + ANSWER,
)  # fmt: skip
ON_DISK: dict[str, Any] = {
    "kv": Fractions(host=0.5, disk=0.5), "kv_disk_bytes": 8 << 20, "kv_staging_bytes": 1 << 20, "kv_tail_bytes": 1 << 20
}  # fmt: skip
POLICIES = {
    "diagonal": BASE,
    "few pages": replace(BASE, kv_host_bytes=1 << 20),
    "zigzag": replace(BASE, schedule="zigzag"),
    "row": replace(BASE, schedule="row"),
    "disk": replace(BASE, **ON_DISK),
    "low-bit": replace(BASE, kv_format="int4"),
    "low-bit on disk": replace(BASE, kv_format="k8v4", **ON_DISK),
    "sim": replace(
        BASE, device="sim", weights=Fractions(device=0.2, host=0.4, disk=0.4), device_ring_bytes=16 << 20, kv_device_bytes=4 << 20,
        **ON_DISK | {"kv": Fractions(device=0.4, host=0.3, disk=0.3)},
    ),
}  # fmt: skip


@pytest.fixture
def opened(novels_opt: Path, tmp_path: Path):
    @contextlib.contextmanager
    def open_engine(policy: Policy) -> Iterator[SteadyEngine]:
        config, kv = AutoConfig.from_pretrained(novels_opt), kv_format(policy.kv_format or "auto", torch.float32)
        model = assemble_model(novels_opt, config, torch.float32, kv_format=kv)
        backend = SimulatedDevice(96 << 20, max_delay_seconds=0.0002) if policy.device == "sim" else None
        with contextlib.closing(SteadyEngine(model, policy, backend=backend, offload_dir=tmp_path, poison=True)) as engine:
            yield engine

    return open_engine


def requests() -> Iterator[TokenRequest]:
    generator = torch.Generator().manual_seed(3)
    for index in range(NUM_REQUESTS):
        prompt = torch.randint(5, 120, (PROMPT,), generator=generator).tolist()
        yield TokenRequest(index=index, prompt_token_ids=tuple(prompt), max_tokens=ANSWER)


def composition(work: PassWork) -> tuple[int, int, int]:
    return round(work.num_sequences), round(work.num_prompt_tokens), round(work.num_sampled)


def tokens(engine: SteadyEngine) -> list[list[int]]:
    return [list(each.tokens) for each in engine._block.scheduler.live]


@pytest.mark.parametrize("name", POLICIES)
def test_passes_carry_what_those_of_a_full_run_carry(name: str, opened: Any) -> None:
    full: list[tuple[int, int, int]] = []
    with opened(POLICIES[name]) as engine:
        for _ in engine.generate(requests(), on_pass=lambda _: full.append(composition(engine.log.passes.last.work))):
            pass
        found = []
        with engine.middle(requests(), num_skipped=SKIPPED, seed=0) as run_pass:
            assert sum(map(len, engine._stored_pages()[next(iter(engine.cache.pools))])) > 0
            for _ in range(PASSES):
                assert run_pass()
                found.append(composition(engine.log.passes.last.work))
                assert all(engine.cache.used_bytes[tier] <= getattr(POLICIES[name], f"kv_{tier}_bytes") for tier in engine.cache.pools)
        assert all(used == 0 for used in engine.cache.used_bytes.values())
        assert not engine.has_work
    assert len(full) > SKIPPED + PASSES
    assert found == full[SKIPPED : SKIPPED + PASSES]
    assert sum(prompts for _, prompts, _ in found) > 0
    assert engine.log.finish_reasons["length"] == engine.log.counts.requests > 0
    assert engine.log.counts.errors == 0, "random numbers are finite"


@pytest.mark.parametrize("name", ["diagonal", "sim"])
def test_the_seed_decides(name: str, opened: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        with opened(POLICIES[name]) as engine, engine.middle(requests(), num_skipped=SKIPPED, seed=seed) as run_pass:
            before = tokens(engine)
            run_pass()
            found.append((before, tokens(engine)))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert len(found[0][0]) > 4


def test_what_a_run_that_was_given_up_has_left_changes_nothing(opened: Any) -> None:
    found: list[list[tuple[int, int, int]]] = []
    with opened(BASE) as engine:
        for num_skipped in (0, 1, 2, 3):
            with engine.middle(requests(), num_skipped=num_skipped, seed=0) as run_pass:
                run_pass()
            found.append([])
            with engine.middle(requests(), num_skipped=0, seed=0) as run_pass:
                for _ in range(4):
                    run_pass()
                    found[-1].append(composition(engine.log.passes.last.work))
    assert found == [found[0]] * 4
    assert len({prompts for _, prompts, _ in found[0]}) > 1, "credit that is left over matters"


def test_a_job_that_is_over_has_no_next_pass(opened: Any) -> None:
    with opened(BASE) as engine, engine.middle(requests(), num_skipped=300, seed=0) as run_pass:
        assert not run_pass()
        assert not engine.has_work


def test_one_job_at_a_time(opened: Any) -> None:
    with opened(BASE) as engine:
        engine.add(next(requests()))
        with pytest.raises(EngineError, match="before the last one was over"), engine.middle(requests(), num_skipped=1, seed=0):
            pass
        engine.clear()
        with engine.middle(requests(), num_skipped=2, seed=0) as run_pass:
            assert run_pass()
        assert len(list(engine.generate(requests()))) == NUM_REQUESTS, "an engine answers as before"
