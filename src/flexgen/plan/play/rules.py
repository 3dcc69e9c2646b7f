"""What the loop over the passes of a job (admit.py) takes and gives, as tuples of arrays and numbers that compiled code reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexgen.options import SCHEDULES

DIAGONAL, ZIGZAG, ROW = (SCHEDULES.index(name) for name in ("diagonal", "zigzag", "row"))


class Rules(NamedTuple):
    """The rules of a policy for admission.

    Attributes:
        schedule: DIAGONAL, ZIGZAG or ROW.
        max_num_seqs: The most sequences that are alive at once.
        prefill_tokens: The prompt quota.
        micro_batch_tokens: The most tokens computed together.
        frees_early: Whether room is kept for answers that end earlier than they may.
    """

    schedule: int
    max_num_seqs: int
    prefill_tokens: int
    micro_batch_tokens: int
    frees_early: bool


class Pools(NamedTuple):
    """The tiers that have KV; each attribute has a number per tier.

    Attributes:
        capacity: The bytes of the pool.
        share: The share of all tokens that should live there.
        whole: Whether a sequence takes from the start the bytes that it needs at its longest.
    """

    capacity: npt.NDArray[np.int64]
    share: npt.NDArray[np.float64]
    whole: npt.NDArray[np.bool_]


class Needs(NamedTuple):
    """Bytes of KV by number of tokens.

    Attributes:
        held: The bytes by the tokens of a sequence (the most pages that it has held so far).
        shared: The bytes by the tokens that it shares (held once, for all sequences).
    """

    held: npt.NDArray[np.int64]
    shared: npt.NDArray[np.int64]


class Admissions(NamedTuple):
    """Groups of equal sequences that enter together; each attribute has a number per group.

    Attributes:
        first_pass: The first pass that carries them.
        run: The index of their run in the queue.
        pool: The pool where their KV lives.
        num_seqs: The number of sequences.
    """

    first_pass: npt.NDArray[np.int64]
    run: npt.NDArray[np.int64]
    pool: npt.NDArray[np.int64]
    num_seqs: npt.NDArray[np.int64]
