"""A block: the live sequences that go through the model together in every pass, and the requests that wait to join them.

It turns requests into plans of passes, and what these find into results.  It runs nothing: an engine has one block or, over the stages of
a pipeline, several.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence

from flexgen.base.isolation import for_one_request
from flexgen.engine.admission import LengthForecast
from flexgen.engine.choosing import BatchAnswer
from flexgen.engine.sampler import Sampled
from flexgen.engine.scheduler import Scheduled, Scheduler
from flexgen.engine.sequence import Finish, LiveSequence
from flexgen.errors import RequestError
from flexgen.kv.cache import KVCache
from flexgen.kv.tiers import Traits
from flexgen.models.assemble import AssembledModel
from flexgen.passes.plan import MicroBatch, PassPlan
from flexgen.plan.policy import Policy
from flexgen.report.run_log import RunLog
from flexgen.request import TokenRequest, TokenResult
from flexgen.text.common_prefixes import CommonPrefixes


class Block:
    """A block.

    Args:
        model: The model, or a stage of it.
        policy: The policy.
        cache: The pages of the block's sequences, which are no other block's.
        traits: For each home of KV, what a pass may compute together of its sequences.
        shares: For each home, its share of the sequences.
        lengths: The forecast of answer lengths, which all blocks have in common.

    Attributes:
        cache: The pages.
        scheduler: What decides what a pass computes.
        work: The tokens that its unfinished requests are expected to have at their ends.
    """

    def __init__(
        self, model: AssembledModel, policy: Policy, cache: KVCache, traits: Mapping[str, Traits], shares: Mapping[str, float],
        lengths: LengthForecast,
    ) -> None:  # fmt: skip
        self.cache = cache
        self.scheduler = Scheduler(policy, cache, traits, shares, self._regime)
        self.work = 0
        self._model, self._lengths = model, lengths
        self._work_of: dict[int, int] = {}  # by sequence

    @property
    def has_work(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self.scheduler.num_live or self.scheduler.num_waiting)

    # -- requests in, results out ---------------------------------------------------------------------------------------------------

    def begin(self, prefixes: CommonPrefixes) -> None:
        """Start a run of requests that have these prefixes in common."""
        self.scheduler.begin(prefixes)

    def add(self, request: TokenRequest, log: RunLog) -> TokenResult | None:
        """Add a request; return its result if an earlier run had finished it."""
        sequence = LiveSequence(request, self._lengths.expect(request.max_tokens))
        self.scheduler.register(sequence)
        if (finish := sequence.finish()) is not None:
            return self._finish(sequence, finish, log)
        self._work_of[sequence.id] = sequence.final_len
        self.work += sequence.final_len
        self.scheduler.enqueue(sequence)
        return None

    def clear(self) -> list[int]:
        """Forget all requests; return the ids of the sequences whose pages were freed since the last pass was scheduled."""
        self.work = 0
        self._work_of.clear()
        return self.scheduler.clear()

    def _finish(self, sequence: LiveSequence, finish: Finish, log: RunLog) -> TokenResult:
        self.scheduler.leave(sequence)
        return self._result(sequence, finish, log)

    def _result(self, sequence: LiveSequence, finish: Finish, log: RunLog) -> TokenResult:
        self.work -= self._work_of.pop(sequence.id, 0)
        if finish.error is None and sequence.request.max_tokens:
            self._lengths.observe(sequence.num_generated)
        if sequence.request.guide is not None:
            sequence.request.guide.forget()
        result = sequence.result(finish)
        log.finished(result, sequence.request, sequence.num_found)
        return result

    # -- before a pass --------------------------------------------------------------------------------------------------------------

    def schedule(self, log: RunLog) -> tuple[Scheduled, list[TokenResult]]:
        """Decide what the next pass computes; return that, and the results of the requests that can never fit."""
        scheduled = self.scheduler.schedule()
        log.preempted(scheduled.num_preempted)
        for each in scheduled.entered:
            log.entered(recomputed_tokens=max(each.num_lost - each.num_stored, 0), shared_tokens=each.num_stored)
        return scheduled, [self._result(each, finish, log) for each, finish in scheduled.refused]

    def prepare_guides(self, plan: PassPlan) -> None:
        """Have the guides find out what may come next while the pass computes; an error in that comes back when it is needed."""
        for batch in plan.micro_batches:
            for each in (self.scheduler[sequence] for sequence, _ in batch.wanted):
                if each.request.guide is not None:
                    for_one_request(each.request.guide.prepare, each.generated)

    # -- after a pass ---------------------------------------------------------------------------------------------------------------

    def rows(self, batch: MicroBatch) -> tuple[list[TokenRequest], list[list[int]]]:
        """Return the request of each row of a micro-batch's logits, and the ids that were generated for it so far."""
        sequences = [self.scheduler[sequence] for sequence, _ in batch.wanted]
        return [each.request for each in sequences], [each.generated for each in sequences]

    def take(self, batch: MicroBatch, answer: BatchAnswer, log: RunLog) -> Iterator[TokenResult]:
        """Give the sequences of a micro-batch what was found for them; yield the results of those that finished."""
        self.stored(batch)
        if answer.scores:
            scores = iter(answer.scores)
            for each in batch.slices:
                self.scheduler[each.sequence].take_scores(itertools.islice(scores, len(each.targets)))
        for each in batch.slices:
            sequence = self.scheduler[each.sequence]
            if not sequence.request.max_tokens and (finish := sequence.finish()) is not None:
                yield self._finish(sequence, finish, log)
        yield from self.append(batch, answer.chosen, log)

    def stored(self, batch: MicroBatch) -> None:
        """Record that the KV of a micro-batch is stored."""
        for each in batch.slices:
            sequence = self.scheduler[each.sequence]
            sequence.num_stored = max(sequence.num_stored, each.stop)

    def append(self, batch: MicroBatch, chosen: Sequence[Sampled | RequestError], log: RunLog) -> Iterator[TokenResult]:
        """Append the next token to each sequence whose last token was computed; yield the results of the sequences that finished."""
        for (sequence_id, _), token in zip(batch.wanted, chosen, strict=True):
            sequence = self.scheduler[sequence_id]
            if (finish := _take(sequence, token)) is not None:
                yield self._finish(sequence, finish, log)
            elif self._outgrew(sequence):
                self.scheduler.preempt(sequence)
                log.preempted()
            else:
                self.scheduler.trim(sequence)

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
