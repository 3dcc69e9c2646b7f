"""The lines of one worker: it takes leases as its engine asks for requests, early enough that the engine never runs dry.

An engine reads far ahead of what it computes.  A worker lets it, while there is much to do; towards the end it takes no more than fits, so
that no line waits in one worker while another has nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexgen.errors import RequestError
from flexgen.jobs.reading import Reader
from flexgen.jobs.serving import Serving
from flexgen.jobs.workers.board import Board
from flexgen.jobs.workers.leases import Offer
from flexgen.jobs.workers.members import Observer
from flexgen.jobs.workers.results import SharedResults
from flexgen.jobs.workers.task import LineReader
from flexgen.request import TokenRequest

_PAUSE_SECONDS = 0.1  # the least time between two looks for leases when there was none
_LEAST_SHARE = 4  # a busy worker takes no lease of less than this part of its sequences


class Leasing:
    """Takes leases for one worker.

    Args:
        board: The leases of the job.
        observer: The workers of the job.
        results: The results of this worker.
        shards: The folder of all shards.
        worker: The id of this worker.
    """

    def __init__(self, board: Board, observer: Observer, results: SharedResults, shards: Path, worker: str) -> None:
        self._board, self._observer, self._results, self._shards, self._worker = board, observer, results, shards, worker
        self._found_none = 0.0  # when there was no lease to take, on the monotonic clock

    @property
    def is_over(self) -> bool:
        """Whether every line of the job has a durable result."""
        return self._board.ledger.is_over

    def take(self, num_awaited: int, max_num_seqs: int) -> Offer | None:
        """Claim a lease: one that a worker has left behind, or else lines that nobody has had.

        Args:
            num_awaited: The number of answers that the engine has been asked for and has not given.
            max_num_seqs: The number of sequences that it keeps alive.

        Returns:
            What was claimed; None if there is nothing to claim now.

        Raises:
            StorageError: The folder of the workers cannot be used.
        """
        if num_awaited and time.monotonic() - self._found_none < _PAUSE_SECONDS:
            return None
        self._board.refresh()
        ledger, alive = self._board.ledger, max(self._observer.num_alive(), 1)
        room = max_num_seqs + min(max_num_seqs, (ledger.num_lines - ledger.frontier) // alive) - num_awaited
        if room > 0 and (num_awaited < max_num_seqs or room >= max_num_seqs // _LEAST_SHARE):
            for offer in self._offers(room, alive):
                if (num_awaited == 0 or not offer.alone) and self._board.claim(offer.lease, offer.attempt, self._worker):
                    for worker in offer.earlier:
                        self._results.learn(self._shards / worker)
                    self._results.hold(offer.lease)
                    return offer
        self._found_none = time.monotonic()
        return None

    def _offers(self, room: int, alive: int) -> Iterator[Offer]:
        """Yield what may be claimed: leases that are tried again beside others, new ones, and those that have to be tried alone."""
        ledger = self._board.ledger
        left_behind = list(ledger.offers(self._observer.fate_of))
        yield from (offer for offer in left_behind if not offer.alone)
        while (lease := ledger.next_lease(room, alive)) is not None:
            yield Offer(lease=lease)
        yield from (offer for offer in left_behind if offer.alone)


class Supply:
    """An iterator over the engine's requests for the lines of leases.

    It may end and go on: it has no next request where no lease can be had now.

    Args:
        leasing: Takes leases.
        results: The results of this worker.
        lines: Reads the lines of leases.
        reader: Makes requests of lines.
        serving: The lines that the engine is answering.
        offers: The leases that are held already.
        max_num_seqs: The number of sequences that the engine keeps alive.
    """

    def __init__(
        self, leasing: Leasing, results: SharedResults, lines: LineReader, reader: Reader, serving: Serving, *,
        offers: Iterable[Offer], max_num_seqs: int,
    ) -> None:  # fmt: skip
        self._leasing, self._results, self._lines, self._reader, self._serving = leasing, results, lines, reader, serving
        self._offers, self._max_num_seqs = list(offers), max_num_seqs
        self._alone = any(offer.alone for offer in self._offers)
        self._requests: Iterator[TokenRequest] = iter(())

    def __iter__(self) -> Iterator[TokenRequest]:
        return self

    def __next__(self) -> TokenRequest:
        while True:
            request = next(self._requests, None)
            if request is not None:
                return request
            offer = self._next_offer()
            if offer is None:
                raise StopIteration
            self._requests = self._of(offer)

    def _next_offer(self) -> Offer | None:
        if self._offers:
            return self._offers.pop(0)
        if self._alone:
            return None
        # What is tried alone begins with an engine that is idle, and so is never taken here.
        return self._leasing.take(max(self._serving.num_awaited, 1), self._max_num_seqs)

    def _of(self, offer: Offer) -> Iterator[TokenRequest]:
        """Yield the requests for the lines of a lease that are not done."""
        lines = self._lines.read(sorted(self._results.held.get(offer.lease, ())))
        for request, token_requests in self._reader.read(lines):
            if offer.hopeless:
                self._serving.refuse(request, _died(offer))
            elif request.error is not None:  # a template may give another result than in the scan
                self._serving.refuse(request, request.error)
            else:
                yield from self._serving.requests(request, token_requests)


def _died(offer: Offer) -> RequestError:
    message = (
        f"{offer.deaths} workers died while they answered this line, the last one with no other line (out of memory, or a crash); "
        "a run that tries errors again tries it again"
    )
    return RequestError(message, code="worker_died")
