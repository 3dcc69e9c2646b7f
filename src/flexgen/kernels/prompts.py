"""Prompts whose tokens all lie in pages, earlier ones and new ones: all of a micro-batch at once, and in plain torch one tile at a time.

The letters of shapes and the layouts are those of reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.dense import attend
from flexgen.kernels.pages import gather_kv, page_tables

TILE_ROWS = 64  # tokens that a program attends with
SHORT_TILE_ROWS = 16  # the same where no prompt has more


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPrompts:
    """New tokens of prompts, cut into tiles: runs of neighbouring tokens of one prompt.  It is made once per pass, on the host.

    Attributes:
        tiles: int64 (tiles, 4).  Of each tile the first of its rows among the queries, the number of its rows, the position of its first
            row, and the row of its page table.
        tile_rows: The most rows of a tile.
        page_tables: int64 (prompts, max_pages).  Entries of pages wholly outside the visible positions are never read.
        starts: int64 (T,).  The first position that each query sees; the last one is its own.
    """

    tiles: Tensor
    tile_rows: int
    page_tables: Tensor
    starts: Tensor


def paged_prompts(
    spans: Sequence[tuple[int, int]], tables: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int] | np.ndarray, device: torch.device
) -> PagedPrompts:
    """Return the tiles of prompts.

    Args:
        spans: The position of each prompt's first new token, and the position after its last.
        tables: The page ids of each prompt.
        starts: The first position that each new token sees.
        device: The device of the tensors.
    """

    def integers(values: Sequence[object] | np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    tile_rows = TILE_ROWS if any(end - begin > SHORT_TILE_ROWS for begin, end in spans) else SHORT_TILE_ROWS
    tiles: list[tuple[int, int, int, int]] = []
    row = 0
    for prompt, (begin, end) in enumerate(spans):
        tiles += [(row + position - begin, min(tile_rows, end - position), position, prompt) for position in range(begin, end, tile_rows)]
        row += end - begin
    return PagedPrompts(
        tiles=integers(tiles),
        tile_rows=tile_rows,
        page_tables=page_tables(tables, device),
        starts=integers(starts),
    )


def prefill_paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    prompts: PagedPrompts,
    *,
    scaling: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Let the new tokens of several prompts attend to everything before them and to themselves, all of which is stored already.

    Args:
        query: (T, H, Dk), the new tokens of one prompt after those of another.
        key_pages: (pages, K, Dk, page_tokens).
        value_pages: (pages, K, page_tokens, Dv).
        prompts: Where the new tokens stand, and what they see.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
        out: (T, H, Dv), of the query's dtype; written.
    """
    for row, num_rows, position, prompt in prompts.tiles.tolist():
        rows, end = slice(row, row + num_rows), position + num_rows
        starts = prompts.starts[rows, None].clamp(min=0)
        first = int(starts.min())
        key, value = gather_kv(key_pages, value_pages, prompts.page_tables[prompt], first, end)
        positions = torch.arange(first, end, device=query.device)
        visible = (starts <= positions) & (positions <= positions[position - first :, None])
        out[rows] = attend(query[rows], key, value, visible, scaling, softcap, sinks)
