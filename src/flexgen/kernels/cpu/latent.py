"""Decode attention on cached latents.  All query heads share one key head, so the cost lies in computing.

The latents are keys and values at once.  Pages store them as keys, transposed, for the scores.  The weighted sum reads
them the other way round, from panels into which a block is turned once for all heads.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import widen
from flexgen.kernels.cpu.rows import PANEL, Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.softmax import absorb_rows, begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import add_product

LATENT_BLOCK = 128  # tokens; latents of a block, widened, stay in the second-level cache


def latent_workspace(heads: int, rank: int, rope_dim: int, page_tokens: int) -> int:
    """Return the number of elements that `decode_latent_attention` needs as workspace."""
    columns, block_tokens = -(-rank // PANEL) * PANEL, max(LATENT_BLOCK, page_tokens)
    parts = (
        heads * rank,
        heads * rope_dim,
        rope_dim * page_tokens,
        columns * block_tokens,
        heads * block_tokens,
        heads * columns,
        heads,
        heads,
    )
    return sum(padded(size) for size in parts)


@entry
def decode_latent_attention(
    begin: int,
    end: int,
    query_latent: Any,
    query_rope: Any,
    key_pages: Any,
    value_pages: Any,
    page_tables: Any,
    starts: Any,
    lengths: Any,
    sinks: Any,
    scaling: Any,
    item_heads: int,
    out: Any,
    workspace: Any,
) -> None:
    """Compute work items begin <= sequence * items per sequence + item < end, of `item_heads` heads each, without sinks."""
    num_pages, _, rank, page_tokens = key_pages.shape
    heads, rope_dim = query_rope.shape[1:]
    items_per_sequence = (heads + item_heads - 1) // item_heads
    columns, block_tokens = (rank + PANEL - 1) // PANEL * PANEL, max(LATENT_BLOCK, page_tokens)
    latent_queries = Rows(pointer(workspace, 0), rank)
    rope_queries = Rows(moved(latent_queries.first, padded(item_heads * rank)), rope_dim)
    ropes = Rows(moved(rope_queries.first, padded(item_heads * rope_dim)), page_tokens)
    latents = moved(ropes.first, padded(rope_dim * page_tokens))
    scores = Rows(moved(latents, padded(columns * block_tokens)), block_tokens)
    state = softmax_state(moved(scores.first, padded(item_heads * block_tokens)), item_heads, columns)

    for item in range(begin, end):
        sequence, head = item // items_per_sequence, item % items_per_sequence * item_heads
        start, length, item_size = starts[sequence], lengths[sequence], min(item_heads, heads - head)
        table, last_page = pointer(page_tables, sequence * page_tables.shape[1]), (length - 1) // page_tokens
        first_head = sequence * heads + head
        widen_row(pointer(query_latent, first_head * rank), latent_queries.first, item_size * rank)
        widen_row(pointer(query_rope, first_head * rope_dim), rope_queries.first, item_size * rope_dim)
        begin_rows(state, item_size, sinks, 0)
        for block in range(start - start % page_tokens, length, block_tokens):
            block_end, visible = min(block + block_tokens, length), max(start, block)
            clear(scores.first, item_size * block_tokens)
            for position in range(block, block_end, page_tokens):
                page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
                size, page_scores = rank * page_tokens, part(scores, 0, position - block)
                stored = Rows(pointer(key_pages, page * size), page_tokens)
                add_product(latent_queries, stored, page_scores, item_size, rank, page_tokens, (following - page) * size)
                turn_rope(pointer(value_pages, page * page_tokens * rope_dim), ropes, rope_dim)
                add_product(rope_queries, ropes, page_scores, item_size, rope_dim, page_tokens, 0)
                turn_latents(stored, moved(latents, (position - block) * PANEL), rank, block_tokens)
            absorb_rows(scores, visible - block, block_end - block, item_size, scaling, scaling * 0, state)
            add_panels(part(scores, 0, visible - block), latents, visible - block, block_end - block, item_size, block_tokens, state.totals)
        write_rows(state, item_size, rank, pointer(out, first_head * rank))


@njit
def add_panels(weights: Any, panels: Any, first: int, end: int, heads: int, block_tokens: int, totals: Any) -> None:
    """Add the latents of a block's tokens first <= token < end, times their weights, to each head's totals, panel by panel."""
    for column in range(0, totals.stride, PANEL):
        panel = Rows(moved(panels, column * block_tokens + first * PANEL), PANEL)
        add_product(weights, panel, part(totals, 0, column), heads, end - first, PANEL, 0)


@njit
def turn_rope(stored: Any, ropes: Any, rope_dim: int) -> None:
    """Widen a page of values (page_tokens, rope_dim) into (rope_dim, page_tokens)."""
    for token in range(ropes.stride):
        for i in range(rope_dim):
            ropes.first[i * ropes.stride + token] = widen(stored[token * rope_dim + i])


@njit
def turn_latents(stored: Any, panels: Any, rank: int, block_tokens: int) -> None:
    """Widen a page of keys (rank, page_tokens) into rows of panels, which are stored one after the other as (block_tokens, PANEL)."""
    for i in range(rank):
        panel = moved(panels, i // PANEL * PANEL * block_tokens + i % PANEL)
        for token in range(stored.stride):
            panel[token * PANEL] = widen(stored.first[i * stored.stride + token])
