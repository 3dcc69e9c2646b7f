"""Schedules and packing: golden lists, and what every packing must keep."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.engine import admission
from flexgen.engine.admission import fits_projected
from flexgen.engine.packing import defer_remainder, pack
from flexgen.engine.schedule import SCHEDULES, Quota
from flexgen.engine.sequence import LiveSequence
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest

POLICY = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=1.0), kv=Fractions(host=1.0), kv_device_bytes=0, kv_host_bytes=64,
    kv_disk_bytes=0, host_ring_bytes=0, device_ring_bytes=0, workspace_bytes=0, embedding_resident=True, schedule="diagonal",
    max_num_seqs=1, prefill_tokens=1, micro_batch_tokens=32, page_tokens=1, compute_threads=1, io_threads=1,
)  # fmt: skip


def sequence(index: int, prompt: int, *, stored: int = 0, generated: int = 0, max_tokens: int = 10) -> LiveSequence:
    request = TokenRequest(index=index, prompt_token_ids=tuple(range(prompt)), max_tokens=max_tokens)
    made = LiveSequence(request, max_tokens)
    for token in range(generated):
        made.append(token)
    made.num_stored = stored
    return made


def play(name: str, prompts: list[int], answers: list[int], *, max_num_seqs: int, quota: int, room: int = 10**6) -> list[list[int]]:
    """Which requests each pass admits, when request i takes answers[i] passes; `room` live at most by KV."""
    waiting = [sequence(index, prompt) for index, prompt in enumerate(prompts)]
    live: dict[int, int] = {}
    credit, passes = Quota(quota), []
    policy = dataclasses.replace(POLICY, max_num_seqs=max_num_seqs)
    while waiting or live:
        entered: list[int] = []

        def admit(candidate: LiveSequence, entered: list[int] = entered, num_live: int = len(live)) -> bool:
            if num_live + len(entered) >= room:
                return False
            entered.append(candidate.request.index)
            return True

        count = SCHEDULES[name](waiting, len(live), policy, credit, admit)
        assert count == len(entered)
        del waiting[:count]
        passes.append(entered)
        live = {index: left - 1 for index, left in (live | {i: answers[i] for i in entered}).items() if left > 1}
        assert len(passes) < 100
    return passes


PROMPTS, ANSWERS = [20, 20, 10, 40, 10, 10, 10], [3, 2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("name", "options", "admitted"),
    [
        # As many prompts as the quota lets in (it may be overdrawn by the last one, and pays back), joining as others finish.
        ("diagonal", {"max_num_seqs": 4, "quota": 40}, [[0, 1], [2, 3], [4, 5], [6]]),
        ("diagonal", {"max_num_seqs": 2, "quota": 1000}, [[0, 1], [], [2], [3, 4], [5], [6]]),
        ("diagonal", {"max_num_seqs": 9, "quota": 1000, "room": 3}, [[0, 1, 2], [3], [4], [5, 6], []]),
        ("diagonal", {"max_num_seqs": 9, "quota": 10}, [[0], [], [1], [], [2], [3], [], [], [], [4], [5], [6]]),
        # Only into an empty block, whatever the quota.
        ("zigzag", {"max_num_seqs": 4, "quota": 1}, [[0, 1, 2, 3], [], [], [4, 5, 6], []]),
        ("zigzag", {"max_num_seqs": 9, "quota": 1, "room": 3}, [[0, 1, 2], [], [], [3, 4, 5], [], [6]]),
        # One micro-batch of 32 tokens at a time; a longer prompt alone.
        ("row", {"max_num_seqs": 9, "quota": 1}, [[0], [], [], [1, 2], [], [3], [], [4, 5, 6], []]),
        ("row", {"max_num_seqs": 2, "quota": 1}, [[0], [], [], [1, 2], [], [3], [], [4, 5], [], [6]]),
    ],
)
def test_who_is_admitted_when(name: str, options: dict[str, int], admitted: list[list[int]]) -> None:
    assert play(name, PROMPTS, ANSWERS, **options) == admitted


def packed(
    sequences: list[LiveSequence], micro_batch_tokens: int, *, mix: bool, chunk: bool = True
) -> list[list[tuple[int, int, int, bool]]]:
    batches = pack(sequences, micro_batch_tokens, mix=mix, chunk=chunk)
    return [[(s.sequence, s.start, s.length, bool(s.wanted)) for s in batch] for batch in batches]


STEP = [sequence(index, 4, stored=5, generated=2) for index in range(3)]


def test_pack_mixed() -> None:
    """Next tokens first; micro-batches are filled to the last row, whatever prompt that cuts."""
    assert packed([*STEP, sequence(3, 4), sequence(4, 19), sequence(5, 3)], 8, mix=True) == [
        [(0, 5, 1, True), (1, 5, 1, True), (2, 5, 1, True), (3, 0, 4, True), (4, 0, 1, False)],
        [(4, 1, 8, False)],
        [(4, 9, 8, False)],
        [(4, 17, 2, True), (5, 0, 3, True)],
    ]


def test_a_small_remainder_is_left_to_the_next_pass() -> None:
    """3 next tokens and 4 + 3 of prompts are 10 rows: 2 beyond a micro-batch of 8, taken from the youngest prompt."""
    sequences = [*STEP, sequence(3, 4), sequence(4, 3)]
    defer_remainder(sequences, 8)
    assert packed(sequences, 8, mix=True) == [[(0, 5, 1, True), (1, 5, 1, True), (2, 5, 1, True), (3, 0, 4, True), (4, 0, 1, False)]]


@pytest.mark.parametrize("prompts", [(4,), (4, 4), (4, 9)])
def test_what_is_not_deferred(prompts: tuple[int, ...]) -> None:
    """Less than a micro-batch, a whole one, or a large remainder: 7, 11 and 16 rows of 8."""
    sequences = [*STEP, *(sequence(3 + index, length) for index, length in enumerate(prompts))]
    defer_remainder(sequences, 8)
    deferred = sum(each.deferred for each in sequences)
    assert deferred == {7: 0, 11: 3, 16: 0}[3 + sum(prompts)]


def test_pack_unmixed() -> None:
    assert packed([sequence(3, 4), *STEP, sequence(4, 2)], 2, mix=False) == [
        [(0, 5, 1, True), (1, 5, 1, True)],
        [(2, 5, 1, True)],
        [(3, 0, 2, False)],
        [(3, 2, 2, True)],
        [(4, 0, 2, True)],
    ]


def test_pack_whole_prompts() -> None:
    """Where a prompt cannot be cut a long one is a micro-batch of its own."""
    assert packed([*STEP[:1], sequence(3, 4), sequence(4, 30), sequence(5, 3), sequence(6, 3)], 8, mix=False, chunk=False) == [
        [(0, 5, 1, True)],
        [(3, 0, 4, True)],
        [(4, 0, 30, True)],
        [(5, 0, 3, True), (6, 0, 3, True)],
    ]


def test_a_last_chunk_of_one_token_keeps_apart_from_prompts() -> None:
    """It is computed as a next token: where those do not mix with prompts, it must not either."""
    sequences = [sequence(0, 9), sequence(1, 3)]
    assert packed(sequences, 8, mix=False) == [[(0, 0, 8, False)], [(0, 8, 1, True)], [(1, 0, 3, True)]]
    assert packed(sequences, 8, mix=True) == [[(0, 0, 8, False)], [(0, 8, 1, True), (1, 0, 3, True)]]


def test_a_preempted_sequence_is_a_prompt() -> None:
    assert packed([sequence(0, 3, generated=4)], 8, mix=False) == [[(0, 0, 7, True)]]


def test_next_tokens_that_see_much_share_a_micro_batch_with_few() -> None:
    """A quarter of a micro-batch for each position: five fit by their number, but not by what they see; one of them alone always."""
    steps = [sequence(index, stored, stored=stored, generated=1) for index, stored in enumerate((1, 2, 1, 1, 1, 1, 7, 1))]
    batches = pack(steps, 5, mix=False, share=lambda position: position / 4)
    assert [[each.start for each in batch] for batch in batches] == [[1, 2, 1], [1, 1, 1], [7], [1]]
    assert [len(batch) for batch in pack(steps, 5, mix=False)] == [5, 3]


@given(st.lists(st.one_of(st.just("step"), st.integers(1, 50)), max_size=15), st.integers(1, 20), st.booleans(), st.booleans())
def test_pack_keeps_its_promises(kinds: list[str | int], micro_batch_tokens: int, mix: bool, chunk: bool) -> None:
    """Every new token exactly once, never padded; chunks in consecutive micro-batches; the limit held; kinds apart unless mixed."""
    sequences = [
        sequence(i, 3, stored=3 + i, generated=i + 1) if kind == "step" else sequence(i, int(kind)) for i, kind in enumerate(kinds)
    ]
    batches = pack(sequences, micro_batch_tokens, mix=mix, chunk=chunk)
    for each in sequences:
        own = [(number, s) for number, batch in enumerate(batches) for s in batch if s.sequence == each.id]
        assert [s.start for _, s in own] == [each.num_stored, *(s.start + s.length for _, s in own[:-1])]
        assert sum(s.length for _, s in own) == each.num_new
        assert [bool(s.wanted) for _, s in own] == [False] * (len(own) - 1) + [True]
        assert all(after == before + 1 for (before, _), (after, _) in pairwise(own))
        assert chunk or len(own) == 1
    for batch in batches:
        assert batch
        assert all(s.length > 0 for s in batch)
        assert sum(s.length for s in batch) <= micro_batch_tokens or (len(batch) == 1 and not chunk)
        assert mix or len({s.length == 1 and s.start > 0 for s in batch}) == 1


def brute_force(stored: list[int], remaining: list[int], elsewhere: list[int], page_tokens: int, capacity: int) -> bool:
    """Every future pass, one by one."""
    for t in range(max(remaining) + 1):
        pages = [-(-(have + t) // page_tokens) - n for have, left, n in zip(stored, remaining, elsewhere, strict=True) if t <= left]
        if sum(pages) > capacity:
            return False
    return True


sequences_strategy = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=12)


@given(sequences_strategy, st.integers(1, 80), st.booleans())
def test_projection_is_exact(sequences: list[tuple[int, int]], capacity: int, shares: bool) -> None:
    stored, remaining = [s for s, _ in sequences], [r for _, r in sequences]
    elsewhere = [s // 16 // 2 * shares for s in stored]
    fits = fits_projected(
        np.array(stored[:-1], dtype=np.int64), np.array(remaining[:-1], dtype=np.int64), (stored[-1], remaining[-1]),
        [lambda lengths: -(-lengths // 16)], [capacity], [np.array(elsewhere)],
    )  # fmt: skip
    assert fits == brute_force(stored, remaining, elsewhere, 16, capacity)


@given(sequences_strategy, st.integers(1, 80))
def test_projection_at_few_times_is_careful(sequences: list[tuple[int, int]], capacity: int) -> None:
    """With many different ends only some are looked at; what is let in still fits."""
    stored, remaining = [s for s, _ in sequences], [r for _, r in sequences]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "MAX_PROJECTED_TIMES", 3)
        fits = fits_projected(
            np.array(stored[1:], dtype=np.int64), np.array(remaining[1:], dtype=np.int64), (stored[0], remaining[0]),
            [lambda lengths: -(-lengths // 16)], [capacity], [0],
        )  # fmt: skip
    assert not fits or brute_force(stored, remaining, [0] * len(stored), 16, capacity)
