"""Decode attention on sealed pages: the products run over the codes themselves, and scales are applied to their sums.

A score is, over the groups of a key, scale * sum(q * code) + least * sum(q); a total of values is the same with weights in place of q.  The
page of the query itself is a tail of plain numbers, which is attended to last.  Work items are those of decode.py, but neighbouring key
heads of a sequence are taken together, because their codes are neighbours in memory: longer runs are read faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.codes import GROUP, HALF_GROUP
from flexgen.kernels.cpu.code_tile import add_scores_4, add_scores_8, add_totals_4, add_totals_8
from flexgen.kernels.cpu.decode import DECODE_BLOCK
from flexgen.kernels.cpu.rows import LANES, Rows, clear, moved, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.sealed import code_bytes_of, rotate
from flexgen.kernels.cpu.sealed_scratch import codes_of, heads_at_once, laid_out, place_of, scratch_sizes
from flexgen.kernels.cpu.softmax import absorb_rows, begin_rows, rows_from, write_rows
from flexgen.kernels.cpu.tile import add_product

SIXTEENTH = np.float32(1 / 16)


def decode_sealed_workspace(group: int, key_dim: int, value_dim: int, page_tokens: int) -> int:
    """Return the number of elements that `decode_sealed_attention` needs as workspace."""
    return sum(scratch_sizes(group, key_dim, value_dim, page_tokens))


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
    value_dim, heads = tail_values.shape[3], query.shape[1]
    group = heads // kv_heads
    key_codes = codes_of(keys, key_parameters, key_bits, key_dim, page_tokens)
    value_codes = codes_of(values, value_parameters, value_bits, value_dim, page_tokens)
    scratch = laid_out(pointer(workspace, 0), group, key_dim, value_dim, page_tokens)
    item = begin
    while item < end:
        sequence, kv_head = item // kv_heads, item % kv_heads
        count = min(heads_at_once(group), kv_heads - kv_head, end - item)
        item += count
        start, length, tail = starts[sequence], lengths[sequence], tails[sequence]
        page_and_next(pointer(tails, 0), sequence, sequence, num_tails)  # is it in the pool
        border, first_head = (length - 1) // page_tokens * page_tokens, sequence * heads + kv_head * group
        table = pointer(page_tables, sequence * page_tables.shape[1])
        widen_row(pointer(query, first_head * key_dim), scratch.queries.first, group * count * key_dim)
        prepare_queries(scratch, group * count, key_codes, turns)
        begin_rows(scratch.state, group * count, sinks, kv_head * group)
        attend_codes(key_codes, value_codes, table, start, border, kv_head, count, group, scaling, softcap, scratch)
        for head in range(count):
            place = (tail * kv_heads + kv_head + head) * page_tokens
            attend_tail(
                part(scratch.queries, head * group, 0), pointer(tail_keys, place * key_dim), pointer(tail_values, place * value_dim),
                scratch.scores, rows_from(scratch.state, head * group), group, key_dim, value_dim, page_tokens,
                max(start, border) - border, length - border, scaling, softcap,
            )  # fmt: skip
        write_rows(scratch.state, group * count, value_dim, pointer(out, first_head * value_dim))


@njit
def prepare_queries(scratch: Any, heads: int, codes: Any, turns: bool) -> None:
    """Rotate the queries as the keys were, add up each group, and fold them into the form that the tiles take."""
    dim, groups = codes.dim, scratch.query_sums.stride
    for head in range(heads):
        row = moved(scratch.folded.first, head * dim)
        for i in range(dim):
            row[i] = scratch.queries.first[head * dim + i]
        if turns:
            rotate(row, dim)
        for group in range(groups):
            total = row[group * GROUP]
            for i in range(group * GROUP + 1, min((group + 1) * GROUP, dim)):
                total += row[i]
            scratch.query_sums.first[head * groups + group] = total
        if codes.bits == 4:
            for group in range(codes.fast_groups):
                for i in range(group * GROUP, group * GROUP + HALF_GROUP):
                    row[i + HALF_GROUP] *= SIXTEENTH
                    row[i] -= row[i + HALF_GROUP]


@njit
def attend_codes(
    keys: Any, values: Any, table: Any, start: int, border: int, kv_head: int, count: int, group: int, scaling: Any, softcap: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Attend to positions start <= p < border, all on complete pages, for `count` key heads from `kv_head` on."""
    page_tokens, heads, scores = keys.page_tokens, count * group, scratch.scores
    num_pages, last_page = keys.num_pages, border // page_tokens - 1
    block_tokens = max(DECODE_BLOCK, page_tokens) // page_tokens * page_tokens
    for block in range(start - start % page_tokens, border, block_tokens):
        block_end, visible = min(block + block_tokens, border), max(start, block)
        clear(scores.first, heads * scores.stride)
        for position in range(block, block_end, page_tokens):
            page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
            for head in range(count):
                place, later = place_of(keys, page, kv_head + head), place_of(keys, following, kv_head + head)
                score_page(keys, place, later, part(scores, head * group, position - block), head * group, group, scratch)
        absorb_rows(scores, visible - block, block_end - block, heads, scaling, softcap, scratch.state)
        clear(scratch.offsets.first, heads * scratch.offsets.stride)
        clear(scratch.coded.first, heads * scratch.coded.stride)
        for position in range(block, block_end, page_tokens):
            page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
            first = max(visible, position) - position
            for head in range(count):
                place, later = place_of(values, page, kv_head + head), place_of(values, following, kv_head + head)
                add_page(
                    values,
                    place,
                    later,
                    part(scores, head * group, position - block + first),
                    head * group,
                    group,
                    first,
                    page_tokens,
                    scratch,
                )
        unfold(values, heads, scratch)


