"""Rounding: never worse than between the smallest and the largest weight, in any group; the layout; the paper's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexgen.errors import CheckpointError
from flexgen.kernels.threads import KernelThreads
from flexgen.quantize.rounding import Rounded, check_finite, round_as_the_paper, round_groups
from tests.quantize.reading import codes_and_zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 32


def decoded(found: Rounded, bits: int, shape: tuple[int, int], group: int) -> torch.Tensor:
    codes, zeros = codes_and_zeros(found.packed, found.zeros, bits, shape)
    assert int(codes.max()) < 1 << bits
    scales = found.scales.double().repeat_interleave(group, 1)
    return (codes - zeros.repeat_interleave(group, 1)).double() * scales


def between_extremes(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Rounded between the smallest and the largest weight of each group, with the scale as it would be stored."""
    data, top = weights.double().view(len(weights), -1, group), (1 << bits) - 1
    low, high = data.amin(2, keepdim=True).clamp(max=0), data.amax(2, keepdim=True).clamp(min=0)
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    scale = ((high - low) / top).clamp(min=least).float().to(dtype).double()
    zero = (-low / scale + 0.5).floor().clamp(0, top)
    codes = (data / scale + zero + 0.5).floor().clamp(0, top)
    return ((codes - zero) * scale).view(weights.shape)


def group_errors(weights: torch.Tensor, approximations: torch.Tensor, group: int) -> torch.Tensor:
    return (weights.double() - approximations).square().view(len(weights), -1, group).sum(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=30)
@given(data=st.data())
def test_no_group_is_worse_than_between_its_extremes(bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 11))
    magnitude = data.draw(st.sampled_from([1.0, 1e-3, 30.0]))
    numbers = st.floats(-1, 1, width=32, allow_subnormal=False)
    weights = torch.from_numpy(data.draw(arrays(np.float32, (rows, 2 * GROUP), elements=numbers))) * magnitude
    found = round_groups(weights, bits=bits, group_size=GROUP, dtype=dtype)
    searched = group_errors(weights, decoded(found, bits, (rows, 2 * GROUP), GROUP), GROUP)
    plain = group_errors(weights, between_extremes(weights, bits, GROUP, dtype), GROUP)
    # a code that lies between two others to the last bit may fall either way
    assert (searched <= plain * (1 + 1e-5) + 1e-12 * magnitude**2).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_finds_better_scales(bits: int, group: int) -> None:
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    found = decoded(round_groups(weights, bits=bits, group_size=group, dtype=torch.bfloat16), bits, (64, 256), group)
    searched = group_errors(weights, found, group)
    plain = group_errors(weights, between_extremes(weights, bits, group, torch.bfloat16), group)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < (0.96 if bits == 4 else 0.99) * plain.sum()


def weighted_errors(weights: torch.Tensor, approximations: torch.Tensor, group: int) -> torch.Tensor:
    data = weights.double().view(len(weights), -1, group)
    importance = data.abs() + data.abs().mean(2, keepdim=True)
    return ((weights.double() - approximations).view(data.shape).square() * importance).sum(2)


