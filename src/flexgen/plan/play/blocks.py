"""Blocks of sequences that follow each other through a pipeline, as one of its stages sees them."""

from __future__ import annotations

import numpy as np

from flexgen.plan.price.requests import Floats


def with_drains(seconds: Floats, num_blocks: int) -> Floats:
    """Return the seconds of a block's passes, each with its share of the time in which the pipeline drains after it.

    Of K blocks on K equal stages, block 0 finds the last stage busy with block K - 1 when its next pass is shorter than the one before:
    K - 1 times the difference is lost, once for all blocks. A longer pass loses nothing. After the last pass, all of it is lost.

    Args:
        seconds: The seconds of each pass on one stage.
        num_blocks: The number K of blocks and stages.
    """
    following = np.append(seconds[1:], 0.0)
    return seconds + (num_blocks - 1) / num_blocks * np.maximum(seconds - following, 0.0)
