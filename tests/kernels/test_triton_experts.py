"""Triton's grouped products and their sums against float64; how they run is said in triton_kernels.py.

Results are poisoned, and so are the matrices of experts that no row chose: what is not to be computed shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.grouped import SortedPairs, Window, sorted_pairs
from flexgen.kernels.triton.experts import LEAST_ROWS, TritonGroupedKernels
from tests.kernels.triton_kernels import DEVICE, DTYPES, ON_GPU

pytestmark = ON_GPU
KERNELS = TritonGroupedKernels()
NAN = float("nan")
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.Tensor.new_empty

    def new(like: Tensor, *shape: int, **how: Any) -> Tensor:
        out = own(like, *shape, **how)
        return out.fill_(NAN) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new)


def routed(routing: str, rows: int, choices: int, num_experts: int, chance: random.Random) -> Tensor:
    """The experts of each row: at random, all the same ones, or none of the first and last ones."""
    chosen = {
        "random": lambda: chance.sample(range(num_experts), choices),
        "same": lambda: list(range(num_experts - choices, num_experts)),
        "few": lambda: chance.sample(range(1, 1 + choices), choices),
    }[routing]
    return torch.tensor([chosen() for _ in range(rows)], device=DEVICE)


def windows(pairs: SortedPairs, parts: list[int], at_once: int) -> Iterator[tuple[Window, list[int]]]:
    """The windows of each part of the experts, and the places that lie in them; the last windows are empty."""
    offsets, num_pairs = pairs.offsets.tolist(), len(pairs.order)
    for first, stop in zip([0, *parts], [*parts, pairs.num_experts], strict=True):
        for skipped in range(0, num_pairs, at_once):
            begin = offsets[first] + skipped
            window = Window(first=first, count=stop - first, skipped=skipped, num_rows=min(at_once, num_pairs - skipped))
            yield window, list(range(begin, min(begin + window.num_rows, offsets[stop])))


def check_product(
    experts: Tensor, num_experts: int, inputs: int, outputs: int, *, parts: list[int], at_once: int, dtype: torch.dtype,
    gathers: bool = True, inputs_first: bool = False, biased: bool = False,
) -> None:  # fmt: skip
    """Every window's products, and nothing behind them."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    rows, choices = experts.shape
    pairs, chosen = sorted_pairs(experts, num_experts), experts.reshape(-1)
    weight = numbers(num_experts, inputs, outputs) if inputs_first else numbers(num_experts, outputs, inputs).mT
    bias = numbers(num_experts, outputs) if biased else None
    unused = [expert for expert in range(num_experts) if expert not in set(chosen.tolist())]
    weight[unused] = NAN
    x = numbers(rows, inputs)
    for window, places in windows(pairs, parts, at_once):
        those, taken = slice(window.first, window.first + window.count), pairs.order[places]
        given = x[taken // choices]
        behind = torch.full((window.num_rows - len(places), inputs), NAN, dtype=dtype, device=DEVICE)
        found = KERNELS.product(
            x if gathers else torch.cat([given, behind]),
            weight[those],
            None if bias is None else bias[those],
            pairs,
            window,
            gathers=gathers,
        )
        assert found.shape == (window.num_rows, outputs)
        matrices = weight[chosen[taken]].double()
        exact = torch.einsum("ri,rio->ro", given.double(), matrices)
        size = torch.einsum("ri,rio->ro", given.double().abs(), matrices.abs())
        if bias is not None:
            exact, size = exact + bias[chosen[taken]].double(), size + bias[chosen[taken]].double().abs()
        limit = ROUNDOFF[dtype] * exact.abs() + (inputs + 2) * 2.0**-24 * size  # of the result, and of float32 sums in any order
        assert bool(((found[: len(places)].double() - exact).abs() <= 1.01 * limit).all())
        assert bool(found[len(places) :].isnan().all())


@pytest.mark.parametrize("seed", range(24))
def test_anything(seed: int) -> None:
    chance = random.Random(seed)
    num_experts = chance.randint(3, 9)
    choices = chance.randint(1, min(4, num_experts - 1))
    rows = chance.choice([1, 2, 17, 40, 90])
    experts = routed(chance.choice(["random", "random", "same", "few"]), rows, choices, num_experts, chance)
    check_product(
        experts, num_experts, chance.choice([5, 32, 64, 100]), chance.choice([7, 64, 130]),
        parts=sorted(chance.sample(range(1, num_experts), chance.randint(0, 2))), at_once=chance.choice([1000, 1000, 20]),
        dtype=chance.choice(DTYPES), gathers=chance.random() < 0.5, inputs_first=chance.random() < 0.5, biased=chance.random() < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_experts"), [(300, 2), (130, 3), (1, 128)])
def test_tiles_of_all_sizes(dtype: torch.dtype, rows: int, num_experts: int) -> None:
    experts = routed("random", rows, 1, num_experts, random.Random(0))
    check_product(experts, num_experts, 64, 64, parts=[1], at_once=1000, dtype=dtype)


def test_rows_of_no_expert_are_left_out() -> None:
    """Such as those that a router masks with the number of experts."""
    experts = torch.tensor([[0, 4], [4, 4], [2, 0]], device=DEVICE)
    pairs = sorted_pairs(experts, 4)
    assert pairs.offsets.tolist() == [0, 2, 2, 3, 3]
    weight = torch.ones(4, 16, 16, device=DEVICE)
    found = KERNELS.product(
        torch.ones(3, 16, device=DEVICE), weight, None, pairs, Window(first=0, count=4, skipped=0, num_rows=6), gathers=True
    )
    assert found[:, 0].nan_to_num(-1).tolist() == [16, 16, 16, -1, -1, -1]


def test_sorted_pairs() -> None:
    pairs = sorted_pairs(torch.tensor([[2, 0], [0, 3], [2, 3]], device=DEVICE), 5)
    assert pairs.order.tolist() == [1, 2, 0, 4, 3, 5]
    assert pairs.places.tolist() == [2, 0, 1, 4, 3, 5]
    assert pairs.offsets.tolist() == [0, 2, 2, 4, 6, 6]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "at_once"), [(24, 1000), (1500, 1000), (24, 7)])
