"""Sparse decode attention on sealed pages: decode_sealed.py's products with codes, and of the values those that some head keeps.

Of a page of which at least half of the values are kept, all are read, because whole pages have a faster loop.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.choose import choose_rows, clear_rows, next_run
from flexgen.kernels.cpu.decode_sealed import add_page, prepare_queries, score_page, unfold
from flexgen.kernels.cpu.decode_sparse import add_values
from flexgen.kernels.cpu.rows import Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.sealed_scratch import codes_of, laid_out, place_of, scratch_sizes
from flexgen.kernels.cpu.softmax import begin_rows, write_rows
from flexgen.kernels.cpu.tile import add_product


def decode_sparse_sealed_workspace(group: int, key_dim: int, value_dim: int, page_tokens: int, columns: int) -> int:
    """Return the number of elements that `decode_sparse_sealed_attention` needs as workspace."""
    return sum(scratch_sizes(group, key_dim, value_dim, page_tokens)) + (2 + group) * padded(columns)


@entry
def decode_sparse_sealed_attention(
    begin: int,
    end: int,
    query: Any,
    keys: Any,
    key_parameters: Any,
    key_bits: int,
    turns: bool,
    values: Any,
    value_parameters: Any,
    value_bits: int,
    tail_keys: Any,
    tail_values: Any,
    page_tables: Any,
    tails: Any,
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
    """Compute work items begin <= sequence * kv_heads + kv_head < end; arguments are those of decode_sealed.py and decode_sparse.py."""
    num_tails, kv_heads, key_dim, page_tokens = tail_keys.shape
    value_dim, heads = tail_values.shape[3], query.shape[1]
    group = heads // kv_heads
    key_codes = codes_of(keys, key_parameters, key_bits, key_dim, page_tokens)
    value_codes = codes_of(values, value_parameters, value_bits, value_dim, page_tokens)
    compact = pointer(workspace, 0)
    union = moved(compact, padded(columns))
    products = Rows(moved(union, padded(columns)), padded(columns))
    scratch = laid_out(moved(products.first, group * padded(columns)), group, key_dim, value_dim, page_tokens)

    for item in range(begin, end):
        sequence, kv_head = item // kv_heads, item % kv_heads
        start, length, tail = starts[sequence], lengths[sequence], tails[sequence]
        page_and_next(pointer(tails, 0), sequence, sequence, num_tails)  # is it in the pool
        border = (length - 1) // page_tokens * page_tokens
        table, last_page = pointer(page_tables, sequence * page_tables.shape[1]), border // page_tokens - 1
        first_head, origin = sequence * heads + kv_head * group, start - start % page_tokens
        widen_row(pointer(query, first_head * key_dim), scratch.queries.first, group * key_dim)
        prepare_queries(scratch, group, key_codes, turns)
        begin_rows(scratch.state, group, sinks, kv_head * group)
        clear_rows(products, group, border + page_tokens - origin)
        for position in range(origin, border, page_tokens):
            page, following = page_and_next(table, position // page_tokens, last_page, key_codes.num_pages)
            place, later = place_of(key_codes, page, kv_head), place_of(key_codes, following, kv_head)
            score_page(key_codes, place, later, part(products, 0, position - origin), 0, group, scratch)
        tail_head = tail * kv_heads + kv_head
        stored = Rows(pointer(tail_keys, tail_head * key_dim * page_tokens), page_tokens)
        add_product(scratch.queries, stored, part(products, 0, border - origin), group, key_dim, page_tokens, 0)
        choose_rows(
            products,
            start - origin,
            border - origin,
            length - origin,
            group,
            kept[sequence],
            scaling,
            softcap,
            compact,
            union,
            scratch.state,
        )
        count = 0
        clear(scratch.offsets.first, group * scratch.offsets.stride)
        clear(scratch.coded.first, group * scratch.coded.stride)
        for position in range(origin, border, page_tokens):
            place = place_of(value_codes, table[position // page_tokens], kv_head)
            count += add_chosen(products, union, value_codes, place, group, position - origin, max(start - position, 0), scratch)
        unfold(value_codes, group, scratch)
        own = pointer(tail_values, tail_head * value_dim * page_tokens)
        count += add_values(products, union, own, border - origin, length - origin, group, value_dim, scratch.state.totals)
        read[item] = count
        write_rows(scratch.state, group, value_dim, pointer(out, first_head * value_dim))


@njit
def add_chosen(weights: Any, union: Any, values: Any, place: int, heads: int, first: int, hidden: int, scratch: Any) -> int:
    """Add the weighted values that some head keeps of a page that begins at column `first`; return how many values were read.

    The first `hidden` values of the page are not visible.
    """
    end, wanted = first + values.page_tokens, 0
    for column in range(first, end):
        wanted += union[column] != 0
    if 2 * wanted >= values.page_tokens:
        add_page(values, place, place, part(weights, 0, first + hidden), 0, heads, hidden, values.page_tokens, scratch)
        return values.page_tokens - hidden
    row, stop = next_run(union, first, end)
    while row < end:
        add_page(values, place, place, part(weights, 0, row), 0, heads, row - first, stop - first, scratch)
        row, stop = next_run(union, stop, end)
    return wanted
