"""What the store binds tensors to, and which tensors are bound there as they are stored."""

from __future__ import annotations

from typing import Protocol

import torch

from flexgen.kernels.encoded import EncodedPlaces
from flexgen.kernels.grouped import GroupedKernels
from flexgen.weights.encoded import EncodedNumbers
from flexgen.weights.unit import UnitForm, UnitLayout


class Binder(Protocol):
    """Binds the tensors of a unit so that they can be used, as the skeleton does."""

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None: ...
    def unbind(self, unit: int, module: str, parameter: str) -> None: ...
    def bind_encoded(self, unit: int, module: str, parameter: str, numbers: EncodedNumbers) -> None: ...

    def takes_encoded(self, unit: int, module: str, parameter: str, *, columns_first: bool) -> bool:
        """Return whether a tensor may be bound by `bind_encoded`, so that kernels multiply by it as it is stored.

        Args:
            unit: The number of the unit.
            module: The name of the module.
            parameter: The name of the parameter within the module.
            columns_first: Whether codes follow each other along the columns of its matrices rather than along the rows.
        """
        ...


def encoded_places(layout: UnitLayout, binder: Binder, kernels: GroupedKernels | None) -> dict[tuple[str, str], EncodedPlaces]:
    """Return where those tensors lie in a unit's carried bytes by which a device multiplies as they are stored, by module and parameter.

    Args:
        layout: The unit.
        binder: What its tensors are bound to.
        kernels: The kernels of the device; None if it has none, so that there are no such tensors.
    """
    found: dict[tuple[str, str], EncodedPlaces] = {}
    if kernels is None:
        return found
    for tensor in layout.tensors:
        name, source = (tensor.module, tensor.parameter), tensor.source
        if tensor.is_view(UnitForm.CARRIED) or not kernels.covers(tensor.dtype):
            continue
        if not binder.takes_encoded(layout.index, *name, columns_first=source.columns_first):
            continue
        if (places := source.encoded_places(tensor.carried_at)) is not None:
            found[name] = places
    return found
