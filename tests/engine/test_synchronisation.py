"""How often the thread that computes waits for the device while it computes there: once per micro-batch, for its results.

So it is wherever the KV lives, if the pages come to the device.  What torch copies to the device counts as well as what the host reads
there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgen.engine.engine import Engine
from flexgen.kv.low_bit import LowBitPages, kv_format
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.policy import Fractions
from flexgen.request import TokenRequest, TokenResult
from tests.devices.counting import CountingDevice
from tests.engine.test_device_sampler import mixed
from tests.models.parity import UNIT_BYTES, build, describe, policy, save
from tests.models.tiny_configs import tiny_config

# Plain attention; windows, caps and queries in groups; learned positions; and latents in three ways.
FAMILIES = {"llama": {}, "gemma2": {}, "opt": {}, "minicpm3": {}, "youtu": {}, "deepseek_v3": {"first_k_dense_replace": 4}}
PROMPTS = (5, 9, 3, 23, 17, 8, 2)
DEVICE_BYTES = 32_000_000
TOKENS = 7  # of an answer


@contextmanager
def opened(model: AssembledModel, home: str = "device") -> Iterator[tuple[Engine, CountingDevice]]:
    chosen = policy(
        "sim", weights=Fractions(device=0.5, host=0.5), kv=Fractions(**{home: 1.0}), ring_bytes=1_000_000, micro_batch_tokens=3
    )  # fmt: skip
    chosen = replace(chosen, max_num_seqs=len(PROMPTS), copies_in_bytes=1 << 20, copies_out_bytes=1 << 20)
    if home == "host":
        chosen = replace(chosen, host_attention=False, kv_ring_bytes=1 << 18)
    device = CountingDevice(DEVICE_BYTES)
    with Engine(model, chosen, backend=device, poison=True) as engine:
        yield engine, device


@pytest.fixture(params=[(family, home) for family in FAMILIES for home in ("device", "host")], ids="-".join)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Engine, CountingDevice]]:
    family, home = request.param
    config = tiny_config(family, **FAMILIES[family])
    save(build(config), tmp_path)
    with opened(describe(tmp_path, config), home) as found:
        yield found


def requests() -> list[TokenRequest]:
    """Greedy rows, drawn ones, with penalties, masks and log probabilities."""
    kinds = [each for each in mixed(10) if each.allowed_token_ids is None]
    prompts = [tuple(10 + (7 * index + place) % 90 for place in range(length)) for index, length in enumerate(PROMPTS)]
    return [
        replace(kinds[index % len(kinds)], index=index, prompt_token_ids=prompt, max_tokens=TOKENS) for index, prompt in enumerate(prompts)
    ]  # fmt: skip


Waits = list[tuple[PassPlan, int]]  # of each pass how often the host waited


def counted(device: CountingDevice, monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Count the waits of all passes from now on."""
    found: Waits = []
    run = Engine._run

    def counting(self: Engine, plan: PassPlan) -> list[TokenResult]:
        before = device.synchronisations + device.num_main_waits
        results = run(self, plan)
        found.append((plan, device.synchronisations + device.num_main_waits - before))
        return results

    monkeypatch.setattr(Engine, "_run", counting)
    return found


def check_decode_passes(waits: Waits) -> None:
    """Each waited once per micro-batch."""
    decode = [(found, len(plan.micro_batches)) for plan, found in waits if all(each.is_decode for each in slices_of(plan))]
    assert max(batches for _, batches in decode) > 1
    assert all(found == batches for found, batches in decode), decode


def slices_of(plan: PassPlan) -> list[Slice]:
    return [each for batch in plan.micro_batches for each in batch.slices]


def test_decode_passes_wait_once_per_micro_batch(engine: tuple[Engine, CountingDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    runs, device = engine
    waits = counted(device, monkeypatch)
    results = list(runs.generate(requests()))
    assert [each.error for each in results] == [None] * len(PROMPTS)
    assert all(each.logprobs is None or len(each.logprobs) == TOKENS for each in results)
    check_decode_passes(waits)


@pytest.mark.parametrize("name", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("family", ["llama", "minicpm3"])
def test_sealing_pages_does_not_wait(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where next tokens complete pages: no constant is copied, and the matrix of rotations is made on the device."""
    config = tiny_config(family)
    save(build(config), tmp_path)
    model = assemble_model(
        tmp_path, copy.deepcopy(config), torch.float32, unit_bytes=UNIT_BYTES, kv_format=kv_format(name, torch.float32)
    )  # fmt: skip
    completed: list[int] = []
    seal_tails = LowBitPages.seal_tails
    monkeypatch.setattr(LowBitPages, "seal_tails", lambda *args: (completed.append(len(args[2])), seal_tails(*args)))
    with opened(model) as (engine, device):
        waits = counted(device, monkeypatch)
        results = list(engine.generate(requests()))
    assert [each.error for each in results] == [None] * len(PROMPTS)
    assert sum(completed) > 0
    check_decode_passes(waits)


def test_scored_prompts_wait_once_per_micro_batch(engine: tuple[Engine, CountingDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    """For their scores, after all micro-batches were submitted."""
    runs, device = engine
    waits = counted(device, monkeypatch)
    scored = [replace(each, max_tokens=0, num_logprobs=None, num_prompt_logprobs=3) for each in requests()]
    results = {each.index: each for each in runs.generate(scored)}
    assert [len(results[each.index].prompt_logprobs or ()) for each in scored] == [len(each.prompt_token_ids) - 1 for each in scored]

    def brings(batch: MicroBatch) -> bool:
        return any(each.scored for each in batch.slices)

    assert max(len(plan.micro_batches) for plan, _ in waits) > 1
    for plan, found in waits:
        assert found == sum(map(brings, plan.micro_batches)), waits
