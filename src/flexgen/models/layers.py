"""The decoder layers of a model: how its forward calls them, and where they can be divided among pipeline stages.  Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flexgen.errors import EngineError, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensForm:
    """The shape and the dtype of a tensor that a forward makes of its tokens.

    Attributes:
        shape: The sizes of its dimensions; None for that of the tokens.
        dtype: The dtype.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, num_tokens: int) -> TokensForm:
        """Return the form of a tensor that was made of so many tokens, a number that no other dimension has."""
        return cls(shape=tuple(None if size == num_tokens else size for size in tensor.shape), dtype=tensor.dtype)

    def shape_of(self, num_tokens: int) -> tuple[int, ...]:
        """Return the shape for so many tokens."""
        return tuple(num_tokens if size is None else size for size in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """How the forward of a model calls a decoder layer.

    Attributes:
        argument: The position or the name of the argument that is the hidden states.
        num_outputs: The length of the tuple that the layer returns; None if it returns hidden states alone.
        output: The position of the hidden states in this tuple.
    """

    argument: int | str
    num_outputs: int | None = None
    output: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayers:
    """The decoder layers of a model, and what runs before them and behind them.

    Attributes:
        model_type: transformers' name of the architecture.
        undivided: Why the layers cannot be divided at all; None if they can be.
        prefix: The name of the list of the layers.
        num_layers: The number of layers, those included that text does not pass through.
        of_kv: For each index under which keys and values are stored, the layer that stores them.
        calls: How each layer is called that text passes through, in order.
        before: The modules with matrices that are used before the first layer, and the form of what they return.
        hidden: The form of the hidden states.
        refused: The layers at which no stage may begin, and why not.
    """

    model_type: str
    undivided: str | None = None
    prefix: str = ""
    num_layers: int = 0
    of_kv: Mapping[int, int] = field(default_factory=dict[int, int])
    calls: Mapping[int, LayerCall] = field(default_factory=dict[int, LayerCall])
    before: Mapping[str, TokensForm] = field(default_factory=dict[str, TokensForm])
    hidden: TokensForm = field(default_factory=lambda: TokensForm(shape=(), dtype=torch.float32))
    refused: Mapping[int, str] = field(default_factory=dict[int, str])

    @property
    def cut_points(self) -> tuple[int, ...]:
        """The layers at which a stage may begin behind another one; empty if the model cannot be divided."""
        if self.undivided is not None:
            return ()
        return tuple(layer for layer in [*self.calls][1:] if layer not in self.refused)

    def layer_of(self, module: str) -> int | None:
        """Return the layer within which a module lies, by its name; None for a module that belongs to none."""
        if self.undivided is not None:
            return None
        return layer_number(self.prefix, module)

    def needed_by(self, layers: range, module: str) -> bool:
        """Return whether a stage with these layers computes with the matrices of a module."""
        if (layer := self.layer_of(module)) is not None:
            return layer in layers
        return layers.start == 0 if module in self.before else layers.stop == self.num_layers

    def check(self, layers: range) -> None:
        """Refuse a stage whose layers cannot be cut out.

        Raises:
            UnsupportedModelError: More than hidden states would cross one of its ends; the message says which layer needs what.
            EngineError: There are no such layers.
        """
        if self.undivided is not None:
            raise UnsupportedModelError(f"stages: {self.model_type!r} cannot be divided: {self.undivided}; use one stage")
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= self.num_layers:
            raise EngineError(f"stages: layers {layers} of {self.num_layers} are none")
        for cut in (layers.start, layers.stop):
            if cut in self.refused and 0 < cut < self.num_layers:
                raise UnsupportedModelError(f"stages: {self.refused[cut]}; cut elsewhere or use one stage")


def layer_number(prefix: str, module: str) -> int | None:
    """Return the number of a module in the list of this name, or that of the one within which it lies; None if it is not in there."""
    if not module.startswith(f"{prefix}."):
        return None
    return int(module.removeprefix(f"{prefix}.").partition(".")[0])
