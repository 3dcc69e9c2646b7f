"""Prompts whose keys and values have no room on the way: their micro-batches wait, others go on, and answers stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.kv.flow import KVFlow
from flexgen.kv.place import Answer, DeferredAttention
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest

POOL = 4 << 20
POLICY = Policy(
    device="sim", dtype="float32", weights=Fractions(host=0.5, disk=0.5), kv=Fractions(host=1.0), kv_host_bytes=POOL,
    host_ring_bytes=16 << 20, device_ring_bytes=16 << 20, embedding_resident=False, schedule="diagonal", max_num_seqs=4,
    prefill_tokens=64, micro_batch_tokens=12, page_tokens=16, compute_threads=1, io_threads=1,
)  # fmt: skip
ON_DISK = {"kv": Fractions(disk=1.0), "kv_host_bytes": 0, "kv_disk_bytes": POOL, "kv_staging_bytes": 1 << 20, "kv_tail_bytes": 1 << 20}


class Reluctant(KVFlow):
    """Has room for one, and not whenever it is asked."""

    def __init__(self) -> None:
        super().__init__(1)
        self._asked = 0

    def has_room(self) -> bool:
        self._asked += 1
        return self._asked % 3 == 0 and super().has_room()


@pytest.mark.parametrize("kv", [{}, ON_DISK], ids=["host", "disk"])
def test_answers_do_not_depend_on_who_waits(
    kv: dict[str, object], novels_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several chunks, of which one goes on where the last has stored."""
    requests = [
        TokenRequest(index=index, prompt_token_ids=tuple(range(5, 5 + length)), max_tokens=4)
        for index, length in enumerate((40, 3, 25, 60))
    ]
    begun: list[Answer] = []
    really = DeferredAttention.result

    def result(deferred: DeferredAttention) -> Answer:
        begun.append(really(deferred))
        return begun[-1]

    def answers(of: Callable[..., KVFlow]) -> dict[int, tuple[int, ...]]:
        monkeypatch.setattr(KVFlow, "of", of)
        policy = Policy(**({name: getattr(POLICY, name) for name in POLICY.__dataclass_fields__} | kv))
        model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
        with Engine(model, policy, backend=SimulatedDevice(64 << 20), offload_dir=tmp_path, poison=True) as engine:
            return {each.index: each.token_ids for each in engine.generate(requests)}

    monkeypatch.setattr(DeferredAttention, "result", result)
    wanted = answers(lambda *, has_device: KVFlow(1000))
    assert not begun, "nobody waits where there is room"
    assert answers(lambda *, has_device: Reluctant()) == wanted
    assert {isinstance(each, torch.Tensor) for each in begun} == ({True, False} if not kv else {True})
