"""The engine: requests are added, and every step is a pass over the model that gives each live sequence its next token.

The scheduler decides what a pass computes, and the runner computes it.  Prompts and answers are token ids here, and what happens is
recorded in a log, from which the session that opened the engine makes progress and reports.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flexgen.base.failpoints import failpoint
from flexgen.base.isolation import for_one_request
from flexgen.base.recorder import COMPUTE, PASSES, Recorder, recorded
from flexgen.devices.base import Device
from flexgen.engine.admission import LengthForecast
from flexgen.engine.logprobs import Scoring, start_scoring
from flexgen.engine.runner import BatchOutput, ModelRunner
from flexgen.engine.sampler import Sampled
from flexgen.engine.sampling import Sampler, Sampling
from flexgen.engine.scheduler import Scheduler
from flexgen.engine.sequence import Finish, LiveSequence
from flexgen.errors import EngineError, RequestError
from flexgen.kv.pages import of_positions
from flexgen.models.assemble import AssembledModel
from flexgen.passes.load import pass_load
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.machine import Machine
from flexgen.plan.policy import Policy
from flexgen.report.pass_log import PassLog
from flexgen.report.run_log import RunLog
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

LOOKAHEAD = 4  # requests read ahead, in multiples of max_num_seqs: those with the longest answers start first


class Engine:
    """The engine, which answers requests as a policy says.

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
        log: The log of the current run, or of the last one.
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
        self.policy, self._model, self._recorder = policy, model, recorder
        self.runner = ModelRunner(
            model, policy, backend=backend, offload_dir=offload_dir, verify_reads=verify_reads, poison=poison, overlap=overlap,
            recorder=recorder,
        )  # fmt: skip
        self._closed = False
        with contextlib.ExitStack() as undo:  # closes what would otherwise outlive a failed construction
            undo.callback(self.close)
            self.cache = self.runner.cache
            self._scheduler = Scheduler(policy, self.cache, self.runner.places, self._regime)
            self._sampler = Sampler(self.runner.copies)
            self._lengths = LengthForecast()
            self._ended: list[TokenResult] = []  # the results of requests that had finished before they were added
            self.log = self.new_log()
            undo.pop_all()

    def new_log(self, machine: Machine | None = None, **how: Any) -> RunLog:
        """Return an empty log for a run.

        Args:
            machine: The measured rates with which the passes are compared; None to compare them with none.
            how: The other arguments of `RunLog`.
        """
        return RunLog(self.runner, PassLog(self._model.spec, machine, self.policy, self.runner.homes), now=self.runner.now, **how)

    def load(self) -> None:
        """Read the weights that stay in memory and start the links; call it once."""
        self.runner.load()

    def close(self) -> None:
        """Stop the links and free the memory; safe to call twice."""
        if not self._closed:
            self._closed = True
            self.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- requests in, results out ---------------------------------------------------------------------------------------------------

    def add(self, request: TokenRequest) -> None:
        """Add a request; this is possible at any time, also while others run."""
        sequence = LiveSequence(request, self._lengths.expect(request.max_tokens))
        self._scheduler.register(sequence)
        if (finish := sequence.finish()) is not None:  # an earlier run had finished it
            self._ended.append(self._finish(sequence, finish))
        else:
            self._scheduler.enqueue(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.num_live or self._scheduler.num_waiting or self._ended)

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
        scheduled = self._scheduler.schedule()
        self.log.preempted(scheduled.num_preempted)
        for each in scheduled.entered:
            self.log.entered(recomputed_tokens=max(each.num_lost - each.num_stored, 0), shared_tokens=each.num_stored)
        results += [self._result(each, finish) for each, finish in scheduled.refused]
        if scheduled.plan.micro_batches:
            results += self._run(scheduled.plan)
        return results

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
            prefixes: The common prefixes of their prompts; each is computed once (per tier on which it is needed).
            log: The log of the run, from `new_log`; None for one that counts, but compares the passes with no machine.
            on_pass: A function that is called after every step, once its results have been yielded, with the unfinished answers so far;
                they are gathered while it iterates.  An exception that it raises ends the run.

        Raises:
            StorageError: Something could not be read or written, so the run cannot continue.
            EngineError: The run cannot continue, or another run has not ended.
        """
        self.load()
        if self.has_work:
            raise EngineError("a run began before the last one was over")
        self._scheduler.begin(prefixes)
        self.log = self.new_log() if log is None else log
        source = iter(requests)
        try:
            while True:
                yield from self._read_ahead(source)
                if not self.has_work:
                    return
                yield from self.step()
                if on_pass is not None:
                    on_pass(self._scheduler.unfinished())
        finally:
            self.log.over()
            self.clear()

    def clear(self) -> None:
        """Forget all unanswered requests."""
        self._scheduler.clear()
        self._ended.clear()

    def _read_ahead(self, source: Iterator[TokenRequest]) -> Iterator[TokenResult]:
        """Add requests while few are waiting; yield the results of those that had finished already."""
        while self._scheduler.num_waiting < LOOKAHEAD * self.policy.max_num_seqs and (request := next(source, None)) is not None:
            self.add(request)
            yield from self._take_ended()

    def _take_ended(self) -> list[TokenResult]:
        ended, self._ended = self._ended, []
        return ended

    def _finish(self, sequence: LiveSequence, finish: Finish) -> TokenResult:
        self._scheduler.leave(sequence)
        return self._result(sequence, finish)

    def _result(self, sequence: LiveSequence, finish: Finish) -> TokenResult:
        if finish.error is None and sequence.request.max_tokens:
            self._lengths.observe(sequence.num_generated)
        if sequence.request.guide is not None:
            sequence.request.guide.forget()
        result = sequence.result(finish)
        self.log.finished(result, sequence.request, sequence.num_found)
        return result

    # -- one pass -------------------------------------------------------------------------------------------------------------------

    def _run(self, plan: PassPlan) -> list[TokenResult]:
        failpoint("engine.pass")
        recorder = self._recorder
        start, begun = self.runner.now(), 0 if recorder is None else recorder.begin_pass()
        brought = ("disk",) if self.policy.host_attention else ("disk", "host")
        self.log.begins(pass_load(plan, tuple(self.runner.places), of_positions(self.cache.groups), brought=brought))
        self._prepare_guides(plan)
        with torch.no_grad():
            outputs, waits = self.runner.run(plan, lambda unit: self.log.tell(self._scheduler.num_live, unit, self.runner.num_units))
            with recorded(recorder, COMPUTE, "sample"):
                # All micro-batches begin before the first one's scores and tokens are waited for.
                started = [self._start(batch, output) for batch, output in zip(plan.micro_batches, outputs, strict=True)]
                received = zip(plan.micro_batches, started, strict=True)
                results = [result for batch, (scores, chosen) in received for result in self._receive(batch, scores, chosen)]
        self.log.passed(self.runner.now() - start, waits)
        if recorder is not None:
            rows = sum(each.length for batch in plan.micro_batches for each in batch.slices)
            recorder.slice(PASSES, f"pass {recorder.pass_index}", begun, micro_batches=len(plan.micro_batches), rows=rows)
        return results

    def _prepare_guides(self, plan: PassPlan) -> None:
        """Have the guides find out what may come next while the pass computes; an error in that comes back when it is needed."""
        for batch in plan.micro_batches:
            for each in (self._scheduler[sequence] for sequence, _ in batch.wanted):
                if each.request.guide is not None:
                    for_one_request(each.request.guide.prepare, each.generated)

    def _start(self, batch: MicroBatch, output: BatchOutput) -> tuple[Scoring | None, Sampling]:
        """Start to bring the scores of a micro-batch to the host, and to choose the next tokens of its sequences."""
        scoring = None if output.scores is None else start_scoring(output.scores, self.runner.copies)
        sequences = [self._scheduler[sequence] for sequence, _ in batch.wanted]
        return scoring, self._sampler.start(output.logits, [each.request for each in sequences], [each.generated for each in sequences])

    def _receive(self, batch: MicroBatch, scores: Scoring | None, chosen: Sampling) -> Iterator[TokenResult]:
        """Give the sequences of a micro-batch what was computed for them; yield the results of those that finished."""
        for each in batch.slices:
            sequence = self._scheduler[each.sequence]
            sequence.num_stored = max(sequence.num_stored, each.stop)
        if scores is not None:
            self._score(batch.slices, scores)
        for each in batch.slices:
            sequence = self._scheduler[each.sequence]
            if not sequence.request.max_tokens and (finish := sequence.finish()) is not None:
                yield self._finish(sequence, finish)
        yield from self._append(batch, chosen())

    def _score(self, slices: Sequence[Slice], scores: Scoring) -> None:
        """Append log probabilities to the sequences whose prompts are scored."""
        targets = [target for each in slices for target in each.targets]
        found = iter(scores(targets, [each.num_likeliest for each in slices for _ in each.targets]))
        for each in slices:
            self._scheduler[each.sequence].take_scores(itertools.islice(found, len(each.targets)))

    def _append(self, batch: MicroBatch, chosen: Sequence[Sampled | RequestError]) -> Iterator[TokenResult]:
        """Append the next token to each sequence whose last token was computed; yield the results of the sequences that finished."""
        for (sequence_id, _), token in zip(batch.wanted, chosen, strict=True):
            sequence = self._scheduler[sequence_id]
            if (finish := _take(sequence, token)) is not None:
                yield self._finish(sequence, finish)
            elif self._outgrew(sequence):
                self._scheduler.preempt(sequence)
                self.log.preempted()
            else:
                self._scheduler.trim(sequence)

    def _regime(self, sequence: LiveSequence) -> Hashable:
        """Return what the keys of a prompt depend on besides its tokens; keys that are computed anew depend on the answer as well."""
        recomputes = self._model.recompute_length is not None
        return self._model.rope_regime(len(sequence.tokens) if recomputes else sequence.prompt_len)

    def _outgrew(self, sequence: LiveSequence) -> bool:
        """Return whether the model computes all keys of this sequence anew, now that it has one more token."""
        length = self._model.recompute_length
        return length is not None and len(sequence.tokens) == length + 1 and sequence.num_generated > 0


def _take(sequence: LiveSequence, token: Sampled | RequestError) -> Finish | None:
    """Append the token of a sequence, or record its error; return how that finishes the answer, or None if it does not."""
    if isinstance(token, RequestError):
        return Finish.failed(token)
    sequence.append(token.token_id, token.logprobs)
    return sequence.finish()
