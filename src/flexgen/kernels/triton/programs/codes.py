"""Keys and values of sealed pages as tiles of float32: codes times the scales of their groups, whose layout is that of kernels/codes.py."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # numbers of a head that share a scale
HALF_GROUP = tl.constexpr(16)


@triton.jit
def code_places(dims, DIM: tl.constexpr, BITS: tl.constexpr):
    """Return the byte of each number's code among those of its head, and by how many bits it is shifted there."""
    if BITS == 8:
        places, shifts = dims, dims * 0
    else:
        within = dims % GROUP
        half = (tl.minimum(DIM - dims + within, GROUP) + 1) // 2  # of the numbers of the group, which may be the last one
        is_high = within >= half
        places, shifts = dims // GROUP * HALF_GROUP + within - tl.where(is_high, half, 0), tl.where(is_high, 4, 0)
    return places, shifts


@triton.jit
def code_numbers(stored, shifts, BITS: tl.constexpr):
    """Return codes, as float32, from bytes: signed ones of 8 bits, or those of 4 bits."""
    codes = stored.to(tl.int32)
    if BITS == 4:
        codes = (codes >> shifts) & 15
    return codes.to(tl.float32)


@triton.jit
def key_codes(
    memory, parameters, page_heads, offsets, DIM: tl.constexpr, BITS: tl.constexpr, CODE_BYTES: tl.constexpr, HEAD_BYTES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the keys (dims, tokens) at these offsets of their pages; those of tokens that are not seen may be anything."""
    dims, groups = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS // GROUP)
    rows, shifts = code_places(dims, DIM, BITS)
    places = page_heads[None, :] * HEAD_BYTES + rows[:, None] * PAGE_TOKENS + offsets[None, :]
    numbers = code_numbers(tl.load(memory + places, mask=dims[:, None] < DIM, other=0), shifts[:, None], BITS)
    first = page_heads * (HEAD_BYTES // 2) + (CODE_BYTES * PAGE_TOKENS) // 2  # of float16
    places = first[None, :] + groups[:, None] * PAGE_TOKENS + offsets[None, :]
    known = groups[:, None] * GROUP < DIM
    scales = tl.load(parameters + places, mask=known, other=0.0).to(tl.float32)
    numbers *= tl.reshape(tl.broadcast_to(scales[:, None, :], [COLUMNS // GROUP, GROUP, TILE]), [COLUMNS, TILE])
    if BITS == 4:
        places += (DIM + GROUP - 1) // GROUP * PAGE_TOKENS
        least = tl.load(parameters + places, mask=known, other=0.0).to(tl.float32)
        numbers += tl.reshape(tl.broadcast_to(least[:, None, :], [COLUMNS // GROUP, GROUP, TILE]), [COLUMNS, TILE])
    return numbers


@triton.jit
def value_codes(
    memory, parameters, page_heads, offsets, visible, DIM: tl.constexpr, BITS: tl.constexpr, CODE_BYTES: tl.constexpr,
    HEAD_BYTES: tl.constexpr, PAGE_TOKENS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the values (tokens, dims) at these offsets of their pages, zeros for tokens that are not visible."""
    dims, groups = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS // GROUP)
    rows, shifts = code_places(dims, DIM, BITS)
    places = page_heads[:, None] * HEAD_BYTES + offsets[:, None] * CODE_BYTES + rows[None, :]
    stored = tl.load(memory + places, mask=visible[:, None] & (dims[None, :] < DIM), other=0)
    numbers = code_numbers(stored, shifts[None, :], BITS)
    first = page_heads * (HEAD_BYTES // 2) + (CODE_BYTES * PAGE_TOKENS) // 2
    places = first[:, None] + groups[None, :] * PAGE_TOKENS + offsets[:, None]
    known = visible[:, None] & (groups[None, :] * GROUP < DIM)
    scales = tl.load(parameters + places, mask=known, other=0.0).to(tl.float32)
    numbers *= tl.reshape(tl.broadcast_to(scales[:, :, None], [TILE, COLUMNS // GROUP, GROUP]), [TILE, COLUMNS])
    if BITS == 4:
        places += (DIM + GROUP - 1) // GROUP * PAGE_TOKENS
        least = tl.load(parameters + places, mask=known, other=0.0).to(tl.float32)
        numbers += tl.reshape(tl.broadcast_to(least[:, :, None], [TILE, COLUMNS // GROUP, GROUP]), [TILE, COLUMNS])
    return numbers
