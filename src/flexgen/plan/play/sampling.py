"""Samples of a job that are small enough to be played again and again, and the whole job extrapolated from a sample."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.plan.model import ModelSpec
from flexgen.plan.play.simulate import Queue, Simulation, queue_of, simulate
from flexgen.plan.policy import Policy
from flexgen.plan.price.weights import unit_homes, weights_work
from flexgen.plan.price.work import PassWork
from flexgen.plan.workload import Workload

# Policies for larger jobs are searched on a sample of the requests and extrapolated; then the best one is played with the whole job. A
# sample has at least the requests of some blocks, of a few lengths, in groups of equal ones that enter together.
SEARCH_REQUESTS, SEARCH_BLOCKS = 512, 4
SEARCH_LENGTHS, SEARCH_ENTRIES = 64, 128
PLAYED_REQUESTS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A small job that stands for one `scale` times as large.

    Attributes:
        queue: The requests of the sample.
        half: Every other of these requests; None where the scale is 1.
        scale: How many times as large as the sample the job is.
    """

    queue: Queue
    half: Queue | None = None
    scale: float = 1.0


class Samples:
    """Samples of a job: small enough to be played hundreds of times, large enough to show how the job goes.

    Requests are drawn evenly from the sorted lengths; where many lengths differ, neighbours are averaged. Their order is independent of
    their lengths, except that some equal ones stand together.

    Answers of many lengths end at ever more different times, a process that takes some dozen blocks: samples of a few blocks are up to a
    sixth too slow where it matters.

    Args:
        workload: The job.
        requests: The fewest requests of a sample.
        entries: The most groups of requests that enter together. A job of no more requests is its own sample.
    """

    def __init__(self, workload: Workload, *, requests: int = SEARCH_REQUESTS, entries: int = SEARCH_ENTRIES) -> None:
        self._workload, self._requests, self._entries = workload, requests, entries
        self._known: dict[int, Sample] = {}

    @classmethod
    def played_once(cls, workload: Workload) -> Samples:
        """Return larger samples, to play few policies with: the whole job where it is not too large, else much of it."""
        return cls(workload, requests=PLAYED_REQUESTS // 2, entries=PLAYED_REQUESTS)

    def of(self, num_seqs: float) -> Sample:
        """Return the sample for policies that keep about so many sequences alive."""
        most, number = len(self._workload), self._requests
        while number < SEARCH_BLOCKS * num_seqs:
            number *= 2
        number = most if most <= self._entries else min(number, most)
        if number not in self._known:
            self._known[number] = self._drawn(number) if most > self._entries else Sample(queue=queue_of(self._workload))
        return self._known[number]

    @functools.cached_property
    def _order(self) -> list[int]:
        """The indices of all requests, short answers first."""
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
        """Return groups of neighbours in an order that is independent of their lengths, as in an input."""
        together = -(-len(drawn) // self._entries)
        firsts = list(range(0, len(drawn), together))
        random.Random(0).shuffle(firsts)
        return drawn.take([place for first in firsts for place in range(first, min(first + together, len(drawn)))])


@dataclass(frozen=True, slots=True)
class PlayedSample:
    """A sample as played under a policy, from which the whole job is extrapolated.

    Attributes:
        jobs: The sample as played, and every other of its requests where that was played too.
        scale: How many times as large as the sample the job is.
    """

    jobs: tuple[Simulation, ...]
    scale: float

    @property
    def refused(self) -> float:
        """The share of the requests that can never fit."""
        return self.jobs[0].num_refused / max(self.jobs[0].num_requests, 1)

    def extrapolated(self, seconds: Sequence[float]) -> float:
        """Return the seconds of the whole job, given those of each of `jobs`.

        Ramp and tail happen once: the time by which the sample exceeds every other of its requests is the steady state's. That holds only
        for samples of several blocks, because requests that enter a block with free room cost little.
        """
        more = max(seconds[0] - seconds[1], 0.0) if len(seconds) > 1 else 0.0
        return seconds[0] + more * 2 * (self.scale - 1)


def play_sample(spec: ModelSpec, policy: Policy, sample: Sample, *, weights: PassWork | None = None) -> PlayedSample:
    """Play the job that a sample stands for.

    Args:
        spec: The model.
        policy: The policy to play.
        sample: The sample.
        weights: The work of moving weights in every pass; None to compute it here.
    """
    weights = weights or weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    queues = [sample.queue] if sample.half is None else [sample.queue, sample.half]
    return PlayedSample(tuple(simulate(spec, policy, queue, weights=weights) for queue in queues), sample.scale)
