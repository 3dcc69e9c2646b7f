"""Sums of the outputs of experts that arrive one after the other, in three ways: by lists on the host, in groups, and for every row.

In all of them the outputs of a row's experts are added in ascending order of experts, so that sums do not depend on how experts are
divided among units.  Letters of shapes are those of kernels/grouped.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexgen.kernels.encoded import EncodedMatrices
from flexgen.kernels.grouped import GroupedKernels, Window, sorted_by_expert, sorted_pairs
from flexgen.plan.policy import EXPERTS_BYTES
from flexgen.weights.encoded import EncodedNumbers

# What is computed in vain for so many rows takes as long as the host's wait, or less; next tokens are seldom more.
UNCOUNTED_ROWS = 1024
SUM_BYTES = 8  # of a number of a sum: a float32 that is read and written when an output is added

Tensors = Mapping[str, Tensor | EncodedNumbers]


def pair_numbers(outputs: int, hidden: int, *, normed: bool) -> int:
    """Return how many numbers of the dtype of computing are held at a time for a pair of a row and an expert, at most.

    That is the first product and what the gate makes of it, five halves in gpt-oss; or the gate's result and the second product, of which
    a norm makes copies in float32.

    Args:
        outputs: The outputs of the first product.
        hidden: Those of the second one.
        normed: Whether there is a norm after it.
    """
    return max(4 * outputs, outputs + (8 if normed else 1) * hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """How each expert of a layer computes.

    Attributes:
        num_experts: The number of experts.
        first: The name of the first matrices; the second ones are "down_proj".
        is_transposed: Whether matrices are (inputs, outputs) rather than (outputs, inputs).
        has_bias: Whether there are biases, whose names end in "_bias".
        gate: What becomes of the first product.
        norm: What becomes of the second product; None for nothing.
    """

    num_experts: int
    first: str
    is_transposed: bool
    has_bias: bool
    gate: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None

    def matrices(self, tensors: Tensors, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the matrices, (experts, inputs, outputs), and biases, (experts, outputs), of the experts that have arrived."""
        weight = _numbers(tensors[name])
        return weight if self.is_transposed else weight.mT, self.bias(tensors, name)

    def bias(self, tensors: Tensors, name: str) -> Tensor | None:
        """Return the biases, (experts, outputs), of the experts that have arrived; None if there are none."""
        return _numbers(tensors[f"{name}_bias"]) if self.has_bias else None

    def output(self, tensors: Tensors, index: int, x: Tensor) -> Tensor:
        """Return the output of one of the experts that have arrived, (rows, hidden), for the inputs `x`, (rows, hidden)."""
        hidden = self.gate(self._product(tensors, self.first, index, x))
        return self.normed(self._product(tensors, "down_proj", index, hidden))

    def normed(self, out: Tensor) -> Tensor:
        """Return what becomes of the second product."""
        return out if self.norm is None else self.norm(out)

    def _product(self, tensors: Tensors, name: str, index: int, x: Tensor) -> Tensor:
        weight, bias = self.matrices(tensors, name)
        out = x @ weight[index]
        return out if bias is None else out + bias[index]


def _numbers(bound: Tensor | EncodedNumbers) -> Tensor:
    return bound if isinstance(bound, Tensor) else bound.decoded()


class ExpertSums(Protocol):
    """The sums of experts' outputs, made with `layer, x, experts, weights` as in experts.py's `empty_sums`."""

    def add(self, tensors: Tensors, first: int) -> None:
        """Add the outputs of the experts first, first + 1, ..., whose matrices and biases are the rows of `tensors`.

        Matrices that are bound as they are stored are decoded if they are needed so.
        """
        ...

    def total(self) -> Tensor:
        """Return the sums, (R, hidden), in the dtype of the inputs."""
        ...


