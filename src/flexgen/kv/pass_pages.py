"""Which micro-batches of a pass store something in pages that others see, and so have to be done in order."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.kv.pages import KVGroup
from flexgen.passes.plan import Slice


def pages_of(group: KVGroup, table: Sequence[int], piece: Slice) -> tuple[Sequence[int], Sequence[int]]:
    """Return the pages that a slice sees in a group, those with its own tokens included, and those of them in which it stores something."""
    stop, of_tail = group.num_pages(piece.stop), group.tail_of is not None
    return table[0 if of_tail else group.first_page(piece.start) : stop], table[0 if of_tail else piece.start // group.page_tokens : stop]


def apart(groups: Sequence[KVGroup], batches: Sequence[Sequence[Slice]]) -> list[bool]:
    """Return for each micro-batch whether it sees nothing that another one stores, nor another one what it stores.

    Args:
        groups: The layer groups, in the order of the slices' tables.
        batches: The slices of all micro-batches of a pass.
    """
    is_apart = [True] * len(batches)
    for index, group in enumerate(groups):
        pages = [[pages_of(group, each.tables[index], each) for each in slices] for slices in batches]
        storing = {page: batch for batch, pieces in enumerate(pages) for _, stored in pieces for page in stored}
        for batch, pieces in enumerate(pages):
            for seen, _ in pieces:
                for page in seen:
                    if (other := storing.get(page, batch)) != batch:
                        is_apart[batch] = is_apart[other] = False
    return is_apart
