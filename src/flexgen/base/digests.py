"""Digests of several parts, as names of what they describe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def digest_of(parts: Iterable[bytes], num_bytes: int) -> str:
    """Return the digest of parts, which tells where one ends and the next begins, as hexadecimal digits of so many bytes."""
    hasher = hashlib.blake2b(digest_size=num_bytes)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
