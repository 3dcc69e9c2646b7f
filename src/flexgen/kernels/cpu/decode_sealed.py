"""Decode attention on sealed pages: the products run over the codes themselves, and scales are applied to their sums.

A score is, over the groups of a key, scale * sum(q * code) + least * sum(q); a total of values is the same with weights in place of q.  The
page of the query itself is a tail of plain numbers, which is attended to last.  Work items are those of decode.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.codes import GROUP
from flexgen.kernels.cpu.code_tile import FAST_TOKENS, add_scores, add_totals, prefetch_bytes
from flexgen.kernels.cpu.decode import DECODE_BLOCK
from flexgen.kernels.cpu.rows import LANES, Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.sealed import code_bytes_of, rotate
from flexgen.kernels.cpu.softmax import absorb_rows, begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import add_product


def decode_sealed_workspace(group: int, key_dim: int, value_dim: int, page_tokens: int) -> int:
    """Return the number of elements that `decode_sealed_attention` needs as workspace."""
    groups = -(-max(key_dim, value_dim) // GROUP)
    parts = (
        group * key_dim, group * key_dim, group * groups, group * max(DECODE_BLOCK, page_tokens), group * max(page_tokens, LANES),
        GROUP * page_tokens, 2 * page_tokens, group * groups * LANES, group * value_dim, group, group,
    )  # fmt: skip
    return sum(padded(size) for size in parts)


@entry
def decode_sealed_attention(
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
    sinks: Any,
    scaling: Any,
    softcap: Any,
    out: Any,
    workspace: Any,
) -> None:
    """Compute work items begin <= sequence * kv_heads + kv_head < end.

    `keys` and `values` are int8 (pages, kv_heads, bytes of a head), the parameters the same memory as int16.
    """
    num_tails, kv_heads, key_dim, page_tokens = tail_keys.shape
    num_pages, value_dim, heads = keys.shape[0], tail_values.shape[3], query.shape[1]
    group, key_bytes, value_bytes = heads // kv_heads, keys.shape[2], values.shape[2]
    block_tokens = max(DECODE_BLOCK, page_tokens) // page_tokens * page_tokens
    key_groups, value_groups = (key_dim + GROUP - 1) // GROUP, (value_dim + GROUP - 1) // GROUP
    queries = Rows(pointer(workspace, 0), key_dim)
    turned = Rows(moved(queries.first, padded(group * key_dim)), key_dim)
    query_sums = Rows(moved(turned.first, padded(group * key_dim)), key_groups)
    scores = Rows(moved(query_sums.first, padded(group * max(key_groups, value_groups))), max(DECODE_BLOCK, page_tokens))
    sums = Rows(moved(scores.first, padded(group * scores.stride)), max(page_tokens, LANES))
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
        first_head = sequence * heads + kv_head * group
        widen_row(pointer(query, first_head * key_dim), queries.first, group * key_dim)
        prepare_queries(queries, turned, query_sums, group, key_dim, turns)
        begin_rows(state, group, sinks, kv_head * group)
        for block in range(start - start % page_tokens, border, block_tokens):
            block_end, visible = min(block + block_tokens, border), max(start, block)
            clear(scores.first, group * scores.stride)
            for position in range(block, block_end, page_tokens):
                page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
                place, ahead = (page * kv_heads + kv_head) * key_bytes, (following - page) * kv_heads * key_bytes
                prefetch_bytes(pointer(keys, place + ahead), key_bytes)
                score_page(
                    turned, query_sums, pointer(keys, place), pointer(key_parameters, place // 2),
                    part(scores, 0, position - block), sums, numbers, scales, group, key_dim, key_bits, page_tokens,
                )  # fmt: skip
            absorb_rows(scores, visible - block, block_end - block, group, scaling, softcap, state)
            clear(offsets.first, group * offsets.stride)
            for position in range(block, block_end, page_tokens):
                page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
                place, ahead = (page * kv_heads + kv_head) * value_bytes, (following - page) * kv_heads * value_bytes
                first = max(visible, position) - position
                prefetch_bytes(pointer(values, place + ahead), value_bytes)
                add_page(
                    part(scores, 0, position - block + first), pointer(values, place), pointer(value_parameters, place // 2),
                    state.totals, offsets, sums, numbers, scales, group, value_dim, value_bits, page_tokens, first,
                )  # fmt: skip
            add_offsets(state.totals, offsets, group, value_dim)
        attend_tail(
            queries, pointer(tail_keys, (tail * kv_heads + kv_head) * key_dim * page_tokens),
            pointer(tail_values, (tail * kv_heads + kv_head) * value_dim * page_tokens),
            scores, state, group, key_dim, value_dim, page_tokens, max(start, border) - border, length - border, scaling, softcap,
        )  # fmt: skip
        write_rows(state, group, value_dim, pointer(out, first_head * value_dim))


@njit
def prepare_queries(queries: Any, turned: Any, sums: Any, heads: int, dim: int, turns: bool) -> None:
    """Rotate the queries as the keys were, and add up each group."""
    for head in range(heads):
        row = moved(turned.first, head * dim)
        for i in range(dim):
            row[i] = queries.first[head * dim + i]
        if turns:
            rotate(row, dim)
        for group in range(sums.stride):
            total = row[group * GROUP]
            for i in range(group * GROUP + 1, min((group + 1) * GROUP, dim)):
                total += row[i]
            sums.first[head * sums.stride + group] = total


@njit
def score_page(
    queries: Any, query_sums: Any, codes: Any, parameters: Any, scores: Any, sums: Any, numbers: Any, scales: Any,
    heads: int, dim: int, bits: int, page_tokens: int,
) -> None:  # fmt: skip
    """Add the scores of a page, group by group."""
    groups, begin = query_sums.stride, 0
    parameters = moved(parameters, code_bytes_of(dim, bits) * page_tokens // 2)
    for group in range(groups):
        size = min(GROUP, dim - group * GROUP)
        stored, query = moved(codes, begin * page_tokens), part(queries, 0, group * GROUP)
        own, least = moved(parameters, group * page_tokens), groups * page_tokens
        begin += size if bits == 8 else (size + 1) // 2
        if bits == 4 and size == GROUP and page_tokens == FAST_TOKENS:
            add_scores(query, part(query_sums, 0, group), stored, own, least, scores, heads)
            continue
        clear(sums.first, heads * sums.stride)
        if bits == 8:
            add_product(query, Rows(stored, page_tokens), sums, heads, size, page_tokens, 0)
        else:
            unpack(stored, page_tokens, page_tokens, 1, size, numbers, page_tokens, 1)
            add_product(query, Rows(numbers, page_tokens), sums, heads, size, page_tokens, 0)
        widen_row(own, scales, page_tokens)
        if bits == 4:
            widen_row(moved(own, least), moved(scales, page_tokens), page_tokens)
        for head in range(heads):
            for token in range(page_tokens):
                score = scales[token] * sums.first[head * sums.stride + token]
                if bits == 4:
                    score += scales[page_tokens + token] * query_sums.first[head * groups + group]
                scores.first[head * scores.stride + token] += score


@njit
def add_page(
    weights: Any, codes: Any, parameters: Any, totals: Any, offsets: Any, scaled: Any, numbers: Any, scales: Any,
    heads: int, dim: int, bits: int, page_tokens: int, first: int,
) -> None:  # fmt: skip
    """Add the weighted values of a page's tokens from `first` on; least numbers go to `offsets`, one vector for each group."""
    code_bytes, rows = code_bytes_of(dim, bits), page_tokens - first
    groups, begin = offsets.stride // LANES, first * code_bytes
    parameters = moved(parameters, code_bytes * page_tokens // 2 + first)
    for group in range(groups):
        size = min(GROUP, dim - group * GROUP)
        stored, out, sums = moved(codes, begin), part(totals, 0, group * GROUP), part(offsets, 0, group * LANES)
        own, least = moved(parameters, group * page_tokens), groups * page_tokens
        begin += size if bits == 8 else (size + 1) // 2
        if bits == 4 and size == GROUP and rows == FAST_TOKENS:
            add_totals(weights, stored, code_bytes, own, least, out, sums, scaled, heads)
            continue
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


@njit
def unpack(codes: Any, code_stride: int, tokens: int, token_stride: int, size: int, numbers: Any, stride: int, token_numbers: int) -> None:
    """Make float32 numbers of a group's codes of 4 bits, `stride` apart, those of a token `token_numbers` behind the ones before."""
    half = (size + 1) // 2
    for token in range(tokens):
        for i in range(half):
            byte, place = codes[token * token_stride + i * code_stride], token * token_numbers + i * stride
            numbers[place] = np.float32(byte & 15)
            if half + i < size:
                numbers[place + half * stride] = np.float32((byte >> 4) & 15)


@njit
def add_offsets(totals: Any, offsets: Any, heads: int, dim: int) -> None:
    """Add each group's offset to its totals."""
    for head in range(heads):
        for group in range(offsets.stride // LANES):
            offset = offsets.first[head * offsets.stride + group * LANES]
            for lane in range(1, LANES):
                offset += offsets.first[head * offsets.stride + group * LANES + lane]
            for i in range(group * GROUP, min((group + 1) * GROUP, dim)):
                totals.first[head * totals.stride + i] += offset


@njit
def attend_tail(
    queries: Any, keys: Any, values: Any, scores: Any, state: Any,
    heads: int, key_dim: int, value_dim: int, page_tokens: int, first: int, end: int, scaling: Any, softcap: Any,
) -> None:  # fmt: skip
    """Attend to tokens first <= token < end of a page of plain numbers."""
    for head in range(heads):
        clear(moved(scores.first, head * scores.stride), page_tokens)
    add_product(queries, Rows(keys, page_tokens), scores, heads, key_dim, page_tokens, 0)
    absorb_rows(scores, first, end, heads, scaling, softcap, state)
    stored = Rows(moved(values, first * value_dim), value_dim)
    add_product(part(scores, 0, first), stored, state.totals, heads, end - first, value_dim, 0)
