"""Decoding of GGUF's blocks: a program decodes some of them.  One program for all types, whose layouts are constants of it.

The bits are those of kernels/dequantize/gguf_torch.py: in float32, integers and products of float16 numbers with integers of up to eleven
bits are exact, so that only the offset and the last rounding round; launches say enable_fp_fusion=False all the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bytes_at(raw, blocks, places, known):
    """Return bytes (blocks, places) of blocks as int32."""
    return tl.load(raw + blocks[:, None] + places[None, :], mask=known[:, None], other=0).to(tl.int32)


@triton.jit
def half_at(raw, blocks, AT: tl.constexpr, known):
    """Return the float16 at byte AT of each block as float32, (blocks, 1)."""
    low = tl.load(raw + blocks + AT, mask=known, other=0).to(tl.int32)
    high = tl.load(raw + blocks + AT + 1, mask=known, other=0).to(tl.int32)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def fields(raw, blocks, index, known, AT: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr):
    """Return the fields (blocks, index) of BITS bits that begin at byte AT, as int32.

    RUN bytes hold the fields of as many numbers in their lowest bits, those of the next RUN numbers in the bits above, and so on.
    """
    per_byte: tl.constexpr = 8 // BITS
    places = AT + index // (RUN * per_byte) * RUN + index % RUN
    shifts = index // RUN % per_byte * BITS
    return (bytes_at(raw, blocks, places, known) >> shifts[None, :]) & ((1 << BITS) - 1)


@triton.jit
def signed(codes):
    """Return bytes as integers from -128 to 127."""
    return (codes ^ 128) - 128


@triton.jit
def doubled_e2m1(codes):
    """Return twice the number of each code of E2M1, an integer; there is no negative zero."""
    magnitude = codes & 7
    found = tl.where(magnitude < 4, magnitude, (2 + (codes & 1)) << (tl.maximum(magnitude >> 1, 1) - 1))
    return tl.where(codes > 7, 0 - found, found)


@triton.jit
def split_scales(raw, blocks, index, known, AT: tl.constexpr):
    """Return the 6-bit numbers of eight groups: the first four begin at byte AT, the others are spread over these and the bytes from 12.

    There the lower halves belong to the numbers at byte 4, and the upper ones to those at byte 8.
    """
    own, last = bytes_at(raw, blocks, AT + index % 4, known), bytes_at(raw, blocks, 12 + index % 4, known)
    low = last & 15 if AT == 4 else last >> 4
    return tl.where((index < 4)[None, :], own & 63, low | ((own >> 2) & 48))


@triton.jit
def scales_of(raw, blocks, known, GROUPS: tl.constexpr, SCALES: tl.constexpr, SCALE: tl.constexpr, LEAST: tl.constexpr):
    """Return the scale and the offset of each group of numbers, (blocks, groups) float32; without an offset it means nothing."""
    index = tl.arange(0, GROUPS)
    if SCALES == "power":  # half of 2**(byte - 127), which is subnormal for the two smallest
        exponent = bytes_at(raw, blocks, index, known)
        bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (tl.maximum(exponent, 1) - 1) << 23)
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = half_at(raw, blocks, SCALE, known)
    least = half_at(raw, blocks, LEAST, known) if LEAST >= 0 else scale
    if SCALES == "nibbles":
        both = bytes_at(raw, blocks, index, known)
        scale, least = scale * (both & 15).to(tl.float32), least * (both >> 4).to(tl.float32)
    elif SCALES == "split":
        scale = scale * split_scales(raw, blocks, index, known, 4).to(tl.float32)
        least = least * split_scales(raw, blocks, index, known, 8).to(tl.float32)
    elif SCALES == "six bits":
        joined = fields(raw, blocks, index, known, 96, 4, 8) | (fields(raw, blocks, index, known, 104, 2, 4) << 4)
        scale = scale * (joined - 32).to(tl.float32)
    elif SCALES == "bytes":
        scale = scale * signed(bytes_at(raw, blocks, 192 + index, known)).to(tl.float32)
    return scale, least


@triton.jit
def each_number(of_groups, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return what groups (blocks, groups) share, for each number (blocks, numbers)."""
    if GROUPS > 1:
        wide = tl.broadcast_to(of_groups[:, :, None], [BLOCKS, GROUPS, BLOCK // GROUPS])
        of_groups = tl.reshape(wide, [BLOCKS, BLOCK])
    return of_groups


@triton.jit(do_not_specialize=["num_blocks"])
def decode_blocks(
    raw, out, num_blocks, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, LOW: tl.constexpr, LOW_BITS: tl.constexpr, LOW_RUN: tl.constexpr,
    HIGH: tl.constexpr, HIGH_BITS: tl.constexpr, HIGH_RUN: tl.constexpr, NUMBERS: tl.constexpr, LESS: tl.constexpr, GROUPS: tl.constexpr,
    SCALES: tl.constexpr, SCALE: tl.constexpr, LEAST: tl.constexpr, ADDED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Decode BLOCKS blocks: scale * number, and an offset if there is one (byte LEAST), which is subtracted or ADDED.

    Codes have LOW_BITS at byte LOW and, above them, HIGH_BITS at byte HIGH.  NUMBERS says what they are: "unsigned", "signed" or "e2m1".
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    known, blocks, index = block < num_blocks, block.to(tl.int64) * BLOCK_BYTES, tl.arange(0, BLOCK)
    codes = fields(raw, blocks, index, known, LOW, LOW_BITS, LOW_RUN)
    if HIGH_BITS > 0:
        codes = codes | (fields(raw, blocks, index, known, HIGH, HIGH_BITS, HIGH_RUN) << LOW_BITS)
    if NUMBERS == "e2m1":
        codes = doubled_e2m1(codes)
    elif NUMBERS == "signed":
        codes = signed(codes)
    scale, least = scales_of(raw, blocks, known, GROUPS, SCALES, SCALE, LEAST)
    result = each_number(scale, BLOCKS, GROUPS, BLOCK) * (codes - LESS).to(tl.float32)
    if LEAST >= 0:
        offset = each_number(least, BLOCKS, GROUPS, BLOCK)
        if ADDED:
            result = result + offset
        else:
            result = result - offset
    places = block.to(tl.int64)[:, None] * BLOCK + index[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=known[:, None])
