"""Which sequences enter in which pass, and where their KV lives: the loop over the passes of a job, compiled.

The rules are those of engine/schedule.py and engine/admission.py. A search plays them thousands of times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen.base.compiled import entry
from flexgen.plan.play.rules import DIAGONAL, ROW, Needs, Pools, Rules

# Equal sequences that enter together are given homes in about this many steps. Fewer than twice as many sequences are given homes one
# by one, as the engine does.
HOME_STEPS = 64
# In place of a pass: no pass can admit more before a sequence ends.
_NEVER = -1
# The rows of groups while playing: those of `Admissions`, and one more than the index of the previous group that ends in the same pass.
_PASS, _RUN, _POOL, _COUNT, _BEFORE = range(5)


@entry
def admit(queue: Any, needs: Needs, pools: Pools, rules: Rules) -> Any:
    """Play a queue to its end.

    Args:
        queue: int64 columns (prompt_len, output_len, reserved_len, found_len, count) of runs that all fit.
        needs: The bytes of KV by number of tokens.
        pools: The tiers that have KV.
        rules: The rules of the policy.

    Returns:
        (groups, used), both int64: the rows of `Admissions`; the bytes used, of shape (pools, passes).
    """
    prompts, outputs, reserved_lens, founds, counts = queue
    groups, num_groups = np.zeros((5, 256), dtype=np.int64), 0
    used = np.zeros((len(pools.capacity), 256), dtype=np.int64)
    ending = np.zeros((1, 256), dtype=np.int64)  # by pass: one more than the index of the last group that ends just before it
    given = np.zeros(len(pools.capacity), dtype=np.int64)  # tokens, by pool
    index = live = credit = last_end = run = ended = 0
    refilled, left = -1, counts[0] if len(counts) else 0
    needed, needed_of = np.empty((0, 0), dtype=np.int64), -1  # the bytes that a sequence of a run needs, and that run
    while run < len(counts):
        while ended <= min(index, last_end):
            live -= _leave(used, groups, ending[0, ended], ended, queue, needs, pools)
            ended += 1
        later = _NEVER  # the next pass that could admit more
        if rules.schedule == DIAGONAL or live == 0:
            credit, refilled, taken = _refilled(rules, credit, index - refilled, live), index, 0
            while run < len(counts):
                own, end = prompts[run] - founds[run], index + outputs[run]
                wanted = min(left, rules.max_num_seqs - live)
                if wanted <= 0:
                    break
                wanted = min(wanted, _within_quota(rules, own, credit, taken))
                if wanted <= 0:
                    later = index + 1 + max(-credit, 0) // rules.prefill_tokens
                    break
                if run != needed_of:
                    needed, needed_of = _needed(needs, pools, prompts[run], reserved_lens[run], founds[run]), run
                used, ending = _longer(used, index + reserved_lens[run]), _longer(ending, end + 1)
                room = _room(used, pools, index, needed, wanted)
                entering = _homes(room, pools.share, given, own + reserved_lens[run] - 1, wanted)
                entered = _sum(entering)
                if entered == 0:
                    # Room that was kept for more falls free with the next answer that ends.
                    if live == 0 or not rules.frees_early:
                        later = _earliest(used, pools, index, needed)
                    break
                groups, num_groups = _enter(used, groups, num_groups, ending, index, run, end, needed, entering)
                last_end = max(last_end, end)
                live += entered
                credit -= entered * own
                taken += entered * own
                left -= entered
                if left == 0:
                    run += 1
                    left = counts[run] if run < len(counts) else 0
        if run == len(counts):
            break
        if later == _NEVER or rules.schedule != DIAGONAL:
            # Where a sequence must end first, for its slot or its room, or the block is closed, nothing changes before one ends.
            assert live > 0, "a request that fits was not admitted to empty pools"
            index = ended
            while ending[0, index] == 0:
                index += 1
        else:
            index = min(later, last_end)  # every pass has a sequence
    return groups[:_BEFORE, :num_groups], _longer(used, last_end)[:, :last_end]


@njit
def _leave(used: Any, groups: Any, last: int, end: int, queue: Any, needs: Needs, pools: Pools) -> int:
    """Return how many sequences end before pass `end`, and free the room that was kept for more tokens than they had.

    Args:
        used: The bytes used, by pool and pass; updated.
        groups: The groups that have entered.
        last: One more than the index of the last group that ends there.
        end: The first pass without these groups.
        queue: The runs, as in `admit`.
        needs: The bytes of KV by number of tokens.
        pools: The tiers that have KV.
    """
    prompts, outputs, reserved_lens, founds, _ = queue
    left = 0
    while last > 0:
        run, pool, count = groups[_RUN, last - 1], groups[_POOL, last - 1], groups[_COUNT, last - 1]
        left += count
        if reserved_lens[run] > outputs[run]:
            kept = _needed(needs, pools, prompts[run], reserved_lens[run], founds[run])
            _add(used, kept, pool, end, outputs[run], -count)
        last = groups[_BEFORE, last - 1]
    return left


@njit
def _enter(used: Any, groups: Any, number: int, ending: Any, index: int, run: int, end: int, needed: Any, entering: Any) -> Any:
    """Add a group for each pool that sequences of the run enter in pass `index`; return the groups and their number."""
    for pool in range(len(entering)):
        if entering[pool] > 0:
            _add(used, needed, pool, index, 0, entering[pool])
            groups = _longer(groups, number + 1)
            groups[_PASS, number], groups[_RUN, number] = index, run
            groups[_POOL, number], groups[_COUNT, number] = pool, entering[pool]
            groups[_BEFORE, number] = ending[0, end]
            number += 1
            ending[0, end] = number
    return groups, number


@njit
def _refilled(rules: Rules, credit: int, num_passes: int, live: int) -> int:
    """Return the prompt tokens to admit after so many passes: each adds its quota, and an empty block never waits for credit."""
    quota = rules.prefill_tokens
    credit = min(credit + quota * num_passes, quota)
    return credit + quota * (1 + -credit // quota) if live == 0 and credit <= 0 else credit


@njit
def _needed(needs: Needs, pools: Pools, prompt_len: int, reserved_len: int, found_len: int) -> Any:
    """Return the bytes of a sequence's own pages, by pool and pass of its life (its last token gets no KV)."""
    needed = np.empty((len(pools.whole), reserved_len), dtype=np.int64)
    for pool in range(len(pools.whole)):
        for age in range(reserved_len):
            tokens = prompt_len + (reserved_len - 1 if pools.whole[pool] else age)
            needed[pool, age] = needs.held[tokens] - needs.shared[found_len]
    return needed


