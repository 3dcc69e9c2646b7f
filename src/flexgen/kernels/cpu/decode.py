"""Decode attention: one query token per sequence reads its sequence's pages once, as fast as memory delivers them.

A work item is one sequence under one key head, with the whole group of query heads that shares it: each element of
the cache is read and widened once.
"""

from __future__ import annotations

from typing import Any

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.rows import Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.softmax import absorb_rows, begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import add_product

DECODE_BLOCK = 512  # tokens; the scores of a block stay in the first-level cache


def decode_workspace(group: int, key_dim: int, value_dim: int, page_tokens: int) -> int:
    """Return the number of elements that `decode_attention` needs as workspace."""
    return sum(padded(group * size) for size in (key_dim, max(DECODE_BLOCK, page_tokens), value_dim, 1, 1))


@entry
def decode_attention(
    begin: int,
    end: int,
    query: Any,
    key_pages: Any,
    value_pages: Any,
    page_tables: Any,
    starts: Any,
    lengths: Any,
    sinks: Any,
    scaling: Any,
    softcap: Any,
    out: Any,
    workspace: Any,
) -> None:
    """Compute work items begin <= sequence * kv_heads + kv_head < end."""
    num_pages, kv_heads, key_dim, page_tokens = key_pages.shape
    value_dim, heads = value_pages.shape[3], query.shape[1]
    group = heads // kv_heads
    block_tokens = max(DECODE_BLOCK, page_tokens)
    queries = Rows(pointer(workspace, 0), key_dim)
    scores = Rows(moved(queries.first, padded(group * key_dim)), block_tokens)
    state = softmax_state(moved(scores.first, padded(group * block_tokens)), group, value_dim)

    for item in range(begin, end):
        sequence, kv_head = item // kv_heads, item % kv_heads
        start, length = starts[sequence], lengths[sequence]
        table, last_page = pointer(page_tables, sequence * page_tables.shape[1]), (length - 1) // page_tokens
        first_head = sequence * heads + kv_head * group
        widen_row(pointer(query, first_head * key_dim), queries.first, group * key_dim)
        begin_rows(state, group, sinks, kv_head * group)
        for block in range(start - start % page_tokens, length, block_tokens):
            block_end, visible = min(block + block_tokens, length), max(start, block)
            clear(scores.first, group * block_tokens)
            for position in range(block, block_end, page_tokens):
                page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
                size = key_dim * page_tokens
                stored = Rows(pointer(key_pages, (page * kv_heads + kv_head) * size), page_tokens)
                ahead = (following - page) * kv_heads * size
                add_product(queries, stored, part(scores, 0, position - block), group, key_dim, page_tokens, ahead)
            absorb_rows(scores, visible - block, block_end - block, group, scaling, softcap, state)
            for position in range(block, block_end, page_tokens):
                page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
                size, first = value_dim * page_tokens, max(visible, position)
                place = (page * kv_heads + kv_head) * size + (first - position) * value_dim
                stored = Rows(pointer(value_pages, place), value_dim)
                rows, ahead = min(position + page_tokens, block_end) - first, (following - page) * kv_heads * size
                add_product(part(scores, 0, first - block), stored, state.totals, group, rows, value_dim, ahead)
        write_rows(state, group, value_dim, pointer(out, first_head * value_dim))
