"""All kinds of faults, by name: those of trials.py and those of hostile.py, each with what it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from faults.hostile import HOSTILE_KINDS, HostileWorkshop, run_hostile_kind
from faults.trials import KINDS, RACE, JobOutcome, Workshop, run_kind, sweep

ALL_KINDS = (*KINDS, RACE, *HOSTILE_KINDS)


class Workshops:
    """Made when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def plain(self) -> Workshop:
        return Workshop.open(self._folder / "plain")

    @cached_property
    def hostile(self) -> HostileWorkshop:
        return HostileWorkshop.open(self._folder / "hostile")

    def run_kind(self, kind: str, num_jobs: int, seed: int) -> Iterator[JobOutcome]:
        """Some jobs of one kind."""
        if kind in HOSTILE_KINDS:
            return run_hostile_kind(self.hostile, kind, num_jobs, seed)
        return run_kind(self.plain, kind, num_jobs, seed)


def main() -> None:
    """`kinds.py FOLDER NUM_JOBS KIND...`, a kind being one of ALL_KINDS, KIND#ITS_NUM_JOBS or ACTION@POINT: an outcome per line."""
    folder, num_jobs, *kinds = sys.argv[1:]
    workshops = Workshops(Path(folder))
    for each in kinds:
        kind, _, number = each.partition("#")
        action, _, point = kind.partition("@")
        outcomes = map(workshops.plain.try_job, sweep(point, action)) if point else workshops.run_kind(kind, int(number or num_jobs), 0)
        for place, outcome in enumerate(outcomes, 1):
            print(json.dumps(asdict(outcome)), flush=True)
            if point and (not outcome.trials[0].struck or place == int(num_jobs)):
                break


if __name__ == "__main__":
    main()
