"""Long sequences are cut: programs attend to SPLIT tokens each, and a second kernel merges what they found (flash-decoding).

Cuts lie at multiples of SPLIT, whatever the batch is, so that a result does not depend on what shares a launch with it.  Sequences may be
launched some at a time, so that what belongs to each of them, and is read or written once, may begin at any address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexgen.kernels.triton.programs.softmax import finished

MERGED_AT_ONCE = tl.constexpr(16)  # parts of a sequence


@triton.jit
def seen_part(starts, lengths, sequence, SPLIT: tl.constexpr):
    """Return the positions first <= p < end that this program attends to; none if first >= end."""
    split = tl.program_id(2)
    first = tl.maximum(tl.load(starts + sequence).to(tl.int32), split * SPLIT)
    return first, tl.minimum(tl.load(lengths + sequence).to(tl.int32), (split + 1) * SPLIT)


@triton.jit
def store_rows(
    base, total, sums, sinks, out, part_sums, part_states, sequence, heads, row_mask, dims, HEADS: tl.constexpr, DIM: tl.constexpr
):
    """Store the rows of one sequence's heads: the results, or the states of softmax if there are parts to be merged."""
    rows, mask = sequence * HEADS + heads, row_mask[:, None] & (dims[None, :] < DIM)
    if part_sums is None:
        results = finished(base, total, sums, sinks, heads, row_mask)
        tl.store(out + rows[:, None] * DIM + dims[None, :], results.to(out.dtype.element_ty), mask=mask)
    else:
        parts = rows * tl.num_programs(2) + tl.program_id(2)
        tl.store(part_sums + parts[:, None] * DIM + dims[None, :], sums, mask=mask)
        tl.store(part_states + parts * 2, base, mask=row_mask)
        tl.store(part_states + parts * 2 + 1, total, mask=row_mask)


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=["starts", "lengths", "out"])
def merge_parts(
    part_sums, part_states, starts, lengths, sinks, out, num_parts, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a head of a sequence: program_id(0) of the sequences, program_id(1) of the heads."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, dims = sequence * HEADS + head, tl.arange(0, COLUMNS)
    first_part = tl.maximum(tl.load(starts + sequence).to(tl.int32), 0) // SPLIT
    last_part = (tl.load(lengths + sequence).to(tl.int32) - 1) // SPLIT
    base = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, COLUMNS], tl.float32)
    for part in range(first_part, last_part + 1, MERGED_AT_ONCE):
        parts = part + tl.arange(0, MERGED_AT_ONCE)
        places, known = row * num_parts + parts, parts <= last_part
        bases = tl.load(part_states + places * 2, mask=known, other=float("-inf"))
        totals = tl.load(part_states + places * 2 + 1, mask=known, other=0.0)
        mask = known[:, None] & (dims[None, :] < DIM)
        found = tl.load(part_sums + places[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        new = tl.maximum(base, tl.max(bases, 0))
        factors, factor = tl.exp2(bases - new), tl.exp2(base - new)
        total = total * factor + tl.sum(totals * factors, 0)
        sums = sums * factor[:, None] + tl.sum(found * factors[:, None], 0)[None, :]
        base = new
    heads = head + tl.zeros([1], tl.int32)
    results = finished(base, total, sums, sinks, heads, heads < HEADS)
    tl.store(out + row * DIM + dims[None, :], results.to(out.dtype.element_ty), mask=dims[None, :] < DIM)
