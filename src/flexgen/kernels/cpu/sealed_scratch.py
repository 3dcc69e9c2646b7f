"""What kernels on sealed pages share: the pages as they see them, and the memory in which one thread computes."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit
from numba.extending import register_jitable

from flexgen.kernels.codes import GROUP
from flexgen.kernels.cpu.code_tile import FAST_TOKENS
from flexgen.kernels.cpu.decode import DECODE_BLOCK
from flexgen.kernels.cpu.rows import LANES, Rows, moved, padded, pointer
from flexgen.kernels.cpu.softmax import softmax_state

QUERIES_AT_ONCE = 8  # query heads whose scores of a block stay in a cache


class Codes(NamedTuple):
    """Pages of codes of keys or of values.

    Attributes:
        memory: A pointer to int8 (pages, kv_heads, bytes of a head).
        parameters: A pointer to the same memory as int16.
        num_pages: The pages of the pool.
        kv_heads: The heads of a page.
        head_bytes: The bytes of a head.
        bits: The bits of a code.
        dim: The numbers of a head.
        page_tokens: The tokens of a page.
        fast_groups: The groups of a head that a tile computes, the first ones; the others take the way for all shapes.
    """

    memory: Any
    parameters: Any
    num_pages: int
    kv_heads: int
    head_bytes: int
    bits: int
    dim: int
    page_tokens: int
    fast_groups: int


class Scratch(NamedTuple):
    """Memory of one thread, in which a few heads of a sequence are computed.

    Attributes:
        queries: `Rows` of queries.
        folded: `Rows` of rotated queries, as the tiles take them.
        query_sums: `Rows` of each group's sum of a rotated query.
        scores: `Rows` of a block's scores, then weights.
        coded: `Rows` of a block's totals of codes, as the tiles give them.
        offsets: `Rows` of a vector per group of values, whose sum is added to each of its totals.
        sums: `Rows` of a page's tokens.
        numbers: A group of a page as plain numbers.
        scales: Scales of a page's tokens.
        state: The softmax.
    """

    queries: Any
    folded: Any
    query_sums: Any
    scores: Any
    coded: Any
    offsets: Any
    sums: Any
    numbers: Any
    scales: Any
    state: Any


@register_jitable
def heads_at_once(group: int) -> int:
    """Return how many key heads of a sequence are taken together."""
    return max(QUERIES_AT_ONCE // group, 1)


@register_jitable
def scratch_sizes(group: int, key_dim: int, value_dim: int, page_tokens: int) -> Any:
    """Return the elements of each part of a `Scratch`."""
    rows, key_groups, value_groups = group * heads_at_once(group), -(-key_dim // GROUP), -(-value_dim // GROUP)
    return (
        padded(rows * key_dim), padded(rows * key_dim), padded(rows * key_groups), padded(rows * max(DECODE_BLOCK, page_tokens)),
        padded(rows * value_dim), padded(rows * value_groups * LANES), padded(rows * max(page_tokens, LANES)),
        padded(GROUP * page_tokens), padded(2 * page_tokens), padded(rows * value_dim) + 2 * padded(rows),
    )  # fmt: skip


@njit
def laid_out(memory: Any, group: int, key_dim: int, value_dim: int, page_tokens: int) -> Any:
    """Lay out a `Scratch` from a pointer on."""
    sizes = scratch_sizes(group, key_dim, value_dim, page_tokens)
    key_groups, value_groups = (key_dim + GROUP - 1) // GROUP, (value_dim + GROUP - 1) // GROUP
    folded = moved(memory, sizes[0])
    query_sums = moved(folded, sizes[1])
    scores = moved(query_sums, sizes[2])
    coded = moved(scores, sizes[3])
    offsets = moved(coded, sizes[4])
    sums = moved(offsets, sizes[5])
    numbers = moved(sums, sizes[6])
    scales = moved(numbers, sizes[7])
    return Scratch(
        Rows(memory, key_dim), Rows(folded, key_dim), Rows(query_sums, key_groups), Rows(scores, max(DECODE_BLOCK, page_tokens)),
        Rows(coded, value_dim), Rows(offsets, value_groups * LANES), Rows(sums, max(page_tokens, LANES)), numbers, scales,
        softmax_state(moved(scales, sizes[8]), group * heads_at_once(group), value_dim),
    )  # fmt: skip


@njit
def codes_of(memory: Any, parameters: Any, bits: int, dim: int, page_tokens: int) -> Any:
    """Return pages of codes: int8 (pages, kv_heads, bytes of a head), and the same memory as int16."""
    num_pages, kv_heads, head_bytes = memory.shape
    fast_groups = dim // GROUP if page_tokens == FAST_TOKENS else 0
    return Codes(pointer(memory, 0), pointer(parameters, 0), num_pages, kv_heads, head_bytes, bits, dim, page_tokens, fast_groups)


@njit
def place_of(codes: Any, page: int, head: int) -> int:
    """Return where a head of a page begins."""
    return (page * codes.kv_heads + head) * codes.head_bytes
