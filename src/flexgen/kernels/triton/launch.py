"""How kernels are launched: the sizes of tiles, and sequences in parts whose number follows from shapes alone, so that nothing waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexgen.base.quantities import power_of_two
from flexgen.kernels.triton.grids import on_grid
from flexgen.kernels.triton.programs.splits import merge_parts

SPLIT_TOKENS = 512  # tokens of a sequence that a program attends to
PARTS_BYTES = 32 << 20  # of what is to be merged, at a time
TILE_BYTES = 40 << 10  # keys and values of a tile
LEAST_TILE, MOST_TILE = 16, 64  # tokens; tensor cores multiply no fewer
LEAST_COLUMNS = 16
MOST_ROWS = 64
WIDE_SUMS = 8192  # for more, the registers of four warps are too few
STAGED_BYTES = 96 << 10  # of queries, and of tiles of which one is read ahead: a multiprocessor has 99 KiB or more for them


def columns(dim: int, least: int = LEAST_COLUMNS) -> int:
    """Return the columns of a tile that holds `dim` of them."""
    return max(power_of_two(dim), least)


def group_rows(group: int) -> int:
    """Return the rows of a tile for the query heads that share a key head."""
    return min(columns(group), MOST_ROWS)


def tile_tokens(token_bytes: int) -> int:
    """Return the tokens of a tile, each of so many bytes in fast memory."""
    return max(LEAST_TILE, min(MOST_TILE, power_of_two(TILE_BYTES // token_bytes + 1) // 2))


def fits(key_bytes: int, value_bytes: int) -> bool:
    """Whether the smallest tiles of queries, keys and values, with heads of so many bytes, fit the fast memory of every device."""
    return LEAST_TILE * (2 * key_bytes + value_bytes) < STAGED_BYTES


def options(tile_bytes: int, num_sums: int, query_bytes: int = 0) -> dict[str, int]:
    """Return the options of a launch whose programs read tiles of so many bytes, and hold so many sums and bytes of queries."""
    return {"num_warps": 8 if num_sums >= WIDE_SUMS else 4, "num_stages": 2 if 2 * tile_bytes + query_bytes <= STAGED_BYTES else 1}


def run_in_parts(
    kernel: Any, programs: int, by_sequence: dict[str, Tensor], shared: dict[str, Any], sinks: Tensor | None, out: Tensor, positions: int
) -> None:
    """Launch a kernel for decode attention, and after it the one that merges its parts, if sequences may have more than one.

    Args:
        kernel: The kernel.
        programs: The number of its programs for each part of a sequence.
        by_sequence: Its arguments whose rows are sequences, "starts" and "lengths" among them.
        shared: Its other arguments.
        sinks: The sinks, (heads,), if any.
        out: The results, (S, heads, dim).
        positions: The number of positions that a sequence may have at most.
    """
    num_sequences, heads, dim = out.shape
    num_parts = -(-positions // SPLIT_TOKENS)
    at_once = num_sequences if num_parts == 1 else max(1, PARTS_BYTES // (num_parts * heads * (dim + 2) * 4))
    for first in range(0, num_sequences, at_once):
        rows = slice(first, first + at_once)
        some, found = {name: tensor[rows] for name, tensor in by_sequence.items()}, out[rows]
        sums = states = None
        if num_parts > 1:
            sums = torch.empty(len(found), heads, num_parts, dim, dtype=torch.float32, device=out.device)
            states = torch.empty(len(found), heads, num_parts, 2, dtype=torch.float32, device=out.device)
        on_grid(kernel, (len(found), programs, num_parts), out.device)(
            **some, **shared, sinks=sinks, out=found, part_sums=sums, part_states=states, SPLIT=SPLIT_TOKENS
        )
        if sums is not None:
            on_grid(merge_parts, (len(found), heads), out.device)(
                sums, states, some["starts"], some["lengths"], sinks, found, num_parts,
                HEADS=heads, DIM=dim, COLUMNS=columns(dim), SPLIT=SPLIT_TOKENS,
            )  # fmt: skip
