"""The division of parameters into units: the module that is cut, and the rows of it that one unit brings."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from flexgen.weights.encoded import EncodedNumbers


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterUse:
    """A module whose parameters stream, and how a forward uses them.

    Attributes:
        module: The name of the module in the model.
        parameters: The names, within the module, of the parameters that stream.
        decoded_bytes: The bytes of all these parameters in the dtype of computing.
        kind: How the parameters may be cut: "whole" (not at all), "linear" (by output rows), "experts" (by ranges of experts) or
            "scored_experts" (Llama 4's, by ranges of experts).
        rows: The size of dimension 0 of every parameter.
        flops_per_token: The FLOPs of one token that passes through the module.
        head: Whether the module is the output head.
        entered_with: The name of the module whose forward needs the parameters: usually `module`, otherwise one that reads them from
            outside.
        in_int8: Whether products are computed with weights and inputs that are rounded to 8 bits.
    """

    module: str
    parameters: tuple[str, ...]
    decoded_bytes: int
    kind: str
    rows: int
    flops_per_token: float
    head: bool
    entered_with: str
    in_int8: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """Rows of a module's parameters that belong to one unit.

    Attributes:
        use: The module and how it is used.
        unit: The index of the unit.
        start: The first row along dimension 0.
        stop: The row after the last one.
        tensors: The bound rows by parameter name within the module; empty while the unit is not open. Rows that are computed with in int8
            are bound as bytes.
        encoded: The bound rows that are not decoded yet, in the same way: matrices of experts.
    """

    use: ParameterUse
    unit: int
    start: int
    stop: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    encoded: dict[str, EncodedNumbers] = field(default_factory=dict[str, EncodedNumbers])

    @property
    def flops_per_token(self) -> float:
        """The FLOPs of one token that passes through these rows."""
        return self.use.flops_per_token * (self.stop - self.start) / self.use.rows

    @property
    def is_whole(self) -> bool:
        """Whether the part contains all rows of the module."""
        return (self.start, self.stop) == (0, self.use.rows)
