"""Where the tokens of a tile lie in pages, and their keys and values as tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_heads(table, positions, first, end, kv_head, KV_HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Return the number, int64, of the head in memory that holds each position: page * KV_HEADS + kv_head.

    Pages that hold none of the positions first <= p < end are not looked up; page 0 stands for them.
    """
    places = positions // PAGE_TOKENS
    seen = (places >= first // PAGE_TOKENS) & (places <= (end - 1) // PAGE_TOKENS)
    pages = tl.load(table + places, mask=seen, other=0)
    # The compiler does not see that neighbours share a page, and would read single numbers.  TILE and tiles' positions are multiples of it.
    pages = tl.max_constancy(pages, [shared_tokens(PAGE_TOKENS, TILE)])
    return pages.to(tl.int64) * KV_HEADS + kv_head


@triton.constexpr_function
def shared_tokens(page_tokens, tile):
    """Return the largest power of two of neighbouring tokens of a tile that always lie on one page."""
    return min(page_tokens & -page_tokens, tile)


@triton.jit
def key_tile(keys, page_heads, offsets, dims, DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr):
    """Return the keys (dims, tokens) at these offsets of their pages; those of tokens that are not seen may be anything."""
    places = page_heads[None, :] * (DIM * PAGE_TOKENS) + dims[:, None] * PAGE_TOKENS + offsets[None, :]
    return tl.load(keys + places, mask=dims[:, None] < DIM, other=0.0)


@triton.jit
def value_tile(values, page_heads, offsets, dims, visible, DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr):
    """Return the values (tokens, dims) at these offsets of their pages, zeros for tokens that are not visible."""
    places = (page_heads[:, None] * PAGE_TOKENS + offsets[:, None]) * DIM + dims[None, :]
    return tl.load(values + places, mask=visible[:, None] & (dims[None, :] < DIM), other=0.0)
