"""The pages that slices of a pass see and store something in, which say what has to be complete before something else begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.kv.pages import KVGroup
from flexgen.passes.plan import Slice


@dataclass(frozen=True, slots=True)
class PassPages:
    """Pages of some slices, by their ids.

    Attributes:
        seen: Those that they see, those with their own tokens included, for each layer group.
        stored: Those of them in which they store something.
    """

    seen: Sequence[frozenset[int]]
    stored: Sequence[frozenset[int]]

    @classmethod
    def of(cls, groups: Sequence[KVGroup], slices: Sequence[Slice]) -> PassPages:
        """Return the pages of slices whose tables are in the order of the groups."""
        seen, stored = [], []
        for index, group in enumerate(groups):
            firsts = [0 if group.tail_of is not None else group.first_page(each.start) for each in slices]
            own = [0 if group.tail_of is not None else each.start // group.page_tokens for each in slices]
            tables = [(each.tables[index], group.num_pages(each.stop)) for each in slices]
            seen.append(frozenset(page for (table, stop), start in zip(tables, firsts, strict=True) for page in table[start:stop]))
            stored.append(frozenset(page for (table, stop), start in zip(tables, own, strict=True) for page in table[start:stop]))
        return cls(seen, stored)

    def meet(self, other: PassPages) -> bool:
        """Return whether one stores something in a page that the other sees."""
        pairs = (*zip(self.stored, other.seen, strict=True), *zip(other.stored, self.seen, strict=True))
        return any(not one.isdisjoint(another) for one, another in pairs)
