"""Pipeline stages one after the other in one process: what the whole model computes of passes made by hand, and what its stages do.

Used by test_stages.py; knows no network: hidden states lie in a dictionary between two stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.runner import ModelRunner
from flexgen.engine.sweep import MicroBatchForward
from flexgen.models.assemble import AssembledModel
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.policy import Policy

PROMPTS = (23, 5, 9, 7)  # the last one joins late
NUM_PAGES = 4  # of a sequence
DEVICE_BYTES = 32_000_000

Place = tuple[tuple[int, int], ...]  # what tells a micro-batch from all others: (sequence, start) of each slice


class Crossing(MicroBatchForward):
    """A micro-batch whose hidden states lie in `hidden` between two stages."""

    hidden: ClassVar[dict[Place, torch.Tensor]] = {}

    @property
    def place(self) -> Place:
        return tuple((each.sequence, each.start) for each in self.batch.slices)

    def stage_input(self) -> torch.Tensor:
        return self.hidden.pop(self.place).to(self.position_ids.device)

    def stage_output(self, hidden: torch.Tensor) -> None:
        num_tokens = self.position_ids.shape[1]
        assert hidden.shape == self._model.hidden_shape(num_tokens)
        assert hidden.dtype == self._model.hidden_dtype
        self.hidden[self.place] = hidden.to("cpu", copy=True)


def stages_of(num_layers: int, cuts: Sequence[int]) -> list[range]:
    """The layers of the stages between these cuts."""
    return [range(start, stop) for start, stop in pairwise((0, *cuts, num_layers))]


def passes(num_groups: int, home: str, vocab_size: int) -> Iterator[PassPlan]:
    """Prompts in chunks and whole, then two next tokens of each, beside another prompt; every position is wanted."""
    generator = torch.Generator().manual_seed(5)
    ids = [tuple(torch.randint(3, vocab_size - 8, (length + 3,), generator=generator).tolist()) for length in PROMPTS]

    def part(sequence: int, start: int, stop: int) -> Slice:
        length = PROMPTS[sequence]
        return Slice(
            sequence=sequence, token_ids=ids[sequence][start:stop], start=start, prompt_len=length, total=max(length, stop),
            wanted=range(start, stop), tables=(tuple(range(sequence * NUM_PAGES, (sequence + 1) * NUM_PAGES)),) * num_groups,
        )  # fmt: skip

    def plan(*batches: tuple[Slice, ...]) -> PassPlan:
        return PassPlan(micro_batches=tuple(MicroBatch(home=home, slices=each, after=tuple(range(i))) for i, each in enumerate(batches)))

    yield plan((part(0, 0, 12), part(1, 0, 5)), (part(0, 12, 23), part(2, 0, 9)))
    yield plan((part(0, 23, 24), part(1, 5, 6), part(2, 9, 10)))
    yield plan((part(0, 24, 25), part(1, 6, 7), part(2, 10, 11)), (part(3, 0, 7),))


def logits_of(model: AssembledModel, policy: Policy) -> list[torch.Tensor]:
    """The logits of each micro-batch; none of a stage whose hidden states go on."""
    home = next(tier for tier in ("device", "host", "disk") if getattr(policy.kv, tier))
    backend = SimulatedDevice(DEVICE_BYTES) if policy.device == "sim" else None
    runner = ModelRunner(model, policy, backend=backend, poison=True)
    try:
        runner.load()
        assert min(runner.cache.pools[home].num_pages) >= NUM_PAGES * len(PROMPTS)
        found: list[torch.Tensor] = []
        with torch.no_grad():
            for plan in passes(len(runner.cache.groups), home, model.spec.vocab_size):
                outputs, _ = runner.run(plan)
                found += [each.logits.to("cpu", copy=True) for each in outputs]
        return found
    finally:
        runner.close()


def logits_of_stages(stages: Sequence[AssembledModel], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits of the last stage; each stage computes all passes before the next one is opened."""
    found: list[torch.Tensor] = []
    with monkeypatch.context() as patched:
        crossing: Any = type("Crossing", (Crossing,), {"hidden": {}})
        patched.setattr("flexgen.engine.runner.MicroBatchForward", crossing)
        for stage in stages:
            assert not found, "only the last stage has logits"
            found = logits_of(stage, policy)
        assert not crossing.hidden
    return found
