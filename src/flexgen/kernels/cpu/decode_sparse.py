"""Sparse decode attention: all keys of a sequence are read, and of its values those that some head of the group keeps.

Work items are those of decode.py.  Products with all visible keys are held at once, since which of them are the highest is known only then.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.choose import choose_rows, clear_rows, next_run
from flexgen.kernels.cpu.rows import Rows, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.softmax import begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import add_product


def decode_sparse_workspace(group: int, key_dim: int, value_dim: int, columns: int) -> int:
    """Return the number of elements that `decode_sparse_attention` needs as workspace."""
    return sum(padded(size) for size in (group * key_dim, columns, columns, group * columns, group * value_dim, group, group))


@entry
def decode_sparse_attention(
    begin: int,
    end: int,
    query: Any,
    key_pages: Any,
    value_pages: Any,
    page_tables: Any,
    starts: Any,
    lengths: Any,
    kept: Any,
    sinks: Any,
    scaling: Any,
    softcap: Any,
    columns: int,
    out: Any,
    read: Any,
    workspace: Any,
) -> None:
    """Compute work items begin <= sequence * kv_heads + kv_head < end, and write to `read` how many values each has read.

    `columns` is the most positions that the pages of one sequence have, from that of its first visible position on.
    """
    num_pages, kv_heads, key_dim, page_tokens = key_pages.shape
    value_dim, heads = value_pages.shape[3], query.shape[1]
    group = heads // kv_heads
    queries = Rows(pointer(workspace, 0), key_dim)
    compact = moved(queries.first, padded(group * key_dim))
    union = moved(compact, padded(columns))
    products = Rows(moved(union, padded(columns)), columns)
    state = softmax_state(moved(products.first, padded(group * columns)), group, value_dim)

    for item in range(begin, end):
        sequence, kv_head = item // kv_heads, item % kv_heads
        start, length = starts[sequence], lengths[sequence]
        table, last_page = pointer(page_tables, sequence * page_tables.shape[1]), (length - 1) // page_tokens
        first_head, origin = sequence * heads + kv_head * group, start - start % page_tokens
        widen_row(pointer(query, first_head * key_dim), queries.first, group * key_dim)
        begin_rows(state, group, sinks, kv_head * group)
        clear_rows(products, group, (last_page + 1) * page_tokens - origin)
        for position in range(origin, length, page_tokens):
            page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
            size = key_dim * page_tokens
            stored = Rows(pointer(key_pages, (page * kv_heads + kv_head) * size), page_tokens)
            ahead = (following - page) * kv_heads * size
            add_product(queries, stored, part(products, 0, position - origin), group, key_dim, page_tokens, ahead)
        choose_rows(
            products, start - origin, last_page * page_tokens - origin, length - origin, group, kept[sequence], scaling, softcap,
            compact, union, state,
        )  # fmt: skip
        count = 0
        for position in range(origin, length, page_tokens):
            place = (table[position // page_tokens] * kv_heads + kv_head) * value_dim * page_tokens
            page_end = min(position + page_tokens, length)
            count += add_values(
                products, union, pointer(value_pages, place), position - origin, page_end - origin, group, value_dim, state.totals
            )
        read[item] = count
        write_rows(state, group, value_dim, pointer(out, first_head * value_dim))


@njit
def add_values(weights: Any, union: Any, values: Any, first: int, end: int, heads: int, dim: int, totals: Any) -> int:
    """Add the weighted values, of a page that begins at column `first` of the weights, that some head keeps; return their number."""
    count = 0
    row, stop = next_run(union, first, end)
    while row < end:
        stored = Rows(moved(values, (row - first) * dim), dim)
        add_product(part(weights, 0, row), stored, totals, heads, stop - row, dim, 0)
        count += stop - row
        row, stop = next_run(union, stop, end)
    return count
