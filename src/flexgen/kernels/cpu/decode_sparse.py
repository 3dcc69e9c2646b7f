"""Sparse decode attention: all keys of a sequence are read, and of its values those that some head of the group keeps.

Work items are those of decode.py.  Products with all visible keys are held at once, since which of them are the highest is known only then.
"""

from __future__ import annotations

from typing import Any

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.choose import choose_rows, clear_rows, list_marked
from flexgen.kernels.cpu.gather import add_plain, gathered_size, laid_out_lists
from flexgen.kernels.cpu.rows import Rows, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.softmax import begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import CACHE_LINE, add_product


def decode_sparse_workspace(group: int, key_dim: int, value_dim: int, columns: int) -> int:
    """Return the number of elements that `decode_sparse_attention` needs as workspace."""
    sizes = (group * key_dim, group * columns, gathered_size(group, value_dim), group * value_dim, group, group)
    return sum(padded(size) for size in sizes)


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
    lists: Any,
) -> None:
    """Compute work items begin <= sequence * kv_heads + kv_head < end, and write to `read` how many values each has read.

    `columns` is the most positions that the pages of one sequence have, from that of its first visible position on.
    """
    num_pages, kv_heads, key_dim, page_tokens = key_pages.shape
    value_dim, heads = value_pages.shape[3], query.shape[1]
    group = heads // kv_heads
    queries = Rows(pointer(workspace, 0), key_dim)
    products = Rows(moved(queries.first, padded(group * key_dim)), columns)
    gather = moved(products.first, padded(group * columns))
    state = softmax_state(moved(gather, gathered_size(group, value_dim)), group, value_dim)
    marks, union, block = laid_out_lists(lists, gather, columns, group, value_dim)

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
            marks, union, state,
        )  # fmt: skip
        count = 0
        for position in range(origin, length, page_tokens):
            place = (table[position // page_tokens] * kv_heads + kv_head) * value_dim * page_tokens
            first, stop = position - origin, min(position + page_tokens, length) - origin
            count = list_marked(union, first, stop, value_dim, place, block.columns, block.places, count)
        add_plain(products, pointer(value_pages, 0), CACHE_LINE // value_pages.itemsize, group, value_dim, count, block, state.totals)
        read[item] = count
        write_rows(state, group, value_dim, pointer(out, first_head * value_dim))
