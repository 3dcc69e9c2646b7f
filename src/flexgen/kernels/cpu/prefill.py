"""Prefill attention: many queries of one sequence, block by block as in FlashAttention-2 (arXiv:2307.08691).

A work item is a run of queries under one key head.  A block of keys and values is widened into panels of PANEL
columns, which the product streams through the first-level cache for one tile of rows after the other.  A row is
one query token under one query head; the heads of a token are adjacent.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import widen
from flexgen.kernels.cpu.rows import PANEL, Rows, clear, moved, padded, part, pointer, widen_row
from flexgen.kernels.cpu.softmax import absorb_rows, begin_rows, rows_from, softmax_state, write_rows
from flexgen.kernels.cpu.tile import add_product

ROWS_PER_ITEM = 512
ROWS_PER_TILE = 8
PREFILL_BLOCK = 256  # tokens; keys and values of a block, widened, stay in the second-level cache


def prefill_workspace(rows: int, key_dim: int, value_dim: int) -> int:
    """Return the number of elements that `prefill_attention` needs as workspace."""
    columns = -(-value_dim // PANEL) * PANEL
    parts = (rows * key_dim, PREFILL_BLOCK * key_dim, PREFILL_BLOCK * columns, ROWS_PER_TILE * PREFILL_BLOCK, rows * columns, rows, rows)
    return sum(padded(size) for size in parts)


@entry
def prefill_attention(
    begin: int,
    end: int,
    query: Any,
    stored_key: Any,
    stored_value: Any,
    stored_starts: Any,
    stored_ends: Any,
    key: Any,
    value: Any,
    starts: Any,
    ends: Any,
    sinks: Any,
    scaling: Any,
    softcap: Any,
    item_tokens: int,
    out: Any,
    workspace: Any,
) -> None:
    """Compute work items begin <= run * kv_heads + kv_head < end, of `item_tokens` queries each.

    A query i sees stored_starts[i] <= row < stored_ends[i] of the stored keys, of which there may be none, and starts[i] <= row < ends[i]
    of the others; ends never fall from one query to the next.
    """
    num_queries, heads, key_dim = query.shape
    _, kv_heads, value_dim = value.shape
    group = heads // kv_heads
    rows, columns = item_tokens * group, (value_dim + PANEL - 1) // PANEL * PANEL
    queries = Rows(pointer(workspace, 0), key_dim)
    keys = Rows(moved(queries.first, padded(rows * key_dim)), PANEL)
    values = Rows(moved(keys.first, padded(PREFILL_BLOCK * key_dim)), PANEL)
    scores = Rows(moved(values.first, padded(PREFILL_BLOCK * columns)), PREFILL_BLOCK)
    state = softmax_state(moved(scores.first, ROWS_PER_TILE * PREFILL_BLOCK), rows, columns)

    for item in range(begin, end):
        kv_head, first_query = item % kv_heads, item // kv_heads * item_tokens
        tokens = min(item_tokens, num_queries - first_query)
        for i in range(tokens):
            place = (first_query + i) * heads + kv_head * group
            widen_row(pointer(query, place * key_dim), moved(queries.first, i * group * key_dim), group * key_dim)
            begin_rows(rows_from(state, i * group), group, sinks, kv_head * group)
        attend_run(
            queries, stored_key, stored_value, stored_starts, stored_ends, keys, values, scores, state,
            first_query, tokens, group, kv_head, scaling, softcap,
        )  # fmt: skip
        attend_run(queries, key, value, starts, ends, keys, values, scores, state, first_query, tokens, group, kv_head, scaling, softcap)
        for i in range(tokens):
            place = (first_query + i) * heads + kv_head * group
            write_rows(rows_from(state, i * group), group, value_dim, pointer(out, place * value_dim))


@njit
def attend_run(
    queries: Any, key: Any, value: Any, starts: Any, ends: Any, keys: Any, values: Any, scores: Any, state: Any,
    first_query: int, tokens: int, group: int, kv_head: int, scaling: Any, softcap: Any,
) -> None:  # fmt: skip
    """Let a run of queries see keys and values, block by block."""
    _, kv_heads, value_dim = value.shape
    key_dim, last, lowest = queries.stride, ends[first_query + tokens - 1], ends[first_query + tokens - 1]
    for i in range(first_query, first_query + tokens):
        lowest = min(lowest, starts[i])
    # Blocks lie where they lie for every item, so that no result depends on how the work was cut.
    for block in range(lowest // PREFILL_BLOCK * PREFILL_BLOCK, last, PREFILL_BLOCK):
        block_end = min(block + PREFILL_BLOCK, last)
        for position in range(max(block, lowest // PANEL * PANEL), block_end):
            place = position * kv_heads + kv_head
            put_key(pointer(key, place * key_dim), keys.first, position - block, key_dim)
            put_value(pointer(value, place * value_dim), values.first, position - block, value_dim)
        for row in range(0, tokens * group, ROWS_PER_TILE):
            tile_rows = min(ROWS_PER_TILE, tokens * group - row)
            attend_tile(
                part(queries, row, 0), keys, values, scores, rows_from(state, row), starts, ends,
                first_query * group + row, tile_rows, group, block, block_end, scaling, softcap,
            )  # fmt: skip


@njit
def put_key(stored: Any, panels: Any, column: int, key_dim: int) -> None:
    """Widen one key into a column of its panel; panels are stored one after the other as (key_dim, PANEL)."""
    panel = moved(panels, column // PANEL * PANEL * key_dim + column % PANEL)
    for i in range(key_dim):
        panel[i * PANEL] = widen(stored[i])


@njit
def put_value(stored: Any, panels: Any, row: int, value_dim: int) -> None:
    """Widen one value into a row of every panel; panels are stored one after the other as (PREFILL_BLOCK, PANEL)."""
    for first in range(0, value_dim, PANEL):
        widen_row(moved(stored, first), moved(panels, first * PREFILL_BLOCK + row * PANEL), min(PANEL, value_dim - first))


@njit
def attend_tile(
    queries: Any, keys: Any, values: Any, scores: Any, state: Any, starts: Any, ends: Any,
    first_row: int, rows: int, group: int, block: int, block_end: int, scaling: Any, softcap: Any,
) -> None:  # fmt: skip
    """Let a few rows, numbered from `first_row` over all queries, see their part of a block of keys and values."""
    first_query, last_query = first_row // group, (first_row + rows - 1) // group
    lowest, highest = block_end, min(ends[last_query], block_end)
    for i in range(first_query, last_query + 1):
        lowest = min(lowest, max(starts[i], block))
    first, last = (lowest - block) // PANEL * PANEL, highest - block
    clear(scores.first, rows * PREFILL_BLOCK)
    for column in range(first, last, PANEL):
        panel = Rows(moved(keys.first, column * queries.stride), PANEL)
        add_product(queries, panel, part(scores, 0, column), rows, queries.stride, PANEL, 0)
    for row in range(rows):
        query = (first_row + row) // group
        begin, end = max(starts[query], block) - block, min(ends[query], block_end) - block
        own = part(scores, row, 0)
        if begin < end:
            absorb_rows(own, begin, end, 1, scaling, softcap, rows_from(state, row))
        clear(moved(own.first, first), min(begin, last) - first)
        clear(moved(own.first, max(end, first)), last - max(end, first))
    for column in range(0, state.totals.stride, PANEL):
        panel = Rows(moved(values.first, column * PREFILL_BLOCK + first * PANEL), PANEL)
        add_product(part(scores, 0, first), panel, part(state.totals, 0, column), rows, last - first, PANEL, 0)
