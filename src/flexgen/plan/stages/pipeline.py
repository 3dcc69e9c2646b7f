"""A pipeline over time: blocks of sequences that go through stages and links, pass after pass.

Every stage computes one pass at a time and every link carries one, in the same order. A block's next pass begins when its tokens have come
back to the first stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexgen.plan.price.requests import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRate:
    """The link between a stage and the next.

    Attributes:
        bytes_per_s: Bytes per second in one direction.
        latency_s: The seconds until the first of them has arrived.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """The times of a block's passes; all blocks are alike.

    Attributes:
        stages: The seconds of each pass at each stage, of shape (passes, stages).
        links: The seconds for which it keeps each link busy, of shape (passes, stages - 1).
        exposed: The seconds after the end of a stage's pass until the last of its hidden states has left, where the link is free; in the
            same shape.  The other hidden states leave while the stage is still computing.
        latency_s: The seconds until what is sent arrives, from any stage at the next, and from the last at the first.
    """

    stages: Floats
    links: Floats
    exposed: Floats
    latency_s: float

    @property
    def num_passes(self) -> int:
        return len(self.stages)

    @property
    def trips(self) -> Floats:
        """The seconds of each pass from its begin to that of the block's next, if nothing is in its way."""
        latencies = self.latency_s * self.stages.shape[1] * (self.stages.shape[1] > 1)
        return self.stages.sum(axis=1) + self.exposed.sum(axis=1) + latencies

    @property
    def slowest(self) -> Floats:
        """The seconds of each pass at the stage, or on the link, that takes longest."""
        return np.concatenate([self.stages, self.links], axis=1).max(axis=1)

    def rounds(self, num_blocks: int) -> Floats:
        """Return the seconds between a pass and the block's next: a round of all blocks, or the trip if that takes longer."""
        return np.maximum(num_blocks * self.slowest, self.trips)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A job as it went through a pipeline.

    Attributes:
        seconds: The time from the first pass's begin to the return of the last one's tokens.
        starts: The begin of each pass at the first stage, of shape (blocks, passes).
        ends: The return of its tokens, in the same shape.
    """

    seconds: float
    starts: Floats
    ends: Floats


def play(times: PassTimes, num_blocks: int) -> Played:
    """Play a job of so many equal blocks, which begin one after the other.

    A pass leaves station m (stages and links in turn) at max(when it came, when the station had finished the pass before) + its service.
    With V(m) the sum of services and delays before m, leaving minus V is a running maximum, so one pass of one block takes a few array
    operations however many stages there are.
    """
    num_passes, num_stages = times.stages.shape
    latency = times.latency_s * (num_stages > 1)
    service, held, delay = (np.zeros((num_passes, 2 * num_stages - 1)) for _ in range(3))
    service[:, 0::2], service[:, 1::2] = times.stages, times.exposed
    held[:, 1::2], delay[:, 1::2] = times.links - times.exposed, latency  # a link is busy before the stage's pass ends, too
    before = np.cumsum(service + delay, axis=1) - (service + delay)
    free, ready = np.zeros(2 * num_stages - 1), np.zeros(num_blocks)
    starts, ends = np.zeros((num_blocks, num_passes)), np.zeros((num_blocks, num_passes))
    for index in range(num_passes):
        for block in range(num_blocks):
            began = np.maximum.accumulate(np.maximum(free + held[index] - before[index], ready[block]))
            free = began + before[index] + service[index]
            starts[block, index], ends[block, index] = began[0], free[-1] + latency
            ready[block] = ends[block, index]
    return Played(seconds=float(ends.max(initial=0.0)), starts=starts, ends=ends)
