"""The loop over passes: admit, sweep, sample, retire.  Owns the threads and the memory of a run.

Where bytes go is decided by the policy, what moves by memory/, what is computed by models/.
"""

from __future__ import annotations

import heapq
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import torch

from flexgen.engine.admission import Admission, Homes, LengthForecast
from flexgen.engine.clock import ProgressClock, RunCounts
from flexgen.engine.progress import Progress, RunReport
from flexgen.engine.report import RunContext, make_report
from flexgen.engine.sampler import sample
from flexgen.engine.schedule import SCHEDULES, Limits, Quota, Slice, defer_remainder, pack
from flexgen.engine.sequence import Sequence
from flexgen.engine.sweep import MicroBatch, run_pass
from flexgen.engine.trace import Trace
from flexgen.errors import EngineError, RequestError
from flexgen.failpoints import failpoint
from flexgen.memory.direct_io import FileSet, IOPool
from flexgen.memory.kv_cache import group_layers
from flexgen.memory.kv_pass import KVSlice, is_decode
from flexgen.memory.places import open_places
from flexgen.memory.rows import EmbeddingRows
from flexgen.memory.transfer import Backend
from flexgen.memory.weights import WeightStore
from flexgen.models.attention import PassCache
from flexgen.models.loading import LoadedModel
from flexgen.options import TIERS
from flexgen.plan.cost import PassLoad, PassWork, price, unit_homes, weights_work
from flexgen.plan.machine import Machine
from flexgen.plan.policy import Policy
from flexgen.request import TokenRequest, TokenResult