def test_sums(dtype: torch.dtype, dim: int, at_once: int, weighted: bool) -> None:
    """Of experts that arrive in parts; what lies behind the results of a window is not added."""
    rows, choices, num_experts = 20, 3, 6
    generator = torch.Generator().manual_seed(0)
    experts = routed("random", rows, choices, num_experts, random.Random(1)).sort(dim=-1).values
    pairs = sorted_pairs(experts, num_experts)
    results = torch.randn(rows * choices, dim, generator=generator).to(dtype).to(DEVICE)  # of pairs
    weights = torch.rand(rows, choices, generator=generator).to(DEVICE) if weighted else None
    total = torch.zeros(rows, dim, device=DEVICE)
    for window, places in windows(pairs, [2, 3], at_once):
        given = torch.full((window.num_rows, dim), NAN, dtype=dtype, device=DEVICE)
        given[: len(places)] = results[pairs.order[places]]
        KERNELS.add(given, weights, pairs, window, total)
    scaled = results.double().view(rows, choices, dim) * (1 if weights is None else weights.double()[..., None])
    torch.testing.assert_close(total.double(), scaled.sum(dim=1), rtol=0, atol=3 * 2.0**-23 * float(scaled.abs().sum(dim=1).max()))


def test_sums_do_not_depend_on_the_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor([[0, 2, 3], [1, 2, 3], [0, 1, 2]], device=DEVICE)
    results, weights = torch.randn(3, 3, 16, generator=generator).to(DEVICE), torch.rand(3, 3, generator=generator).to(DEVICE)

    def summed(rows: slice) -> Tensor:
        pairs, total = sorted_pairs(experts[rows], 4), torch.zeros(len(experts[rows]), 16, device=DEVICE)
        window = Window(first=0, count=4, skipped=0, num_rows=len(pairs.order))
        KERNELS.add(results[rows].reshape(-1, 16)[pairs.order], weights[rows], pairs, window, total)
        return total

    assert torch.equal(summed(slice(1, 2))[0], summed(slice(0, 3))[1])


def test_inputs_in_another_order_in_memory() -> None:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE).T
    pairs, weight = sorted_pairs(torch.zeros(5, 1, dtype=torch.int64, device=DEVICE), 1), torch.eye(16, device=DEVICE)[None]
    window = Window(first=0, count=1, skipped=0, num_rows=5)
    assert torch.equal(KERNELS.product(x, weight, None, pairs, window, gathers=True), x)


def test_refusals() -> None:
    pairs = sorted_pairs(torch.zeros(5, 1, dtype=torch.int64, device=DEVICE), 2)
    x, weight, window = (
        torch.zeros(5, 16, device=DEVICE),
        torch.zeros(1, 16, 8, device=DEVICE),
        Window(first=0, count=1, skipped=0, num_rows=5),
    )
    how: dict[str, Any] = {"pairs": pairs, "window": window, "gathers": True}
    with pytest.raises(EngineError, match=r"weight holds torch\.float16"):
        KERNELS.product(x, weight.half(), None, **how)
    with pytest.raises(EngineError, match="x has the shape"):
        KERNELS.product(x[:, :8], weight, None, **how)
    with pytest.raises(EngineError, match="weight has the shape"):
        KERNELS.product(x, weight.repeat(2, 1, 1), None, **how)
    with pytest.raises(EngineError, match="rows has the shape"):
        KERNELS.add(x[:3], None, pairs, window, torch.zeros(5, 16, device=DEVICE))


def test_other_formats_are_not_covered() -> None:
    assert all(map(KERNELS.covers, [torch.float32, torch.float16, torch.bfloat16]))
    assert not KERNELS.covers(torch.float64)
    assert LEAST_ROWS == 16  # what tensor cores need at least
