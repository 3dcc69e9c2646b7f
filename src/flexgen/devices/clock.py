"""A clock in slow motion, and what does one thing at a time by it: arithmetic of when simulated things begin and end."""

from __future__ import annotations

import bisect
import time


class Clock:
    """The time of a simulated machine, of which a second takes `slow_motion` seconds here.  Thread-safe.

    So what Python needs here counts only a fraction, and threads, conditions and queues of the program work as ever.  The clock stands at 0
    until `start`: so long nothing takes time.  After `stop` it stands again, and nothing is waited for.

    Args:
        slow_motion: How many times longer everything takes here, more than 0.
    """

    def __init__(self, slow_motion: float) -> None:
        self.slow_motion = slow_motion
        self._origin: float | None = None
        self._stopped: float | None = None

    @property
    def runs(self) -> bool:
        return self._origin is not None and self._stopped is None

    def start(self) -> None:
        """Let time pass from now on."""
        self._origin = time.perf_counter()

    def stop(self) -> None:
        """Let the clock stand where it is."""
        self._stopped = self.now()

    def now(self) -> float:
        """Return the simulated seconds since `start`."""
        if self._stopped is not None:
            return self._stopped
        return 0.0 if self._origin is None else (time.perf_counter() - self._origin) / self.slow_motion

    def wait_until(self, when: float) -> None:
        """Sleep until it is that time, if the clock runs."""
        while self.runs and (left := when - self.now()) > 0:
            time.sleep(left * self.slow_motion)


class Resource:
    """Something that does one thing at a time, such as a copy engine: what it has been given to do, and when that takes place.

    When something ends is known when it is given.  It goes behind what was given before, unless it fits into a gap before something that
    has to wait for something else.  Not thread-safe.

    Attributes:
        beside: Other resources, and how many times longer what begins while they are busy takes.
        busy_seconds: The seconds of all that was given.
    """

    def __init__(self) -> None:
        self.beside: list[tuple[Resource, float]] = []
        self.busy_seconds = 0.0
        self._spans: list[tuple[float, float]] = []  # begin and end of what is not over, in order

    def give(self, now: float, ready: float, seconds: float) -> float:
        """Give it something to do.

        Args:
            now: The time.
            ready: When it may begin at the earliest; what is past means now.
            seconds: The seconds that it takes alone.

        Returns:
            When it ends.
        """
        self._spans = [span for span in self._spans if span[1] > now]
        begin = self._gap(max(now, ready), seconds)
        for other, factor in self.beside:
            if other.busy_at(begin):
                seconds *= factor
        begin = self._gap(begin, seconds)
        bisect.insort(self._spans, (begin, begin + seconds))
        self.busy_seconds += seconds
        return begin + seconds

    def _gap(self, begin: float, seconds: float) -> float:
        """Return the first time from `begin` on at which something of so many seconds fits."""
        for start, end in self._spans:
            if begin + seconds <= start:
                break
            begin = max(begin, end)
        return begin

    def busy_at(self, when: float) -> bool:
        """Return whether something of what was given takes place then."""
        return any(begin <= when < end for begin, end in self._spans)
