"""What the model is given of a micro-batch: token ids, positions, and the rows whose logits are wanted, in host memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from flexgen.passes.arrays import ranges, starts_of
from flexgen.passes.plan import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInputs:
    """The inputs of a micro-batch.

    Attributes:
        token_ids: The token ids, int64 (1, tokens), those of fillers included.
        positions: The positions of the tokens in their sequences, int64 (1, tokens).
        rows: The tokens whose logits are wanted, and behind them those whose logits are only scored, int64 (rows,).
        targets: The known tokens whose log probabilities are wanted, int64 (targets,).
        places: The place of each target's row among those that are only scored, int64 (targets,).
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor


def batch_inputs(batch: MicroBatch) -> tuple[BatchInputs, list[int]]:
    """Return the inputs of a micro-batch; and its `places` as Python's numbers, which the host needs."""
    slices = batch.slices
    starts, lengths = starts_of(slices), _integers(each.length for each in slices)
    first_rows = np.cumsum(lengths) - lengths - starts  # the row of each slice's position 0, as if it were there
    token_ids, positions = _integers(itertools.chain.from_iterable(each.token_ids for each in slices)), ranges(starts, lengths)
    wanted = ranges(first_rows + _integers(each.wanted.start for each in slices), _integers(len(each.wanted) for each in slices))
    scored = _integers(itertools.chain.from_iterable(each.scored for each in slices))
    scored += np.repeat(first_rows, _integers(len(each.scored) for each in slices))
    rows, places = np.unique(scored, return_inverse=True)  # several targets may be alternatives at one position
    inputs = BatchInputs(
        token_ids=torch.from_numpy(_filled(token_ids, batch.filler)),
        positions=torch.from_numpy(_filled(positions, batch.filler)),
        rows=torch.from_numpy(np.concatenate([wanted, rows])),
        targets=torch.from_numpy(_integers(itertools.chain.from_iterable(each.targets for each in slices))),
        places=torch.from_numpy(places.astype(np.int64)),
    )
    return inputs, places.tolist()


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _filled(values: np.ndarray, count: int) -> np.ndarray:
    """Return (tokens,) numbers as (1, tokens + count), the last one repeated."""
    return np.concatenate([values, np.repeat(values[-1:], count)])[None]
