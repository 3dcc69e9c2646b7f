"""The first stage's side of a pipeline: it sends plans down the chain, runs its own part of every pass, and waits for the answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from flexgen.base.isolation import for_one_request
from flexgen.distributed.boundaries import LinkBoundary
from flexgen.distributed.channel import Receiver, Sender
from flexgen.distributed.figures import StageFigures
from flexgen.distributed.messages import error_message, plan_message, read_answer, request_message
from flexgen.engine.choosing import BatchAnswer
from flexgen.engine.pipeline import Pipeline
from flexgen.engine.runner import ModelRunner
from flexgen.engine.sequence import LiveSequence
from flexgen.errors import EngineError, RequestError
from flexgen.kv.lanes import Lanes
from flexgen.passes.plan import PassPlan

PASS, RESULT = "pass", "result"


class StagePipeline(Pipeline):
    """The passes of a model whose stages run on several ranks, of which this is the first.

    Args:
        runner: What executes the first stage's part.
        lanes: The combinations of tiers of all stages.
        num_stages: The number of stages, at least 2.
        to_next: What sends to the second stage.
        from_last: What receives from the last stage.

    Attributes:
        passes_begun: The number of passes that were begun.
        figures: What the first stage has done.
    """

    def __init__(self, runner: ModelRunner, lanes: Lanes, num_stages: int, to_next: Sender, from_last: Receiver) -> None:
        self._runner, self._lanes, self._num_stages = runner, lanes, num_stages
        self._to_next, self._from_last = to_next, from_last
        self._known: set[int] = set()  # the sequences whose requests the last stage has
        self._forgotten: list[int] = []  # those that all stages need not know any more, although nobody has told them yet
        self._flying: deque[tuple[int, int, dict[str, float]]] = deque()  # (block, pass, waits) in the order of beginning
        self.passes_begun, self.figures = 0, StageFigures()

    def begin(self, block: int, plan: PassPlan, requests: Mapping[int, LiveSequence], on_unit: Callable[[int], None]) -> None:
        number, self.passes_begun = self.passes_begun, self.passes_begun + 1
        plans = [self._lanes.for_stage(plan, stage) for stage in range(self._num_stages)]
        header, masks = self._sampling(plan, requests)
        header |= {"pass": number, "block": block, "plan": plan_message(plans[1:])}
        self._to_next.send(PASS, header, masks)
        boundary = LinkBoundary(number, len(plan.micro_batches), None, self._to_next)
        start = time.perf_counter()
        _, waits = self._runner.run(plans[0], on_unit, boundary)
        self.figures.add(time.perf_counter() - start, waits)
        self._flying.append((block, number, waits))

    def _sampling(self, plan: PassPlan, live: Mapping[int, LiveSequence]) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Return what the last stage needs to choose tokens: new requests, those to forget, and the masks of guided answers."""
        requests: list[dict[str, Any]] = []
        guided: list[list[Any]] = []
        masks: list[torch.Tensor] = []
        for sequence_id, _ in (each for batch in plan.micro_batches for each in batch.wanted):
            sequence = live[sequence_id]
            if sequence_id not in self._known:
                self._known.add(sequence_id)
                message = request_message(sequence.request)
                requests.append(message | {"sequence": sequence_id, "generated": list(sequence.generated)})
            if (guide := sequence.request.guide) is not None:
                allowed = for_one_request(guide.allowed, sequence.generated)
                if isinstance(allowed, RequestError):
                    guided.append([sequence_id, error_message(allowed)])
                else:
                    guided.append([sequence_id, [len(masks), len(allowed)]])
                    masks.append(torch.from_numpy(np.packbits(allowed)))
        forgotten, self._forgotten = self._forgotten, []
        return {"requests": requests, "forget": forgotten, "guided": guided}, masks

    def finish(self, block: int) -> tuple[list[BatchAnswer], dict[str, float]]:
        if not self._flying or self._flying[0][0] != block:
            raise EngineError(f"block {block} has no pass in flight, or another block's began earlier")
        _, number, waits = self._flying.popleft()
        start = time.perf_counter()
        frame = self._from_last.receive()
        if frame.kind != RESULT or frame.header["pass"] != number:
            raise EngineError(f"{frame.kind} of pass {frame.header.get('pass')} came in place of the results of pass {number}")
        waits = waits | {"stages": time.perf_counter() - start}
        return [read_answer(each) for each in frame.header["answers"]], waits

    def forget(self, sequence_ids: Collection[int]) -> None:
        self._known.difference_update(sequence_ids)
        self._forgotten += sequence_ids
