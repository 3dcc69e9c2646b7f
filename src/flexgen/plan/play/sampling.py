"""What a search needs to know of a job: how much its requests hold, a sample to play, and the whole from the sample."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flexgen.base.quantities import align_up
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.queue import Queue, queue_of
from flexgen.plan.play.simulate import Simulation, held_kv_bytes, shared_kv_bytes, simulate
from flexgen.plan.policy import Policy
from flexgen.plan.price.work import PassWork, unit_homes, weights_work
from flexgen.plan.workload import Workload

# Jobs beyond these sizes are searched on a sample of their requests and extrapolated; then the winner is played whole.  A sample has as
# many requests as some blocks at least, of a few lengths, in groups of equal ones that enter together.
SEARCH_REQUESTS, SEARCH_BLOCKS = 512, 4
SEARCH_LENGTHS, SEARCH_ENTRIES = 64, 128
PLAYED_REQUESTS = 20_000


class JobSizes:
    """What a job's requests need: their KV bytes, and the prompt tokens that keep a block full.

    Attributes:
        largest, smallest, all: KV bytes at their longest (all: shared ones once); of a single one with what windowed layers
            hold of it during its prompt. mean: of a live sequence. layer: of one layer of the longest.
        prompt_tokens: to compute. shortest_prompt: of them, the fewest of a request. longest_prompt, longest: tokens of a prompt, of a
            whole sequence.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, page_tokens: int) -> None:
        prompts, most, answers = workload.prompt_lens, [max(n, 1) for n in workload.output_lens], workload.answer_lens
        longest = [s + n for s, n in zip(prompts, most, strict=True)]
        held = held_kv_bytes(spec, page_tokens, max(longest))
        peaks = [int(held[length - 1]) for length in longest]
        before = np.concatenate([[0], np.cumsum(held)])
        self._number, self._passes = len(prompts), sum(answers)
        found = list(workload.found_lens)
        shared = [int(each) for each in shared_kv_bytes(spec, page_tokens, max(found))[found]]
        self.prompt_tokens = sum(prompts) - sum(found)
        self.longest_prompt, self.longest = max(prompts), max(longest)
        self.shortest_prompt = min(s - c for s, c in zip(prompts, found, strict=True))
        whole = sum(
            (align_up(self.longest, page_tokens) + page_tokens) * group.num_layers * group.bytes_per_token
            for group in spec.kv_groups
            if group.window is not None
        )
        self.largest, self.smallest, self.all = max(peaks) + whole, min(peaks) + whole, sum(peaks) - sum(shared)
        held_by_all = sum(int(before[s + n] - before[s]) - n * once for s, n, once in zip(prompts, answers, shared, strict=True))
        self.mean = max(held_by_all / self._passes, 1.0)
        self.layer = self.longest * max((group.bytes_per_token for group in spec.kv_groups), default=0)

    def block(self, pool_bytes: float) -> float:
        """About how many sequences pools keep alive."""
        return min(pool_bytes / self.mean, self._number)

    def num_seqs(self, policy: Policy) -> float:
        """About how many sequences a policy keeps alive."""
        return min(policy.max_num_seqs, self.block(policy.kv_bytes))

    def quota(self, pool_bytes: float, share: float) -> int:
        """Prompt tokens per pass: from half of what replaces those that end (`share` 0) to the whole block at once (1)."""
        prompts = max(self.block(pool_bytes), 1.0) * self.prompt_tokens / self._number
        slowest = self._number / self._passes / 2
        return math.ceil(prompts * slowest ** (1 - share))

    def quota_share(self, times: float) -> float:
        """The share at which that is so many times what replaces those that end."""
        return min(math.log(2 * times) / math.log(2 * self._passes / self._number), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A job that stands for one `scale` times as large.

    Attributes:
        half: every other of its requests; None where the scale is 1.
    """

    queue: Queue
    half: Queue | None = None
    scale: float = 1.0


class Samples:
    """Smaller jobs like a job: small enough to be played hundreds of times, large enough to show how it goes.

    Requests are drawn evenly from the sorted lengths; where many lengths differ, neighbours are averaged.  They come in an order that says
    nothing of their lengths, some equal ones together.

    Answers of many lengths end at ever more different times, which takes some dozen blocks: samples of a few blocks are up to a sixth too
    slow where that matters.

    Args:
        requests: that a sample has at least. entries: groups of requests that enter together, at most; a job of no more requests is
            its own sample.
    """

    def __init__(self, workload: Workload, *, requests: int = SEARCH_REQUESTS, entries: int = SEARCH_ENTRIES) -> None:
        self._workload, self._requests, self._entries = workload, requests, entries
        self._known: dict[int, Sample] = {}

    @classmethod
    def played_once(cls, workload: Workload) -> Samples:
        """For few policies: all of the job, where it is not too large, else much of it."""
        return cls(workload, requests=PLAYED_REQUESTS // 2, entries=PLAYED_REQUESTS)

    def of(self, num_seqs: float) -> Sample:
        """The sample for policies that keep about so many sequences alive."""
        most, number = len(self._workload), self._requests
        while number < SEARCH_BLOCKS * num_seqs:
            number *= 2
        number = most if most <= self._entries else min(number, most)
        if number not in self._known:
            self._known[number] = self._drawn(number) if most > self._entries else Sample(queue=queue_of(self._workload))
        return self._known[number]

    @functools.cached_property
    def _order(self) -> list[int]:
        """Places of all requests, short answers first."""
        answers, prompts = self._workload.answer_lens, self._workload.prompt_lens
        return sorted(range(len(self._workload)), key=lambda place: (answers[place], prompts[place]))

    def _drawn(self, number: int) -> Sample:
        scale = len(self._order) / number
        drawn = self._workload.take([self._order[int((each + 0.5) * scale)] for each in range(number)])
        if number > self._entries and len(set(drawn.rows())) > SEARCH_LENGTHS:
            bounds = [each * number // SEARCH_LENGTHS for each in range(SEARCH_LENGTHS + 1)]
            drawn = drawn.averaged(list(itertools.pairwise(bounds)))
        half = queue_of(self._mixed(drawn.take(range(0, number, 2)))) if scale > 1 else None
        return Sample(queue=queue_of(self._mixed(drawn)), half=half, scale=scale)

    def _mixed(self, drawn: Workload) -> Workload:
        """Groups of neighbours in an order that says nothing of their lengths, as in an input."""
        together = -(-len(drawn) // self._entries)
        firsts = list(range(0, len(drawn), together))
        random.Random(0).shuffle(firsts)
        return drawn.take([place for first in firsts for place in range(first, min(first + together, len(drawn)))])


def extrapolated(
    spec: ModelSpec,
    policy: Policy,
    sample: Sample,
    seconds: Callable[[Simulation], float],
    *,
    weights: PassWork | None = None,
) -> tuple[float, float]:
    """(share of refused requests, seconds) of the job that a sample stands for.

    Ramp and tail happen once: what the sample takes longer than every other of its requests is the steady state's.  That is only true of
    samples of several blocks: requests that enter a block with places left cost little.

    Args:
        weights: what every pass moves of them, where that is known already.
    """
    weights = weights or weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    played = simulate(spec, policy, sample.queue, weights=weights)
    refused, total = played.num_refused / max(sample.queue.num_requests, 1), seconds(played)
    if sample.half is not None:
        total += max(total - seconds(simulate(spec, policy, sample.half, weights=weights)), 0.0) * 2 * (sample.scale - 1)
    return refused, total
