"""Counts the bytes of tensors that operations have made and that are still in use."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, every result of an operation counts for as long as a tensor refers to its memory.

    Attributes:
        peak: The most bytes that were in use after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._references: dict[int, int] = {}  # address of the memory -> the tensors that refer to it
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        before = {_address(each) for each in tree_leaves((args, kwargs or {})) if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and ((address := _address(each)) in self._references or address not in before):
                self._references[address] = self._references.get(address, 0) + 1
                self._sizes[address] = each.untyped_storage().nbytes()
                weakref.finalize(each, self._let_go, address)
        self.peak = max(self.peak, sum(self._sizes[address] for address in self._references))
        return result

    def _let_go(self, address: int) -> None:
        self._references[address] -= 1
        if not self._references[address]:
            del self._references[address]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
