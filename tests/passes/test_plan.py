"""A plan of a pass is a plain value: it can be sent elsewhere, and says which rows of logits are whose."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from flexgen.passes.plan import MicroBatch, PassPlan, Slice

PROMPT = Slice(
    sequence=4, token_ids=(11, 12, 13), start=0, prompt_len=5, total=5, wanted=range(1, 3), tables=((7, 3), (-1, 0))
)  # fmt: skip
NEXT = Slice(sequence=2, token_ids=(9,), start=6, prompt_len=3, total=7, wanted=range(6, 7), tables=((1,), (2,)))
CHUNK = Slice(sequence=4, token_ids=(14, 15), start=3, prompt_len=5, total=5, wanted=range(5, 5), tables=((7, 3), (-1, 0)))
PLAN = PassPlan(
    micro_batches=(
        MicroBatch(home="disk", slices=(NEXT, PROMPT), filler=1),
        MicroBatch(home="host", slices=(CHUNK,), after=(0,)),
    )
)


def test_a_plan_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN
    assert hash(PLAN) == hash(pickle.loads(pickle.dumps(PLAN))), "nothing in it can change"


def test_every_part_of_a_plan_counts() -> None:
    other = dataclasses.replace(PROMPT, tables=((7, 3), (-1, 1)))
    assert dataclasses.replace(PLAN, micro_batches=(MicroBatch(home="disk", slices=(NEXT, other), filler=1),)) != PLAN


def test_whose_rows_are_whose() -> None:
    assert [list(batch.wanted) for batch in PLAN.micro_batches] == [[(2, 6), (4, 1), (4, 2)], []]


@pytest.mark.parametrize(("each", "length", "stop", "is_decode"), [(PROMPT, 3, 3, False), (NEXT, 1, 7, True), (CHUNK, 2, 5, False)])
def test_slices(each: Slice, length: int, stop: int, is_decode: bool) -> None:
    assert (each.length, each.stop, each.is_decode) == (length, stop, is_decode)


def test_a_prompt_of_one_token_is_no_next_token() -> None:
    assert not Slice(sequence=0, token_ids=(3,), start=0, prompt_len=1, total=1).is_decode
