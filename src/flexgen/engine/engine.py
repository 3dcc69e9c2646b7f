"""The loop over passes: admit, run, sample, retire.

Where bytes go is decided by the policy, what moves by memory/, what is computed by models/; all three meet in the ModelRunner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np
import torch

from flexgen.base.failpoints import failpoint
from flexgen.devices.base import Backend
from flexgen.engine.admission import Admission, Homes, LengthForecast
from flexgen.engine.answers import Ending, ending, ending_or_error
from flexgen.engine.logprobs import token_logprobs
from flexgen.engine.prefixes import PrefixStore
from flexgen.engine.runner import ModelRunner
from flexgen.engine.sampler import as_float64, sample
from flexgen.engine.schedule import SCHEDULES, Limits, Quota
from flexgen.engine.sequence import Sequence
from flexgen.engine.sweep import MicroBatch
from flexgen.engine.waiting import Waiting
from flexgen.errors import EngineError, RequestError
from flexgen.io.offload import OffloadFolder
from flexgen.models.assemble import LoadedModel
from flexgen.options import TIERS
from flexgen.plan.machine import Machine
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.work import price, weights_work
from flexgen.plan.tell.forecast import forecast_again
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.plan.workload import Workload
from flexgen.report.pass_log import Trace
from flexgen.report.progress import Progress, RunReport
from flexgen.report.report import RunContext, make_report
from flexgen.report.run_log import Record
from flexgen.request import Live, TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

logger = logging.getLogger(__name__)

LOOKAHEAD = 4  # requests read ahead, in multiples of max_num_seqs: the longest answers among them start first


class Engine:
    """Executes a policy.

    Args:
        model: described, without weights. policy: where everything lives and what a pass carries.
        machine: rates that the trace compares with.
        context: names and budgets, for the report.
        temporary: folders that are removed when the engine closes.
        backend, offload_dir, verify_reads, poison: as for `ModelRunner`.

    Attributes:
        record: the books of the last run.
    """

    def __init__(
        self,
        model: LoadedModel,
        policy: Policy,
        machine: Machine,
        *,
        context: RunContext | None = None,
        backend: Backend | None = None,
        offload_dir: Path | None = None,
        temporary: SequenceOf[OffloadFolder] = (),
        verify_reads: bool = False,
        poison: bool = False,
    ) -> None:
        self.policy, self.machine, self.spec = policy, machine, model.spec
        self._model, self._context, self._temporary = model, context, tuple(temporary)
        self.forecast, self._workload = (context.forecast, context.workload) if context is not None else (None, None)
        self.load_seconds = 0.0
        self.runner = ModelRunner(model, policy, backend=backend, offload_dir=offload_dir, verify_reads=verify_reads, poison=poison)
        self.cache = self.runner.cache
        self._weights_work = weights_work(model.spec, self.runner.homes, policy.device)
        shares = {tier: getattr(policy.kv, tier) for tier in TIERS if tier in self.cache.pools}
        self._prefixes = PrefixStore(self.cache, self._regime)
        self._admission = Admission(self.cache, Homes(shares), self._prefixes)
        self._schedule = SCHEDULES[policy.schedule]
        self._limits = Limits(max_num_seqs=policy.max_num_seqs, micro_batch_tokens=policy.micro_batch_tokens)
        self._quota = Quota(policy.prefill_tokens, policy.prefill_tokens)
        self._forecast = LengthForecast()
        self._live: list[Sequence] = []
        self._expectation = Expectation(model.spec, machine, policy.dtype)
        self._waiting = Waiting()  # answers as long in the order of the input, requests of a common prefix together
        self.record = Record(self.runner.meters, Trace(self._expectation, policy))
        self._closed = False

    # ------------------------------------------------------------------ life

    def load(self) -> None:
        """Read what stays in memory, and let the links run ahead."""
        self.runner.load()

    def close(self) -> None:
        """Stop the links and free the memory; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.runner.close()
        for folder in self._temporary:
            folder.remove()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the run

    def generate(
        self,
        requests: Iterable[TokenRequest],
        *,
        num_requests: int | None = None,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[Live]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Answer requests, pulled as they are needed; results come as they finish, in any order.

        Args:
            prefixes: what their prompts have in common; it is computed once (per tier on which it is needed).
            on_progress: told now and then how the run goes.
            on_pass: called after every pass, once its results are out, with what the unfinished answers are so far; they are
                gathered while it iterates.  What it raises ends the run.

        Raises:
            StorageError, EngineError: when the run cannot go on.
        """
        self.load()
        self._begin_prefixes(prefixes)
        remaining = self._remaining_time()
        trace = Trace(self._expectation, self.policy)
        self.record = Record(self.runner.meters, trace, remaining=remaining, num_requests=num_requests, on_progress=on_progress)
        source = iter(requests)
        try:
            while True:
                yield from self._read_ahead(source)
                self._make_room()
                yield from self._admit()
                if not self._live:
                    if not self._waiting:
                        return
                    continue
                yield from self._run_pass()
                if on_pass is not None:
                    on_pass(_Unfinished(self._unfinished))
        finally:
            self.record.over()
            self._drop_all()

    def _begin_prefixes(self, prefixes: CommonPrefixes) -> None:
        if prefixes is not NO_PREFIXES and prefixes.page_tokens != self.policy.page_tokens:
            raise EngineError(f"prefixes of pages of {prefixes.page_tokens} tokens for pages of {self.policy.page_tokens}")
        self._prefixes.begin(prefixes)

    def _remaining_time(self) -> RemainingTime | None:
        if self.forecast is None or self._workload is None:
            return None
        return RemainingTime(self.forecast, self.policy, self._expectation, self._workload)

    def expect(self, workload: Workload) -> None:
        """Tell what comes next, if it is another job than the one that the engine was opened for."""
        self._workload = workload
        if self.forecast is not None:
            self.forecast = forecast_again(self.forecast, self.policy, self._expectation, workload)

    def report(self) -> RunReport:
        """How the last run went.

        Raises:
            EngineError: when the engine was opened without a context.
        """
        if self._context is None:
            raise EngineError("this engine knows no budgets to report on")
        return make_report(self, self._context)

    def _drop_all(self) -> None:
        for sequence in reversed(self._live):  # who computes a prefix after those behind it
            if sequence.kv is not None:
                self.cache.release(sequence.kv)
                self._prefixes.let_go(sequence)
        self._prefixes.clear()
        self._live.clear()
        self._waiting.clear()

    def _unfinished(self) -> Iterator[Live]:
        """What has been generated of answers that go on, those of preempted and of resumed sequences that wait included."""
        for sequence in (*self._live, *self._waiting):
            if sequence.generated:
                yield Live(index=sequence.request.index, generated=sequence.so_far())

    def _read_ahead(self, source: Iterator[TokenRequest]) -> Iterator[TokenResult]:
        """Let requests wait; one that an earlier run had brought to its end is answered at once."""
        while len(self._waiting) < LOOKAHEAD * self.policy.max_num_seqs:
            request = next(source, None)
            if request is None:
                return
            sequence = Sequence(request, self._forecast.expect(request.max_tokens))
            self._prefixes.expect(sequence)
            if (end := ending_or_error(ending, sequence)) is not None:
                yield self._finish(sequence, end)
            else:
                self._waiting.add(sequence, self._prefixes.order(sequence))

    def _admit(self) -> Iterator[TokenResult]:
        """Let the schedule choose; a request that can never fit becomes its own error."""
        while self._waiting and not self._admission.can_ever_fit(self._waiting.first):
            yield self._refused(self._waiting.pop())
        count = self._schedule(self._waiting, tuple(self._live), self._limits, self._quota, self._enter)
        for _ in range(count):
            self._waiting.pop()
        if count == 0 and not self._live and self._waiting and self._quota.credit > 0:
            raise EngineError("nothing was admitted into an empty block")

    def _enter(self, sequence: Sequence) -> bool:
        if not self._admission.can_ever_fit(sequence) or not self._admission.admit(sequence, self._live):
            return False
        self._live.append(sequence)
        self.record.answers.entered(sequence)
        return True

    def _refused(self, sequence: Sequence) -> TokenResult:
        request = sequence.request
        error = RequestError(
            f"the KV cache of {len(request.prompt_token_ids)} prompt tokens and up to {request.max_tokens} generated ones does not "
            "fit the memory granted: lower max_tokens or raise --host-mem",
            code="kv_cache_too_small",
        )
        return self._finish(sequence, Ending.failed(error))

    def _finish(self, sequence: Sequence, end: Ending) -> TokenResult:
        if sequence.kv is not None:
            self.cache.release(sequence.kv)
            sequence.kv = None
            self._prefixes.let_go(sequence)
        self._prefixes.done(sequence)
        if end.error is None:
            self._forecast.observe(sequence.num_generated)
        return self.record.finished(sequence, end)

    # ------------------------------------------------------------------ one pass

    def _run_pass(self) -> Iterator[TokenResult]:
        failpoint("engine.pass")
        start = time.perf_counter()
        batches, load = self.runner.micro_batches(self._live)
        work = price(load, self.spec, self.policy, self._weights_work)
        self.record.begins(work)
        with torch.no_grad():
            waits = self.runner.run(batches, self._on_unit)
            results = self._sample(batches)
        self.record.passed(time.perf_counter() - start, work, waits)
        yield from results

    def _make_room(self) -> None:
        """Pages for every live sequence's new token, before others may take them; wrong forecasts are repaired by
        forgetting prefixes that have no user at present, then by preempting the youngest."""
        for sequence in list(self._live):
            while sequence.kv is not None and not self.cache.reserve(sequence.kv, len(sequence.tokens)):
                home = sequence.kv.home
                if self._prefixes.evict(home):
                    continue
                victim = next(each for each in reversed(self._live) if each.kv is not None and each.kv.home == home)
                self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.kv is not None
        num_lost = sequence.num_stored if sequence.behind is None else 0  # nothing was computed as long as it waited for a prefix
        self.cache.release(sequence.kv)
        self._prefixes.let_go(sequence)
        sequence.kv, sequence.num_lost, sequence.num_stored, sequence.deferred = None, num_lost, 0, 0
        sequence.num_preemptions += 1
        sequence.expected_tokens = sequence.request.max_tokens
        self._live.remove(sequence)
        self._waiting.add(sequence, self._prefixes.order(sequence), preempted=True)
        self.record.answers.preempted()
        logger.debug("request %d was preempted", sequence.request.index)

    def _sample(self, batches: list[MicroBatch]) -> list[TokenResult]:
        results: list[TokenResult] = []
        for batch in batches:
            for each in batch.slices:
                each.sequence.num_stored = max(each.sequence.num_stored, each.start + each.length)
            rows = [each.sequence for each in batch.slices if each.last]
            if rows:
                assert batch.logits is not None
                results += self._extend(rows, batch.logits)
            batch.logits = None
        self._live = [each for each in self._live if each.kv is not None]
        return results

    def _extend(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> Iterator[TokenResult]:
        """Give each sequence the token of its row; the results of those that ended."""
        tokens = sample(logits, [each.request for each in sequences], [each.generated for each in sequences])
        for sequence, row, token in zip(sequences, logits, tokens, strict=True):
            if (end := self._take(sequence, row, token)) is not None:
                yield self._finish(sequence, end)
            elif self._outgrew(sequence):
                self._preempt(sequence)
            else:
                assert sequence.kv is not None
                self.cache.trim(sequence.kv, sequence.num_stored)

    def _take(self, sequence: Sequence, row: torch.Tensor, token: int | RequestError) -> Ending | None:
        """Give a sequence its token; how that ends the answer, if it does."""
        if isinstance(token, RequestError):
            return Ending.failed(token)
        numbers = None if sequence.request.num_logprobs is None else as_float64(row)
        return ending_or_error(_append, sequence, numbers, token)

    def _regime(self, sequence: Sequence) -> Hashable:
        """What the keys of its prompt depend on besides the tokens; keys that are computed anew depend on the answer, too."""
        recomputes = self._model.recompute_length is not None
        return self._model.rope_regime(len(sequence.tokens if recomputes else sequence.request.prompt_token_ids))

    def _outgrew(self, sequence: Sequence) -> bool:
        """Whether the model computes all keys of this sequence anew, now that it has one token more."""
        length = self._model.recompute_length
        return length is not None and len(sequence.tokens) == length + 1 and sequence.num_generated > 0

    def _on_unit(self, unit: int) -> None:
        self.record.tell(len(self._live), (unit, self.runner.num_units))


def _append(sequence: Sequence, row: np.ndarray | None, token: int) -> Ending | None:
    """Add a token with its log probabilities, by the model's logits, if they are asked for; how it ends the answer, if it does."""
    asked = sequence.request.num_logprobs
    sequence.append(token, None if row is None or asked is None else token_logprobs(row, token, asked))
    return ending(sequence)


class _Unfinished:
    """What there is of answers that go on, gathered whenever it is iterated."""

    def __init__(self, gather: Callable[[], Iterator[Live]]) -> None:
        self._gather = gather

    def __iter__(self) -> Iterator[Live]:
        return self._gather()
