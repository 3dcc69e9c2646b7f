"""Triton's products by matrices in codes: to the bit those by the same matrices decoded before; how they run is said in triton_kernels.py.

Results are poisoned, and so are the codes of experts that no row chose.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.dequantize import tables
from flexgen.kernels.dequantize.blocks import Codes, Scales
from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints
from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.encoded import EncodedMatrices
from flexgen.kernels.grouped import Window, sorted_pairs
from flexgen.kernels.triton.experts import ENCODED_ROWS, MOST_ROWS, TritonGroupedKernels
from tests.kernels.plain_grouped import numbers_of
from tests.kernels.test_triton_experts import routed, windows
from tests.kernels.triton_kernels import DEVICE, DTYPES, ON_GPU

pytestmark = ON_GPU
KERNELS = TritonGroupedKernels()
NAN = float("nan")
SCALES = {"bytes": torch.uint8, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "float": torch.float32, "half": torch.float16}
KINDS = ("e2m1", "integers", "integers with zeros in words", "integers with zeros in bytes")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own = torch.Tensor.new_empty

    def new(like: Tensor, *shape: int, **how: Any) -> Tensor:
        out = own(like, *shape, **how)
        return out.fill_(NAN) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new)
    with np.errstate(all="ignore"):
        yield


def matrices(
    kind: str, scales: str, experts: int, blocks: int, outputs: int, inputs: int, group: int, dtype: torch.dtype, *, gaps: bool = False
) -> EncodedMatrices:
    """Random codes of `blocks` times `outputs` outputs, with other bytes between matrices if there are `gaps`."""
    generator = torch.Generator().manual_seed(experts + outputs + inputs)
    groups, integers = -(-inputs // group), kind != "e2m1"
    line = 4 * -(-inputs // 8) if integers else inputs // 2

    def whole(low: int, high: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        shape = experts, blocks, rows + (3 if gaps else 0), columns
        return torch.randint(low, high, shape, generator=generator).to(dtype)[:, :, :rows].to(DEVICE)

    if scales in ("bytes", "e8m0"):
        found = whole(118, 130, outputs, groups, torch.uint8).view(SCALES[scales])
    else:
        found = (whole(1, 65, outputs, groups, torch.float32) / 64).to(SCALES[scales])
    zeros = {
        "integers with zeros in words": lambda: whole(-(1 << 31), 1 << 31, -(-outputs // 8), groups, torch.int32),
        "integers with zeros in bytes": lambda: whole(-8, 8, outputs, groups, torch.int8),
    }.get(kind, lambda: None)()
    return EncodedMatrices(
        codes=whole(0, 256, outputs, line, torch.uint8), scales=found, zeros=zeros, zero=8 if integers else None, group=group,
        inputs=inputs, dtype=dtype,
    )  # fmt: skip


def decoded(encoded: EncodedMatrices) -> Tensor:
    """The same matrices as the reference of all decoding gives them, (experts, inputs, outputs)."""
    experts, blocks, outputs, line = encoded.codes.shape
    found = torch.empty(experts, blocks, outputs, 2 * line, dtype=encoded.dtype, device=DEVICE)
    reference, width = DequantizeKernels(), encoded.inputs
    for expert in range(experts):
        for block in range(blocks):
            codes, scales, out = encoded.codes[expert, block], encoded.scales[expert, block], found[expert, block, :, :width].contiguous()
            zeros: Any = None if encoded.zeros is None else encoded.zeros[expert, block]
            if encoded.zero is None:
                given = Codes(numbers=codes[None], values=tables.on_device(tables.E2M1, DEVICE))
                reference.look_up(given, Scales(numbers=scales[None], block_columns=encoded.group), out[None])
            else:
                if zeros is not None and zeros.dtype == torch.int32:
                    zeros = ZeroPoints(words=zeros, packing=Packing(bits=4), rows=outputs)
                groups = Groups(scales=scales, zeros=zeros, zero=encoded.zero, columns=encoded.group)
                reference.rows(codes.contiguous().view(torch.int32), Packing(bits=4), groups, out)
            found[expert, block, :, :width] = out
    return found[..., :width].flatten(1, 2).contiguous().mT


def check(encoded: EncodedMatrices, experts: Tensor, *, parts: list[int], at_once: int, gathers: bool = True, biased: bool = False) -> None:
    """Every window's products, and nothing behind them."""
    count, inputs, outputs = encoded.shape
    generator = torch.Generator().manual_seed(1)
    rows, choices = experts.shape
    pairs, x = sorted_pairs(experts, count), torch.randn(rows, inputs, generator=generator).to(encoded.dtype).to(DEVICE)
    bias = torch.randn(count, outputs, generator=generator).to(encoded.dtype).to(DEVICE) if biased else None
    unused = [expert for expert in range(count) if expert not in set(experts.reshape(-1).tolist())]
    if encoded.scales.dtype == torch.float32:
        encoded.scales[unused] = NAN
    weight = decoded(encoded)
    assert torch.equal(weight.nan_to_num(), numbers_of(encoded).nan_to_num())
    for window, places in windows(pairs, parts, at_once):
        those = slice(window.first, window.first + window.count)
        some = replace(
            encoded, codes=encoded.codes[those], scales=encoded.scales[those], zeros=None if encoded.zeros is None else encoded.zeros[those]
        )
        behind = torch.full((window.num_rows - len(places), inputs), NAN, dtype=x.dtype, device=DEVICE)
        given = x if gathers else torch.cat([x[pairs.order[places] // choices], behind])
        how: dict[str, Any] = {"bias": None if bias is None else bias[those], "pairs": pairs, "window": window, "gathers": gathers}
        wanted, found = KERNELS.product(given, weight[those], **how), KERNELS.product(given, some, **how)
        assert bool(found[len(places) :].isnan().all())
        assert torch.equal(found[: len(places)], wanted[: len(places)])


@pytest.mark.parametrize("seed", range(32))
def test_anything(seed: int) -> None:
    chance = random.Random(seed)
    num_experts = chance.randint(3, 9)
    choices = chance.randint(1, min(4, num_experts - 1))
    kind = KINDS[seed % 4]
    inputs = chance.choice([32, 64, 96, 160] if kind == "e2m1" else [5, 32, 63, 64, 100, 200])
    encoded = matrices(
        kind, chance.choice(["bytes", "e8m0", "e4m3"] if kind == "e2m1" else ["float", "half"]), num_experts, chance.randint(1, 3),
        chance.choice([7, 24, 64, 130]), inputs, chance.choice([16, 24, 32, 128, 1000]), chance.choice(DTYPES), gaps=chance.random() < 0.5,
    )  # fmt: skip
    experts = routed(chance.choice(["random", "same", "few"]), chance.choice([1, 2, 17, 40, 90]), choices, num_experts, chance)
    check(
        encoded, experts, parts=sorted(chance.sample(range(1, num_experts), chance.randint(0, 2))), at_once=chance.choice([1000, 20]),
        gathers=chance.random() < 0.5, biased=chance.random() < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_experts"), [(300, 2), (130, 3), (1, 128)])
def test_tiles_of_all_sizes(dtype: torch.dtype, rows: int, num_experts: int) -> None:
    encoded = matrices("integers with zeros in words", "float", num_experts, 2, 32, 128, 64, dtype)
    check(encoded, routed("random", rows, 1, num_experts, random.Random(0)), parts=[1], at_once=1000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale(dtype: torch.dtype) -> None:
    """Those of E8M0, whose products overflow and underflow, one at a time: a product with a row of a unit matrix is one number."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    line = (codes[0::2] | codes[1::2] << 4).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    encoded = EncodedMatrices(
        codes=line[None, None].to(DEVICE), scales=scales[None, None].to(DEVICE), zeros=None, zero=None, group=32, inputs=32, dtype=dtype
    )
    pairs = sorted_pairs(torch.zeros(32, 1, dtype=torch.int64, device=DEVICE), 1)
    window, x = Window(first=0, count=1, skipped=0, num_rows=32), torch.eye(32, dtype=dtype, device=DEVICE)
    wanted = KERNELS.product(x, decoded(encoded), None, pairs, window, gathers=True)
    found = KERNELS.product(x, encoded, None, pairs, window, gathers=True)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    assert len(found.nan_to_num(7).unique()) > 16


def test_few_rows_are_multiplied_by_codes() -> None:
    assert KERNELS.reads_encoded(0)
    assert KERNELS.reads_encoded(ENCODED_ROWS)
    assert not KERNELS.reads_encoded(ENCODED_ROWS + 1)
    assert ENCODED_ROWS < MOST_ROWS


def test_refusals() -> None:
    encoded = matrices("integers with zeros in words", "float", 1, 1, 16, 32, 16, torch.float32)
    pairs, x = sorted_pairs(torch.zeros(5, 1, dtype=torch.int64, device=DEVICE), 2), torch.zeros(5, 32, device=DEVICE)
    how: dict[str, Any] = {"bias": None, "pairs": pairs, "window": Window(first=0, count=1, skipped=0, num_rows=5), "gathers": True}
    with pytest.raises(EngineError, match=r"weight holds torch\.float16"):
        KERNELS.product(x, replace(encoded, dtype=torch.float16), **how)
    with pytest.raises(EngineError, match="codes has the shape"):
        KERNELS.product(x, encoded, **how | {"window": Window(first=0, count=2, skipped=0, num_rows=5)})
    with pytest.raises(EngineError, match="scales has the shape"):
        KERNELS.product(x, replace(encoded, group=8), **how)
    with pytest.raises(EngineError, match="zeros has the shape"):
        KERNELS.product(x, replace(encoded, zeros=encoded.zeros[:, :, :1]), **how)  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(EngineError, match="not stored row by row"):
        KERNELS.product(x, replace(encoded, codes=encoded.codes.mT.contiguous().mT), **how)
    with pytest.raises(EngineError, match="do not make 32 inputs"):
        KERNELS.product(x, replace(encoded, scales=encoded.scales.double()), **how)