def plain_search(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The search as docs/quantization.md has it, in float64."""
    data, top = weights.double().view(len(weights), -1, group), (1 << bits) - 1
    low, high = data.amin(2, keepdim=True).clamp(max=0), data.amax(2, keepdim=True).clamp(min=0)
    importance = data.abs() + data.abs().mean(2, keepdim=True)

    def decoded_with(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return scale * ((data / scale + zero + 0.5).floor().clamp(0, top) - zero)

    def errors(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        square = (decoded_with(scale, zero) - data).square()
        return (square * importance).sum(2, keepdim=True), square.sum(2, keepdim=True)

    def ranged(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = ((high - low) * share / top).to(dtype).double()
        return scale, (-low * share / scale + 0.5).floor().clamp(max=top)

    scale, zero = ranged(1.0)
    best, most = errors(scale, zero)
    for attempt in [*np.linspace(0.65, 1.05, 10), None]:
        if attempt is None:
            steps = decoded_with(scale, zero) / scale
            fitted = (data * steps * importance).sum(2, keepdim=True) / (steps.square() * importance).sum(2, keepdim=True)
            candidate = fitted.to(dtype).double(), zero
        else:
            candidate = ranged(float(attempt))
        weighted, plain = errors(*candidate)
        better = (weighted < best) & (plain <= most)
        best, scale, zero = (torch.where(better, new, old) for new, old in zip((weighted, *candidate), (best, scale, zero), strict=True))
    return decoded_with(scale, zero).view(weights.shape)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_is_as_good_as_a_plain_one(bits: int, group: int) -> None:
    weights = torch.randn(24, 384, generator=torch.Generator().manual_seed(3)) * 0.02
    found = decoded(round_groups(weights, bits=bits, group_size=group, dtype=torch.bfloat16), bits, (24, 384), group)
    ours = weighted_errors(weights, found, group)
    plain = weighted_errors(weights, plain_search(weights, bits, group, torch.bfloat16), group)
    assert ours.sum().item() == pytest.approx(plain.sum().item(), rel=1e-4)
    assert ((ours / plain - 1).abs() < 1e-3).double().mean() > 0.95  # a choice between equals may fall either way


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_rounded_as_they_are_stored(dtype: torch.dtype, bits: int) -> None:
    stored = (torch.randn(13, 224, generator=torch.Generator().manual_seed(4)) * 0.02).to(dtype)
    found = round_groups(stored, bits=bits, group_size=32, dtype=torch.bfloat16)
    in_float32 = round_groups(stored.float(), bits=bits, group_size=32, dtype=torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(found, in_float32, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_does_not_depend_on_what_is_rounded_beside_it(bits: int) -> None:
    weights = torch.randn(8, 32 * 7, generator=torch.Generator().manual_seed(5))
    together = round_groups(weights, bits=bits, group_size=32, dtype=torch.float32)
    for index in range(7):
        alone = round_groups(weights[:, 32 * index : 32 * (index + 1)].contiguous(), bits=bits, group_size=32, dtype=torch.float32)
        assert torch.equal(alone.packed, together.packed[:, bits * index : bits * (index + 1)])
        assert torch.equal(alone.scales, together.scales[:, index : index + 1])
        assert torch.equal(alone.zeros, together.zeros[:, index : index + 1])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_refuses_what_no_integer_can_stand_for(dtype: torch.dtype, wrong: float) -> None:
    for row, column in ((0, 0), (17, 95)):
        weights = torch.ones(18, 96, dtype=dtype)
        weights[row, column] = wrong
        with KernelThreads(2) as threads, pytest.raises(CheckpointError, match=r"^layer\.weight holds numbers .*--keep layer\.weight"):
            round_groups(weights, bits=4, group_size=32, dtype=dtype, name="layer.weight", parallel=threads.over)


def test_four_bits_are_better_than_the_papers_with_fewer_bits() -> None:
    weights = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    found = round_groups(weights, bits=4, group_size=64, dtype=torch.bfloat16)
    paper = round_as_the_paper(weights)
    ours, theirs = decoded(found, 4, (256, 512), 64) - weights, paper_decoded(paper) - weights
    assert ours.square().mean() < 0.98 * theirs.square().mean()
    assert sum(part.nbytes for part in found) < sum(part.nbytes for part in paper)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-30, -7e4])
def test_equal_weights_are_nearly_exact(bits: int, value: float) -> None:
    weights = torch.full((9, GROUP), value)
    found = decoded(round_groups(weights, bits=bits, group_size=GROUP, dtype=torch.float32), bits, (9, GROUP), GROUP)
    assert torch.allclose(found, weights.double(), rtol=1e-6, atol=0)


def test_small_weights_in_float16_have_the_smallest_scale() -> None:
    weights = torch.linspace(-1e-8, 1e-8, GROUP)[None]
    found = round_groups(weights, bits=4, group_size=GROUP, dtype=torch.float16)
    assert found.scales.item() == 2.0**-24
    assert decoded(found, 4, (1, GROUP), GROUP).abs().max() == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_do_not_change_anything(bits: int) -> None:
    weights = torch.randn(77, 192, generator=torch.Generator().manual_seed(2))
    alone = round_groups(weights, bits=bits, group_size=64, dtype=torch.bfloat16)
    with KernelThreads(3) as threads:
        together = round_groups(weights, bits=bits, group_size=64, dtype=torch.bfloat16, parallel=threads.over)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert alone.zeros.shape == (-(-77 * bits // 32), 3)


def paper_decoded(found: object) -> torch.Tensor:
    codes, ranges = found  # type: ignore[misc]
    both = torch.stack((codes >> 4, codes & 15), 1).flatten(0, 1).double()
    scale, low = (ranges[:, each].double().repeat_interleave(64, 0)[: len(both)] for each in (0, 1))
    return both / scale + low


def test_the_papers_arithmetic_by_hand() -> None:
    """One input, 70 outputs: a whole group, and one that is filled up with zeros."""
    weights = torch.arange(70.0)[:, None] + 1
    found = round_as_the_paper(weights)
    assert found.codes.shape == (35, 1)
    assert torch.equal(found.ranges[:, 0, 0], torch.tensor([15 / 63, 15 / 70]).half())
    assert torch.equal(found.ranges[:, 1, 0], torch.tensor([1.0, 0.0]).half())
    first = [round((value - 1) * 15 / 63) for value in (1, 2, 3, 4)]
    assert found.codes[:2, 0].tolist() == [first[0] << 4 | first[1], first[2] << 4 | first[3]]
    assert found.codes[32, 0].item() == round(65 * 15 / 70) << 4 | round(66 * 15 / 70)


def test_groups_of_equal_weights_are_exact_in_the_papers_format() -> None:
    found = round_as_the_paper(torch.full((64, 3), 0.25))
    assert not found.codes.any()
    assert torch.equal(paper_decoded(found), torch.full((64, 3), 0.25).double())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_no_integer_can_stand_for_is_refused_by_name(wrong: float) -> None:
    weights = torch.zeros(3, 32)
    check_finite("w", weights)
    weights[1, 5] = wrong
    with pytest.raises(CheckpointError, match=r"layer\.weight holds numbers .*--keep layer\.weight"):
        check_finite("layer.weight", weights)
