"""The engine that stays open from one call to the next, and when another must take its place.  Loads torch only when one is opened."""

from __future__ import annotations

import dataclasses
import gc
from typing import TYPE_CHECKING

from flexgen.hub import ModelFiles
from flexgen.options import EngineOptions
from flexgen.plan.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.steps import step

if TYPE_CHECKING:
    from flexgen.engine.engine import Engine
    from flexgen.plan.model import ModelSpec
    from flexgen.plan.policy import Policy


def plan_job(files: ModelFiles, options: EngineOptions, workload: Workload) -> Plan:
    """The plan that `open_engine` would execute; no weights are read.

    Raises:
        CapacityError: no plan fits the budgets.
        UnsupportedModelError: the model is refused by name.
    """
    step("loading PyTorch")
    from flexgen.opening import discard, prepare

    found = prepare(files, options, workload)
    discard(found)
    return found.plan


def open_engine(files: ModelFiles, options: EngineOptions, workload: Workload) -> Engine:
    """Plan for the workload, load the model, and return the engine that serves it.

    Raises:
        CapacityError, ModelError, OptionError: as `plan_job`; nothing stays open.
    """
    step("loading PyTorch")
    from flexgen.opening import open_prepared, prepare

    return open_prepared(prepare(files, options, workload))


class OpenEngine:
    """At most one engine, opened when there is work.

    Attributes:
        options: what engines are opened with.
        engine: None until the first work, and after `close`.
    """

    def __init__(self, files: ModelFiles, options: EngineOptions) -> None:
        self.options = options
        self.engine: Engine | None = None
        self._files = files
        self._workload = self._expected = Workload(prompt_lens=(), output_lens=())  # that it was opened for, that it expects
        self._max_num_seqs = 0  # of the last engine, also when it is closed

    def serving(self, workload: Workload) -> Engine:
        """The open engine if its plan suits the workload, else a fresh one.

        Raises:
            CapacityError, ModelError, OptionError: as `open_engine`.
        """
        engine = self.engine
        if engine is None or not _suits(engine.policy, engine.spec, self._workload, workload, self.options):
            if engine is not None:
                engine = None  # a closed engine still holds its memory,
                self.close()
                gc.collect()  # and its hooks refer back to their modules
            engine = open_engine(self._files, self.options, workload)
            self.engine, self._workload = engine, workload
            self._max_num_seqs = engine.policy.max_num_seqs
        elif workload != self._expected:
            engine.expect(workload)
        self._expected = workload
        return engine

    def shrink(self) -> int | None:
        """Have the next engine keep half as many sequences alive as the last one.

        Returns:
            how many; None if it was one already.
        """
        if self._max_num_seqs <= 1:
            return None
        self.close()
        self._max_num_seqs //= 2  # also if no engine opens with it
        self.options = dataclasses.replace(self.options, max_num_seqs=self._max_num_seqs)
        return self._max_num_seqs

    def close(self) -> None:
        """Close the engine that is open, if one is."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()


def _suits(policy: Policy, spec: ModelSpec, old: Workload, new: Workload, options: EngineOptions) -> bool:
    """Whether a plan made for `old` serves `new` well: its limits do not bind, or they came from the budgets and not from `old`."""

    def longest(workload: Workload) -> int:
        return max((p + o for p, o in zip(workload.prompt_lens, workload.output_lens, strict=True)), default=0)

    def block_bytes(workload: Workload) -> int:
        return min(len(workload), policy.max_num_seqs) * spec.kv_bytes(longest(workload))

    if max(new.prompt_lens, default=0) > max(old.prompt_lens, default=0):
        return False  # the workspace was sized for the longest prompt
    pools = (policy.kv_device_bytes, policy.kv_host_bytes, policy.kv_disk_bytes)
    if longest(new) > longest(old) and spec.kv_bytes(longest(new)) > max(pools):
        return False  # a sequence's KV has one home
    if options.max_num_seqs is None and len(old) <= policy.max_num_seqs < len(new):
        return False
    return block_bytes(new) <= sum(pools) or block_bytes(old) > sum(pools)
