"""What the environment says about the ranks of a pipeline, as torchrun sets it.  Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several that were started together."""
    return all(name in environment for name in _NEEDED)


def is_follower(environment: Mapping[str, str]) -> bool:
    """Return whether this process is such a rank, and not the first."""
    return is_rank(environment) and environment["RANK"] != "0"
