"""Keys and values as codes of few bits: the layout of a head's numbers, and how they are rounded to codes and back, in plain torch.

A head of one token is cut into groups of neighbouring numbers.  With 8 bits a number is scale * code, for codes from -127 to 127; with
4 bits it is least + scale * code, for codes from 0 to 15.  Scales and least numbers are float16.  Keys may be rotated first by a Hadamard
matrix (orthonormal, and its own inverse), which spreads a single large number over all of a head.  Every step is one operation of float32
with one rounding, so that each device finds the same codes; constants are Python's numbers, which become float32 and are not copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GROUP = 32  # numbers of a head that share a scale
HALF_GROUP = GROUP // 2
LARGEST_HALF = 65504.0  # of float16
PARAMETER_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCodes:
    """The codes of a head of one token.

    Two codes of 4 bits share a byte: number i of a group has the low half of byte i, number i + half the high one, where half is half
    of the group's size, rounded up.

    Attributes:
        dim: The numbers of the head.
        bits: The bits of a code, 4 or 8.
        rotated: Whether the numbers are rotated first.
    """

    dim: int
    bits: int
    rotated: bool = False

    @property
    def num_groups(self) -> int:
        return -(-self.dim // GROUP)

    @property
    def code_bytes(self) -> int:
        """The bytes of the codes."""
        if self.bits == 8:
            return self.dim
        return self.dim // GROUP * HALF_GROUP + -(-(self.dim % GROUP) // 2)

    @property
    def num_parameters(self) -> int:
        """The scales, and behind them the least numbers, of all groups."""
        return self.num_groups * (1 if self.bits == 8 else 2)

    @property
    def token_bytes(self) -> int:
        """The bytes of codes and parameters."""
        return self.code_bytes + PARAMETER_BYTES * self.num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedPages:
    """Complete pages of codes.

    A head of a page is stored as its codes and behind them its parameters, (parameters, page_tokens) float16.  Codes of keys are
    (code bytes, page_tokens), those of values (page_tokens, code bytes).

    Attributes:
        keys: uint8 (pages, key heads, page_tokens * bytes of a key head, or more, an even number); bytes behind are never touched.
        values: uint8 (pages, value heads, page_tokens * bytes of a value head, or more).
        key_codes: The codes of a key head.
        value_codes: The codes of a value head.
        page_tokens: The number of tokens of a page, even.
    """

    keys: Tensor
    values: Tensor
    key_codes: HeadCodes
    value_codes: HeadCodes
    page_tokens: int


def hadamard_blocks(dim: int) -> list[tuple[int, int]]:
    """Return (first, size) of the blocks that are rotated: powers of two, the largest that fit first."""
    blocks, first = [], 0
    while first < dim:
        size = 1 << ((dim - first).bit_length() - 1)
        blocks.append((first, size))
        first += size
    return blocks


def rotated(numbers: Tensor) -> Tensor:
    """Return (..., dim) float32 or float64 times the block-diagonal Hadamard matrix, by the fast transform."""
    parts = []
    for first, size in hadamard_blocks(numbers.shape[-1]):
        part, half = numbers[..., first : first + size], 1
        while half < size:
            pairs = part.reshape(*part.shape[:-1], size // (2 * half), 2, half)
            one, other = pairs[..., 0, :], pairs[..., 1, :]
            part = torch.stack([one + other, one - other], dim=-2).flatten(-3)
            half *= 2
        parts.append(part * (1 / math.sqrt(size)) if size > 1 else part)
    return torch.cat(parts, dim=-1)


def encode(numbers: Tensor, codes: HeadCodes) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 (tokens, heads, code_bytes), and parameters, float16 (tokens, heads, parameters), of (tokens, heads, dim).

    Where a group holds a number that is not finite, its scale is not a number.
    """
    numbers = numbers.float()
    if codes.rotated:
        numbers = rotated(numbers)
    packed, scales, leasts = [], [], []
    for first in range(0, codes.dim, GROUP):
        group = numbers[..., first : first + GROUP]
        scale, least = _parameters(group, codes.bits)
        rounded = torch.round((group - least.float()) / torch.where(scale > 0, scale, 1).float())
        packed.append(_packed(rounded, codes.bits))
        scales.append(scale)
        leasts.append(least)
    return torch.cat(packed, dim=-1), torch.cat(scales + (leasts if codes.bits == 4 else []), dim=-1)