class ListedRows:
    """Each expert computes its own rows, whose number the host knows: it waits for the device once per layer."""

    def __init__(self, layer: ExpertLayer, x: Tensor, experts: Tensor, weights: Tensor | None) -> None:
        self._layer, self._x, self._total = layer, x, torch.zeros_like(x)
        order, offsets = sorted_by_expert(experts, layer.num_experts)
        ends = offsets[1:].tolist()
        self._rows = (order // experts.shape[1]).tensor_split(ends)  # of each expert, and of none
        self._weights = None if weights is None else weights.reshape(-1, 1)[order].tensor_split(ends)

    def add(self, tensors: Tensors, first: int) -> None:
        for index in range(len(tensors["down_proj"])):
            rows = self._rows[first + index]
            if not len(rows):
                continue
            out = self._layer.output(tensors, index, self._x[rows])
            if self._weights is not None:
                out = out * self._weights[first + index]
            self._total.index_add_(0, rows, out.to(self._total.dtype))

    def total(self) -> Tensor:
        return self._total


class EveryRow:
    """Each expert computes all rows, and those count that chose it: for devices on which nothing else works without waiting."""

    def __init__(self, layer: ExpertLayer, x: Tensor, experts: Tensor, weights: Tensor | None) -> None:
        self._layer, self._x, self._experts, self._weights = layer, x, experts, weights
        self._total = torch.zeros_like(x)

    def add(self, tensors: Tensors, first: int) -> None:
        for index in range(len(tensors["down_proj"])):
            others = self._experts != first + index  # (R, k)
            out = self._layer.output(tensors, index, self._x)
            if self._weights is not None:
                out = out * self._weights.masked_fill(others, 0).sum(dim=-1, keepdim=True)
            self._total += out.to(self._total.dtype).masked_fill_(others.all(dim=-1, keepdim=True), 0)

    def total(self) -> Tensor:
        return self._total


class GroupedRows:
    """The rows of all experts that have arrived are computed together by kernels of ours; nothing waits for the device.

    The host does not know how many rows these are.  So it goes through windows that have room for as many as there could be; what is
    computed between products is computed for all rows of a window.  Windows are as large as EXPERTS_BYTES of temporary tensors allow.
    Where rows are many, as in prompts, most of a window would be empty, and the host asks how many there are, once.
    """

    def __init__(self, layer: ExpertLayer, kernels: GroupedKernels, x: Tensor, experts: Tensor, weights: Tensor | None) -> None:
        self._layer, self._kernels, self._x = layer, kernels, x
        chosen = experts.sort(dim=-1, stable=True)
        self._weights = None if weights is None else weights.gather(-1, chosen.indices)
        self._pairs = sorted_pairs(chosen.values, layer.num_experts)
        self._total = torch.zeros_like(x, dtype=torch.float32)
        self._offsets = kernels.offsets_on_host(self._pairs) if len(x) > UNCOUNTED_ROWS else None
        self._reads_encoded = kernels.reads_encoded(len(self._pairs.order) // layer.num_experts)

    def add(self, tensors: Tensors, first: int) -> None:
        weight, bias = self._matrices(tensors, self._layer.first)
        down, down_bias = self._matrices(tensors, "down_proj")
        count, _, outputs = weight.shape
        if self._offsets is None:
            most = min(len(self._pairs.order), len(self._x) * count)  # a row chooses no expert twice
        else:
            most = self._offsets[first + count] - self._offsets[first]
        pair_bytes = pair_numbers(outputs, down.shape[2], normed=self._layer.norm is not None) * self._x.element_size()
        at_once = max(EXPERTS_BYTES // pair_bytes, 1)
        for skipped in range(0, most, at_once):
            window = Window(first=first, count=count, skipped=skipped, num_rows=min(at_once, most - skipped))
            hidden = self._kernels.product(self._x, weight, bias, self._pairs, window, gathers=True)
            hidden = self._layer.gate(hidden)
            out = self._kernels.product(hidden, down, down_bias, self._pairs, window, gathers=False)
            self._kernels.add(self._layer.normed(out), self._weights, self._pairs, window, self._total)
            del hidden, out  # before the next window's are made

    def _matrices(self, tensors: Tensors, name: str) -> tuple[Tensor | EncodedMatrices, Tensor | None]:
        """Return matrices and biases as in ExpertLayer, the matrices as they are stored where that pays."""
        bound = tensors[name]
        if self._reads_encoded and isinstance(bound, EncodedNumbers):
            return bound.matrices, self._layer.bias(tensors, name)
        return self._layer.matrices(tensors, name)

    def total(self) -> Tensor:
        return self._total.to(self._x.dtype)
