"""How many operations the host launches on a device for a micro-batch: what the trace sees of a forward, and what it leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen.models.parts import Part

# Operations that make no number: the others that take tensors without changing them, and return no new ones, are views.
_MEMORY_ONLY = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"))
# Of a layer of experts where the device has kernels for groups of them (expert_sums.py): sorting pairs and the sums, and for the experts of
# each unit two products, the gate between them, and adding the results up.
EXPERTS_OPERATIONS, GROUP_OPERATIONS = 9, 5
# Of each part of a linear layer that is cut: its product, and the copy to where its rows belong.
PART_OPERATIONS = 2


class OperationCounter(TorchDispatchMode):
    """Counts the operations that make numbers, each of which would be launched on a device.

    Attributes:
        num_operations: Their number so far.
        num_bytes: The bytes that they have read and written so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in _MEMORY_ONLY:
            self.num_operations += 1
            touched = [*args, *(() if func._schema.is_mutable else (out,))]
            self.num_bytes += sum(each.nbytes for each in touched if isinstance(each, Tensor))
        return out


def untraced_operations(units: Sequence[Sequence[Part]]) -> int:
    """Return the operations of linear layers that are cut, and of experts, beyond the one for each that the trace counts.

    Args:
        units: The parts of each unit.
    """
    parts = [part for unit in units for part in unit]
    pieces = Counter(part.use.module for part in parts)
    found = 0
    for module, kind in {part.use.module: part.use.kind for part in parts}.items():
        if kind in ("experts", "scored_experts"):
            found += EXPERTS_OPERATIONS + GROUP_OPERATIONS * pieces[module] - 1
        elif pieces[module] > 1:
            found += PART_OPERATIONS * pieces[module] - 1
    return found
