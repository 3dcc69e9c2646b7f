"""A NumPy array without numbers, for code that rearranges NumPy arrays: it consists of pieces of stored tensors (`Traced`).

Only what transformers' processors of GGUF tensors do is known; anything else raises an error of some kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from flexgen.checkpoint.conversion import Traced, Untraceable


class MovedArray:
    """An array whose methods rearrange pieces.

    Attributes:
        tensor: The pieces.
    """

    __array_ufunc__ = None  # arithmetic with it is an error

    def __init__(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, Traced):
            raise Untraceable("an array of nothing stored")
        self.tensor = tensor

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function not in _FUNCTIONS:
            raise Untraceable(str(function))
        return _FUNCTIONS[function](*args, **kwargs)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    @property
    def T(self) -> MovedArray:
        return MovedArray(self.tensor.permute(*reversed(range(self.ndim))))

    def __getitem__(self, index: Any) -> MovedArray:
        return MovedArray(self.tensor[index])

    def reshape(self, *shape: Any) -> MovedArray:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return MovedArray(self.tensor.view(tuple(sizes)))

    def flatten(self) -> MovedArray:
        return self.reshape(-1)

    def swapaxes(self, one: int, other: int) -> MovedArray:
        return MovedArray(self.tensor.transpose(one, other))


def _array_split(array: MovedArray, sections: int, axis: int = 0) -> list[MovedArray]:
    size, rest = divmod(array.shape[axis], sections)
    if rest:
        raise Untraceable("an uneven split")
    return [MovedArray(part) for part in torch.split(array.tensor, size, dim=axis)]


def _stack(arrays: Sequence[MovedArray], axis: int = 0) -> MovedArray:
    return MovedArray(torch.stack([array.tensor for array in arrays], dim=axis))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.array_split: _array_split,
    np.copy: lambda array: array,
    np.expand_dims: lambda array, axis: MovedArray(array.tensor.unsqueeze(axis)),
    np.stack: _stack,
}
