"""Host memory beside a device: an engine pins what its plan counts, and all of it is unpinned however the engine ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from flexgen.base.quantities import align_up
from flexgen.devices.arena import HostArena
from flexgen.devices.sim import SimulatedDevice
from flexgen.engine import engine as module
from flexgen.engine.engine import Engine
from flexgen.kv.host import HostPlace
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.machine import Limits
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.copies import with_copies
from flexgen.plan.price.memory import ENCODED, footprint
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.workload import Workload
from flexgen.request import TokenRequest
from tests.devices.fake_cudart import PAGE, FakeRuntime

POLICY = Policy(
    device="sim", dtype="float32", weights=Fractions(host=0.5, disk=0.5), kv=Fractions(host=1.0), kv_host_bytes=4 << 20,
    host_ring_bytes=16 << 20, device_ring_bytes=16 << 20, embedding_resident=False, schedule="diagonal", max_num_seqs=4,
    prefill_tokens=16, micro_batch_tokens=12, page_tokens=16, compute_threads=1, io_threads=1,
)  # fmt: skip
LIMITS = Limits(
    device="sim", host_bytes=1 << 30, host_source="test", host_total_bytes=1 << 30, host_total_source="test", device_bytes=1 << 30,
    device_total_bytes=1 << 30, disk_bytes=0, disk_total_bytes=0, offload_dir="/tmp", offload_in_memory=False,
)  # fmt: skip


class PinningDevice(SimulatedDevice):
    """A simulated device whose host memory is registered."""

    def __init__(self, runtime: FakeRuntime, budget_bytes: int = 64 << 20) -> None:
        super().__init__(budget_bytes)
        self.host = HostArena(runtime)


@pytest.fixture
def assemble(novels_opt: Path) -> Callable[[], AssembledModel]:
    return lambda: assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)


@pytest.mark.parametrize(
    "weights",
    [
        Fractions(host=1.0),
        Fractions(encoded=1.0),
        Fractions(disk=1.0),
        Fractions(device=0.3, host=0.7),
        Fractions(host=0.3, encoded=0.3, disk=0.4),
    ],
    ids=str,
)
def test_what_is_pinned_is_what_the_plan_counts(weights: Fractions, assemble: Callable[[], AssembledModel]) -> None:
    """To the page."""
    runtime, model = FakeRuntime(), assemble()
    device = PinningDevice(runtime)
    requests = [TokenRequest(index=index, prompt_token_ids=(5,) * length, max_tokens=3) for index, length in enumerate((3, 40, 1, 25, 7))]
    job = Workload(prompt_lens=tuple(len(each.prompt_token_ids) for each in requests), output_lens=(3,) * len(requests))
    policy = replace(POLICY, weights=weights, host_ring_bytes=POLICY.host_ring_bytes * bool(weights.disk))
    policy = with_copies(policy, model.spec, JobSizes(model.spec, job, policy.page_tokens))
    counted = footprint(policy, model.spec, LIMITS, process_bytes=0)["host"]
    with Engine(model, policy, backend=device) as engine:
        engine.load()
        parts = [counted[part] for part in ("weights", ENCODED, "weight staging", "decoding", "copies")]
        pinned = sum(align_up(part, PAGE) for part in parts)
        assert sum(runtime.registered.values()) == device.host.size_bytes == pinned
        used = device.used_bytes
        assert len(list(engine.generate(requests))) == len(requests)
        assert (device.host.size_bytes, device.used_bytes) == (pinned, used), "no pass needs more"


def test_engines_unpin_what_they_pinned(assemble: Callable[[], AssembledModel]) -> None:
    runtime, answers = FakeRuntime(), list[list[tuple[int, ...]]]()
    for _ in range(2):
        with Engine(assemble(), POLICY, backend=PinningDevice(runtime)) as engine:
            requests = [TokenRequest(index=index, prompt_token_ids=(5, 6 + index, 7), max_tokens=3) for index in range(3)]
            answers.append([tuple(each.token_ids) for each in sorted(engine.generate(requests), key=lambda each: each.index)])
            assert runtime.registered
        assert not runtime.registered
    assert answers[0] == answers[1]
    assert runtime.last_error == 0


def no_room(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> tuple[Policy, SimulatedDevice]:
    return POLICY, PinningDevice(runtime, 1000)


def no_folder(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> tuple[Policy, SimulatedDevice]:
    return replace(POLICY, kv=Fractions(disk=1.0), kv_host_bytes=0, kv_disk_bytes=1 << 20), PinningDevice(runtime)


def no_block(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> tuple[Policy, SimulatedDevice]:
    monkeypatch.setattr(module, "Block", None)
    return POLICY, PinningDevice(runtime)


def no_reads(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> tuple[Policy, SimulatedDevice]:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    return POLICY, PinningDevice(runtime)


def no_end(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> tuple[Policy, SimulatedDevice]:
    really = HostPlace.close

    def failing(place: HostPlace) -> None:
        really(place)
        raise RuntimeError("cannot end")

    monkeypatch.setattr(HostPlace, "close", failing)
    return POLICY, PinningDevice(runtime)


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (no_room, "device_mem"),
        (no_folder, "offload folder"),
        (no_block, "not callable"),
        (no_reads, "Input/output error"),
        (no_end, "cannot end"),
    ],
)
def test_an_engine_that_fails_unpins_what_it_pinned(
    failing: Callable[..., tuple[Policy, SimulatedDevice]],
    message: str,
    assemble: Callable[[], AssembledModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, model = FakeRuntime(), assemble()
    policy, device = failing(monkeypatch, runtime)

    def run() -> None:
        with Engine(model, policy, backend=device) as engine:
            engine.load()

    with pytest.raises(Exception, match=message):
        run()
    assert runtime.num_registered
    assert not runtime.registered
