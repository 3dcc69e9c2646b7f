"""Blocks of sequences that follow each other through a pipeline, as one of its stages sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexgen.plan.price.requests import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The blocks in flight through the stages of a pipeline.

    Attributes:
        num_blocks: Their number, at least that of the stages.
        num_stages: The number of stages.
    """

    num_blocks: int = 1
    num_stages: int = 1

    def with_drains(self, seconds: Floats) -> Floats:
        """Return the seconds of a block's passes, each with its share of the time in which the pipeline drains after it.

        With K equal stages, block 0 finds the last stage busy with the last block when its next pass is shorter than the one before:
        K - 1 times the difference is lost, once for all blocks. A longer pass loses nothing. After the last pass, all of it is lost.
        That is exact for as many blocks as stages; more blocks lose a little less.

        Args:
            seconds: The seconds of each pass on one stage.
        """
        if self.num_stages == 1:
            return seconds
        following = np.append(seconds[1:], 0.0)
        return seconds + (self.num_stages - 1) / self.num_blocks * np.maximum(seconds - following, 0.0)


ALONE = Blocks()
