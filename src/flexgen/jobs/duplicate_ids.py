"""Whether ids are unique, for any number of lines, in twelve bytes each."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from flexgen.api.fields import Origin


class Census:
    """Ids and the lines that have them."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._lines = array("I")

    def add(self, origin: Origin) -> None:
        """Count a line's id, if it has one.  1 and "1" are two."""
        if origin.id is None:
            return
        digest = hashlib.blake2b(repr(origin.id).encode(), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))
        self._lines.append(origin.line_number)

    def repeated(self) -> list[int]:
        """The lines whose id an earlier line has, too, in order."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.empty(0, np.uint64)
        lines = np.frombuffer(self._lines, np.uint32) if self._lines else np.empty(0, np.uint32)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        again = order[1:][ordered[1:] == ordered[:-1]]
        return np.sort(lines[again]).tolist()
