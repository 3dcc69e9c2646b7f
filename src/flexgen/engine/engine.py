"""The engine: requests are added, and every step is a pass over the model that gives each live sequence its next token.

The scheduler decides what a pass computes, and the runner computes it.  Prompts and answers are token ids here, and what happens is
recorded in a log, from which the session that opened the engine makes progress and reports.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from flexgen.base.failpoints import failpoint
from flexgen.base.recorder import COMPUTE, Recorder, recorded
from flexgen.devices.base import Device
from flexgen.engine.admission import LengthForecast
from flexgen.engine.block_engine import BlockEngine
from flexgen.engine.blocks import Block
from flexgen.engine.choosing import Chooser
from flexgen.engine.runner import ModelRunner
from flexgen.kv.tiers import traits_of
from flexgen.models.assemble import AssembledModel
from flexgen.passes.plan import PassPlan
from flexgen.plan.policy import Policy
from flexgen.request import TokenResult


class Engine(BlockEngine):
    """The engine on one machine, which has one block and runs one pass after the other.

    Args:
        model: The assembled model, without weights.
        policy: Where every byte lives and what a pass carries.
        backend: The device, or None when computing happens in host memory; the engine closes it, also if it cannot be constructed.
        offload_dir: The folder of the spill file; needed only if the policy puts KV on disk.
        verify_reads: Whether to compare the bytes that are read from disk with those that were written or first read.
        poison: Whether to overwrite released memory, so that a late use is noticed (for tests).
        overlap: See `ModelRunner`.
        recorder: The recorder of the trace, which the caller closes after the engine; None without one.

    Attributes:
        cache: The pages of all sequences.
    """

    def __init__(
        self,
        model: AssembledModel,
        policy: Policy,
        *,
        backend: Device | None = None,
        offload_dir: Path | None = None,
        verify_reads: bool = False,
        poison: bool = False,
        overlap: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        runner = ModelRunner(
            model, policy, backend=backend, offload_dir=offload_dir, verify_reads=verify_reads, poison=poison, overlap=overlap,
            recorder=recorder,
        )  # fmt: skip
        with contextlib.ExitStack() as undo:  # closes what would otherwise outlive a failed construction
            undo.callback(runner.close)
            self.cache = cache = runner.cache
            traits = {tier: traits_of(tier, cache.groups, policy) for tier in cache.pools}
            shares = {tier: getattr(policy.kv, tier) for tier in cache.pools}
            self._block = Block(model, policy, cache, traits, shares, LengthForecast())
            self._chooser = Chooser(runner.copies)
            super().__init__(runner, [self._block])
            undo.pop_all()

    def step(self) -> list[TokenResult]:
        """Admit requests, run one pass and sample; return the results of the requests that finished.

        Without work nothing happens.

        Raises:
            StorageError: Something could not be read or written, so the engine cannot continue.
            EngineError: The engine cannot continue.
        """
        results = self._take_ended()
        if not self.has_work:
            return results
        self.load()
        scheduled, refused = self._block.schedule(self.log)
        results += refused
        if scheduled.plan.micro_batches:
            results += self._run(scheduled.plan)
        return results

    def _run(self, plan: PassPlan) -> list[TokenResult]:
        failpoint("engine.pass")
        block, start, begun = self._block, self.runner.now(), self._begin_record()
        work = self.log.begins(self._load_of(plan))
        block.prepare_guides(plan)
        with torch.no_grad():
            outputs, waits = self.runner.run(plan, self._tell)
            with recorded(self.runner.recorder, COMPUTE, "sample"):
                batches = list(zip(plan.micro_batches, outputs, strict=True))
                # All micro-batches begin before the first one's scores and tokens are waited for.
                started = [self._chooser.start(batch, output, *block.rows(batch)) for batch, output in batches]
                received = zip(plan.micro_batches, started, strict=True)
                results = [result for batch, answer in received for result in block.take(batch, answer(), self.log)]
        self.log.passed(self.runner.now() - start, work, waits)
        self._end_record(plan, begun)
        return results
