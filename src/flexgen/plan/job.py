"""What a search needs to know of a job: how much its requests hold, a sample to play, and the whole from the sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from flexgen.plan.cost import PassWork, unit_homes, weights_work
from flexgen.plan.model import ModelSpec
from flexgen.plan.outputs import GOLDEN_STEP
from flexgen.plan.policy import Policy
from flexgen.plan.simulate import Simulation, held_kv_bytes, shared_kv_bytes, simulate
from flexgen.plan.workload import Workload
from flexgen.sizes import align_up

# Jobs beyond these sizes are searched on a sample of their requests and extrapolated; then the winner is played whole.
SEARCH_REQUESTS = 512
SEARCH_LENGTHS = 64
PLAYED_REQUESTS = 20_000


class JobSizes:
    """What a job's requests need: their KV bytes, and the prompt tokens that keep a block full.

    Attributes:
        largest, smallest, all: KV bytes at their longest (all: shared ones once); of a single one with what windowed layers
            hold of it during its prompt. mean: of a live sequence. layer: of one layer of the longest.
        prompt_tokens: to compute. longest_prompt, longest: tokens of a prompt, of a whole sequence.
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

    def quota(self, pool_bytes: float, share: float) -> int:
        """Prompt tokens per pass: from half of what replaces those that end (`share` 0) to the whole block at once (1)."""
        prompts = max(self.block(pool_bytes), 1.0) * self.prompt_tokens / self._number
        slowest = self._number / self._passes / 2
        return math.ceil(prompts * slowest ** (1 - share))


def sampled(workload: Workload) -> tuple[Workload, float]:
    """A job small enough to be played hundreds of times, and how many times larger the real one is.

    Requests are drawn evenly from the sorted lengths; where many lengths differ, neighbours are averaged.  Answers whose lengths nobody
    knows beforehand come in an order that says nothing of them.
    """
    answers = workload.answer_lens
    order = sorted(range(len(workload)), key=lambda place: (answers[place], workload.prompt_lens[place]))
    scale = max(len(order) / SEARCH_REQUESTS, 1.0)
    if scale > 1:
        order = [order[int((each + 0.5) * scale)] for each in range(SEARCH_REQUESTS)]
    drawn = workload.take(order)
    if len(set(drawn.rows())) > SEARCH_LENGTHS:
        bounds = [each * len(order) // SEARCH_LENGTHS for each in range(SEARCH_LENGTHS + 1)]
        drawn = drawn.averaged(list(itertools.pairwise(bounds)))
    if drawn.reserved_lens:
        drawn = drawn.take(sorted(range(len(drawn)), key=lambda place: (place + 1) * GOLDEN_STEP % 1.0))
    return drawn, scale


def extrapolated(
    spec: ModelSpec,
    policy: Policy,
    sample: Workload,
    scale: float,
    seconds: Callable[[Simulation], float],
    *,
    weights: PassWork | None = None,
) -> tuple[float, float]:
    """(share of refused requests, seconds) of a job `scale` times the sample.

    Ramp and tail happen once: what the sample takes longer than every other of its requests is the steady state's.

    Args:
        weights: what every pass moves of them, where that is known already.
    """
    weights = weights or weights_work(spec, unit_homes(spec, policy.weights), policy.device)
    played = simulate(spec, policy, sample, weights=weights)
    refused, total = played.num_refused / max(len(sample), 1), seconds(played)
    if scale > 1:
        half = sample.take(range(0, len(sample), 2))
        total += max(total - seconds(simulate(spec, policy, half, weights=weights)), 0.0) * 2 * (scale - 1)
    return refused, total
