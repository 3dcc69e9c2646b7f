"""What the model is given of a micro-batch, against a loop over its tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flexgen.engine.inputs import batch_inputs
from flexgen.passes.arrays import ranges
from flexgen.passes.plan import MicroBatch, Slice


def any_slice(chance: random.Random) -> Slice:
    start, length = chance.choice([0, 0, 3, 40]), chance.choice([1, 1, 2, 9])
    stop, kind = start + length, chance.randrange(3)
    scored = sorted(chance.choices(range(start, stop), k=chance.randint(1, 4))) if kind == 1 else []
    return Slice(
        sequence=0, token_ids=tuple(chance.choices(range(99), k=length)), start=start, prompt_len=stop, total=stop,
        wanted=range(chance.randint(start, stop) if kind == 2 else stop, stop), scored=tuple(scored),
        targets=tuple(chance.choices(range(99), k=len(scored))),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_like_a_loop_over_tokens(seed: int) -> None:
    chance = random.Random(seed)
    batch = MicroBatch(home="host", slices=tuple(any_slice(chance) for _ in range(chance.randint(1, 5))), filler=chance.randrange(2))
    ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    scored: list[int] = []
    places: list[int] = []
    for each in batch.slices:
        for position, token in zip(range(each.start, each.stop), each.token_ids, strict=True):
            if position in each.wanted:
                wanted.append(len(ids))
            if position in each.scored:
                places += [len(scored)] * each.scored.count(position)
                scored.append(len(ids))
            ids.append(token)
            positions.append(position)
    inputs, found = batch_inputs(batch)
    assert inputs.token_ids.tolist() == [ids + ids[-1:] * batch.filler]
    assert inputs.positions.tolist() == [positions + positions[-1:] * batch.filler]
    assert inputs.rows.tolist() == wanted + scored
    assert inputs.targets.tolist() == [target for each in batch.slices for target in each.targets]
    assert found == inputs.places.tolist() == places


def test_ranges() -> None:
    assert ranges(np.array([5, 0, -2]), np.array([3, 0, 2])).tolist() == [5, 6, 7, -2, -1]
