"""How often the thread that computes waits for the device while next tokens are attended to there: once per micro-batch, for their results.

So it is wherever their KV lives, if the pages come to the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen.engine.engine import Engine
from flexgen.passes.plan import PassPlan
from flexgen.plan.policy import Fractions
from flexgen.request import TokenRequest, TokenResult
from tests.devices.counting import CountingDevice
from tests.engine.test_device_sampler import mixed
from tests.models.parity import build, describe, policy, save
from tests.models.tiny_configs import tiny_config

# Plain attention; windows, caps and queries in groups; learned positions; and latents in three ways.
FAMILIES = {"llama": {}, "gemma2": {}, "opt": {}, "minicpm3": {}, "youtu": {}, "deepseek_v3": {"first_k_dense_replace": 4}}
PROMPTS = (5, 9, 3, 23, 17, 8, 2)
DEVICE_BYTES = 32_000_000


@pytest.fixture(params=[(family, home) for family in FAMILIES for home in ("device", "host")], ids="-".join)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Engine, CountingDevice]]:
    family, home = request.param
    config = tiny_config(family, **FAMILIES[family])
    save(build(config), tmp_path)
    chosen = policy(
        "sim", weights=Fractions(device=0.5, host=0.5), kv=Fractions(**{home: 1.0}), ring_bytes=1_000_000, micro_batch_tokens=3
    )  # fmt: skip
    chosen = replace(chosen, max_num_seqs=7, copies_in_bytes=1 << 20, copies_out_bytes=1 << 20)
    if home == "host":
        chosen = replace(chosen, host_attention=False, kv_ring_bytes=1 << 18)
    device = CountingDevice(DEVICE_BYTES)
    with Engine(describe(tmp_path, config), chosen, backend=device, poison=True) as engine:
        yield engine, device


def requests() -> list[TokenRequest]:
    """Greedy rows, drawn ones, with penalties, masks and log probabilities."""
    kinds = [each for each in mixed(10) if each.allowed_token_ids is None]
    prompts = [tuple(10 + (7 * index + place) % 90 for place in range(length)) for index, length in enumerate(PROMPTS)]
    return [
        replace(kinds[index % len(kinds)], index=index, prompt_token_ids=prompt, max_tokens=7) for index, prompt in enumerate(prompts)
    ]  # fmt: skip


def test_decode_passes_wait_once_per_micro_batch(engine: tuple[Engine, CountingDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    runs, device = engine
    waits: list[tuple[int, int]] = []  # per decode pass: how often the host waited, and the number of micro-batches
    run = Engine._run

    def counting(self: Engine, plan: PassPlan) -> list[TokenResult]:
        before = device.synchronisations + device.num_main_waits
        results = run(self, plan)
        if all(each.is_decode for batch in plan.micro_batches for each in batch.slices):
            waits.append((device.synchronisations + device.num_main_waits - before, len(plan.micro_batches)))
        return results

    monkeypatch.setattr(Engine, "_run", counting)
    results = list(runs.generate(requests()))
    assert [each.error for each in results] == [None] * len(PROMPTS)
    assert all(each.logprobs is None or len(each.logprobs) == 7 for each in results)
    assert max(batches for _, batches in waits) > 1
    assert all(found == batches for found, batches in waits), waits
