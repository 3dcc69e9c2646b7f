"""Compares what the ranks of a run have before they begin: versions, the model, options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from flexgen.errors import JobError, StageError

_MISSING = "nothing"


class Published(Protocol):
    """What is needed of `Ranks`."""

    rank: int
    size: int
    hosts: tuple[str, ...]

    def publish(self, key: str, value: dict[str, Any]) -> None: ...
    def lookup(self, key: str, timeout: float = ...) -> dict[str, Any]: ...


def check_agreement(ranks: Published, facts: Mapping[str, Any], *, timeout: float = 300.0) -> None:
    """Compare facts with those of all other ranks.

    Args:
        ranks: The ranks.
        facts: JSON values by names that people understand, such as "version of torch".
        timeout: Seconds until all others must have theirs.

    Raises:
        JobError: Some differ; the message, the same on all ranks, names each with the value of every rank.
        StageError: A rank is lost.
    """
    ranks.publish(f"facts/{ranks.rank}", dict(facts))
    found = [ranks.lookup(f"facts/{rank}", timeout) for rank in range(ranks.size)]
    if not (differing := differences(found, ranks.hosts)):
        return
    ranks.publish(f"facts/read/{ranks.rank}", {})
    with suppress(StageError):  # one that has read all facts may end at once: the reason is the same here
        for rank in range(ranks.size):
            ranks.lookup(f"facts/read/{rank}", timeout)
    raise JobError("the ranks do not agree:\n" + "\n".join(differing))


def differences(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """Return a line for each fact that is not the same on all ranks.

    Args:
        facts: The facts of each rank.
        hosts: The host of each rank.
    """
    names = dict.fromkeys(name for each in facts for name in each)  # in the order of the first rank that has them
    lines = list[str]()
    for name in names:
        values = [json.dumps(each[name], sort_keys=True) if name in each else _MISSING for each in facts]
        if len(set(values)) > 1:
            lines.append(f"  {name}: " + ", ".join(f"{said} {_where(said, values, hosts)}" for said in dict.fromkeys(values)))
    return lines


def _where(said: str, values: Sequence[str], hosts: Sequence[str]) -> str:
    """Return the ranks that have a value: "on rank 0 (alpha) and rank 2 (beta)"."""
    return "on " + " and ".join(f"rank {rank} ({hosts[rank]})" for rank, value in enumerate(values) if value == said)
