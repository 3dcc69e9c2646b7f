"""Sparse decode attention on sealed pages: decode_sealed.py's products with codes, and of the values those that some head keeps.

Of a page of which at least half of the values are kept, all are read, because whole pages have a faster loop.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.choose import choose_rows, clear_rows, list_marked
from flexgen.kernels.cpu.decode_sealed import add_page, prepare_queries, score_page, unfold
from flexgen.kernels.cpu.gather import add_coded, gathered_size, laid_out_lists
from flexgen.kernels.cpu.rows import Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.sealed_scratch import codes_of, heads_at_once, laid_out, place_of, scratch_sizes
from flexgen.kernels.cpu.softmax import begin_rows, rows_from, write_rows
from flexgen.kernels.cpu.tile import add_product


def decode_sparse_sealed_workspace(group: int, key_dim: int, value_dim: int, page_tokens: int, columns: int) -> int:
    """Return the number of elements that `decode_sparse_sealed_attention` needs as workspace."""
    rows = group * heads_at_once(group)
    return sum(scratch_sizes(group, key_dim, value_dim, page_tokens)) + rows * padded(columns) + gathered_size(group, value_dim)


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
    lists: Any,
) -> None:
    """Compute work items begin <= sequence * kv_heads + kv_head < end; arguments are those of decode_sealed.py and decode_sparse.py."""
    num_tails, kv_heads, key_dim, page_tokens = tail_keys.shape
    value_dim, heads = tail_values.shape[3], query.shape[1]
    group = heads // kv_heads
    key_codes = codes_of(keys, key_parameters, key_bits, key_dim, page_tokens)
    value_codes = codes_of(values, value_parameters, value_bits, value_dim, page_tokens)
    products = Rows(pointer(workspace, 0), padded(columns))
    gather = moved(products.first, group * heads_at_once(group) * products.stride)
    marks, union, block = laid_out_lists(lists, gather, padded(columns), group, value_dim)
    scratch = laid_out(moved(gather, gathered_size(group, value_dim)), group, key_dim, value_dim, page_tokens)
    item = begin
    while item < end:
        sequence, kv_head = item // kv_heads, item % kv_heads
        count = min(heads_at_once(group), kv_heads - kv_head, end - item)
        start, length, tail = starts[sequence], lengths[sequence], tails[sequence]
        page_and_next(pointer(tails, 0), sequence, sequence, num_tails)  # is it in the pool
        border = (length - 1) // page_tokens * page_tokens
        table, first_head = pointer(page_tables, sequence * page_tables.shape[1]), sequence * heads + kv_head * group
        origin, tail_head = start - start % page_tokens, tail * kv_heads + kv_head
        widen_row(pointer(query, first_head * key_dim), scratch.queries.first, group * count * key_dim)
        prepare_queries(scratch, group * count, key_codes, turns)
        begin_rows(scratch.state, group * count, sinks, kv_head * group)
        clear_rows(products, group * count, border + page_tokens - origin)
        multiply_keys(key_codes, table, origin, border, kv_head, count, group, products, scratch)
        clear(scratch.offsets.first, group * count * scratch.offsets.stride)
        clear(scratch.coded.first, group * count * scratch.coded.stride)
        for head in range(count):
            own, state = part(products, head * group, 0), rows_from(scratch.state, head * group)
            place = (tail_head + head) * page_tokens
            stored = Rows(pointer(tail_keys, place * key_dim), page_tokens)
            add_product(part(scratch.queries, head * group, 0), stored, part(own, 0, border - origin), group, key_dim, page_tokens, 0)
            choose_rows(own, start - origin, border - origin, length - origin, group, kept[sequence], scaling, softcap, marks, union, state)
            num_read, num_listed = add_full_pages(
                own, union, value_codes, table, start, border, kv_head + head, head * group, group, block, scratch
            )
            add_coded(own, value_codes, group, num_listed, block, state.totals)
            first = max(start, border)
            stored = Rows(pointer(tail_values, (place + first - border) * value_dim), value_dim)
            add_product(part(own, 0, first - origin), stored, state.totals, group, length - first, value_dim, 0)
            read[item + head] = num_read + length - first
        unfold(value_codes, group * count, scratch)
        write_rows(scratch.state, group * count, value_dim, pointer(out, first_head * value_dim))
        item += count


@njit
def multiply_keys(
    keys: Any, table: Any, origin: int, border: int, kv_head: int, count: int, group: int, products: Any, scratch: Any
) -> None:
    """Add the products with the keys of `count` key heads from `kv_head` on, whose codes are neighbours in memory."""
    last_page = border // keys.page_tokens - 1
    for position in range(origin, border, keys.page_tokens):
        page, following = page_and_next(table, position // keys.page_tokens, last_page, keys.num_pages)
        for head in range(count):
            place, later = place_of(keys, page, kv_head + head), place_of(keys, following, kv_head + head)
            score_page(keys, place, later, part(products, head * group, position - origin), head * group, group, scratch)


@njit
def add_full_pages(
    weights: Any, union: Any, values: Any, table: Any, start: int, border: int, kv_head: int, row: int, group: int, block: Any,
    scratch: Any,
) -> Any:  # fmt: skip
    """Add the weighted values of pages of which some head keeps at least half, to the totals from `row` on, and list the other kept ones.

    Returns:
        The number of values that are read, and of those that are listed.
    """
    page_tokens, origin = values.page_tokens, start - start % values.page_tokens
    num_read, count, last = 0, 0, weights.stride  # full pages are listed from the end of the lists on, backwards
    for position in range(origin, border, page_tokens):
        place, first = place_of(values, table[position // page_tokens], kv_head), position - origin
        listed = list_marked(union, first, first + page_tokens, 0, place, block.columns, block.places, count)
        if 2 * (listed - count) >= page_tokens:
            last -= 1
            block.columns[last], block.places[last] = first, place
            num_read += page_tokens - max(start - position, 0)
        else:
            num_read, count = num_read + listed - count, listed
    for page in range(weights.stride - 1, last - 1, -1):
        place, later = block.places[page], block.places[max(page - 1, last)]
        hidden = max(start - origin - block.columns[page], 0)
        add_page(values, place, later, part(weights, 0, block.columns[page] + hidden), row, group, hidden, page_tokens, scratch)
    return num_read, count
