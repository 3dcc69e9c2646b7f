"""What the tokens of a micro-batch see in one layer group, and what generated ones keep of it: index tensors, made once per pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flexgen.devices.base import HOST
from flexgen.kernels.pages import page_tables
from flexgen.kv.format import Steps
from flexgen.kv.pages import KVGroup
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.views import SparseRows, StepPart
from flexgen.passes.arrays import starts_of
from flexgen.passes.plan import Slice


def step_parts(
    group: KVGroup, index: int, steps: Sequence[Slice], tail: int | None = None, sparse: SparseAttention | None = None
) -> tuple[StepPart, ...]:
    """Return the next tokens of a micro-batch: those that attend to all that they see, and those that leave positions out.

    Args:
        group: The layer group.
        index: Its index among the slices' page tables.
        steps: The slices.
        tail: The index of the group of its tails; None if there are none.
        sparse: What generated tokens keep; None where they keep all that they see.
    """
    if sparse is None:
        return (StepPart(rows=None, steps=steps_of(group, index, steps, tail)),)
    divided: dict[bool, list[int]] = {}
    for row, each in enumerate(steps):
        divided.setdefault(sparse.leaves_out(group.geometry, each, each.start), []).append(row)
    parts: list[StepPart] = []
    for leaves_out, rows in divided.items():
        some = [steps[row] for row in rows]
        parts.append(
            StepPart(
                rows=torch.tensor(rows, dtype=torch.int64) if len(divided) > 1 else None,
                steps=steps_of(group, index, some, tail, sparse if leaves_out else None),
                seen_bytes=sum(_seen_value_bytes(group, each.start) for each in some),
                value_bytes=group.format.value_bytes(group.geometry) // group.geometry.value_heads,
                sparse=sparse,
            )
        )
    return tuple(parts)


def steps_of(group: KVGroup, index: int, steps: Sequence[Slice], tail: int | None = None, sparse: SparseAttention | None = None) -> Steps:
    """Return what next tokens see, counted from the first page of which they see something.


    Args:
        group: The layer group.
        index: Its index among the slices' page tables.
        steps: The slices.
        tail: The index of the group of its tails; None if there are none.
        sparse: What they keep of it; None if they keep all.
    """
    size, positions = group.page_tokens, starts_of(steps)
    first_visible = group.geometry.first_visible(positions)
    skipped = first_visible // size  # pages before
    tables = [each.tables[index][pages : each.start // size + 1] for each, pages in zip(steps, skipped.tolist(), strict=True)]
    kept = None if sparse is None else torch.tensor([sparse.kept(group.geometry, each.start) for each in steps], dtype=torch.int64)
    return Steps(
        tables=page_tables(tables, HOST),
        starts=torch.from_numpy(first_visible - skipped * size),
        lengths=torch.from_numpy(positions + 1 - skipped * size),
        tails=None if tail is None else torch.tensor([each.tables[tail][0] for each in steps], dtype=torch.int64),
        kept=kept,
    )


def sparse_rows(group: KVGroup, each: Slice, origin: int, sparse: SparseAttention | None) -> SparseRows | None:
    """Return what generated tokens keep that are computed together with others; None if they leave nothing out.

    Args:
        group: The layer group.
        each: The slice.
        origin: The position from which the slice counts its positions.
        sparse: What generated tokens keep; None where they keep all that they see.
    """
    if sparse is None or (num_dense := sparse.num_dense(group.geometry, each)) == each.length:
        return None
    size, positions = group.page_tokens, np.arange(each.start + num_dense, each.stop)
    return SparseRows(
        num_dense=num_dense,
        borders=torch.from_numpy(positions // size * size - origin),
        kept=torch.tensor([sparse.kept(group.geometry, position) for position in positions.tolist()], dtype=torch.int64),
    )


def _seen_value_bytes(group: KVGroup, position: int) -> int:
    """Return the bytes of the values that a next token at this position sees in one layer; its own page may be a tail."""
    geometry, tail = group.geometry, group.format.tail
    first, border = geometry.first_visible(position), position // group.page_tokens * group.page_tokens
    own = position + 1 - max(first, border)
    return max(border - first, 0) * group.format.value_bytes(geometry) + own * (tail or group.format).value_bytes(geometry)
