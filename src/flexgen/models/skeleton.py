"""A transformers model on the meta device, and the hooks that suspend its forward where weights are needed.

Responsible for building the module tree without weights and for binding arrived tensors to it.
Does not know where bytes come from (memory/) nor who runs the coroutines (engine/).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flexgen.errors import CheckpointError, EngineError, UnsupportedModelError
from flexgen.models.attention import register_attention
from flexgen.models.coroutine import current_forward
from flexgen.models.experts import register_experts, scored_experts_forward
from flexgen.models.rope import check_factors, isolate_sequences, recompute_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from flexgen.checkpoint.parameters import Headers

IMPLEMENTATION = "flexgen"
LARGE = 1 << 24
_SPLIT = 8  # parameters that one stored tensor may become
_PACKED = 32  # numbers that one stored number may hold
_MIN_PARAMETERS = 1 << 12
CREATING = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full})


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much a skeleton may hold: what weights can fill.

    Attributes:
        parameters: their number. elements: of one. why: what more than that would be.
    """

    parameters: int
    elements: int
    why: str = "far more than the weights hold: it is not the config of these weights"

    @classmethod
    def of(cls, headers: Headers) -> Room:
        """What these weights can fill, with room for tensors that are stored merged, packed or once for several modules."""
        stored = headers.tensors.values()
        elements = sum(math.prod(tensor.shape) for tensor in stored)
        return cls(parameters=_SPLIT * len(stored) + _MIN_PARAMETERS, elements=_PACKED * elements + LARGE)


ANY_ROOM = Room(parameters=1 << 18, elements=1 << 48, why="more than any known model has")


@contextlib.contextmanager
def parameters_on_meta(room: Room) -> Iterator[None]:
    """Parameters registered inside live on the meta device; buffers (rotary frequencies) stay real."""
    original = nn.Module.register_parameter
    count = 0

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        original(self, name, param)
        if param is None:
            return
        count += 1
        if count > room.parameters or param.numel() > room.elements:
            what = f"more than {count - 1:,} parameters" if count > room.parameters else f"a parameter of shape {tuple(param.shape)}"
            raise CheckpointError(f"config.json asks for {what}, {room.why}")
        if param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Tensors as large as weights are created on the meta device: before they are registered, they must not take memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is None and _numel(func, args, kwargs) >= LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _numel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many elements a call creates; 0 for one that creates none, or does not say it in numbers."""
    if func in CREATING:
        size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
        return math.prod(size) if all(isinstance(each, int) for each in size) else 0
    if func is torch.arange:
        bounds = [kwargs.get(name, 0) for name in ("start", "end")] if not args else [0, args[0]] if len(args) == 1 else args[:2]
        step = kwargs.get("step", args[2] if len(args) > 2 else 1)
        return int((bounds[1] - bounds[0]) / step) if all(isinstance(each, (int, float)) for each in (*bounds, step)) and step else 0
    return 0


@contextlib.contextmanager
def building(config: PretrainedConfig) -> Iterator[None]:
    """Raises UnsupportedModelError for what is raised inside, where the model of `config` is built; a CheckpointError stays one."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # constructors raise whatever a wrong value leads to
        said = str(error).strip().partition("\n")[0][:300]
        raise UnsupportedModelError(f"model type {config.model_type!r} cannot be built: {type(error).__name__}: {said}") from error


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, room: Room) -> PreTrainedModel:
    """The causal language model of `config`: parameters on meta, buffers real, attention and experts ours.

    Raises:
        UnsupportedModelError: when transformers has no such causal model, or it takes no attention function.
        CheckpointError: when it has no room.
    """
    from transformers import AutoModelForCausalLM

    register_attention(IMPLEMENTATION)
    register_experts(IMPLEMENTATION)
    with building(config), parameters_on_meta(room), _LargeTensorsOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    if not model._supports_attention_backend:
        raise UnsupportedModelError(f"model type {config.model_type!r} does not take an attention function of ours")
    for module in model.modules():
        if any(
            buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set for name, buffer in module._buffers.items()
        ):
            raise UnsupportedModelError(
                f"model type {config.model_type!r} computes tables of {LARGE:,} numbers and more, which is not supported"
            )
        if (module_config := getattr(module, "config", None)) is not None:
            module_config._attn_implementation = IMPLEMENTATION
            module_config._experts_implementation = IMPLEMENTATION
    check_factors(model)
    return model.eval()


@dataclass(slots=True)
class Part:
    """Rows of a module's parameters that belong to one unit.

    Attributes:
        unit: its index.
        start, stop: rows along dim 0 of every split parameter.
        tensors: own parameter name -> bound rows; empty while the unit is not open.
    """

    unit: int
    start: int
    stop: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """How one module's parameters are cut into units.

    Attributes:
        module: its name in the tree. parameters: own names of the parameters that stream.
        entered_with: the module whose forward needs a whole one; mostly the same.
        kind: "whole" (one unit), "linear" (output rows over several units) or "experts" (ranges of experts),
            "scored_experts" (Llama 4's).
        ranges: (unit, start, stop) in rising order; a whole module has one entry.
    """

    module: str
    entered_with: str
    parameters: tuple[str, ...]
    kind: str
    ranges: tuple[tuple[int, int, int], ...]


