"""Tensors without numbers: whatever rearranges them says the same as the real thing, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, PermuteForRope, Transpose

from flexgen.checkpoint.conversion import Traced, Untraceable
from flexgen.formats.base import StoredTensor


def stored(name: str, shape: Sequence[int]) -> StoredTensor:
    return StoredTensor(name=name, path=Path("x"), offset=0, nbytes=4 * math.prod(shape), dtype=torch.float32, shape=tuple(shape))


def filled(traced: Tensor, real: dict[str, Tensor]) -> Tensor:
    """The numbers that the pieces of `traced` point to; NaN where there is no piece."""
    assert isinstance(traced, Traced)
    out = torch.full(traced.shape, math.nan)
    for piece in traced.pieces:
        assert torch.isnan(out[piece.target]).all(), "pieces overlap"
        out[piece.target] = real[piece.tensor.name].as_strided(piece.shape, piece.strides, piece.first)
    return out


def check(function: Callable[..., Tensor | Sequence[Tensor]], *shapes: Sequence[int]) -> list[int]:
    """Compare with the real thing; the number of pieces of each result."""
    tensors = [stored(str(i), shape) for i, shape in enumerate(shapes)]
    real = {tensor.name: torch.randn(tensor.shape) for tensor in tensors}
    traced = function(*[Traced.of(tensor) for tensor in tensors])
    expected = function(*real.values())
    counts = []
    for have, want in zip(*([x] if isinstance(x, Tensor) else list(x) for x in (traced, expected)), strict=True):
        torch.testing.assert_close(filled(have, real), want.contiguous(), rtol=0, atol=0)
        counts.append(len(have.pieces))
    return counts


@pytest.mark.parametrize(
    ("function", "shapes", "pieces"),
    [
        (lambda a: a[...], [(3, 4)], [1]),
        (lambda a: a[1:3, 2], [(3, 4)], [1]),
        (lambda a: a[-1], [(3, 4)], [1]),
        (lambda a: a[:, 1:3], [(3, 4)], [1]),
        (lambda a: a[2:2], [(3, 4)], [0]),
        (lambda a: a.detach().clone().contiguous(), [(3, 4)], [1]),
        (lambda a: a.T, [(3, 4)], [1]),
        (lambda a: a.t().reshape(-1), [(3, 4)], [4]),
        (lambda a: a.transpose(-1, 0), [(3, 4, 5)], [1]),
        (lambda a: a.permute(2, 0, 1), [(3, 4, 5)], [1]),
        (lambda a: a.permute(2, 0, 1).flatten(), [(3, 2, 4)], [4]),
        (lambda a: a.permute(2, 0, 1).reshape(12, 2), [(3, 2, 4)], [4]),
        (lambda a: a.unsqueeze(1).squeeze(1).squeeze(0), [(3, 4)], [1]),
        (lambda a: a.view(2, -1), [(3, 4)], [1]),
        (lambda a: a.view(4, 0), [(0, 4, 4)], [0]),
        (lambda a: a.reshape(()), [(1, 1)], [1]),
        (lambda a: a.chunk(3), [(6, 4)], [1, 1, 1]),
        (lambda a: a.chunk(3, dim=-1), [(2, 7)], [1, 1, 1]),
        (lambda a: a.split([1, 0, 2]), [(3, 4)], [1, 0, 1]),
        (lambda a: a.unbind(1), [(2, 3)], [1, 1, 1]),
        (lambda a, b: torch.stack([a, b], dim=-1), [(3, 4), (3, 4)], [2]),
        (lambda a, b: torch.cat([a, b], dim=-1), [(3, 4), (3, 2)], [2]),
        (lambda a, b: torch.cat([a, b])[2:5], [(3, 4), (4, 4)], [2]),
        (lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1), [(3, 4), (3, 4)], [4]),
        (lambda a: a.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4), [(6, 4)], [2]),
        (lambda a: a.reshape(2, 3, 4).transpose(0, 1).reshape(6, 4), [(6, 4)], [3]),
        (lambda a: a.reshape(1, 3, 1, 4).transpose(1, 3).reshape(4, 3), [(3, 4)], [1]),
    ],
)
def test_rearrangements(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], pieces: list[int]) -> None:
    assert check(function, *shapes) == pieces


def converted(operation: object, tensors: dict[str, object], targets: list[str], **options: object) -> list[Tensor]:
    results = operation.convert(tensors, source_patterns=list(tensors), target_patterns=targets, **options)  # pyright: ignore
    return [x[0] if isinstance(x, list) else x for x in results.values()]


def test_operations_of_transformers() -> None:
    heads = LlamaConfig(num_attention_heads=4)
    assert check(lambda a, b, c: converted(MergeModulelist(), {"s": [a, b, c]}, ["t"]), *[(2, 4)] * 3) == [3]
    assert check(lambda a, b: converted(Concatenate(1), {"a": [a], "b": [b]}, ["t"]), (2, 3, 4), (2, 5, 4)) == [2]
    assert check(lambda a: converted(Chunk(0), {"s": [a]}, ["q", "k", "v"]), (6, 4)) == [1, 1, 1]
    assert check(lambda a: converted(Transpose(1, 2), {"s": [a]}, ["t"]), (2, 3, 4)) == [1]
    assert check(lambda a: converted(Interleave(1), {"s": [a]}, ["t"]), (2, 6, 4)) == [2 * 2]
    assert check(lambda a: converted(Interleave(0, inverse=True), {"s": [a]}, ["t"]), (6, 4)) == [3]
    assert check(lambda a: converted(PermuteForRope(), {"s": [a]}, ["t"], config=heads), (32, 4)) == [4 * 2]


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a + 1,
        lambda a: a.bfloat16(),
        lambda a: a.sum(),
        lambda a: a[0, 0].item(),
        lambda a: a[::2],
        lambda a: a.permute(1, 0).reshape(2, 6),  # a row of the result is made of one and a half of the other
        lambda a: torch.cat([a, a]).view(-1),
        lambda a: torch.cat([a, torch.zeros(4, 3)]),
        lambda a: torch.stack([a] * ((1 << 14) + 1)),
    ],
)
def test_what_computes_is_untraceable(function: Callable[[Tensor], object]) -> None:
    with pytest.raises((Untraceable, AttributeError)):
        function(Traced.of(stored("a", (4, 3))))


def test_shapes_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        torch.stack([Traced.of(stored("a", (3, 4))), Traced.of(stored("b", (3, 5)))])
    with pytest.raises(ValueError, match="cannot be split"):
        Traced.of(stored("a", (3, 4))).split_with_sizes([1, 1])
