"""The blocks of GGUF decoded by torch operations, on any device; also what the compiled loops are tested against.

The layouts are those of ggml (ggml-common.h), the arithmetic is that of `gguf.quants`, in float32 and in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flexgen.errors import EngineError
from flexgen.hub.gguf_file import BY_NAME
from flexgen.kernels.dequantize.portions import portions


def decode_blocks(name: str, raw: torch.Tensor, out: torch.Tensor, parallel: object = None) -> None:
    """Decode blocks of one type.

    Args:
        name: The type.
        raw: The blocks, uint8, contiguous.
        out: The numbers, contiguous, on the same device; they are written.
        parallel: Not used: a device runs operations by itself.

    Raises:
        EngineError: There is no such type.
    """
    if name not in _DECODERS:
        raise EngineError(f"there are no blocks of type {name}; known are {', '.join(_DECODERS)}")
    block = BY_NAME[name].block
    flat, blocks = out.view(-1, block), raw.view(-1, BY_NAME[name].block_bytes)
    for start, stop in portions(len(blocks), block):
        flat[start:stop].copy_(_DECODERS[name](blocks[start:stop]).view(-1, block))


def _half(x: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at byte `at` of each block as float32, (blocks, 1)."""
    return x[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(x: torch.Tensor) -> torch.Tensor:
    """Return the lower halves of all bytes of each row, then the upper ones, (rows, 2, bytes)."""
    return torch.stack([x & 15, x >> 4], dim=1)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Return the four 2-bit fields of all bytes of each row, lowest first, (rows, 4, bytes)."""
    return torch.stack([x & 3, (x >> 2) & 3, (x >> 4) & 3, x >> 6], dim=1)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Return the eight bits of all bytes of each row, lowest first, (rows, 8, bytes)."""
    return torch.stack([(x >> shift) & 1 for shift in range(8)], dim=1)


def _signed(x: torch.Tensor, less: int) -> torch.Tensor:
    return x.to(torch.int16).sub_(less).float()


def _q4_0(x: torch.Tensor) -> torch.Tensor:
    return _half(x, 0) * _signed(_nibbles(x[:, 2:]).flatten(1), 8)


def _q4_1(x: torch.Tensor) -> torch.Tensor:
    return (_half(x, 0) * _nibbles(x[:, 4:]).flatten(1).float()) + _half(x, 2)


def _fifth(x: torch.Tensor, at: int) -> torch.Tensor:
    """Return the 5-bit numbers whose highest bits begin at byte `at`, (blocks, 32) uint8."""
    high = _bits(x[:, at : at + 4]).transpose(1, 2).flatten(1)  # bit i of the 32 belongs to number i
    return _nibbles(x[:, at + 4 :]).flatten(1) | (high << 4)


def _q5_0(x: torch.Tensor) -> torch.Tensor:
    return _half(x, 0) * _signed(_fifth(x, 2), 16)


def _q5_1(x: torch.Tensor) -> torch.Tensor:
    return (_half(x, 0) * _fifth(x, 4).float()) + _half(x, 2)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    return x[:, 2:].contiguous().view(torch.int8).float() * _half(x, 0)


def _mxfp4(x: torch.Tensor) -> torch.Tensor:
    exponent = x[:, :1].to(torch.int32)
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
    code = _nibbles(x[:, 1:]).flatten(1)
    magnitude, odd = code & 7, code & 1
    # twice E2M1: 0, 1, 2, 3, 4, 6, 8, 12
    doubled = torch.where(magnitude < 4, magnitude, (2 + odd) << ((magnitude >> 1).clamp(min=1) - 1)).to(torch.int16)
    return bits.view(torch.float32) * torch.where(code > 7, -doubled, doubled).float()


def _q2_k(x: torch.Tensor) -> torch.Tensor:
    scales, numbers = x[:, :16], _pairs(x[:, 16:80].reshape(-1, 32))
    scale = (_half(x, 80) * (scales & 15).float())[:, :, None]
    least = (_half(x, 82) * (scales >> 4).float())[:, :, None]
    return scale * numbers.reshape(-1, 16, 16).float() - least


def _q3_k(x: torch.Tensor) -> torch.Tensor:
    low, high = _nibbles(x[:, 96:104]).flatten(1), _pairs(x[:, 104:108]).flatten(1)
    scale = _half(x, 108) * _signed(low | (high << 4), 32)
    numbers = _pairs(x[:, 32:96].reshape(-1, 32)).reshape(-1, 16, 16).to(torch.int16)
    absent = (_bits(x[:, :32]) ^ 1).reshape(-1, 16, 16).to(torch.int16)
    return scale[:, :, None] * (numbers - (absent << 2)).float()


def _scales_and_least(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eight scales and eight offsets for each block of the types with both in 12 bytes, (blocks, 8, 1) each."""
    first, second, third = x[:, 4:8], x[:, 8:12], x[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return (_half(x, 0) * scale.float())[:, :, None], (_half(x, 2) * least.float())[:, :, None]


def _q4_k(x: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_least(x)
    return scale * _nibbles(x[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32).float() - least


def _q5_k(x: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_least(x)
    low, high = _nibbles(x[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32), _bits(x[:, 16:48])
    return scale * (low | (high << 4)).float() - least


def _q6_k(x: torch.Tensor) -> torch.Tensor:
    low = _nibbles(x[:, :128].reshape(-1, 64)).reshape(-1, 8, 32)
    high = _pairs(x[:, 128:192].reshape(-1, 32)).reshape(-1, 8, 32)
    scale = _half(x, 208) * x[:, 192:208].contiguous().view(torch.int8).float()
    return scale[:, :, None] * _signed(low | (high << 4), 32).reshape(-1, 16, 16)


_DECODERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "MXFP4": _mxfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
