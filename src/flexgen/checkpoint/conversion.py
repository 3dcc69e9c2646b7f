"""Determines where stored numbers end up by running transformers' own conversions on tensors without numbers.

A `Traced` tensor has a shape and a dtype and, in place of numbers, the pieces of stored tensors that it consists of.
Stacking, concatenating, splitting, transposing and reshaping only rearrange pieces.  So transformers' conversion operations
(merging experts, splitting a fused projection, ...) run as they are, and the result says which stored numbers become
which part of a parameter.  An operation that computes with the numbers raises `Untraceable`.  The module knows no models and no names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from flexgen.checkpoint.pieces import Piece, put, whole
from flexgen.formats.base import StoredTensor

_aten = torch.ops.aten
_MAX_PIECES = 1 << 14  # per tensor; with more, placing them one by one costs more than computing would


class Untraceable(Exception):
    """Raised by an operation that does more than move numbers."""


class Traced(torch.Tensor):
    """A tensor that consists of `pieces` of stored tensors, which fill it without overlap."""

    pieces: tuple[Piece, ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls: type[Traced], shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> Traced:
        if len(pieces) > _MAX_PIECES:
            raise Untraceable(f"more than {_MAX_PIECES} pieces")
        # Its own strides are always those of a contiguous tensor, so that `contiguous` and `reshape` make no copies.
        tensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("meta"))
        tensor.pieces = tuple(pieces)
        return tensor

    @classmethod
    def of(cls, tensor: StoredTensor) -> Traced:
        """Return the whole stored tensor."""
        return cls(tensor.shape, tensor.dtype, whole(tensor))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Traced({tuple(self.shape)}, {self.dtype}, {len(self.pieces)} pieces)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rearrange = _REARRANGEMENTS.get(func)
        if rearrange is None:
            raise Untraceable(str(func))
        return rearrange(*args, **(kwargs or {}))


# One function for each rearrangement, with the arguments of the aten operation of that name.


def _same(x: Traced, **_: Any) -> Traced:
    return Traced(x.shape, x.dtype, x.pieces)  # a new tensor: torch forbids an operation to return its argument


def _reindexed(x: Traced, reindex: Callable[[Sequence[int], int], tuple[int, ...]]) -> Traced:
    """Reorder, drop or insert dimensions by `reindex(values, value of an inserted dimension)`."""
    pieces = [replace(p, shape=reindex(p.shape, 1), strides=reindex(p.strides, 0), start=reindex(p.start, 0)) for p in x.pieces]
    return Traced(reindex(x.shape, 1), x.dtype, pieces)


def _permute(x: Traced, order: Sequence[int]) -> Traced:
    return _reindexed(x, lambda values, _: tuple(values[dim] for dim in order))


def _transpose(x: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(x, order)


def _unsqueeze(x: Traced, dim: int) -> Traced:
    dim %= x.ndim + 1
    return _reindexed(x, lambda values, inserted: (*values[:dim], inserted, *values[dim:]))


def _squeeze(x: Traced, dim: int) -> Traced:
    dim %= x.ndim
    return _reindexed(x, lambda values, _: (*values[:dim], *values[dim + 1 :])) if x.shape[dim] == 1 else _same(x)


def _narrow(x: Traced, dim: int, start: int, stop: int) -> Traced:
    dim %= x.ndim
    pieces = [part for piece in x.pieces if (part := piece.narrow(dim, start, stop))]
    return Traced(put(x.shape, dim, stop - start), x.dtype, pieces)


def _slice(x: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Traced:
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    if step != 1:
        raise Untraceable("a slice with steps")
    return _narrow(x, dim, start, max(start, end))


def _select(x: Traced, dim: int, index: int) -> Traced:
    index %= x.shape[dim]
    return _squeeze(_narrow(x, dim, index, index + 1), dim)


def _unbind(x: Traced, dim: int = 0) -> list[Traced]:
    return [_select(x, dim, index) for index in range(x.shape[dim])]


def _split_with_sizes(x: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    if sum(sizes) != x.shape[dim]:
        raise ValueError(f"a dimension of {x.shape[dim]} cannot be split into {list(sizes)}")
    return [_narrow(x, dim, sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _split(x: Traced, size: int, dim: int = 0) -> list[Traced]:
    length = x.shape[dim]
    return [_narrow(x, dim, start, min(start + size, length)) for start in range(0, length, size)]


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    model = tensors[0]
    dim %= model.ndim
    pieces, position = [], 0
    for x in tensors:
        if x.dtype != model.dtype:  # torch would cast
            raise Untraceable("numbers of different types together")
        if x.ndim != model.ndim or put(x.shape, dim, 0) != put(model.shape, dim, 0):
            raise ValueError(f"tensors of shape {tuple(model.shape)} and {tuple(x.shape)} do not go together")
        pieces += [replace(p, start=put(p.start, dim, p.start[dim] + position)) for p in x.pieces]
        position += x.shape[dim]
    return Traced(put(model.shape, dim, position), model.dtype, pieces)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([_unsqueeze(x, dim) for x in tensors], dim)


def _view(x: Traced, shape: Sequence[int]) -> Traced:
    if -1 in shape:
        shape = [x.numel() // -math.prod(shape) if n == -1 else n for n in shape]
    if tuple(shape) == tuple(x.shape) or not x.pieces:
        return Traced(shape, x.dtype, x.pieces)
    piece, *others = x.pieces
    if others:
        raise Untraceable("a reshape of several pieces")
    return Traced(shape, x.dtype, list(_reshaped(piece, tuple(shape), (0,) * len(shape), 0)))


def _reshaped(piece: Piece, shape: tuple[int, ...], start: tuple[int, ...], dim: int) -> Iterator[Piece]:
    """Yield the boxes that fill the box of `shape` at `start` with the numbers of `piece`, in the same order.

    There is one box if strides exist for it; otherwise (transposed dimensions are merged) there is one for each index of the piece's
    first dimension.

    Args:
        piece: The piece.
        shape: The shape of the box to fill.
        start: The start of the box to fill.
        dim: The dimension of `shape` that the piece's first dimension lies in; those before it have size 1.
    """
    try:
        strides = torch.empty_strided(piece.shape, piece.strides, device="meta").view(shape).stride()
        yield replace(piece, shape=shape, strides=strides, start=start)
        return
    except RuntimeError:
        count = piece.shape[0]
    if shape[dim] % count or count > _MAX_PIECES:
        raise Untraceable("a reshape across dimensions")
    rows = shape[dim] // count  # rows of dimension `dim` for each index
    deeper = rows == 1 and dim + 1 < len(shape)
    for index in range(count):
        part = replace(piece, first=piece.first + index * piece.strides[0], shape=piece.shape[1:], strides=piece.strides[1:])
        place = put(start, dim, start[dim] + index * rows)
        yield from _reshaped(part, put(shape, dim, rows), place, dim + 1 if deeper else dim)


_REARRANGEMENTS: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _same,
    _aten.cat.default: _cat,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten.permute.default: _permute,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_with_sizes,
    _aten.squeeze.dim: _squeeze,
    _aten.stack.default: _stack,
    _aten.t.default: lambda x: _transpose(x, 0, 1),
    _aten.transpose.int: _transpose,
    _aten.unbind.int: _unbind,
    _aten.unsqueeze.default: _unsqueeze,
    _aten._unsafe_view.default: _view,
    _aten.view.default: _view,
}
