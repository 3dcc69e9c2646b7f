"""What searches for a policy share: the axes of the unit cube, sizes of a job, a sample of it, and a descent.

Knows prices only through the score it is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from flexgen.plan.cost import PassWork, unit_homes, weights_work
from flexgen.plan.model import ModelSpec
from flexgen.plan.outputs import GOLDEN_STEP
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.simulate import Simulation, held_kv_bytes, shared_kv_bytes, simulate
from flexgen.plan.workload import Workload
from flexgen.sizes import align_up

# Jobs beyond these sizes are searched on a sample of their requests and extrapolated; then the winner is played whole.
SEARCH_REQUESTS = 512
SEARCH_LENGTHS = 64
PLAYED_REQUESTS = 20_000


def search_axes(device: str, kv_on_disk: bool) -> list[tuple[float, ...]]:
    """Coarse values of: weights on the device, on the host (of what fits); homes of KV; disk's share of KV; prefill quota."""
    if device == "cpu":
        return [(), _steps(10), (), _steps(2) if kv_on_disk else (), _steps(8)]
    if kv_on_disk:
        return [_steps(2), _steps(2), _steps(2), _steps(2), _steps(4)]
    return [_steps(4), _steps(2), _steps(2), (), _steps(6)]


def _steps(number: int) -> tuple[float, ...]:
    return tuple(each / number for each in range(number + 1))


def placed_weights(weight_bytes: int, device: str, device_bytes: float, host_bytes: float, on_device: float, on_host: float) -> Fractions:
    """Home shares of so many bytes that use `on_device` and `on_host` (0 to 1) of the most that fits each tier."""
    whole = max(weight_bytes, 1)
    share = on_device * min(max(device_bytes, 0) / whole, 1.0) if device != "cpu" else 0.0
    host = on_host * min(max(host_bytes, 0) / whole, 1.0 - share)
    disk = 1.0 - share - host
    return Fractions(device=share, host=host, disk=disk if disk > 1e-9 else 0.0)


def kv_pools(free: dict[str, int], disk_bytes: int, kv_homes: float, kv_disk: float, *, staged: float = 0.0) -> dict[str, int]:
    """Pool bytes per tier.

    Args:
        kv_homes: 0 takes the device, 1 the host, a half all of both; between, a part of the one or of the other.
        kv_disk: the disk's share of all KV.
        staged: host bytes of staging that a byte on disk takes.
    """
    device = int(max(free["device"], 0) * min(2 - 2 * kv_homes, 1.0))
    room = max(free["host"], 0)
    host = int(room * min(2 * kv_homes, 1.0)) if free["device"] > 0 else room
    most = min(disk_bytes, int(room / staged) if staged else disk_bytes)
    if kv_disk >= 1:
        return {"device": 0, "host": 0, "disk": most}
    # Each byte on the host brings `ratio` bytes on disk, and these their staging on the host.
    ratio = kv_disk / (1 - kv_disk)
    host = min(host, int(max(room - staged * ratio * device, 0) / (1 + staged * ratio)))
    return {"device": device, "host": host, "disk": min(int((device + host) * ratio), most)}


def pool_fractions(pools: dict[str, int]) -> Fractions:
    """The shares of all KV bytes that pools of these sizes stand for."""
    total = max(sum(pools.values()), 1)
    return Fractions(**{tier: size / total for tier, size in pools.items()})


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


def descend(
    axes: Sequence[tuple[float, ...]], score: Callable[[tuple[float, ...]], tuple[float, float]], *, keep: int, rounds: int = 8
) -> list[tuple[float, ...]]:
    """The best points, best first: all of a grid, then some of the best moved along their axes in halving steps.

    Every axis lies within 0 and 1; one without values stays at 0, one of a single value starts there.  What is moved
    are the `keep` best points, and as many of different homes of KV (axes 2 and 3), between which no single step leads.
    """
    known: dict[tuple[float, ...], tuple[float, float]] = {}

    def look(point: tuple[float, ...]) -> tuple[float, float]:
        if point not in known:
            known[point] = score(point)
        return known[point]

    ranked = sorted(itertools.product(*(axis or (0.0,) for axis in axes)), key=look)
    best_by_homes: dict[tuple[float, ...], tuple[float, ...]] = {}
    for point in ranked:
        best_by_homes.setdefault(point[2:4], point)
    found: list[tuple[float, ...]] = []
    for start in dict.fromkeys([*ranked[:keep], *list(best_by_homes.values())[:keep]]):
        point, step = start, 0.5 / max(1, *(len(axis) for axis in axes))
        for _ in range(rounds):
            moves = [
                (*point[:axis], min(max(point[axis] + sign * step, 0.0), 1.0), *point[axis + 1 :])
                for axis in range(len(axes))
                for sign in (-1, 1)
                if axes[axis]
            ]
            nearest = min(moves, key=look, default=point)
            if look(nearest) < look(point):
                point = nearest
            else:
                step /= 2
        found.append(point)
    return sorted(found, key=look)
