"""T*: a lower bound on the ideal time of a job within budgets, which no policy and no engine can beat, and by which both are measured.

The ideal time of a job is the sum over its passes of the busiest resource's time. The bound is a linear program over totals. Each pass
reads the weights that are not at home where they compute, so with A passes and shares w of the weights the products A·w are the variables.
Memory bounds A from below: over all passes together, weights and the KV of every request, pass by pass of its life, must fit.

A request enters at least as many passes before the end as its answer has tokens. So two kinds of passes are distinguished: a tail of K
passes, in which no prompt of an answer with more than K tokens is computed, and the passes before it. Each of the two takes at least as
long as its own work on each resource, and both together as long as all work on it. Every K gives a bound; the largest counts.

Many different requests are put together for the program. Its dual values then price each request alone, which is a bound again (weak
duality), and exact where few were put together.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen.options import TIERS, WEIGHT_HOMES
from flexgen.plan.machine import Limits, Machine, has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.requests import Floats, RequestLoad
from flexgen.plan.price.weights import can_stay_encoded, memory_bytes, weights_work
from flexgen.plan.price.work import PassWork, attended_bytes, ideal_seconds, price
from flexgen.plan.search.steady import Minimum, minimum
from flexgen.plan.workload import Workload

# The most kinds into which requests of different lengths are put together.
KINDS = 64
# The lengths of the tail that are tried: the quantiles of answer lengths at these shares.
TAILS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# The solver's tolerance: the bound is lowered by this share.
TOLERANCE = 5e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The bytes that weights and KV may take, per tier; what the process itself needs is already subtracted.

    Attributes:
        device: "cpu" (without a device tier), "cuda" or "sim".
        host_bytes: The bytes of host memory.
        device_bytes: The bytes of device memory.
        disk_bytes: The bytes for KV on disk; 0 forbids KV on disk.
    """

    device: str
    host_bytes: int
    device_bytes: int = 0
    disk_bytes: int = 0


def budgets_of(limits: Limits, spec: ModelSpec, process_bytes: int) -> Budgets:
    """Return the budgets for T*: everything but the process itself and the tensors that never move."""
    on_cpu = not has_device_tier(limits.device)
    return Budgets(
        device=limits.device,
        host_bytes=max(limits.host_bytes - process_bytes - (spec.resident_bytes if on_cpu else 0), 0),
        device_bytes=0 if on_cpu else max(limits.device_bytes - limits.device_overhead_bytes - spec.resident_bytes, 0),
        disk_bytes=0 if limits.offload_in_memory else limits.disk_bytes,
    )


def least_ideal_seconds(spec: ModelSpec, machine: Machine, workload: Workload, budgets: Budgets, dtype: str) -> float:
    """Return T*: no policy that keeps within `budgets` and serves all requests has a smaller sum of its passes' ideal times.

    Overheads, pages, staging and activations are left out, and so are the rows of an embedding that is not in memory.

    Raises:
        OptionError: The machine was not measured in `dtype`.
    """
    if not len(workload):
        return 0.0
    program = _Program(spec, machine, workload, budgets, dtype)
    tails = {int(np.quantile(program.output_lens, share)) - 1 for share in TAILS}
    return max(program.bound(tail) for tail in tails) * (1 - TOLERANCE)


