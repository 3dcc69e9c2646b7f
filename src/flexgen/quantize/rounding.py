"""Weights to stored tensors: groups along the inputs by a search for the scale, and the FlexGen paper's groups along the outputs."""

from __future__ import annotations

import shlex
from typing import NamedTuple

import numpy as np
import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.errors import CheckpointError
from flexgen.formats.flexgen_v0 import GROUP as PAPER_GROUP
from flexgen.kernels.cpu.formats import carried

# The ranges that are tried, as shares of the range of the weights.
_SHARES = np.linspace(0.65, 1.05, 10, dtype=np.float32)
# The smallest scale of each dtype whose reciprocal is finite in float32.
_LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
_PAPER_TOP = 15
# The dtypes of weights that `round_groups` takes.
ROUNDED_AS_STORED = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Rounded(NamedTuple):
    """A matrix in integers, as compressed-tensors stores it.

    Attributes:
        packed: The codes, packed along the inputs from the low bits on, int32 (outputs, inputs * bits / 32).
        scales: The scales, (outputs, groups).
        zeros: The zero points, packed along the outputs from the low bits on, int32 (outputs * bits / 32 rounded up, groups).
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def round_groups(
    weights: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    name: str = "the matrix",
    parallel: Parallel = serially,
) -> Rounded:
    """Round a matrix to integers with a scale and a zero point for each group along the inputs.

    The squared error of no group is larger than that of the scale and zero point that its smallest and largest weight give; among such
    scales, one is chosen for which errors of large weights count more (kernel.py).

    Args:
        weights: In one of the dtypes ROUNDED_AS_STORED, contiguous, (outputs, inputs); the inputs are a multiple of the group size.
        bits: 4 or 8.
        group_size: The weights of a group, a multiple of 16.
        dtype: The dtype of the scales: float16, bfloat16 or float32.
        name: The name of the matrix, for messages.
        parallel: Runs the loop over the rows.

    Raises:
        CheckpointError: There is a number that is infinite or none.
    """
    from flexgen.quantize.kernel import round_rows

    outputs, inputs = weights.shape
    per_word = 32 // bits
    words, groups = -(-outputs // per_word), inputs // group_size
    packed = torch.empty(outputs, inputs // per_word, dtype=torch.int32)
    scales = torch.empty(outputs, groups, dtype=dtype)
    zeros = torch.empty(words, groups, dtype=torch.int32)
    arrays = packed.view(torch.uint8).numpy(), carried(scales), zeros.view(torch.uint32).numpy()
    given, least = carried(weights), np.float32(_LEAST[dtype])
    finite: list[bool] = []
    parallel(lambda begin, end: finite.append(round_rows(given, bits, group_size, _SHARES, least, *arrays, begin, end)), words)
    if not all(finite):
        raise _not_finite(name)
    return Rounded(packed, scales, zeros)


class PaperRounded(NamedTuple):
    """A matrix in the FlexGen paper's 4 bits.

    Attributes:
        codes: Two rows in a byte, the first in the high half, uint8 (outputs / 2, inputs).
        ranges: For each group of 64 outputs, 15 / (largest - smallest) and the smallest weight, float16 (groups, 2, inputs).
    """

    codes: torch.Tensor
    ranges: torch.Tensor


def round_as_the_paper(weights: torch.Tensor) -> PaperRounded:
    """Round a matrix as FlexGen does (ICML 2023, section 5): between the smallest and the largest of 64 neighbouring outputs of an input.

    The last group is filled up with zeros, which count as weights.  Where all weights of a group are equal, the codes are 0.

    Args:
        weights: Float32, (outputs, inputs), with an even number of outputs.
    """
    outputs, inputs = weights.shape
    padded = torch.nn.functional.pad(weights, (0, 0, 0, -outputs % PAPER_GROUP))
    data = padded.view(-1, PAPER_GROUP, inputs)
    low, high = data.amin(1, keepdim=True), data.amax(1, keepdim=True)
    scale = _PAPER_TOP / (high - low)
    codes = ((data - low) * scale).clamp_(0, _PAPER_TOP).round_().nan_to_num_(0).to(torch.uint8)
    both = codes[:, 0::2] << 4 | codes[:, 1::2]  # (groups, 32, inputs)
    return PaperRounded(both.reshape(-1, inputs)[: outputs // 2], torch.cat([scale, low], 1).to(torch.float16))


def check_finite(name: str, weights: torch.Tensor) -> None:
    """Refuse weights that no integer can stand for, as `round_groups` does by itself.

    Raises:
        CheckpointError: There is a number that is infinite or none.
    """
    if weights.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(weights)):
        raise _not_finite(name)


def _not_finite(name: str) -> CheckpointError:
    what = "numbers that are infinite, not numbers, or too large"
    return CheckpointError(f"{name} holds {what}, and cannot be rounded: `flexgen convert --keep {shlex.quote(name)}` leaves it as it is")