logger = logging.getLogger(__name__)

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
        temporary: SequenceOf[Path] = (),
        poison: bool = False,
    ) -> None:
        self.policy, self.machine, self.spec = policy, machine, model.spec
        self.model = model
        self._context, self._temporary = context, tuple(temporary)
        self.load_seconds = 0.0
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(policy.compute_threads)
        self._device = backend.device if backend is not None else torch.device("cpu")
        self._backend = backend
        self._io = IOPool(policy.io_threads)
        self._files = FileSet()
        self.homes = unit_homes(model.spec, policy.weights)
        self._weights_work = weights_work(model.spec, self.homes, policy.device)
        self.weights = WeightStore(
            model.layouts, self.homes, model.bound, self._io, self._files, backend=backend,
            host_ring_bytes=policy.host_ring_bytes, device_ring_bytes=policy.device_ring_bytes, poison=poison,
        )  # fmt: skip
        self._rows = EmbeddingRows(list(model.tables), self._device)
        groups = group_layers([(layer.layer, layer.group) for layer in model.layers], policy.page_tokens, model.dtype)
        self.places, self.cache = open_places(
            groups, policy, backend=backend, io=self._io, offload_dir=offload_dir, notify=self.weights.notify
        )
        shares = {tier: getattr(policy.kv, tier) for tier in TIERS if tier in self.places}
        self._admission = Admission(self.cache, Homes(shares))
        self._schedule = SCHEDULES[policy.schedule]
        self._limits = Limits(max_num_seqs=policy.max_num_seqs, micro_batch_tokens=policy.micro_batch_tokens)
        self._quota = Quota(policy.prefill_tokens, policy.prefill_tokens)
        self._forecast = LengthForecast()
        self._pass_cache = PassCache()
        self._live: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []  # heap: longest expected answer first, then input order
        self.trace = Trace(machine, policy.dtype)
        self.counts = RunCounts()
        self.finish_reasons: Counter[str] = Counter()
        self._finished: list[tuple[int, int]] = []
        self._bytes_before: dict[str, int] = {}
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
            shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(self._previous_threads)

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
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Answer requests, pulled as they are needed; results come as they finish, in any order.

        Raises:
            StorageError, EngineError: when the run cannot go on.
        """
        self.load()
        self._begin_run()
        self._clock.start(num_requests, on_progress, self.bytes_moved())
        source = iter(requests)
        start = time.perf_counter()
        try:
            while True:
                self._read_ahead(source)
                self._make_room()
                yield from self._admit()
                if not self._live:
                    if not self._waiting:
                        return
                    continue
                yield from self._run_pass()
        finally:
            self._elapsed_seconds = time.perf_counter() - start
            self._drop_all()

    def _begin_run(self) -> None:
        """Forget what earlier runs did."""
        self.trace = Trace(self.machine, self.policy.dtype)
        self.counts = RunCounts()
        self.finish_reasons.clear()
        self._finished.clear()
        self._bytes_before = self._bytes_total()

    def report(self) -> RunReport:
        """How the last run went.

        Raises:
            EngineError: when the engine was opened without a context.
        """
        if self._context is None:
            raise EngineError("this engine knows no budgets to report on")
        return make_report(self, self._context, self._elapsed_seconds, self._finished)

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

    def device_bytes(self) -> int:
        """Bytes of the device's arenas (0 on a CPU device)."""
        return self._backend.used_bytes if self._backend is not None else 0

    def _drop_all(self) -> None:
        for sequence in self._live:
            if sequence.kv is not None:
                self.cache.release(sequence.kv)
        self._live.clear()
        self._waiting.clear()

    def _read_ahead(self, source: Iterator[TokenRequest]) -> None:
        while len(self._waiting) < LOOKAHEAD * self.policy.max_num_seqs:
            request = next(source, None)
            if request is None:
                return
            sequence = Sequence(request, self._forecast.expect(request.max_tokens))
            heapq.heappush(self._waiting, (-sequence.remaining, request.index, sequence))

    def _admit(self) -> Iterator[TokenResult]:
        """Let the schedule choose; a request that can never fit becomes its own error."""
        while self._waiting and not self._admission.can_ever_fit(self._waiting[0][2]):
            sequence = heapq.heappop(self._waiting)[2]
            yield self._refused(sequence)
        count = self._schedule(_popping(self._waiting), tuple(self._live), self._limits, self._quota, self._enter)
        for _ in range(count):
            heapq.heappop(self._waiting)
        if count == 0 and not self._live and self._waiting and self._quota.credit > 0:
            raise EngineError("nothing was admitted into an empty block")

    def _enter(self, sequence: Sequence) -> bool:
        if not self._admission.can_ever_fit(sequence) or not self._admission.admit(sequence, self._live):
            return False
        self._live.append(sequence)
        return True

    def _refused(self, sequence: Sequence) -> TokenResult:
        request = sequence.request
        error = RequestError(
            f"the KV cache of {len(request.prompt_token_ids)} prompt tokens and up to {request.max_tokens} generated ones does not "
            "fit the memory granted: lower max_tokens or raise --host-mem",
            code="kv_cache_too_small",
        )
        return self._finish(sequence, "error", error)

    def _finish(self, sequence: Sequence, reason: str, error: RequestError | None = None) -> TokenResult:
        generated = tuple(sequence.tokens[len(sequence.request.prompt_token_ids) :])
        if sequence.kv is not None:
            self.cache.release(sequence.kv)
            sequence.kv = None
        if error is None:
            self._forecast.observe(len(generated))
        self.finish_reasons[reason] += 1
        self._finished.append((len(sequence.request.prompt_token_ids), len(generated)))
        counts = self.counts
        self.counts = replace(
            counts,
            requests=counts.requests + 1,
            errors=counts.errors + (error is not None),
            prompt_tokens=counts.prompt_tokens + len(sequence.request.prompt_token_ids),
            output_tokens=counts.output_tokens + len(generated),
        )
        return TokenResult(
            index=sequence.request.index, token_ids=generated, finish_reason=reason, error=error,
            num_preemptions=sequence.num_preemptions,
        )  # fmt: skip

    # ------------------------------------------------------------------ one pass

    def _run_pass(self) -> Iterator[TokenResult]:
        failpoint("engine.pass")
        start = time.perf_counter()
        batches = self._batches()
        load = self._load(batches)
        waits: dict[str, float] = {}
        for home, place in self.places.items():
            place.begin_pass([batch.view for batch in batches if batch.home == home])
        with torch.no_grad():
            run_pass(batches, self.weights, len(self.model.layouts), on_unit=self._on_unit, waits=waits)
            for place in self.places.values():
                place.finish_pass()
            results = self._sample(batches)
        work = self._count(load)
        self.trace.add(time.perf_counter() - start, work, waits, len(self._live), len(batches))
        self._clock.tokens(work.num_prompt_tokens, work.num_sampled)
        yield from results

    def _make_room(self) -> None:
        """Pages for every live sequence's new token, before others may take them; wrong forecasts are repaired by
        preempting the youngest."""
        for sequence in list(self._live):
            while sequence.kv is not None and not self.cache.reserve(sequence.kv, len(sequence.tokens)):
                home = sequence.kv.home
                victim = next(each for each in reversed(self._live) if each.kv is not None and each.kv.home == home)
                self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.kv is not None
        self.cache.release(sequence.kv)
        sequence.kv, sequence.num_stored, sequence.deferred = None, 0, 0
        sequence.num_preemptions += 1
        sequence.expected_tokens = sequence.request.max_tokens
        self._live.remove(sequence)
        heapq.heappush(self._waiting, (-(1 << 60), sequence.request.index, sequence))
        self.counts = replace(self.counts, preemptions=self.counts.preemptions + 1)
        logger.debug("request %d was preempted", sequence.request.index)

    def _batches(self) -> list[MicroBatch]:
        batches: list[MicroBatch] = []
        for home, place in self.places.items():
            members = [each for each in self._live if each.kv is not None and each.kv.home == home]
            if place.mixes and self.policy.schedule == "diagonal":
                defer_remainder(members, self.policy.micro_batch_tokens)
            previous: MicroBatch | None = None
            for slices in pack(members, self.policy.micro_batch_tokens, mix=place.mixes, chunk=place.chunks):
                slices = sorted(slices, key=lambda each: not is_decode(_kv_slice(each)))
                view = place.view([_kv_slice(each) for each in slices])
                batch = MicroBatch(
                    slices, self.model.bound, self._pass_cache, view, self._rows, self._device, even_rows=self._backend is None
                )
                if previous is not None and any(each.start > each.sequence.num_stored for each in slices):
                    batch.after = previous
                batches.append(batch)
                previous = batch
        return batches

    def _load(self, batches: list[MicroBatch]) -> PassLoad:
        """What this pass carries, for pricing."""
        groups = range(len(self.cache.groups))
        prompts = dict.fromkeys(self.places, 0)
        starts = dict.fromkeys(self.places, 0)
        steps = dict.fromkeys(self.places, 0)
        pairs = [0 for _ in groups]
        attended = {home: [0 for _ in groups] for home in self.places}
        for batch in batches:
            plan = batch.view.plan
            read = plan.decode_tokens_read()
            visible = plan.visible_pairs()
            home = batch.home
            for each in batch.slices:
                if is_decode(_kv_slice(each)):
                    steps[home] += 1
                else:
                    prompts[home] += each.length
                    starts[home] += each.last
            for group in groups:
                attended[home][group] += read[group]
                pairs[group] += visible[group] - read[group]
        return PassLoad(prompt_tokens=prompts, num_prompts=starts, next_tokens=steps, prompt_pairs=pairs, attended_tokens=attended)

    def _count(self, load: PassLoad) -> PassWork:
        return price(load, self.spec, self.policy, self._weights_work)

    def _sample(self, batches: list[MicroBatch]) -> list[TokenResult]:
        results = []
        for batch in batches:
            for each in batch.slices:
                each.sequence.num_stored = max(each.sequence.num_stored, each.start + each.length)
            rows = [each.sequence for each in batch.slices if each.last]
            if rows:
                assert batch.logits is not None
                requests = [sequence.request for sequence in rows]
                tokens = sample(batch.logits, requests, [len(sequence.tokens) for sequence in rows])
                for sequence, token in zip(rows, tokens, strict=True):
                    if (result := self._append(sequence, token)) is not None:
                        results.append(result)
            batch.logits = None
        self._live = [each for each in self._live if each.kv is not None]
        return results

    def _append(self, sequence: Sequence, token: int | RequestError) -> TokenResult | None:
        """Take a sampled token; the result when it ended the answer."""
        if isinstance(token, RequestError):
            return self._finish(sequence, "error", token)
        sequence.tokens.append(token)
        if token in sequence.request.stop_token_ids:
            return self._finish(sequence, "stop")
        if sequence.num_generated >= sequence.request.max_tokens:
            return self._finish(sequence, "length")
        assert sequence.kv is not None
        if self._outgrew(sequence):
            self._preempt(sequence)
        else:
            self.cache.trim(sequence.kv, sequence.num_stored)
        return None

    def _outgrew(self, sequence: Sequence) -> bool:
        """Whether the model computes all keys of this sequence anew, now that it has one token more."""
        length = self.model.recompute_length
        return length is not None and len(sequence.tokens) == length + 1 and sequence.num_generated > 0

    def _on_unit(self, unit: int) -> None:
        if self._clock.due():
            begun = sum(min(each.num_generated / each.expected_tokens, 1.0) for each in self._live)
            self._clock.tell(self.counts, self.trace, self.bytes_moved(), begun, len(self._live), (unit, len(self.model.layouts)))


def _kv_slice(each: Slice) -> KVSlice:
    assert each.sequence.kv is not None
    return KVSlice(start=each.start, length=each.length, tables=each.sequence.kv.tables)


def _popping(heap: list[tuple[int, int, Sequence]]) -> Iterator[Sequence]:
    """The heap's sequences, best first, without removing them."""
    for _, _, sequence in heapq.nsmallest(len(heap), heap):
        yield sequence
