"""The loop over passes: admit, sweep, sample, retire.  Owns the threads and the memory of a run.

Where bytes go is decided by the policy, what moves by memory/, what is computed by models/.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from flexgen.engine.admission import Admission, Homes, LengthForecast
from flexgen.engine.answers import Answers, Ending, ending
from flexgen.engine.batches import micro_batches
from flexgen.engine.clock import ProgressClock
from flexgen.engine.logprobs import token_logprobs
from flexgen.engine.pass_load import pass_load
from flexgen.engine.prefixes import PrefixStore
from flexgen.engine.progress import Progress, RunReport
from flexgen.engine.report import RunContext, make_report
from flexgen.engine.sampler import sample
from flexgen.engine.schedule import SCHEDULES, Limits, Quota, Slice
from flexgen.engine.sequence import Sequence
from flexgen.engine.sweep import MicroBatch, run_pass
from flexgen.engine.trace import Trace
from flexgen.engine.waiting import Waiting
from flexgen.errors import EngineError, RequestError
from flexgen.failpoints import failpoint
from flexgen.memory.direct_io import FileSet, IOPool
from flexgen.memory.kv_cache import group_layers
from flexgen.memory.kv_place import View
from flexgen.memory.offload import OffloadFolder
from flexgen.memory.places import open_places
from flexgen.memory.rows import EmbeddingRows
from flexgen.memory.transfer import Backend
from flexgen.memory.weights import WeightStore
from flexgen.models.attention import PassCache
from flexgen.models.loading import LoadedModel
from flexgen.options import TIERS
from flexgen.plan.cost import price, unit_homes, weights_work
from flexgen.plan.expect import Expectation
from flexgen.plan.forecast import forecast_again
from flexgen.plan.machine import Machine
from flexgen.plan.policy import Policy
from flexgen.plan.remaining import RemainingTime
from flexgen.plan.workload import Workload
from flexgen.prefixes import NO_PREFIXES, CommonPrefixes
from flexgen.request import Live, TokenRequest, TokenResult

logger = logging.getLogger(__name__)

# A thread that has read a chunk wants the interpreter for some microseconds; others give it up after this time.  With Python's own 5 ms a
# disk of 3.4 GB/s reads 1.6 beside Python code (docs/log.md).
SWITCH_SECONDS = 1e-4
LOOKAHEAD = 4  # requests read ahead, in multiples of max_num_seqs: the longest answers among them start first


class Engine:
    """Executes a policy.

    Args:
        model: described, without weights. policy: where everything lives and what a pass carries.
        machine: rates that the trace compares with.
        backend: the device, or None when computing happens in host memory.
        context: names and budgets, for the report.
        offload_dir: folder for spilled KV; needed only where the policy puts KV on disk.
        temporary: folders that are removed when the engine closes.
        verify_reads: check what comes from disk against what was written or first read.
        poison: overwrite released memory, so that a late use shows (tests).
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
        self.model = model
        self._context, self._temporary = context, tuple(temporary)
        self.forecast, self._workload = (context.forecast, context.workload) if context is not None else (None, None)
        self.load_seconds = 0.0
        self._previous_threads, self._previous_interval = torch.get_num_threads(), sys.getswitchinterval()
        self._device = backend.device if backend is not None else torch.device("cpu")
        self._backend = backend
        self._files = FileSet(verify=verify_reads)
        self.homes = unit_homes(model.spec, policy.weights)
        self._weights_work = weights_work(model.spec, self.homes, policy.device)
        self._rows = EmbeddingRows(list(model.tables), self._device, verify=verify_reads)
        groups = group_layers([(layer.layer, layer.group) for layer in model.layers], policy.page_tokens, model.dtype)
        with contextlib.ExitStack() as undo:  # what would outlive an engine that cannot be made
            self._io = IOPool(policy.io_threads)
            undo.callback(self._io.close)
            self.weights = WeightStore(
                model.layouts, self.homes, model.bound, self._io, self._files, backend=backend,
                host_ring_bytes=policy.host_ring_bytes, device_ring_bytes=policy.device_ring_bytes, poison=poison,
            )  # fmt: skip
            undo.callback(self.weights.close)
            self.places, self.cache = open_places(
                groups, policy, backend=backend, io=self._io, offload_dir=offload_dir, notify=self.weights.notify, verify=verify_reads
            )
            undo.pop_all()
        torch.set_num_threads(policy.compute_threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        shares = {tier: getattr(policy.kv, tier) for tier in TIERS if tier in self.places}
        self._prefixes = PrefixStore(self.cache, self._regime)
        self._admission = Admission(self.cache, Homes(shares), self._prefixes)
        self._schedule = SCHEDULES[policy.schedule]
        self._limits = Limits(max_num_seqs=policy.max_num_seqs, micro_batch_tokens=policy.micro_batch_tokens)
        self._quota = Quota(policy.prefill_tokens, policy.prefill_tokens)
        self._forecast = LengthForecast()
        self._pass_cache = PassCache()
        self._live: list[Sequence] = []
        self._expectation = Expectation(model.spec, machine, policy.dtype)
        self.trace = Trace(self._expectation, policy)
        self._waiting = Waiting()  # answers as long in the order of the input, requests of a common prefix together
        self.answers = Answers()
        self._bytes_before: dict[str, int] = {}
        self._busy_before = 0.0
        self._remaining: RemainingTime | None = None
        self._elapsed_seconds = 0.0
        self._clock = ProgressClock()
        self._started = False
        self._closed = False

    # ------------------------------------------------------------------ life

    def load(self) -> None:
        """Read what stays in memory, bind it, and let the links run ahead."""
        if self._started:
            return
        self._load_residents()
        if self.policy.embedding_resident:
            for table in self.model.tables:
                self._rows.load(table.module)
        self.model.bound.move_buffers(self._device)
        self.weights.load_residents()
        self.weights.start()
        self._started = True
        logger.info("weights: %s", self.weights.describe())

    def _load_residents(self) -> None:
        """Norms, biases, routers' buffers: read once, plainly, and bound for good."""
        for tensor in self.model.residents.tensors:
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor.source.read(out)  # type: ignore[attr-defined]
            name = f"{tensor.module}.{tensor.parameter}" if tensor.module else tensor.parameter
            self.model.bound.bind_resident(name, out.to(self._device))

    def close(self) -> None:
        """Stop the links and free the memory; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.weights.close()
        for place in self.places.values():
            place.close()
        self._io.close()
        self._rows.close()
        self._files.close()
        if self._backend is not None:
            self._backend.close()
        for folder in self._temporary:
            folder.remove()
        torch.set_num_threads(self._previous_threads)
        sys.setswitchinterval(self._previous_interval)

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
        self._begin_run(prefixes)
        self._clock.start(num_requests, on_progress, self.bytes_moved())
        source = iter(requests)
        start = time.perf_counter()
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
            self._elapsed_seconds = time.perf_counter() - start
            self._drop_all()

    def _begin_run(self, prefixes: CommonPrefixes) -> None:
        """Forget what earlier runs did."""
        self.trace = Trace(self._expectation, self.policy)
        if prefixes is not NO_PREFIXES and prefixes.page_tokens != self.policy.page_tokens:
            raise EngineError(f"prefixes of pages of {prefixes.page_tokens} tokens for pages of {self.policy.page_tokens}")
        self._prefixes.begin(prefixes)
        self.answers = Answers()
        self._bytes_before, self._busy_before = self._bytes_total(), self._io.busy_seconds
        self._remaining = None
        if self.forecast is not None and self._workload is not None:
            self._remaining = RemainingTime(self.forecast, self.policy, self._expectation, self._workload)

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
        return make_report(self, self._context, self._elapsed_seconds)

    def _bytes_total(self) -> dict[str, int]:
        moved = {
            "disk_read": self._io.bytes_read + self._rows.bytes_gathered,
            "disk_write": self._io.bytes_written,
        }
        if self._backend is not None:
            moved |= {"host_to_device": self._backend.bytes_in, "device_to_host": self._backend.bytes_out}
        return moved

    def bytes_moved(self) -> dict[str, int]:
        """Link -> bytes since the run began."""
        return {link: total - self._bytes_before.get(link, 0) for link, total in self._bytes_total().items()}

    def disk_busy_seconds(self) -> float:
        """Seconds of the run in which the disk was reading or writing."""
        return self._io.busy_seconds - self._busy_before

    def device_bytes(self) -> int:
        """Bytes of the device's arenas (0 on a CPU device)."""
        return self._backend.used_bytes if self._backend is not None else 0

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
            if (end := ending(sequence)) is not None:
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
        self.answers.entered(sequence)
        return True

    def _refused(self, sequence: Sequence) -> TokenResult:
        request = sequence.request
        error = RequestError(
            f"the KV cache of {len(request.prompt_token_ids)} prompt tokens and up to {request.max_tokens} generated ones does not "
            "fit the memory granted: lower max_tokens or raise --host-mem",
            code="kv_cache_too_small",
        )
        return self._finish(sequence, Ending(reason="error", error=error))

    def _finish(self, sequence: Sequence, end: Ending) -> TokenResult:
        if sequence.kv is not None:
            self.cache.release(sequence.kv)
            sequence.kv = None
            self._prefixes.let_go(sequence)
        self._prefixes.done(sequence)
        if end.error is None:
            self._forecast.observe(sequence.num_generated)
            if self._remaining is not None:
                self._remaining.finished(sequence.num_generated - sequence.num_resumed)
        return self.answers.finish(sequence, end)

    # ------------------------------------------------------------------ one pass

    def _run_pass(self) -> Iterator[TokenResult]:
        failpoint("engine.pass")
        start = time.perf_counter()
        batches = micro_batches(self._live, self.places, self.policy, self._micro_batch)
        load = pass_load(batches, tuple(self.places), len(self.cache.groups))
        waits: dict[str, float] = {}
        for home, place in self.places.items():
            place.begin_pass([batch.view for batch in batches if batch.home == home])
        with torch.no_grad():
            run_pass(batches, self.weights, len(self.model.layouts), on_unit=self._on_unit, waits=waits)
            for place in self.places.values():
                place.finish_pass()
            self._files.check_unchanged()  # before any token comes of what was read
            self._rows.check_unchanged()
            results = self._sample(batches)
        work = price(load, self.spec, self.policy, self._weights_work)
        self.trace.add(time.perf_counter() - start, work, waits)
        self._clock.tokens(round(work.num_prompt_tokens), round(work.num_sampled))
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
        self.answers.preempted()
        logger.debug("request %d was preempted", sequence.request.index)

    def _micro_batch(self, slices: SequenceOf[Slice], view: View) -> MicroBatch:
        bound, even_rows = self.model.bound, self._backend is None
        return MicroBatch(slices, bound, self._pass_cache, view, self._rows, self._device, even_rows=even_rows)

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
            if isinstance(token, RequestError):
                end = Ending(reason="error", error=token)
            else:
                asked = sequence.request.num_logprobs
                sequence.append(token, None if asked is None else token_logprobs(row, token, asked))
                end = ending(sequence)
            if end is not None:
                yield self._finish(sequence, end)
            elif self._outgrew(sequence):
                self._preempt(sequence)
            else:
                assert sequence.kv is not None
                self.cache.trim(sequence.kv, sequence.num_stored)

    def _regime(self, sequence: Sequence) -> Hashable:
        """What the keys of its prompt depend on besides the tokens; keys that are computed anew depend on the answer, too."""
        recomputes = self.model.recompute_length is not None
        return self.model.rope_regime(len(sequence.tokens if recomputes else sequence.request.prompt_token_ids))

    def _outgrew(self, sequence: Sequence) -> bool:
        """Whether the model computes all keys of this sequence anew, now that it has one token more."""
        length = self.model.recompute_length
        return length is not None and len(sequence.tokens) == length + 1 and sequence.num_generated > 0

    def _on_unit(self, unit: int) -> None:
        if self._clock.due():
            left = self._remaining.seconds(self.trace.seconds, self.trace.expected_seconds) if self._remaining is not None else None
            self._clock.tell(self.answers.counts, self.trace, self.bytes_moved(), left, len(self._live), (unit, len(self.model.layouts)))


class _Unfinished:
    """What there is of answers that go on, gathered whenever it is iterated."""

    def __init__(self, gather: Callable[[], Iterator[Live]]) -> None:
        self._gather = gather

    def __iter__(self) -> Iterator[Live]:
        return self._gather()
