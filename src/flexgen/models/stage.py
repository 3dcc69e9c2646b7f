"""A pipeline stage of a model: a range of its decoder layers, and the hooks by which transformers' own forward runs these layers alone.

The whole forward of the model runs, so that positions, rotary tables and masks come about as ever.  What precedes the stage costs nothing
in it: modules with matrices before the layers return zeros, and earlier layers pass on what they are given.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexgen.models.coroutine import current_forward
from flexgen.models.layers import DecoderLayers, LayerCall, TokensForm


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A contiguous range of a model's decoder layers; the first stage has the embedding as well, the last one the final norm and the head.

    Attributes:
        layers: The layers of the stage.
        decoder: All decoder layers of the model.
    """

    layers: range
    decoder: DecoderLayers

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.decoder.num_layers


class StageEnd(Exception):
    """Ends a forward whose hidden states go on to another stage."""


def install_stage(model: nn.Module, stage: Stage) -> list[tuple[str, str]]:
    """Make the forward of a skeleton that of a stage.

    Args:
        model: The skeleton.
        stage: The stage.

    Returns:
        The (module, parameter) names of matrices that are not needed, which are without rows now, since models move ids to where they are.
    """
    decoder, empty = stage.decoder, list[tuple[str, str]]()
    modules: dict[str, Any] = dict(model.named_modules())
    if not stage.is_first:
        for name, form in decoder.before.items():
            modules[name].forward = functools.partial(_zeros, form)
            for own, parameter in modules[name]._parameters.items():
                if parameter is not None and parameter.ndim >= 2:
                    no_rows = torch.empty(0, *parameter.shape[1:], dtype=parameter.dtype)
                    modules[name]._parameters[own] = nn.Parameter(no_rows, requires_grad=False)
                    empty.append((name, own))
        for layer, call in decoder.calls.items():
            if layer < stage.layers.start:
                modules[f"{decoder.prefix}.{layer}"].forward = functools.partial(_passed_on, call)
        _before(modules, decoder, stage.layers.start, _receive)
    if not stage.is_last:
        _before(modules, decoder, stage.layers.stop, _send)
    return empty


def _before(modules: dict[str, Any], decoder: DecoderLayers, layer: int, hook: Any) -> None:
    hook = functools.partial(hook, decoder.calls[layer].argument)
    modules[f"{decoder.prefix}.{layer}"].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _zeros(form: TokensForm, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return zeros in place of what a module before the layers would return."""
    positions = current_forward().position_ids  # (1, tokens)
    return torch.zeros(form.shape_of(positions.shape[1]), dtype=form.dtype, device=positions.device)


def _passed_on(call: LayerCall, *args: Any, **kwargs: Any) -> Any:
    """Return what a layer is given in the place of what it would return; nobody uses the rest."""
    hidden = args[call.argument] if isinstance(call.argument, int) else kwargs[call.argument]
    if call.num_outputs is None:
        return hidden
    return tuple(hidden if place == call.output else None for place in range(call.num_outputs))


def _receive(argument: int | str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the first layer of a stage the hidden states of the stage before."""
    hidden = current_forward().stage_input()
    if isinstance(argument, int):
        return (*args[:argument], hidden, *args[argument + 1 :]), kwargs
    return args, {**kwargs, argument: hidden}


def _send(argument: int | str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hand over what the first layer of the next stage would be given, and end the forward."""
    current_forward().stage_output(args[argument] if isinstance(argument, int) else kwargs[argument])
    raise StageEnd
