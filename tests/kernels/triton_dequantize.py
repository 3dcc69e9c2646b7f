"""What the tests of Triton's kernels that decode share: the kernels, torch's bfloat16 for the interpreter, and the comparison to the bit.

Numbers are poisoned before they are decoded, and memory around them must stay as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgen.kernels.dequantize import tables
from flexgen.kernels.dequantize.reference import DequantizeKernels
from tests.formats.encoded import NF4
from tests.kernels.test_dequantize import assert_same
from tests.kernels.triton_kernels import DEVICE, ON_DEVICE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GUARD, UNTOUCHED = 64, 7  # numbers before and after those that are decoded, and what they are

To = Callable[[Tensor], Tensor]
Decode = Callable[[DequantizeKernels, To, Tensor], None]  # (kernels, copies to their device, numbers to be written)


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without warnings of overflows; the interpreter cuts bfloat16 off where a device rounds, so here torch converts for it."""
    with np.errstate(all="ignore"):
        if not ON_DEVICE:
            from triton.runtime import interpreter

            really = interpreter.InterpreterBuilder.cast_impl
            bfloat16, float32 = interpreter.tl.bfloat16, interpreter.tl.float32

            def converted(builder: Any, source: Any, target: Any) -> Any:
                kinds = source.dtype.scalar, target.scalar
                if kinds == (float32, bfloat16):
                    numbers = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
                elif kinds == (bfloat16, float32):
                    numbers = torch.from_numpy(np.array(source.data).view(np.int16)).view(torch.bfloat16).float().numpy()
                else:
                    return really(builder, source, target)
                return interpreter.TensorHandle(numbers, target.scalar)

            monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", converted)
        yield


@pytest.fixture(scope="module")
def kernels() -> DequantizeKernels:
    from flexgen.kernels.triton.dequantize import TritonDequantizeKernels

    return TritonDequantizeKernels()


def check(kernels: DequantizeKernels, decode: Decode, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Decode twice; return the numbers."""
    wanted = torch.full(shape, math.nan, dtype=dtype)
    decode(DequantizeKernels(), lambda tensor: tensor, wanted)
    memory = torch.full((wanted.numel() + 2 * GUARD,), UNTOUCHED, dtype=dtype, device=DEVICE)
    out = memory[GUARD : GUARD + wanted.numel()].view(shape).fill_(math.nan)
    decode(kernels, lambda tensor: tensor.to(DEVICE), out)
    found = memory.cpu()
    assert_same(found[GUARD : GUARD + wanted.numel()].view(shape), wanted)
    assert bool((found[:GUARD] == UNTOUCHED).all())
    assert bool((found[GUARD + wanted.numel() :] == UNTOUCHED).all())
    return wanted


def numbers(chance: random.Random, *shape: int, wide: bool = True) -> Tensor:
    """Float32 numbers of both signs, if `wide` over the whole range: products overflow, underflow and are subnormal."""
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    exponents = torch.randint(-140, 127, shape, generator=generator) if wide else torch.zeros(shape)
    return torch.randn(shape, generator=generator) * torch.exp2(exponents.float())


def codes_of(chance: random.Random, *shape: int, bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(chance.randrange(1 << 30)))


def of_kind(kind: str, device: torch.device) -> Tensor:
    """A table of values, as the formats have it on a device."""
    if kind == "other":
        return torch.linspace(-3, 5, 256).to(device)
    return NF4.to(device) if kind == "nf4" else tables.on_device(tables.E2M1 if kind == "e2m1" else tables.e4m3(), device)
