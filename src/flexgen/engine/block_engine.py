"""What every engine does between requests and results: requests are spread over its blocks, and read ahead as they are needed.

How the passes of the blocks are run is the business of its subclasses: on one machine (engine.py) or over the stages of a pipeline
(pipeline.py).
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

from flexgen.base.recorder import PASSES
from flexgen.engine.blocks import Block
from flexgen.engine.runner import ModelRunner
from flexgen.errors import EngineError
from flexgen.kv.pages import of_positions
from flexgen.passes.load import pass_load
from flexgen.passes.plan import PassPlan
from flexgen.plan.machine import Machine
from flexgen.plan.price.work import PassLoad
from flexgen.report.pass_log import PassLog
from flexgen.report.run_log import RunLog
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

LOOKAHEAD = 4  # requests read ahead, in multiples of max_num_seqs: those with the longest answers start first


class BlockEngine(abc.ABC):
    """An engine, which answers requests as a policy says.

    Args:
        runner: What executes its passes, or its own stage of them; the engine closes it.
        blocks: The blocks of sequences.

    Attributes:
        runner: The runner.
        policy: The policy, of which `max_num_seqs` is for each block.
        blocks: The blocks.
        log: The log of the current run, or of the last one.
    """

    def __init__(self, runner: ModelRunner, blocks: Sequence[Block]) -> None:
        self.runner, self.policy, self.blocks = runner, runner.policy, tuple(blocks)
        self._closed = False
        self._ended: list[TokenResult] = []  # the results of requests that had finished before they were added
        self._prefixes = NO_PREFIXES
        self._block_of: dict[bytes, Block] = {}  # by the digest of a prefix whose requests go to the same block
        self.log = self.new_log()

    def new_log(self, machine: Machine | None = None, **how: Any) -> RunLog:
        """Return an empty log for a run.

        Args:
            machine: The measured rates with which the passes are compared; None to compare them with none.
            how: The other arguments of `RunLog`.
        """
        runner = self.runner
        return RunLog(runner, PassLog(runner.model.spec, machine, self.policy, runner.homes), now=runner.now, **how)

    def load(self) -> None:
        """Read the weights that stay in memory and start the links; call it once."""
        self.runner.load()

    def close(self) -> None:
        """Stop the links and free the memory; safe to call twice."""
        if not self._closed:
            self._closed = True
            self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- requests in, results out ---------------------------------------------------------------------------------------------------

    def add(self, request: TokenRequest) -> None:
        """Add a request; this is possible at any time, also while others run."""
        result = self._block_for(request).add(request, self.log)
        if result is not None:  # an earlier run had finished it
            self._ended.append(result)

    def _block_for(self, request: TokenRequest) -> Block:
        """Return the block with the least work; requests that begin alike go to the same one, if no more of them do than it holds."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        least = min(self.blocks, key=lambda block: block.work)
        points = (*self._prefixes.path(request.sharable), *self._prefixes.beyond(request.sharable, request.offered))
        together = next((point for point in points if point.num_requests <= self.policy.max_num_seqs), None)
        return least if together is None else self._block_of.setdefault(together.digest, least)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._ended) or any(block.has_work for block in self.blocks)

    @property
    def num_live(self) -> int:
        """The number of live sequences."""
        return sum(block.scheduler.num_live for block in self.blocks)

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait to become live."""
        return sum(block.scheduler.num_waiting for block in self.blocks)

    @abc.abstractmethod
    def step(self) -> list[TokenResult]:
        """Admit requests, and run a pass or go on with one; return the results of the requests that finished.

        Without work nothing happens.

        Raises:
            StorageError: Something could not be read or written, so the engine cannot continue.
            EngineError: The engine cannot continue.
        """

    def generate(
        self,
        requests: Iterable[TokenRequest],
        *,
        prefixes: CommonPrefixes = NO_PREFIXES,
        log: RunLog | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Yield the results of requests as they finish, in any order; requests are pulled as they are needed.

        Args:
            requests: The requests; their indices are unique.
            prefixes: The common prefixes of their prompts; each is computed once (per tier and block in which it is needed).
            log: The log of the run, from `new_log`; None for one that counts, but compares the passes with no machine.
            on_pass: A function that is called after every step, once its results have been yielded, with the unfinished answers so far;
                they are gathered while it iterates.  An exception that it raises ends the run.

        Raises:
            StorageError: Something could not be read or written, so the run cannot continue.
            EngineError: The run cannot continue, or another run has not ended.
        """
        self._begin(prefixes, log)
        source = iter(requests)
        try:
            while True:
                yield from self._read_ahead(source)
                if not self.has_work:
                    return
                yield from self.step()
                if on_pass is not None:
                    on_pass(itertools.chain.from_iterable(block.scheduler.unfinished() for block in self.blocks))
        finally:
            self.log.over()
            self.clear()

    def _begin(self, prefixes: CommonPrefixes, log: RunLog | None = None) -> None:
        """Begin a run."""
        self.load()
        if self.has_work:
            raise EngineError("a run began before the last one was over")
        for block in self.blocks:
            block.begin(prefixes)
        self._prefixes, self._block_of = prefixes, {}
        self.log = self.new_log() if log is None else log

    def clear(self) -> None:
        """Forget all unanswered requests."""
        self._clear_blocks()

    def _clear_blocks(self) -> list[int]:
        """Forget all requests; return the ids of the sequences whose pages were freed since the last pass was scheduled."""
        self._ended.clear()
        return [sequence for block in self.blocks for sequence in block.clear()]

    def _read_ahead(self, source: Iterator[TokenRequest]) -> Iterator[TokenResult]:
        """Add requests while few are waiting; yield the results of those that had finished already."""
        most = LOOKAHEAD * self.policy.max_num_seqs * len(self.blocks)
        while self.num_waiting < most and (request := next(source, None)) is not None:
            self.add(request)
            yield from self._take_ended()

    def _take_ended(self) -> list[TokenResult]:
        ended, self._ended = self._ended, []
        return ended

    # -- passes ---------------------------------------------------------------------------------------------------------------------

    def _load_of(self, plan: PassPlan) -> PassLoad:
        """Return the work of a pass that the runner executes."""
        brought = ("disk",) if self.policy.host_attention else ("disk", "host")
        return pass_load(plan, tuple(self.runner.places), of_positions(self.runner.cache.groups), brought=brought)

    def _tell(self, unit: int) -> None:
        """Report progress, if that is due, now that a pass has reached a unit."""
        self.log.tell(self.num_live, unit, self.runner.num_units)

    def _begin_record(self) -> int:
        """Return the time at which the recorded pass begins."""
        return 0 if self.runner.recorder is None else self.runner.recorder.begin_pass()

    def _end_record(self, plan: PassPlan, begun: int, **about: Any) -> None:
        """Record a pass for the trace, if there is one."""
        if (recorder := self.runner.recorder) is not None:
            rows = sum(each.length for batch in plan.micro_batches for each in batch.slices)
            name = f"pass {recorder.pass_index}"
            recorder.slice(PASSES, name, begun, micro_batches=len(plan.micro_batches), rows=rows, **about)
