"""Finds ids that occur on several lines, in twelve bytes of memory per line."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np


class Census:
    """Collects the ids of a file and the lines that have them."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._lines = array("I")

    def add(self, line_number: int, identity: str | int | None) -> None:
        """Record the id of a line, if it has one.  The integer 1 and the text "1" are different ids."""
        if identity is None:
            return
        digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))
        self._lines.append(line_number)

    def repeated(self) -> list[int]:
        """Return, in ascending order, the numbers of the lines whose id an earlier line has as well."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.empty(0, np.uint64)
        lines = np.frombuffer(self._lines, np.uint32) if self._lines else np.empty(0, np.uint32)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        again = order[1:][ordered[1:] == ordered[:-1]]
        return np.sort(lines[again]).tolist()
