"""What crosses the link to a device and back is what plans expect, keys and values that prompts go on from included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.kv.low_bit import kv_format
from flexgen.models.assemble import assemble_model
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.work import PassWork
from flexgen.plan.workload import Workload
from flexgen.report.pass_log import PassLog
from flexgen.request import TokenRequest
from flexgen.text.common_prefixes import NO_PREFIXES
from tests.models.tiny_configs import tiny_config
from tests.test_prefix_sharing import common, tokens

# Two layers with a window and two without, whose keys and values are much larger than the tables that cross beside them.
MODEL = tiny_config("qwen3", hidden_size=256, num_key_value_heads=4, head_dim=64, sliding_window=100, max_position_embeddings=1024)
ROOM, OUTPUT_LEN, PREFIX_LEN = 32 << 20, 3, 320
# Ids, positions, tables and results of sampling cross, too, and pages in few bits are sent whole.
MORE = 1.05


def policy(home: str, kv: str) -> Policy:
    """All weights are on the device, so that nothing else crosses; micro-batches have 64 tokens."""
    on_disk = {"kv_staging_bytes": ROOM, "kv_tail_bytes": ROOM} if home == "disk" else {}
    return Policy(
        device="sim", dtype="float32", weights=Fractions(device=1.0), kv=Fractions(**{home: 1.0}), kv_format=None if kv == "auto" else kv,
        embedding_resident=True, schedule="diagonal", max_num_seqs=8, prefill_tokens=4096, micro_batch_tokens=64, page_tokens=16,
        compute_threads=1, io_threads=2, workspace_bytes=1 << 20, longest_sequence=640, **{f"kv_{home}_bytes": ROOM}, **on_disk,
    )  # fmt: skip


@dataclass(frozen=True)
class Bytes:
    """What crosses to the device, and back."""

    into: float
    out: float


def crossed(folder: Path, chosen: Policy, prompts: Sequence[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, *, shares: bool) -> Any:
    """The bytes that are copied by a run, those that its passes count, and those that a plan of the same requests expects."""
    requests = [TokenRequest(index=index, prompt_token_ids=each, max_tokens=OUTPUT_LEN) for index, each in enumerate(prompts)]
    prefixes = common(requests)[0] if shares else NO_PREFIXES
    model = assemble_model(folder, MODEL, torch.float32, kv_format=kv_format(chosen.kv_format or "auto", torch.float32))
    device, works = SimulatedDevice(256 << 20, max_delay_seconds=0.0002), list[PassWork]()
    with Engine(model, chosen, backend=device, offload_dir=folder, poison=True) as engine:
        list(engine.generate(requests[:1]))  # brings the weights
        before = Bytes(device.bytes_in, device.bytes_out)
        monkeypatch.setattr(PassLog, "add", lambda log, seconds, work, waits: works.append(work))
        list(engine.generate(requests, prefixes=prefixes))
        copied = Bytes(device.bytes_in - before.into, device.bytes_out - before.out)
        assert engine.log.counts.shared_prompt_tokens == (PREFIX_LEN * (len(prompts) - 1) if shares else 0)
    counted = Bytes(sum(work.host_to_device_bytes for work in works), sum(work.device_to_host_bytes for work in works))
    shared = (0, *(PREFIX_LEN * shares,) * (len(prompts) - 1))
    workload = Workload(prompt_lens=tuple(map(len, prompts)), output_lens=(OUTPUT_LEN,) * len(prompts), shared_lens=shared)
    planned = simulate(model.spec, chosen, workload).total()
    return copied, counted, Bytes(planned.host_to_device_bytes, planned.device_to_host_bytes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(MODEL, path, torch.float32)
    return path


@pytest.mark.parametrize(("home", "kv"), [("host", "auto"), ("host", "int8"), ("disk", "auto")])
def test_long_prompts_bring_their_earlier_chunks(folder: Path, home: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose KV goes to disk have no chunks, so nothing is brought back for them."""
    prompts = [tokens(length, seed) for seed, length in enumerate((420, 130))]
    copied, counted, planned = crossed(folder, policy(home, kv), prompts, monkeypatch, shares=False)
    assert counted == planned
    assert planned.out <= copied.out <= MORE * planned.out
    if home == "disk":
        assert copied.into < 0.1 * copied.out
    else:
        assert planned.into <= copied.into <= MORE * planned.into
        assert planned.into > 2 * planned.out


@pytest.mark.parametrize("home", ["host", "disk"])
def test_prompts_after_a_prefix_bring_it(folder: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tokens(PREFIX_LEN, 7)
    prompts = [(*prefix, *tokens(40, 8 + place)) for place in range(3)]
    copied, counted, planned = crossed(folder, policy(home, "auto"), prompts, monkeypatch, shares=True)
    assert counted == planned
    assert planned.into <= copied.into <= MORE * planned.into
    assert planned.out <= copied.out <= MORE * planned.out
