"""Arguments of launches, checked as far as shapes tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexgen.kernels.checks import check_shapes
from flexgen.kernels.triton.grids import ALIGNMENT

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How programs read scales that are stored in these dtypes.
SCALE_KINDS = {
    torch.float32: "float", torch.float16: "float", torch.bfloat16: "float", torch.uint8: "power", torch.float8_e8m0fnu: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}  # fmt: skip


def seen(num_sequences: int, page_tables: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Return the arguments that say what next tokens see."""
    check_shapes(page_tables=(page_tables, (num_sequences, None)), starts=(starts, (num_sequences,)), lengths=(lengths, (num_sequences,)))
    return {"tables": page_tables.contiguous(), "starts": starts.contiguous(), "lengths": lengths.contiguous()}


def rows_of(tensor: Tensor) -> Tensor:
    """Return (tokens, heads, dim) with contiguous heads, such that one program fits, whatever the tensor was a part of.

    Where heads have a multiple of 16 numbers, as nearly all models' have, strides and addresses are multiples of 16, too.  Other heads are
    copied if there is anything between them.
    """
    _, heads, dim = tensor.shape
    token, head, one = tensor.stride()
    if dim % ALIGNMENT:
        fits = (token, head, one) == (heads * dim, dim, 1)
    else:
        fits = one == 1 and token % ALIGNMENT == head % ALIGNMENT == 0
    return tensor if fits and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)


def cap(softcap: float | None) -> float | None:
    """Return the limit of scores as a float."""
    return None if softcap is None else float(softcap)


def sink_logits(sinks: Tensor | None, heads: int) -> Tensor | None:
    """Return sinks as contiguous (heads,), or None for none."""
    if sinks is None:
        return None
    check_shapes(sinks=(sinks, (heads,)))
    return sinks.detach().contiguous()


def of_scores(scaling: float, softcap: float | None, sinks: Tensor | None, heads: int) -> dict[str, Any]:
    """Return the arguments that say what becomes of scores."""
    return {"scaling": float(scaling), "softcap": cap(softcap), "sinks": sink_logits(sinks, heads)}