@njit
def score_page(keys: Any, place: int, later: int, scores: Any, row: int, heads: int, scratch: Any) -> None:
    """Add the scores of a page's key head at `place`, for `heads` queries from `row` on, while what begins at `later` is fetched."""
    code_bytes, groups, tokens = code_bytes_of(keys.dim, keys.bits), scratch.query_sums.stride, keys.page_tokens
    codes, parameters = moved(keys.memory, place), moved(keys.parameters, (place + code_bytes * tokens) // 2)
    queries, sums = part(scratch.folded, row, 0), part(scratch.query_sums, row, 0)
    least, fetched = groups * tokens, moved(keys.memory, later)
    if keys.fast_groups > 0:
        if keys.bits == 4:
            add_scores_4(queries, sums, codes, parameters, least, keys.fast_groups, fetched, scores, heads)
        else:
            add_scores_8(queries, sums, codes, parameters, least, keys.fast_groups, fetched, scores, heads)
    for group in range(keys.fast_groups, groups):
        own, size = moved(parameters, group * tokens), min(GROUP, keys.dim - group * GROUP)
        stored, query = moved(codes, code_bytes_of(group * GROUP, keys.bits) * tokens), part(queries, 0, group * GROUP)
        clear(scratch.sums.first, heads * scratch.sums.stride)
        if keys.bits == 8:
            add_product(query, Rows(stored, tokens), scratch.sums, heads, size, tokens, 0)
        else:
            unpack(stored, tokens, tokens, 1, size, scratch.numbers, tokens, 1)
            add_product(query, Rows(scratch.numbers, tokens), scratch.sums, heads, size, tokens, 0)
            widen_row(moved(own, least), moved(scratch.scales, tokens), tokens)
        widen_row(own, scratch.scales, tokens)
        for head in range(heads):
            for token in range(tokens):
                score = scratch.scales[token] * scratch.sums.first[head * scratch.sums.stride + token]
                if keys.bits == 4:
                    score += scratch.scales[tokens + token] * sums.first[head * groups + group]
                scores.first[head * scores.stride + token] += score


@njit
def add_page(
    values: Any, place: int, later: int, weights: Any, row: int, heads: int, first: int, end: int, scratch: Any
) -> None:  # fmt: skip
    """Add the weighted values of tokens first <= token < end of a page's head at `place` to the totals from `row` on."""
    code_bytes, groups = code_bytes_of(values.dim, values.bits), scratch.offsets.stride // LANES
    tokens, rows = values.page_tokens, end - first
    fast_groups = values.fast_groups if rows == tokens else 0
    codes = moved(values.memory, place + first * code_bytes)
    parameters = moved(values.parameters, (place + code_bytes * tokens) // 2 + first)
    totals, offsets = part(scratch.state.totals, row, 0), part(scratch.offsets, row, 0)
    coded, scaled = part(scratch.coded, row, 0), scratch.sums
    least, fetched = groups * tokens, moved(values.memory, later)
    if fast_groups > 0:
        if values.bits == 4:
            add_totals_4(weights, codes, code_bytes, parameters, least, fast_groups, fetched, coded, offsets, scaled, heads)
        else:
            add_totals_8(weights, codes, code_bytes, parameters, least, fast_groups, fetched, coded, offsets, scaled, heads)
    for group in range(fast_groups, groups):
        own, size = moved(parameters, group * tokens), min(GROUP, values.dim - group * GROUP)
        stored, out = moved(codes, code_bytes_of(group * GROUP, values.bits)), part(totals, 0, group * GROUP)
        widen_row(own, scratch.scales, rows)
        for head in range(heads):
            for token in range(rows):
                scaled.first[head * scaled.stride + token] = weights.first[head * weights.stride + token] * scratch.scales[token]
        if values.bits == 8:
            add_product(scaled, Rows(stored, code_bytes), out, heads, rows, size, 0)
            continue
        unpack(stored, 1, rows, code_bytes, size, scratch.numbers, 1, GROUP)
        add_product(scaled, Rows(scratch.numbers, GROUP), out, heads, rows, size, 0)
        widen_row(moved(own, least), scratch.scales, rows)
        for head in range(heads):
            for token in range(rows):
                offsets.first[head * offsets.stride + group * LANES] += weights.first[head * weights.stride + token] * scratch.scales[token]


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
def unfold(values: Any, heads: int, scratch: Any) -> None:
    """Add a block's totals of codes, and each group's offset, to the totals."""
    totals, coded, offsets = scratch.state.totals, scratch.coded, scratch.offsets
    for head in range(heads):
        own, found = moved(totals.first, head * totals.stride), moved(coded.first, head * coded.stride)
        for group in range(offsets.stride // LANES):
            first, last = group * GROUP, min((group + 1) * GROUP, values.dim)
            if values.bits == 4:
                offset = offsets.first[head * offsets.stride + group * LANES]
                for lane in range(1, LANES):
                    offset += offsets.first[head * offsets.stride + group * LANES + lane]
                for i in range(first, last):
                    own[i] += offset
                if group < values.fast_groups:
                    for i in range(first, first + HALF_GROUP):
                        own[i] += found[i]
                        own[i + HALF_GROUP] += (found[i + HALF_GROUP] - found[i]) * SIXTEENTH
            elif group < values.fast_groups:
                for i in range(first, last):
                    own[i] += found[i]


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
