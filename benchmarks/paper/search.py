"""The paper's two-level search: block sizes are enumerated, and for each a linear program finds the nine fractions.

The program's rows are not written down a second time: price and memory are affine in the fractions, so their
coefficients are read off by pricing no placement at all and then each fraction alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from flexgen.errors import EngineError
from flexgen.options import TIERS
from flexgen.plan.policy import Fractions

from .case import PaperCase, PaperPolicy, PaperVariant
from .memory import held_bytes
from .price import decode_seconds, overlapped, prefill_seconds, throughput

Array = npt.NDArray[np.float64]

PLACED = ("weights", "kv", "activations")
NUM_FRACTIONS = len(PLACED) * len(TIERS)
INFEASIBLE = 2  # scipy's status of a program that nothing satisfies
TIE = 1e-6  # the solver's tolerance: closer throughputs are equal, and the smaller block wins


def solve_fractions(case: PaperCase, gpu_batch_size: int, num_gpu_batches: int) -> PaperPolicy | None:
    """The placement that is fastest for this block and fits, or None when none fits.

    Variables: the nine fractions, then Tpre and Tgen in units of their own, so that all coefficients are near 1.
    """
    bare = PaperPolicy(
        gpu_batch_size=gpu_batch_size, num_gpu_batches=num_gpu_batches, weights=Fractions(), kv=Fractions(), activations=Fractions()
    )
    phases = [
        _affine(bare, lambda policy: overlapped(prefill_seconds(case, policy), case.variant.prefill_overlap)),
        _affine(bare, lambda policy: overlapped(decode_seconds(case, policy), case.variant.decode_overlap)),
    ]
    units = [constants.max() for _, constants in phases]
    rows: list[Array] = []
    bounds: list[Array] = []
    for phase, (slopes, constants) in enumerate(phases):
        longest = np.zeros((len(constants), len(phases)))
        longest[:, phase] = -1.0
        rows.append(np.hstack([slopes / units[phase], longest]))
        bounds.append(-constants / units[phase])
    for tier, capacity in case.capacities().items():
        slopes, constants = _affine(bare, lambda policy, tier=tier: held_bytes(case, policy)[tier])
        unit = capacity or slopes.max()
        rows.append(np.hstack([slopes / unit, np.zeros((len(constants), len(phases)))]))
        bounds.append((capacity - constants) / unit)
    price = np.array([0.0] * NUM_FRACTIONS + [units[0], units[1] * (case.workload.output_len - 1)])
    solution = _minimum(price / price.sum(), np.vstack(rows), np.concatenate(bounds), case.variant)
    return None if solution is None else _placed(bare, solution)


def best_policy(case: PaperCase) -> PaperPolicy | None:
    """The fastest policy over the variant's block sizes, or None when nothing fits."""
    best, best_reached = None, 0.0
    for gpu_batch_size in _gpu_batch_sizes(case.variant):
        fits = False
        for policy, reached in _growing_blocks(case, gpu_batch_size):
            fits = True
            if reached > best_reached * (1 + TIE):
                best, best_reached = policy, reached
        if not fits:
            break
    return best


def _gpu_batch_sizes(variant: PaperVariant) -> Iterator[int]:
    yield from variant.small_gpu_batches
    step = variant.gpu_batch_step
    yield from itertools.count(step, step) if step else (2**power for power in itertools.count(2))


def _growing_blocks(case: PaperCase, gpu_batch_size: int) -> Iterator[tuple[PaperPolicy, float]]:
    """(placement, tokens per second) of each number of GPU batches, up to what fits: a larger block needs more of every tier."""
    before = 0.0
    most = case.variant.most_gpu_batches
    for num_gpu_batches in itertools.count(1) if most is None else range(1, most + 1):
        policy = solve_fractions(case, gpu_batch_size, num_gpu_batches)
        if policy is None:
            return
        reached = throughput(case, policy)
        if case.variant.stops_at_first_drop and reached < before * (1 - TIE):
            return
        before = reached
        yield policy, reached


def _affine(bare: PaperPolicy, values: Callable[[PaperPolicy], tuple[float, ...]]) -> tuple[Array, Array]:
    """Slopes (values, fractions) and constants (values,) of a function that is affine in the fractions."""
    constants = np.array(values(bare))
    alone = [dataclasses.replace(bare, **{what: Fractions(**{tier: 1.0})}) for what in PLACED for tier in TIERS]
    slopes = np.array([values(policy) for policy in alone]).T - constants[:, None]
    return slopes, constants


def _minimum(price: Array, rows: Array, bounds: Array, variant: PaperVariant) -> Array | None:
    """The cheapest point with rows @ point <= bounds and shares that add up to 1, or None.  Raises EngineError if HiGHS fails."""
    shares = np.zeros((len(PLACED), len(price)))
    for index in range(len(PLACED)):
        shares[index, index * len(TIERS) : (index + 1) * len(TIERS)] = 1.0
    ranges: list[tuple[float, float | None]] = [(0.0, None)] * len(price)
    if not variant.activations_on_disk:
        ranges[NUM_FRACTIONS - 1] = (0.0, 0.0)
    # scipy ships no types.
    found: Any = linprog(price, A_ub=rows, b_ub=bounds, A_eq=shares, b_eq=np.ones(len(PLACED)), bounds=ranges, method="highs")
    if found.status == INFEASIBLE:
        return None
    if not found.success:
        raise EngineError(f"the linear program of the paper's model was not solved: {found.message}")
    return np.asarray(found.x, dtype=np.float64)


def _placed(bare: PaperPolicy, solution: Array) -> PaperPolicy:
    """The policy of a solution; what the solver's tolerance leaves below 0 or beside 1 is taken off."""
    shares = np.clip(solution[:NUM_FRACTIONS].reshape(len(PLACED), len(TIERS)), 0.0, 1.0)
    shares /= shares.sum(axis=1, keepdims=True)
    placed = {what: Fractions(**dict(zip(TIERS, map(float, row), strict=True))) for what, row in zip(PLACED, shares, strict=True)}
    return dataclasses.replace(bare, **placed)
