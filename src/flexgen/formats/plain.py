"""Plain numbers: any dtype of torch, cast to the dtype of computing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexgen.formats.base import NumberFormat

if TYPE_CHECKING:
    import torch

# Four megabytes of float32, which fit into CPU caches.
CAST_ELEMENTS = 1 << 20


class PlainNumbers(NumberFormat):
    """Numbers of one dtype, stored as they are, which the host casts (`cast_into`) before the link."""

    runs = True

    def __init__(self, dtype: str) -> None:
        self.name = dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cast_into(out: torch.Tensor, numbers: torch.Tensor) -> None:
    """Copy `numbers` into `out` with a cast.

    float16 becomes bfloat16 through pieces of float32, which is three to four times faster on a CPU (docs/log.md).
    """
    import torch

    slow = numbers.dtype == torch.float16 and out.dtype == torch.bfloat16 and not out.is_cuda
    if not slow or not (out.is_contiguous() and numbers.is_contiguous()) or numbers.numel() < CAST_ELEMENTS:
        out.copy_(numbers)
        return
    wide = torch.empty(CAST_ELEMENTS, dtype=torch.float32)
    for part, source in zip(out.view(-1).split(CAST_ELEMENTS), numbers.view(-1).split(CAST_ELEMENTS), strict=True):
        part.copy_(wide[: source.numel()].copy_(source))
