"""The leases of a job as files: `DEPTH-START.ATTEMPT` is a claim and names its worker, `DEPTH-START.done` a lease without open lines.

Files are made once and never change.  A claim succeeds for one worker only, whatever it knows of the others: a list that is out of date
makes it try names that exist, and learn from them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from flexgen.jobs.workers.leases import Claim, Lease, Ledger
from flexgen.jobs.workers.place import link_new, names_in, translated

_NAME = re.compile(r"(\d+)-(\d+)\.(\d+|done)")
_DONE = "done"


class Board:
    """The leases in a folder.

    Args:
        folder: The folder.
        ledger: What is known of them, which this keeps up to date.
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self._folder, self.ledger = folder, ledger
        self._known: set[str] = set()

    def refresh(self) -> None:
        """Learn what others have claimed and finished.

        Raises:
            StorageError: The folder cannot be read; it may be gone.
        """
        with translated(self._folder):
            for name in names_in(self._folder):
                if name not in self._known:
                    self._learn(name)

    def claim(self, lease: Lease, attempt: int, worker: str) -> bool:
        """Claim a lease, and return whether this worker has got it."""
        name = f"{lease.name}.{attempt}"
        with translated(self._folder):
            mine = link_new(self._folder / name, json.dumps({"worker": worker, "stop": lease.stop}))
            self._learn(name)
        return mine

    def finish(self, lease: Lease) -> None:
        """Record that all lines of a lease have durable records."""
        name = f"{lease.name}.{_DONE}"
        with translated(self._folder):
            link_new(self._folder / name, "")
            self._learn(name)

    def _learn(self, name: str) -> None:
        found = _NAME.fullmatch(name)
        if found is None:
            return
        depth, start = int(found[1]), int(found[2])
        if found[3] == _DONE:
            self.ledger.note_done(depth, start)
        else:
            content = json.loads((self._folder / name).read_bytes())
            self.ledger.note_claim(depth, start, int(found[3]), Claim(worker=content["worker"], stop=content["stop"]))
        self._known.add(name)