@njit
def _within_quota(rules: Rules, own_len: int, credit: int, taken: int) -> int:
    """Return how many such prompts the pass still admits; the last may overdraw, at the cost of the next passes."""
    if rules.schedule == DIAGONAL:
        return -(-max(credit, 0) // own_len)
    if rules.schedule == ROW:
        return max((rules.micro_batch_tokens - taken) // own_len, 1 if taken == 0 else 0)
    return rules.max_num_seqs


@njit
def _longer(numbers: Any, size: int) -> Any:
    """Return the array with room for at least `size` columns; new columns are 0."""
    if size <= numbers.shape[1]:
        return numbers
    longer = np.zeros((numbers.shape[0], max(size, 2 * numbers.shape[1])), dtype=np.int64)
    for row in range(numbers.shape[0]):
        for column in range(numbers.shape[1]):
            longer[row, column] = numbers[row, column]
    return longer


@njit
def _sum(numbers: Any) -> int:
    total = 0
    for number in numbers:
        total += number
    return total


@njit
def _add(used: Any, needed: Any, pool: int, index: int, age: int, count: int) -> None:
    """Add the bytes of `count` sequences, which have this age in pass `index`, to those used from that pass on."""
    for later in range(needed.shape[1] - age):
        used[pool, index + later] += needed[pool, age + later] * count


@njit
def _room(used: Any, pools: Pools, index: int, needed: Any, wanted: int) -> Any:
    """Return, by pool, how many of `wanted` sequences fit in all the passes from `index` on; at most 0 where none does."""
    room = np.empty(len(pools.capacity), dtype=np.int64)
    for pool in range(len(room)):
        fits = wanted
        for age in range(needed.shape[1]):
            left = pools.capacity[pool] - used[pool, index + age]
            if needed[pool, age] * fits > left:
                fits = left // needed[pool, age]
                if fits <= 0:
                    break
        room[pool] = fits
    return room


@njit
def _earliest(used: Any, pools: Pools, index: int, needed: Any) -> int:
    """Return a pass after `index` before which such a sequence cannot enter, given that it cannot enter at `index`.

    Where a pass leaves too little room for the age that the sequence would have, the sequence must be younger by then: young enough for the
    room.
    """
    first = _NEVER
    for pool in range(len(pools.capacity)):
        earliest = index + 1
        for age in range(needed.shape[1]):
            room = pools.capacity[pool] - used[pool, index + age]
            if room < needed[pool, age]:
                younger = age
                while younger >= 0 and needed[pool, younger] > room:
                    younger -= 1
                earliest = max(earliest, index + age - younger)
        first = earliest if first == _NEVER else min(first, earliest)
    return first


@njit
def _homes(room: Any, share: Any, given: Any, tokens: int, wanted: int) -> Any:
    """Return, by pool, how many of `wanted` equal sequences with so many tokens enter now.

    Each goes to the pool with room that is furthest behind its share of the tokens given so far; of very many, several go at once.
    """
    entering = np.zeros(len(room), dtype=np.int64)
    if len(room) == 1:
        entering[0] = max(min(room[0], wanted), 0)
        return entering
    total = _sum(given) + 1
    step = max(wanted // HOME_STEPS, 1)
    while wanted > 0:
        furthest, least = -1, np.inf
        for pool in range(len(room)):
            behind = given[pool] - share[pool] * total
            if room[pool] > 0 and behind < least:
                furthest, least = pool, behind
        if furthest < 0:
            break
        number = min(step, room[furthest], wanted)
        wanted -= number
        room[furthest] -= number
        entering[furthest] += number
        given[furthest] += number * tokens
        total += number * tokens
    return entering


def prepare() -> None:
    """Compile the loop, or load it compiled; the memory that this takes is never released."""
    none, rules = np.empty(0, dtype=np.int64), Rules(DIAGONAL, 1, 1, 1, frees_early=False)
    pools = Pools(capacity=none, share=none.astype(np.float64), whole=none.astype(bool))
    admit((none,) * 5, Needs(held=none, shared=none), pools, rules)
