"""How a module's parameters are divided into units: the module that is cut, and the rows of it that one unit brings."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterUse:
    """A module whose parameters stream, and how a forward uses them.

    Attributes:
        module: its name in the tree.
        parameters: own names of the parameters that stream.
        decoded_bytes: of all of them, in the dtype that is computed in.
        kind: how they may be cut: "whole" (not at all), "linear" (by output rows), "experts" (by ranges of experts) or
            "scored_experts" (Llama 4's, by ranges of experts).
        rows: along dim 0 of every parameter.
        flops_per_token: of a token that passes through the module.
        head: whether it is the output head.
        entered_with: the module whose forward needs them: mostly the same, else one that reads them from outside.
    """

    module: str
    parameters: tuple[str, ...]
    decoded_bytes: int
    kind: str
    rows: int
    flops_per_token: float
    head: bool
    entered_with: str


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """Rows of a module's parameters that belong to one unit.

    Attributes:
        use: the module.
        unit: index of the unit.
        start: the first row along dim 0.
        stop: the row after the last one.
        tensors: own parameter name -> bound rows; empty while the unit is not open.
    """

    use: ParameterUse
    unit: int
    start: int
    stop: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the module."""
        return (self.start, self.stop) == (0, self.use.rows)
