"""The names of units, which say to which layer they belong."""

from __future__ import annotations

import re

# Matches the number of a layer.
_LAYER_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d*)(?=\.| |$)")


def split_name(name: str) -> tuple[int | None, str]:
    """Return the layer's number and the name with "{}" in its place, or (None, the name) if the name has no number."""
    match = _LAYER_NUMBER.search(name)
    if match is None or "{}" in name:
        return None, name
    return int(match[0]), name[: match.start()] + "{}" + name[match.end() :]