class BoundModel:
    """A skeleton with its hooks installed: units are bound to it and unbound from it.

    Not thread-safe: bind, unbind and the forwards run on one thread.
    """

    def __init__(self, model: PreTrainedModel, plans: Sequence[ModulePlan], gathered: Sequence[str]) -> None:
        isolate_sequences(model, recomputes=recompute_length(model.config) is not None)
        self.model = model
        self._placeholders: dict[tuple[str, str], nn.Parameter] = {}
        self._parts: dict[tuple[int, str, str], Part] = {}
        self._modules = dict(model.named_modules())
        self._gathered = tuple(gathered)
        for plan in plans:
            self._install(plan)
        for name in gathered:
            module: Any = self._modules[name]
            module.padding_idx = None  # concerns gradients only, and ids are renumbered
            no_rows = torch.empty(0, module.embedding_dim, dtype=module.weight.dtype)
            module._parameters["weight"] = nn.Parameter(no_rows, requires_grad=False)  # models move ids to its device
            module.register_forward_pre_hook(functools.partial(_gather_rows, name))

    def _install(self, plan: ModulePlan) -> None:
        module: Any = self._modules[plan.module]
        if plan.kind == "whole":
            unit = plan.ranges[0][0]
            self._modules[plan.entered_with].register_forward_pre_hook(lambda *_: current_forward().enter_unit(unit))
            for parameter in plan.parameters:
                placeholder = module._parameters[parameter]
                assert placeholder is not None
                self._placeholders[plan.module, parameter] = placeholder
            return
        parts = [Part(*each) for each in plan.ranges]
        for part in parts:
            for parameter in plan.parameters:
                self._parts[part.unit, plan.module, parameter] = part
        if plan.kind == "linear":
            module.forward = functools.partial(_split_linear, module, parts)
        elif plan.kind == "experts":
            module.flexgen_parts = parts  # read by experts.py
        elif plan.kind == "scored_experts":
            mixture: Any = self._modules[plan.module.rpartition(".")[0]]
            mixture.forward = functools.partial(scored_experts_forward, mixture, parts)
        else:
            raise EngineError(f"unknown kind of module plan {plan.kind!r}")

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None:
        """Make `tensor` the unit's rows of `module.parameter`."""
        if (part := self._parts.get((unit, module, parameter))) is not None:
            part.tensors[parameter] = tensor
        else:
            self._modules[module]._parameters[parameter] = nn.Parameter(tensor, requires_grad=False)

    def unbind(self, unit: int, module: str, parameter: str) -> None:
        """Forget the rows: a use after this fails instead of reading released bytes."""
        if (part := self._parts.get((unit, module, parameter))) is not None:
            del part.tensors[parameter]
        else:
            self._modules[module]._parameters[parameter] = self._placeholders[module, parameter]

    def bind_resident(self, name: str, tensor: torch.Tensor) -> None:
        """Bind a small parameter or a persistent buffer for good (`name` as in the state dict)."""
        module_name, _, own = name.rpartition(".")
        module = self._modules[module_name]
        if own in module._buffers:
            module._buffers[own] = tensor
        else:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)

    def move_buffers(self, device: torch.device) -> None:
        """Buffers (rotary frequencies, masks) go where the computing is, and so does what embeddings hold before the first rows."""
        for name in self._gathered:
            weight = self._modules[name]._parameters["weight"]
            assert weight is not None
            self._modules[name]._parameters["weight"] = nn.Parameter(weight.to(device), requires_grad=False)
        for module in self._modules.values():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(device)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, sampled: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits (sampled, vocab) of a packed micro-batch; runs inside a ForwardCoroutine.

        Args:
            input_ids, position_ids: int64 (1, tokens).
            sampled: int64, the positions within the micro-batch whose logits are wanted.
        """
        current_forward().position_ids = position_ids
        output = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=sampled)
        return output.logits[0]


def _split_linear(module: Any, parts: Sequence[Part], x: torch.Tensor) -> torch.Tensor:
    """A linear layer whose output rows arrive as several units."""
    forward = current_forward()
    out = x.new_empty(*x.shape[:-1], module.out_features)
    for part in parts:
        forward.enter_unit(part.unit)
        out[..., part.start : part.stop] = functional.linear(x, part.tensors["weight"])
    return out if module.bias is None else out.add_(module.bias)


def _gather_rows(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Bind just the rows that this micro-batch looks up, and renumber its ids to match."""
    rows, renumbered = current_forward().input_rows(name, args[0])
    module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    return (renumbered, *args[1:])
