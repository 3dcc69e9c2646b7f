"""Models without memory for their weights: parameters are kept on the meta device, and their number is limited."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from flexgen.checkpoint.files import Headers
from flexgen.errors import CheckpointError, UnsupportedModelError

LARGE = 1 << 24
_SPLIT = 8  # the most parameters that one stored tensor may become
_PACKED = 32  # the most numbers that one stored number may hold
_MIN_PARAMETERS = 1 << 12
_CREATING = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full})


@dataclass(frozen=True, slots=True, kw_only=True)
class SkeletonLimits:
    """The limits of a skeleton's size, which follow from the size of the weights.

    Attributes:
        parameters: The most parameters.
        elements: The most elements of one parameter.
        why: The explanation for a skeleton that exceeds a limit, as it appears in the message.
    """

    parameters: int
    elements: int
    why: str = "far more than the weights hold: it is not the config of these weights"

    @classmethod
    def of(cls, headers: Headers) -> SkeletonLimits:
        """Return the limits for these weights, with an allowance for tensors that are stored merged, packed or once for several modules."""
        stored = headers.tensors.values()
        elements = sum(math.prod(tensor.shape) for tensor in stored)
        return cls(parameters=_SPLIT * len(stored) + _MIN_PARAMETERS, elements=_PACKED * elements + LARGE)


LOOSEST_LIMITS = SkeletonLimits(parameters=1 << 18, elements=1 << 48, why="more than any known model has")


@contextlib.contextmanager
def parameters_on_meta(limits: SkeletonLimits) -> Iterator[None]:
    """Put parameters that are registered inside the block on the meta device; buffers (rotary frequencies) stay real."""
    original = nn.Module.register_parameter
    count = 0

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        original(self, name, param)
        if param is None:
            return
        count += 1
        if count > limits.parameters or param.numel() > limits.elements:
            what = f"more than {count - 1:,} parameters" if count > limits.parameters else f"a parameter of shape {tuple(param.shape)}"
            raise CheckpointError(f"config.json asks for {what}, {limits.why}")
        if param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class LargeTensorsOnMeta(TorchFunctionMode):
    """Creates tensors as large as weights on the meta device, so that they take no memory before they are registered."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is None and _numel(func, args, kwargs) >= LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _numel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many elements a call creates; 0 if it creates none or its size is not given in numbers."""
    if func in _CREATING:
        size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
        return math.prod(size) if all(isinstance(each, int) for each in size) else 0
    if func is torch.arange:
        bounds = [kwargs.get(name, 0) for name in ("start", "end")] if not args else [0, args[0]] if len(args) == 1 else args[:2]
        step = kwargs.get("step", args[2] if len(args) > 2 else 1)
        return int((bounds[1] - bounds[0]) / step) if all(isinstance(each, (int, float)) for each in (*bounds, step)) and step else 0
    return 0


@contextlib.contextmanager
def building(config: PreTrainedConfig) -> Iterator[None]:
    """Translate exceptions raised inside the block, where the model of `config` is built; a CheckpointError is raised unchanged.

    Raises:
        UnsupportedModelError: Building the model failed.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # constructors raise any exception for a wrong value
        said = str(error).strip().partition("\n")[0][:300]
        raise UnsupportedModelError(f"model type {config.model_type!r} cannot be built: {type(error).__name__}: {said}") from error
