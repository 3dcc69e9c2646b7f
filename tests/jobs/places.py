"""Jobs without a model: a folder, a store, and results to put into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexgen.jobs.folder import JobFolder, JobPaths
from flexgen.jobs.identity import Identity
from flexgen.jobs.store import Store

IDENTITY = Identity(answers={"model": "m", "seed": 0}, versions={"torch": "2.0"})


def paths_of(output: Path) -> JobPaths:
    return JobPaths(folder=output.with_name(output.name + ".flexgen"), output=output)


@contextmanager
def opened(output: Path, identity: Identity = IDENTITY, *, accept_changes: bool = False) -> Iterator[Store]:
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        store.begin(identity, "m", accept_changes=accept_changes)
        yield store


def result(number: int, *, failed: bool = False, digest: int | None = None) -> dict[str, Any]:
    """The arguments of `Store.add`."""
    return {
        "line_number": number, "digest": digest or number + 1000, "record": record(number), "failed": failed, "prompt_tokens": 2,
        "output_tokens": number,
    }  # fmt: skip


def record(number: int) -> bytes:
    return json.dumps({"id": None, "index": number, "text": "x" * (number * 7 % 50)}).encode() + b"\n"


def fill(output: Path, numbers: range) -> None:
    """Every third line fails."""
    with opened(output) as store:
        for number in numbers:
            store.add(**result(number, failed=number % 3 == 0))
        store.commit()


def records(numbers: range) -> bytes:
    return b"".join(record(number) for number in numbers)
