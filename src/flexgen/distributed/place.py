"""Where a process stands among the ranks of a run, as torchrun or our own launcher writes it into its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexgen.errors import OptionError

STORE_FD = "FLEXGEN_STORE_FD"  # a socket that listens on MASTER_PORT already, for rank 0 to serve the store on


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of one process.

    Attributes:
        rank, size: Its rank, and the number of all.
        local_rank, local_size: The same among those on its machine.
        host, port: Where the store of the ranks is served.
        agent_serves: Whether torchrun's agent serves the store; otherwise rank 0 does.
        listener: The number of a file descriptor that listens there, in rank 0.
        run: What tells this run from others that the same store has seen.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    agent_serves: bool
    listener: int | None
    run: str


def is_placed(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment and "MASTER_ADDR" in environment


def place_of(environment: Mapping[str, str]) -> Place:
    """Return the place that the environment gives a process.

    Raises:
        OptionError: A variable is missing or has no possible value.
    """
    size = _number(environment, "WORLD_SIZE", 1, 1 << 16)
    rank = _number(environment, "RANK", 0, size - 1)
    if not environment.get("MASTER_ADDR"):
        raise OptionError("MASTER_ADDR is missing in the environment: start the ranks with torchrun")
    return Place(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", 0, size - 1, rank),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", 1, size, size),
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT", 1, (1 << 16) - 1),
        agent_serves=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        listener=_number(environment, STORE_FD, 0, 1 << 30) if STORE_FD in environment else None,
        run="/".join(("flexgen", environment.get("TORCHELASTIC_RUN_ID", ""), environment.get("TORCHELASTIC_RESTART_COUNT", "0"))),
    )


def _number(environment: Mapping[str, str], name: str, least: int, most: int, default: int | None = None) -> int:
    """Return the number of a variable.

    Raises:
        OptionError: It is missing without a default, no number, or not in the range.
    """
    if name not in environment and default is not None:
        return default
    text = environment.get(name, "")
    if not text.isdecimal() or not least <= int(text) <= most:
        said = f"{name}={text!r}" if text else f"{name} is missing"
        raise OptionError(f"{said} in the environment: a number from {least} to {most} is needed; start the ranks with torchrun")
    return int(text)
