"""The leases of a job as a value: which ranges of lines are claimed, finished, or free to be taken.  Knows no files and no clocks.

Workers divide the lines into ranges as they take them, from the first line to the last; the end of one range is the beginning of the next.
Each attempt at a range is a claim.  A range whose workers have died is tried again as a whole at first.  When it has died once less often
than a line may, it is divided into parts, which are tried alone, so that the line that is to blame is found in a few attempts and no other
one is blamed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

PARTS = 8  # into so many parts a range is divided
ATTEMPTS = 3  # a line that so many workers have died with ends in an error
_MOST_LEASES = 4096  # a job has about as many at most, since every worker lists them


class Fate(Enum):
    """What has become of a worker: it works, it has given back what it did not finish, or it is gone."""

    ALIVE = "alive"
    RELEASED = "released"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A range of the lines that a job has left to answer.

    Attributes:
        depth: How often a range has been divided to get this one.
        start: The index of its first line among the lines of the job.
        stop: The index after its last line.
    """

    depth: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        return f"{self.depth}-{self.start}"

    def parts(self) -> list[Lease]:
        """Return the ranges that it is divided into."""
        size = -(-len(self) // PARTS)
        starts = range(self.start, self.stop, size)
        return [Lease(depth=self.depth + 1, start=start, stop=min(start + size, self.stop)) for start in starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """An attempt at a lease.

    Attributes:
        worker: The id of the worker.
        stop: The index after the last line of the lease.
    """

    worker: str
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A lease that may be claimed.

    Attributes:
        lease: The lease.
        attempt: The number that the claim will have, from 1.
        deaths: The number of workers that have died while they had these lines.
        alone: Whether a worker may have no other lines at the same time.
        hopeless: Whether it is a line that too many workers have died with.
        earlier: The workers that have had these lines.
    """

    lease: Lease
    attempt: int = 1
    deaths: int = 0
    alone: bool = False
    hopeless: bool = False
    earlier: tuple[str, ...] = ()


class Ledger:
    """The leases of a job.

    Args:
        num_lines: The number of lines to answer.
        attempts: The number of workers after whose deaths a line ends in an error, at least 2.

    Attributes:
        frontier: The number of lines that were in some claim.
    """

    def __init__(self, num_lines: int, attempts: int = ATTEMPTS) -> None:
        self.num_lines, self._attempts = num_lines, attempts
        self.frontier = 0
        self._claims: dict[str, dict[int, Claim]] = {}
        self._done: set[str] = set()
        self._open: dict[int, Lease] = {}  # undivided ranges that are not finished, by their start

    def note_claim(self, depth: int, start: int, attempt: int, claim: Claim) -> None:
        """Add a claim; a claim that is known is the same."""
        name = f"{depth}-{start}"
        self._claims.setdefault(name, {})[attempt] = claim
        if depth == 0:
            self.frontier = max(self.frontier, claim.stop)
            if name not in self._done:
                self._open.setdefault(start, Lease(depth=0, start=start, stop=claim.stop))

    def note_done(self, depth: int, start: int) -> None:
        """Record that all lines of a lease have durable records."""
        self._done.add(f"{depth}-{start}")
        if depth == 0:
            self._open.pop(start, None)

    def is_done(self, lease: Lease) -> bool:
        """Return whether all lines of a lease have durable records."""
        if lease.name in self._done:
            return True
        return self._is_divided(lease) and all(self.is_done(part) for part in lease.parts())

    @property
    def is_over(self) -> bool:
        """Whether every line has a durable record."""
        if self.frontier < self.num_lines:
            return False
        for lease in list(self._open.values()):
            if self.is_done(lease):
                self.note_done(lease.depth, lease.start)
        return not self._open

    def next_lease(self, room: int, num_workers: int) -> Lease | None:
        """Return a range of lines that nobody has had: smaller ones towards the end, so that all workers end together.

        Args:
            room: The number of lines that the worker has room for.
            num_workers: The number of workers.
        """
        left = self.num_lines - self.frontier
        size = min(max(room, -(-self.num_lines // _MOST_LEASES)), max(left // (2 * num_workers), 1), left)
        return Lease(depth=0, start=self.frontier, stop=self.frontier + size) if size > 0 else None

    def offers(self, fate_of: Callable[[str], Fate]) -> Iterator[Offer]:
        """Yield the leases that workers have left behind.

        Args:
            fate_of: Returns what has become of a worker.
        """
        for lease in list(self._open.values()):
            yield from self._offers(lease, 0, (), fate_of)

    def _offers(self, lease: Lease, deaths: int, earlier: tuple[str, ...], fate_of: Callable[[str], Fate]) -> Iterator[Offer]:
        if self.is_done(lease):
            return
        claims = self._claims.get(lease.name, {})
        workers = [claims[attempt].worker for attempt in sorted(claims)]
        fates = [fate_of(worker) for worker in workers]
        if fates and fates[-1] is Fate.ALIVE:
            return
        died = sum(fate is not Fate.RELEASED for fate in fates)  # one that is alive again had been given up
        deaths, earlier = deaths + died, (*earlier, *workers)
        suspect = deaths >= self._attempts - 1
        if self._is_divided(lease) or (suspect and died and len(lease) > 1):
            for part in lease.parts():
                yield from self._offers(part, deaths, earlier, fate_of)
            return
        hopeless = len(lease) == 1 and died > 0 and deaths >= self._attempts  # the last one had no other line
        attempt = max(claims, default=0) + 1
        yield Offer(lease=lease, attempt=attempt, deaths=deaths, alone=suspect, hopeless=hopeless, earlier=tuple(dict.fromkeys(earlier)))

    def _is_divided(self, lease: Lease) -> bool:
        """Return whether somebody has claimed or finished a part of the lease."""
        return len(lease) > 1 and any(part.name in self._claims or part.name in self._done for part in lease.parts())