class _Program:
    """The coefficients of the program: seconds by resource and bytes by tier, of kinds of units and of requests, by home.

    Attributes:
        output_lens: The tokens of all answers.
    """

    def __init__(self, spec: ModelSpec, machine: Machine, workload: Workload, budgets: Budgets, dtype: str) -> None:
        # Under sparse attention the heads that share a key head may all keep the same positions.
        groups = tuple(dataclasses.replace(group, queries_per_key=1) for group in spec.kv_groups)
        self._spec = dataclasses.replace(spec, kv_groups=groups)
        self._machine, self._policy = machine, _bare_policy(budgets.device, dtype)
        self._tiers = TIERS if has_device_tier(budgets.device) else ("host", "disk")
        encoded = any(can_stay_encoded(unit) for unit in spec.units)
        self._homes = tuple(home for home in WEIGHT_HOMES if home in self._tiers or (home == "encoded" and encoded))
        self._room = np.array([getattr(budgets, f"{tier}_bytes") for tier in self._tiers], dtype=np.float64)
        self.output_lens = np.array(workload.answer_lens)
        self._take_units()
        self._take_requests(workload)

    def _take_units(self) -> None:
        """Set the arrays of (resources or tiers, kinds of units, homes); weights on disk take no room there."""
        kinds = Counter(dataclasses.replace(unit, name="") for unit in self._spec.units)
        alone = [dataclasses.replace(self._spec, units=(unit,)) for unit in kinds]
        homes = [
            [
                self._seconds(weights_work(spec, (home,), self._policy.device), 1) * number
                for spec, number in zip(alone, kinds.values(), strict=True)
            ]
            for home in self._homes
        ]
        self._unit_seconds = np.moveaxis(np.array(homes)[..., 0], -1, 0).swapaxes(1, 2)
        self._unit_bytes = np.zeros((len(self._tiers), len(kinds), len(self._homes)))
        for place, home in enumerate(self._homes):
            if home != "disk":
                held = [memory_bytes(unit, home, self._policy.device) * number for unit, number in kinds.items()]
                self._unit_bytes[self._tiers.index(WEIGHT_HOMES[home]), :, place] = held

    def _take_requests(self, workload: Workload) -> None:
        """Set the arrays of (resources or tiers, different requests, homes)."""
        columns = [workload.answer_lens, workload.sampled_lens, workload.prompt_lens, workload.found_lens]
        columns.append(workload.scored_lens or (0,) * len(workload))
        (self._outputs, sampled, prompts, found, scored), self._counts = np.unique(np.array(columns), axis=1, return_counts=True)
        own = prompts - found

        def load_of(lengths: Any, outputs: Any, shared: Any) -> RequestLoad:
            job = Workload(prompt_lens=tuple(lengths), output_lens=tuple(outputs), shared_lens=tuple(shared), scored_lens=tuple(scored))
            return RequestLoad.of(self._spec, job)

        first = np.minimum(sampled, 1)  # what the pass that computes the prompt samples
        load, own_load = load_of(prompts, sampled, found), load_of(own, sampled, 0 * found)
        prompt, own_prompt = load_of(prompts, first, found), load_of(own, first, 0 * found)
        self._life_seconds, self._prompt_seconds = (
            np.stack([self._request_seconds(*each, tier) for tier in self._tiers], axis=-1)
            for each in ((load, own_load), (prompt, own_prompt))
        )
        groups = self._spec.kv_groups
        at_first = [np.minimum(own, group.window or np.inf) for group in groups]
        held = attended_bytes(groups, [first + seen for first, seen in zip(at_first, own_load.attended_tokens, strict=True)])
        held = np.broadcast_to(np.asarray(held, dtype=np.float64), own.shape)
        growth = np.array([self._spec.disk_kv_growth if tier == "disk" else 1.0 for tier in self._tiers])
        self._held_bytes = np.diag(growth)[:, None, :] * held[:, None]

    def _request_seconds(self, load: RequestLoad, own: RequestLoad, home: str) -> Floats:
        """Return the seconds by resource and request; what several requests have in common may be brought once for all of them.

        Where next tokens see KV in host memory, each resource has the seconds of the place of attention that takes less of it.
        """
        shared = [np.maximum(seen - least, 0) for seen, least in zip(load.attended_tokens, own.attended_tokens, strict=True)]
        brought = dataclasses.replace(load.at(home), repeated_tokens={home: shared} if home != "device" else {})
        places = [dataclasses.replace(self._policy, host_attention=each) for each in (True, False)]
        on_host, on_device = (self._seconds(price(brought, self._spec, each, PassWork()), len(self._outputs)) for each in places)
        return np.minimum(on_host, on_device)

    def _seconds(self, work: PassWork, number: int) -> Floats:
        """Return the ideal seconds of so many passes, by resource and pass."""
        seconds = ideal_seconds(work, self._machine, self._policy.dtype).values()
        return np.stack([np.broadcast_to(np.asarray(each, dtype=np.float64), (number,)) for each in seconds])

    def bound(self, tail: int) -> float:
        """Return the bound that follows from separating the last `tail` passes."""
        in_head = self._prompt_seconds * (self._outputs > tail)[:, None]
        parts = (self._life_seconds, in_head, self._held_bytes)
        counts = self._counts[:, None]
        firsts = np.unique(np.linspace(0, len(counts), KINDS, endpoint=False).astype(np.int64))
        found = self._solved(tail, *(np.add.reduceat(part * counts, firsts, axis=1) for part in parts))
        if found is None:
            return math.inf
        prices, paid = -found.worth[: sum(map(len, parts))], float(found.equal_worth[2 * self._unit_bytes.shape[1] :].sum())
        each = np.tensordot(prices, np.concatenate(parts), axes=1)
        return found.value - paid + float((each.min(axis=1) * self._counts).sum())

    def _solved(self, tail: int, life: Floats, prompts: Floats, held: Floats) -> Minimum | None:
        """Solve the linear program; requests are in the first rows, and in the last equations.

        The variables are the seconds before the tail and in it; the number of passes before it; for each kind of unit and each home, the
        passes before the tail and in it in which its units are at home there; and for each kind of request and each home, its share.
        """
        num_units, num_kinds = self._unit_seconds.shape[1], life.shape[1]
        homes, tiers = len(self._homes), len(self._tiers)
        seconds, size, life, prompts, held = (
            part.reshape(len(part), -1) for part in (self._unit_seconds, self._unit_bytes, life, prompts, held)
        )
        units, kinds = (
            np.kron(np.eye(number), np.ones(places)).astype(np.float64) for number, places in ((num_units, homes), (num_kinds, tiers))
        )

        def rows(fixed: Sequence[Any], before: Floats, within: Floats, requests: Floats) -> Floats:
            return np.hstack([*(np.broadcast_to(each, (len(before), 1)) for each in fixed), before, within, requests])

        no_homes = np.zeros((num_kinds, units.shape[1]))
        no_units, no_bytes, room = 0 * seconds, 0 * size, -self._room[:, None]
        at_most: list[tuple[Floats, Floats]] = [
            (rows((-1, -1, 0), seconds, seconds, life), 0 * seconds[:, 0]),
            (rows((-1, 0, 0), seconds, no_units, prompts), 0 * seconds[:, 0]),
            (rows((0, 0, room), size, size, held), tail * self._room),
            (rows((0, -1, 0), no_units, seconds, 0 * life), 0 * seconds[:, 0]),
            (rows((0, 0, room), size, no_bytes, 0 * held), 0 * self._room),
            (rows((0, 0, 0), no_bytes, size, 0 * held), tail * self._room),
        ]
        equal: list[tuple[Floats, Floats]] = [
            (rows((0, 0, -1), units, 0 * units, np.zeros((num_units, kinds.shape[1]))), np.zeros(num_units)),
            (rows((0, 0, 0), 0 * units, units, np.zeros((num_units, kinds.shape[1]))), np.full(num_units, tail)),
            (rows((0, 0, 0), no_homes, no_homes, kinds), np.ones(num_kinds)),
        ]
        (matrix, limits), (equations, values) = _joined(at_most), _joined(equal)
        goal = np.zeros(matrix.shape[1])
        goal[:2] = 1.0
        bounds = [(0.0, None), (0.0, None), (float(self._outputs.max() - tail), None)] + [(0.0, None)] * (len(goal) - 3)
        return minimum(goal, matrix, limits, equations, values, bounds)


def _joined(blocks: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Return the rows of all blocks, and their right-hand sides."""
    return np.concatenate([rows for rows, _ in blocks]), np.concatenate([sides for _, sides in blocks])


def _bare_policy(device: str, dtype: str) -> Policy:
    """Return a policy to price work with; the load says where KV lives."""
    return Policy(
        device=device, dtype=dtype, weights=Fractions(disk=1.0), kv=Fractions(host=1.0), embedding_resident=True, schedule="diagonal",
        max_num_seqs=1, prefill_tokens=1, micro_batch_tokens=1, page_tokens=1, compute_threads=1, io_threads=1,
    )  # fmt: skip
