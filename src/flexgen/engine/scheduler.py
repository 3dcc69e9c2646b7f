"""The sequences in progress: those that wait, those that are live, and the pages that these hold.  Uses no tensors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

from flexgen.engine.admission import Admission, Homes
from flexgen.engine.packing import plan_pass
from flexgen.engine.prefixes import PrefixStore
from flexgen.engine.schedule import SCHEDULES, Quota, Waiting
from flexgen.engine.sequence import Finish, LiveSequence
from flexgen.errors import EngineError, RequestError
from flexgen.kv.cache import KVCache
from flexgen.kv.tiers import Traits
from flexgen.passes.plan import PassPlan
from flexgen.plan.policy import Policy
from flexgen.request import PartialAnswer
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """The decisions before a pass.

    Attributes:
        plan: The plan of the pass; it has no micro-batches if nothing is live.
        entered: The sequences that the pass admits.
        refused: The sequences that can never fit, each with its error; they have left the scheduler.
        num_preempted: The number of sequences that were preempted; they wait again.
        freed: The ids of the sequences whose pages were freed since the last pass was scheduled.
    """

    plan: PassPlan
    entered: list[LiveSequence]
    refused: list[tuple[LiveSequence, Finish]]
    num_preempted: int
    freed: list[int]


class Scheduler:
    """Decides before each pass which sequences join, which are preempted, and what is computed.

    Args:
        policy: The policy, which says how many sequences may be live and when they join.
        cache: The cache that holds their KV.
        traits: For each home, what a pass may compute together of its sequences.
        shares: For each home, its share of the sequences.
        regime: A function that returns what the keys of a sequence's prompt depend on besides its tokens (models/rope.py).
    """

    def __init__(
        self, policy: Policy, cache: KVCache, traits: Mapping[str, Traits], shares: Mapping[str, float],
        regime: Callable[[LiveSequence], Hashable],
    ) -> None:  # fmt: skip
        self._policy, self._cache, self._traits = policy, cache, traits
        self._prefixes = PrefixStore(cache, regime)
        self._admission = Admission(cache, Homes(shares), self._prefixes)
        self._join = SCHEDULES[policy.schedule]
        self._quota = Quota(policy.prefill_tokens, policy.prefill_tokens)
        self._live: dict[int, LiveSequence] = {}  # by id, oldest first
        self._waiting = Waiting()  # among equally long answers, in input order with requests of a common prefix together
        self._freed: list[int] = []

    # -- the sequences --------------------------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def live(self) -> Iterator[LiveSequence]:
        """The live sequences, oldest first."""
        return iter(self._live.values())

    def unfinished(self) -> Iterator[PartialAnswer]:
        """Yield the unfinished answers as far as they have come, those of preempted sequences included."""
        return (each.so_far() for each in itertools.chain(self._live.values(), self._waiting) if each.generated)

    @property
    def by_id(self) -> Mapping[int, LiveSequence]:
        """The live sequences by their ids."""
        return self._live

    def __getitem__(self, sequence_id: int) -> LiveSequence:
        """Return a live sequence by its id."""
        return self._live[sequence_id]

    # -- joining and leaving --------------------------------------------------------------------------------------------------------

    def begin(self, prefixes: CommonPrefixes) -> None:
        """Start a run of requests that have these prefixes in common."""
        if prefixes is not NO_PREFIXES and prefixes.page_tokens != self._policy.page_tokens:
            raise EngineError(f"prefixes of pages of {prefixes.page_tokens} tokens for pages of {self._policy.page_tokens}")
        self._prefixes.begin(prefixes)
        self._quota.credit = self._quota.per_pass  # whatever a run that was given up has left

    def register(self, sequence: LiveSequence) -> None:
        """Find the prefixes that a new sequence has in common with others."""
        self._prefixes.expect(sequence)

    def enqueue(self, sequence: LiveSequence, *, preempted: bool = False) -> None:
        """Add a registered sequence to the waiting ones."""
        self._waiting.add(sequence, self._prefixes.order(sequence), preempted=preempted)

    def leave(self, sequence: LiveSequence) -> None:
        """Forget a sequence whose answer is finished, and free its pages."""
        if self._live.pop(sequence.id, None) is not None:
            self._free(sequence)
        self._prefixes.done(sequence)

    def preempt(self, sequence: LiveSequence) -> None:
        """Free the pages of a live sequence, which then waits to be computed again."""
        num_lost = sequence.num_stored if sequence.behind is None else 0  # nothing was computed while it waited for a prefix
        del self._live[sequence.id]
        self._free(sequence)
        sequence.num_lost, sequence.num_stored, sequence.deferred = num_lost, 0, 0
        sequence.num_preemptions += 1
        sequence.expected_tokens = sequence.request.max_tokens
        self.enqueue(sequence, preempted=True)
        logger.debug("request %d was preempted", sequence.id)

    def trim(self, sequence: LiveSequence) -> None:
        """Free the pages that no later token of a live sequence attends to."""
        assert sequence.kv is not None
        self._cache.trim(sequence.kv, sequence.num_stored)

    def clear(self) -> list[int]:
        """Forget all sequences and prefixes; return the ids of the sequences whose pages were freed since the last pass was scheduled."""
        for sequence in reversed(self._live.values()):  # the writer of a prefix after the sequences that use it
            self._free(sequence)
        self._prefixes.clear()
        self._live.clear()
        self._waiting.clear()
        return self._take_freed()

    def _take_freed(self) -> list[int]:
        freed, self._freed = self._freed, []
        return freed

    def _free(self, sequence: LiveSequence) -> None:
        assert sequence.kv is not None
        self._freed.append(sequence.id)
        self._cache.release(sequence.kv)
        sequence.kv = None
        self._prefixes.let_go(sequence)

    # -- before a pass --------------------------------------------------------------------------------------------------------------

    def schedule(self) -> Scheduled:
        """Decide what the next pass computes."""
        num_preempted = self._make_room()
        refused = self._refuse()
        entered = self._admit()
        plan = plan_pass(self._live.values(), self._traits, self._policy)
        return Scheduled(plan=plan, entered=entered, refused=refused, num_preempted=num_preempted, freed=self._take_freed())

    def _make_room(self) -> int:
        """Reserve pages for the new token of every live sequence before others are admitted; return the number of preempted sequences.

        Where forecasts were wrong, prefixes without users are forgotten first; then the youngest sequences are preempted.
        """
        num_preempted = 0
        for sequence in list(self._live.values()):
            while sequence.kv is not None and not self._cache.reserve(sequence.kv, len(sequence.tokens)):
                home = sequence.kv.home
                if not self._prefixes.evict(home):
                    self.preempt(next(each for each in reversed(self._live.values()) if each.kv is not None and each.kv.home == home))
                    num_preempted += 1
        return num_preempted

    def _refuse(self) -> list[tuple[LiveSequence, Finish]]:
        """Remove sequences that could not fit even alone from the head of the queue; return them with their errors."""
        refused: list[tuple[LiveSequence, Finish]] = []
        while self._waiting and not self._admission.can_ever_fit(self._waiting.first):
            sequence = self._waiting.pop()
            self.leave(sequence)
            error = RequestError(
                f"the KV cache of {sequence.prompt_len} prompt tokens and up to {sequence.request.max_tokens} generated ones does not "
                "fit the memory granted: lower max_tokens or raise host_mem (--host-mem)",
                code="kv_cache_too_small",
            )
            refused.append((sequence, Finish.failed(error)))
        return refused

    def _admit(self) -> list[LiveSequence]:
        """Let the schedule choose which sequences join; an empty block ignores the quota."""
        entered: list[LiveSequence] = []

        def enter(sequence: LiveSequence) -> bool:
            if not self._admission.can_ever_fit(sequence) or not self._admission.admit(sequence):
                return False
            if not sequence.num_preemptions:
                sequence.num_found = sequence.num_stored
            self._live[sequence.id] = sequence
            entered.append(sequence)
            return True

        self._admission.begin_pass(self._live.values())
        while True:
            self._join(self._waiting, self.num_live, self._policy, self._quota, enter)
            for _ in entered:
                self._waiting.pop()
            if self._live or not self._waiting:
                return entered
            if self._quota.credit > 0:
                raise EngineError("nothing was admitted into an empty block")
