"""Chooses tokens on the last stage for a leader elsewhere; what it needs of the requests came with the plans of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexgen.devices.packed import PackedCopies
from flexgen.distributed.messages import ShippedGuide, answer_message, read_masks, read_request
from flexgen.engine.choosing import Chooser
from flexgen.engine.runner import BatchOutput
from flexgen.engine.sampler import Sampled
from flexgen.passes.plan import PassPlan
from flexgen.request import TokenRequest


class LastStage:
    """The requests whose answers a leader continues, and the choice of their next tokens.

    Args:
        copies: The copies of small tensors to and from the computing device.
    """

    def __init__(self, copies: PackedCopies) -> None:
        self._chooser = Chooser(copies)
        self._requests: dict[int, TokenRequest] = {}
        self._generated: dict[int, list[int]] = {}

    def learn(self, header: Mapping[str, Any], masks: Sequence[torch.Tensor]) -> None:
        """Take in what came with the plan of a pass (see `StagePipeline`)."""
        for each in header["forget"]:
            self._requests.pop(each, None)
            self._generated.pop(each, None)
        for message in header["requests"]:
            fields = dict(message)
            sequence = fields.pop("sequence")
            self._requests[sequence], self._generated[sequence] = read_request(fields)
        for sequence, mask in read_masks(header["guided"], masks).items():
            guide = self._requests[sequence].guide
            assert isinstance(guide, ShippedGuide)
            guide.mask = mask

    def choose(self, plan: PassPlan, outputs: Sequence[BatchOutput]) -> list[dict[str, Any]]:
        """Return the answer of each micro-batch as a message; all of them begin before the first one is waited for."""
        started = []
        for batch, output in zip(plan.micro_batches, outputs, strict=True):
            wanted = [sequence for sequence, _ in batch.wanted]
            requests, generated = [self._requests[each] for each in wanted], [self._generated[each] for each in wanted]
            started.append((wanted, self._chooser.start(batch, output, requests, generated)))
        messages: list[dict[str, Any]] = []
        for wanted, receive in started:
            answer = receive()
            for sequence, chosen in zip(wanted, answer.chosen, strict=True):
                if isinstance(chosen, Sampled):
                    self._generated[sequence].append(chosen.token_id)
            messages.append(answer_message(answer))
        return messages
