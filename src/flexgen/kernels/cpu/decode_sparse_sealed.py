"""Sparse decode attention on sealed pages: decode_sealed.py's products with codes, and of the values those that some head keeps.

Of a page of which at least half of the values are kept, all are read, because whole pages have a faster loop.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.codes import GROUP
from flexgen.kernels.cpu.choose import choose_rows, clear_rows, next_run
from flexgen.kernels.cpu.code_tile import prefetch_bytes
from flexgen.kernels.cpu.decode_sealed import add_offsets, add_page, prepare_queries, score_page, unpack
from flexgen.kernels.cpu.decode_sparse import add_values
from flexgen.kernels.cpu.rows import LANES, Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.sealed import code_bytes_of
from flexgen.kernels.cpu.softmax import begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import add_product


def decode_sparse_sealed_workspace(group: int, key_dim: int, value_dim: int, page_tokens: int, columns: int) -> int:
    """Return the number of elements that `decode_sparse_sealed_attention` needs as workspace."""
    groups = -(-max(key_dim, value_dim) // GROUP)
    parts = (
        group * key_dim, group * key_dim, group * groups, columns, columns, group * columns, group * max(page_tokens, LANES),
        GROUP * page_tokens, 2 * page_tokens, group * groups * LANES, group * value_dim, group, group,
    )  # fmt: skip
    return sum(padded(size) for size in parts)


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
    num_pages, value_dim, heads = keys.shape[0], tail_values.shape[3], query.shape[1]
    group, key_bytes, value_bytes = heads // kv_heads, keys.shape[2], values.shape[2]
    key_groups, value_groups = (key_dim + GROUP - 1) // GROUP, (value_dim + GROUP - 1) // GROUP
    queries = Rows(pointer(workspace, 0), key_dim)
    turned = Rows(moved(queries.first, padded(group * key_dim)), key_dim)
    query_sums = Rows(moved(turned.first, padded(group * key_dim)), key_groups)
    compact = moved(query_sums.first, padded(group * max(key_groups, value_groups)))
    union = moved(compact, padded(columns))
    products = Rows(moved(union, padded(columns)), columns)
    sums = Rows(moved(products.first, padded(group * columns)), max(page_tokens, LANES))
    numbers = moved(sums.first, padded(group * sums.stride))
    scales = moved(numbers, padded(GROUP * page_tokens))
    offsets = Rows(moved(scales, padded(2 * page_tokens)), value_groups * LANES)
    state = softmax_state(moved(offsets.first, padded(group * max(key_groups, value_groups) * LANES)), group, value_dim)

    for item in range(begin, end):
        sequence, kv_head = item // kv_heads, item % kv_heads
        start, length, tail = starts[sequence], lengths[sequence], tails[sequence]
        page_and_next(pointer(tails, 0), sequence, sequence, num_tails)  # is it in the pool
        border = (length - 1) // page_tokens * page_tokens
        table, last_page = pointer(page_tables, sequence * page_tables.shape[1]), border // page_tokens - 1
        first_head, origin = sequence * heads + kv_head * group, start - start % page_tokens
        widen_row(pointer(query, first_head * key_dim), queries.first, group * key_dim)
        prepare_queries(queries, turned, query_sums, group, key_dim, turns)
        begin_rows(state, group, sinks, kv_head * group)
        clear_rows(products, group, border + page_tokens - origin)
        for position in range(origin, border, page_tokens):
            page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
            place, ahead = (page * kv_heads + kv_head) * key_bytes, (following - page) * kv_heads * key_bytes
            prefetch_bytes(pointer(keys, place + ahead), key_bytes)
            score_page(
                turned, query_sums, pointer(keys, place), pointer(key_parameters, place // 2),
                part(products, 0, position - origin), sums, numbers, scales, group, key_dim, key_bits, page_tokens,
            )  # fmt: skip
        tail_head = tail * kv_heads + kv_head
        stored = Rows(pointer(tail_keys, tail_head * key_dim * page_tokens), page_tokens)
        add_product(queries, stored, part(products, 0, border - origin), group, key_dim, page_tokens, 0)
        choose_rows(
            products, start - origin, border - origin, length - origin, group, kept[sequence], scaling, softcap, compact, union, state
        )
        count = 0
        clear(offsets.first, group * offsets.stride)
        for position in range(origin, border, page_tokens):
            place = (table[position // page_tokens] * kv_heads + kv_head) * value_bytes
            count += add_chosen(
                products, union, pointer(values, place), pointer(value_parameters, place // 2), state.totals, offsets, sums, numbers,
                scales, group, value_dim, value_bits, page_tokens, position - origin, max(start - position, 0),
            )  # fmt: skip
        add_offsets(state.totals, offsets, group, value_dim)
        own = pointer(tail_values, tail_head * value_dim * page_tokens)
        count += add_values(products, union, own, border - origin, length - origin, group, value_dim, state.totals)
        read[item] = count
        write_rows(state, group, value_dim, pointer(out, first_head * value_dim))


@njit
def add_chosen(
    weights: Any, union: Any, codes: Any, parameters: Any, totals: Any, offsets: Any, scaled: Any, numbers: Any, scales: Any,
    heads: int, dim: int, bits: int, page_tokens: int, first: int, hidden: int,
) -> int:  # fmt: skip
    """Add the weighted values that some head keeps of a page that begins at column `first`; return how many values were read.

    The first `hidden` values of the page are not visible.
    """
    end, wanted = first + page_tokens, 0
    for place in range(first, end):
        wanted += union[place] != 0
    if 2 * wanted >= page_tokens:
        add_page(
            part(weights, 0, first + hidden), codes, parameters, totals, offsets, scaled, numbers, scales,
            heads, dim, bits, page_tokens, hidden,
        )  # fmt: skip
        return page_tokens - hidden
    row, stop = next_run(union, first, end)
    while row < end:
        add_run(
            part(weights, 0, row), codes, parameters, totals, offsets, scaled, numbers, scales, heads, dim, bits, page_tokens,
            row - first, stop - row,
        )  # fmt: skip
        row, stop = next_run(union, stop, end)
    return wanted


@njit
def add_run(
    weights: Any, codes: Any, parameters: Any, totals: Any, offsets: Any, scaled: Any, numbers: Any, scales: Any,
    heads: int, dim: int, bits: int, page_tokens: int, first: int, rows: int,
) -> None:  # fmt: skip
    """Add the weighted values of `rows` tokens of a page from `first` on; the other arguments are those of `add_page`."""
    code_bytes = code_bytes_of(dim, bits)
    groups, begin = offsets.stride // LANES, first * code_bytes
    parameters = moved(parameters, code_bytes * page_tokens // 2 + first)
    for group in range(groups):
        size = min(GROUP, dim - group * GROUP)
        stored, out, sums = moved(codes, begin), part(totals, 0, group * GROUP), part(offsets, 0, group * LANES)
        own, least = moved(parameters, group * page_tokens), groups * page_tokens
        begin += size if bits == 8 else (size + 1) // 2
        widen_row(own, scales, rows)
        for head in range(heads):
            for token in range(rows):
                scaled.first[head * scaled.stride + token] = weights.first[head * weights.stride + token] * scales[token]
        if bits == 8:
            add_product(scaled, Rows(stored, code_bytes), out, heads, rows, size, 0)
        else:
            unpack(stored, 1, rows, code_bytes, size, numbers, 1, GROUP)
            add_product(scaled, Rows(numbers, GROUP), out, heads, rows, size, 0)
            widen_row(moved(own, least), scales, rows)
            for head in range(heads):
                for token in range(rows):
                    sums.first[head * sums.stride] += weights.first[head * weights.stride + token] * scales[token]
