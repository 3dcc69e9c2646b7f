"""Linear layers of units that are computed by kernels of ours instead of torch's `linear`: how their rows are bound and used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flexgen.kernels.int8.products import Int8Products, RoundedInput, RoundedRows
from flexgen.models.coroutine import current_forward
from flexgen.models.parts import Part


def int8_linear(module: Any, parts: Sequence[Part], products: Int8Products, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear layer in int8, part by part as its units arrive.

    The input is rounded once for all parts, and for the layers that take the same one next, as q, k and v do, unless another micro-batch
    computes in between: the codes of one input are held at a time.

    Args:
        module: The linear layer.
        parts: Its parts, whose weights are bound as bytes of rounded rows.
        products: Computes them.
        x: The inputs, (..., in_features).

    Returns:
        The outputs, (..., out_features), in the dtype of `x`.
    """
    forward = current_forward()
    out = x.new_empty(x.numel() // module.in_features, module.out_features)
    for part in parts:
        forward.enter_unit(part.unit)
        weight = RoundedRows.within(part.tensors["weight"], part.stop - part.start, module.in_features)
        bias = None if module.bias is None else module.bias[part.start : part.stop]
        products.write(_rounded(x, products), weight, bias, out, part.start)
    return out.view(*x.shape[:-1], module.out_features)


def _rounded(x: torch.Tensor, products: Int8Products) -> RoundedRows:
    """Return an input rounded, (rows, in_features): what was rounded last, if it is that."""
    if products.last is None or not products.last.is_of(x):
        products.last = None  # before the next is made
        products.last = RoundedInput(x, products.rounded(x.reshape(-1, x.shape[-1]).contiguous()))
    return products.last.rows