def _parameters(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the least number of a group, float16 (..., 1); with 8 bits the least number is 0 and stands for none."""
    poison = (group * 0).sum(-1, keepdim=True)  # 0, or not a number
    if bits == 8:
        largest = group.abs().amax(-1, keepdim=True)
        scale = largest * (1 / 127)
        return (scale.clamp(max=LARGEST_HALF) + poison).half(), torch.zeros_like(scale).half()
    least, largest = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    scale = (largest - least) * (1 / 15)
    return (scale.clamp(max=LARGEST_HALF) + poison).half(), least.clamp(-LARGEST_HALF, LARGEST_HALF).half()


def _packed(rounded: Tensor, bits: int) -> Tensor:
    """Return the bytes of a group's codes."""
    rounded = rounded.nan_to_num(0.0)
    if bits == 8:
        return rounded.clamp(-127, 127).to(torch.int8).view(torch.uint8)
    code = rounded.clamp(0, 15).to(torch.uint8)
    half = -(-code.shape[-1] // 2)
    low, high = code[..., :half], torch.nn.functional.pad(code[..., half:], (0, 2 * half - code.shape[-1]))
    return low | (high << 4)


def decode(codes_bytes: Tensor, parameters: Tensor, codes: HeadCodes, dtype: torch.dtype) -> Tensor:
    """Return the numbers, (tokens, heads, dim) in `dtype`, which are computed in float32 or a wider dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    groups, begin = [], 0
    for index in range(codes.num_groups):
        size = min(GROUP, codes.dim - index * GROUP)
        scale = parameters[..., index : index + 1].to(wide)
        if codes.bits == 8:
            groups.append(codes_bytes[..., begin : begin + size].view(torch.int8).to(wide) * scale)
            begin += size
            continue
        half = -(-size // 2)
        packed = codes_bytes[..., begin : begin + half]
        least = parameters[..., codes.num_groups + index, None].to(wide)
        groups.append(torch.cat([packed & 15, packed >> 4], dim=-1)[..., :size].to(wide) * scale + least)
        begin += half
    numbers = torch.cat(groups, dim=-1)
    return (rotated(numbers) if codes.rotated else numbers).to(dtype)


def seal(key: Tensor, value: Tensor, pages: SealedPages, page_ids: Tensor) -> None:
    """Store whole pages.

    Args:
        key: (len(page_ids) * page_tokens, key heads, key dim), of any floating-point dtype.
        value: (len(page_ids) * page_tokens, value heads, value dim).
        pages: The pages.
        page_ids: int64 (pages,): where they are stored.
    """
    size = pages.page_tokens
    for numbers, codes, memory, by_token in ((key, pages.key_codes, pages.keys, False), (value, pages.value_codes, pages.values, True)):
        found, parameters = (each.unflatten(0, (-1, size)) for each in encode(numbers, codes))  # (pages, tokens, heads, ..)
        found = found.permute(0, 2, 1, 3) if by_token else found.permute(0, 2, 3, 1)
        packed = parameters.permute(0, 2, 3, 1).contiguous().view(torch.uint8)  # (pages, heads, parameters, bytes of all tokens)
        memory[page_ids, :, : size * codes.token_bytes] = torch.cat([found.flatten(2), packed.flatten(2)], dim=-1)


def unseal(pages: SealedPages, page_table: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return positions start <= p < length of one sequence as keys (length - start, heads, dim) and values in `dtype`."""
    size = pages.page_tokens
    first = start // size
    ids = page_table[first : -(-length // size)].long()
    visible = slice(start - first * size, length - first * size)
    keys, values = (numbers.transpose(1, 2).flatten(0, 1)[visible].contiguous() for numbers in unsealed(pages, ids, dtype))
    return keys, values


def unsealed(
    pages: SealedPages, page_ids: Tensor, dtype: torch.dtype, heads: slice = slice(None), *, turned: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of whole pages, each (*page_ids.shape, heads, page_tokens, dim) in `dtype`.

    Args:
        pages: The pages.
        page_ids: int64, of any shape.
        dtype: The dtype of the numbers, which are computed in float32 or a wider one.
        heads: The heads that are wanted.
        turned: Whether keys that were rotated stay so.
    """
    size, found = pages.page_tokens, list[Tensor]()
    for codes, memory, by_token in ((pages.key_codes, pages.keys, False), (pages.value_codes, pages.values, True)):
        stored = memory[:, heads, : size * codes.token_bytes][page_ids]  # (..., heads, bytes)
        border = codes.code_bytes * size
        code_bytes, parameters = stored[..., :border], stored[..., border:].contiguous().view(torch.float16)
        code_bytes = code_bytes.unflatten(-1, (size, codes.code_bytes) if by_token else (codes.code_bytes, size))
        code_bytes = code_bytes if by_token else code_bytes.transpose(-1, -2).contiguous()
        parameters = parameters.unflatten(-1, (codes.num_parameters, size)).transpose(-1, -2).contiguous()
        found.append(decode(code_bytes, parameters, replace(codes, rotated=False) if turned else codes, dtype))
    return found[0], found[1]


class Rotations:
    """The rotation of queries as keys were rotated, by one product with a matrix, which is made once per dimension and device."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, numbers: Tensor) -> Tensor:
        """Return (..., dim) rotated, in float32 or a wider dtype."""
        wide, dim = torch.promote_types(numbers.dtype, torch.float32), numbers.shape[-1]
        key = dim, numbers.device, wide
        if key not in self._matrices:
            places = torch.arange(dim, device=numbers.device)  # made where it is used, so that nothing is copied
            self._matrices[key] = rotated((places[:, None] == places).to(wide))
        return numbers.to(wide) @ self._matrices[key]
