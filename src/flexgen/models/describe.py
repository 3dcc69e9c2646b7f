"""What a model is made of: one traced forward of the skeleton gives the order in which parameters are used,
every attention call and every cache entry; from that follow units, KV groups and FLOPs.

The trace computes nothing: linear layers return zeros.  Knows no tiers and no budgets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexgen.errors import UnsupportedModelError
from flexgen.models.attention import HARMLESS, AttentionCall, PassCache
from flexgen.models.skeleton import ModulePlan
from flexgen.models.suspension import ForwardCoroutine

TRACE_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """What one attention layer caches per token, and which earlier tokens it sees.

    Attributes:
        layer: the index under which the model stores it.
        key_heads, key_dim, value_heads, value_dim: of the cached tensors (for latent attention: 1, rank, 1, rope).
        window: visible tokens (the token itself included), or None. chunk: tokens attend within aligned chunks, or None.
        flops_per_pair: of one (query, visible token) pair, all heads.
    """

    layer: int
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None
    chunk: int | None
    flops_per_pair: float

    @property
    def group(self) -> tuple[int, int, int, int, int | None, int | None]:
        """Layers with equal groups share page tables and pools."""
        return (self.key_heads, self.key_dim, self.value_heads, self.value_dim, self.window, self.chunk)

    @property
    def elements_per_token(self) -> int:
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTrace:
    """Raw findings of the trace.

    Attributes:
        entered: modules that own parameters, in the order of their first use.
        revisited: those used more than once in a forward (their parameters cannot stream).
        layers: KV by layer index.
        experts_per_token: experts module -> (k, num_experts).
    """

    entered: tuple[str, ...]
    revisited: frozenset[str]
    layers: tuple[LayerKV, ...]
    experts_per_token: dict[str, tuple[int, int]]


class _Tracer(ForwardCoroutine):
    """Answers the model's questions with zeros and writes down what was asked."""

    def __init__(self, run: Any, config: Any) -> None:
        super().__init__(run)
        self._config = config
        self.entered: list[str] = []
        self.stored: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.layers: dict[int, LayerKV] = {}

    def enter_module(self, name: str) -> None:
        self.entered.append(name)

    def store_kv(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.stored[layer] = (key.shape, value.shape)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.layer not in self.stored:
            raise UnsupportedModelError(f"layer {call.layer} attends to keys that it did not cache")
        key, value = self.stored[call.layer]
        heads, query_dim = call.query.shape[1], call.query.shape[3]
        window, chunk = visible_tokens(call, self._config)
        latent = call.latent is not None
        self.layers[call.layer] = LayerKV(
            layer=call.layer,
            key_heads=key[1],
            key_dim=key[3],
            value_heads=value[1],
            value_dim=value[3],
            window=window,
            chunk=chunk,
            flops_per_pair=2.0 * heads * ((2 * key[3] + value[3]) if latent else (query_dim + call.value.shape[3])),
        )
        return call.query.new_zeros(1, call.query.shape[2], heads, call.value.shape[3])


def visible_tokens(call: AttentionCall, config: Any) -> tuple[int | None, int | None]:
    """(window, chunk) of an attention call.

    Raises:
        UnsupportedModelError: on an argument whose meaning is unknown.
    """
    arguments = dict(call.arguments or {})
    window = arguments.pop("sliding_window", None)
    for name, given in arguments.items():
        if name not in HARMLESS and given is not None and given is not False:
            raise UnsupportedModelError(f"model type {config.model_type!r} passes {name!r} to attention, which is not supported")
    layer_types = getattr(config, "layer_types", None) or ()
    kind = layer_types[call.layer] if call.layer < len(layer_types) else None
    chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
    return window, chunk


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that directly own parameters, by name."""
    return {name: module for name, module in model.named_modules() if any(p is not None for p in module._parameters.values())}


def trace_model(model: Any) -> ModelTrace:
    """Run one forward of `TRACE_TOKENS` tokens without weights and write down what it used.

    Args:
        model: a fresh skeleton (build_skeleton); left as it was.

    Raises:
        UnsupportedModelError: when the forward needs what the engine does not offer.
    """
    config = model.config.get_text_config()
    experts: dict[str, tuple[int, int]] = {}
    undo = list(_fake_modules(model, experts))

    def run() -> None:
        ids = torch.zeros(1, TRACE_TOKENS, dtype=torch.int64)
        positions = torch.arange(TRACE_TOKENS)[None]
        model(
            input_ids=ids, position_ids=positions, past_key_values=PassCache(), use_cache=True,
            logits_to_keep=torch.tensor([TRACE_TOKENS - 1]),
        )  # fmt: skip

    tracer = _Tracer(run, config)
    try:
        with torch.no_grad():
            tracer.switch()
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(f"model type {config.model_type!r} cannot be traced: {reason}") from error
    finally:
        for restore in undo:
            restore()
    if not tracer.dead:
        raise UnsupportedModelError(f"model type {config.model_type!r}: the forward did not finish")
    if missing := set(tracer.stored) - set(tracer.layers):
        raise UnsupportedModelError(f"model type {config.model_type!r} caches keys in layers {sorted(missing)} without attention")
    counts = Counter(tracer.entered)
    return ModelTrace(
        entered=tuple(dict.fromkeys(tracer.entered)),
        revisited=frozenset(name for name, count in counts.items() if count > 1),
        layers=tuple(tracer.layers[layer] for layer in sorted(tracer.layers)),
        experts_per_token=experts,
    )


def _fake_modules(model: nn.Module, experts: dict[str, tuple[int, int]]) -> Iterator[Any]:
    """Make every parameter zeros without memory and every large product free; yields what undoes it."""
    for name, module in _owners(model).items():
        handle = module.register_forward_pre_hook(_record_entry(name), prepend=True)
        yield handle.remove
        saved = dict(module._parameters)
        yield lambda module=module, saved=saved: module._parameters.update(saved)
        for own, parameter in saved.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[own] = nn.Parameter(zeros, requires_grad=False)
        if (fake := _fake_forward(name, module, experts)) is not None:
            module.forward = fake  # type: ignore[method-assign]
            yield lambda module=module: module.__dict__.pop("forward")


def _record_entry(name: str) -> Any:
    from flexgen.models.suspension import current_forward

    def hook(_module: nn.Module, _args: Any) -> None:
        current_forward().enter_module(name)

    return hook


def _fake_forward(name: str, module: nn.Module, experts: dict[str, tuple[int, int]]) -> Any:
    """A forward of the right shape that costs nothing, or None where the real one is cheap."""
    if type(module) is nn.Linear:
        return lambda x: x.new_zeros(*x.shape[:-1], module.out_features)
    if is_experts(module):

        def no_experts(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            experts[name] = (top_k_index.shape[-1], int(module.num_experts))
            return torch.zeros_like(hidden)

        return no_experts
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward to our experts function."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterUse:
    """A module's streamed parameters: what the unit builder cuts."""

    module: str
    parameters: tuple[str, ...]
    decoded_bytes: int
    kind: str
    rows: int
    flops_per_token: float
    head: bool


def streamed_uses(
    model: Any, trace: ModelTrace, itemsize: int, gathered: frozenset[str], sliceable: Callable[[str], bool]
) -> list[ParameterUse]:
    """Modules whose parameters stream, in the order of use.

    Vectors (norms, biases) stay resident, and so do position tables and what a forward uses twice.

    Args:
        sliceable: whether rows of a parameter (state-dict name) can be read apart.
    """
    modules = dict(model.named_modules())
    output_embeddings = model.get_output_embeddings()
    unsplit = {f"{name}.kv_b_proj" for name in modules}  # attention on latents needs it whole
    uses = []
    for name in trace.entered:
        module = modules[name]
        experts = is_experts(module)
        names = tuple(own for own, p in module._parameters.items() if p is not None and p.ndim >= 2)
        if not names or name in gathered or name in trace.revisited or isinstance(module, nn.Embedding):
            continue
        numel = sum(module._parameters[own].numel() for own in names)  # type: ignore[union-attr]
        kind = "whole"
        if not all(sliceable(f"{name}.{own}") for own in names):
            pass
        elif experts:
            kind = "experts"
        elif type(module) is nn.Linear and name not in unsplit:
            kind = "linear"
        share = 1.0
        if name in trace.experts_per_token:
            chosen, num_experts = trace.experts_per_token[name]
            share = chosen / num_experts
        uses.append(
            ParameterUse(
                module=name,
                parameters=names,
                decoded_bytes=numel * itemsize,
                kind=kind,
                rows=module._parameters[names[0]].shape[0],  # type: ignore[union-attr]
                flops_per_token=2.0 * numel * share,
                head=module is output_embeddings,
            )
        )
    return uses


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPart:
    """Rows of one module within a unit."""

    use: ParameterUse
    start: int
    stop: int


def cut_units(uses: list[ParameterUse], unit_bytes: int) -> list[list[UnitPart]]:
    """Consecutive modules share a unit up to `unit_bytes`; larger ones are cut by rows or by experts.

    A unit stays within one decoder layer, and never mixes the head with anything else.
    """
    units: list[list[UnitPart]] = []
    room, owner = 0, None
    for use in uses:
        layer = (_layer_of(use.module), use.head)
        pieces = 1 if use.kind == "whole" else min(use.rows, -(-use.decoded_bytes // unit_bytes))
        bounds = [use.rows * index // pieces for index in range(pieces + 1)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            size = use.decoded_bytes * (stop - start) // use.rows
            if not units or size > room or layer != owner:
                units.append([])
                room, owner = unit_bytes, layer
            units[-1].append(UnitPart(use=use, start=start, stop=stop))
            room -= size
    return units


def module_plans(units: list[list[UnitPart]]) -> list[ModulePlan]:
    """The hooks that these units need."""
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    uses: dict[str, ParameterUse] = {}
    for index, parts in enumerate(units):
        for part in parts:
            ranges.setdefault(part.use.module, []).append((index, part.start, part.stop))
            uses[part.use.module] = part.use
    return [
        ModulePlan(
            module=name,
            parameters=uses[name].parameters,
            kind="whole" if len(spans) == 1 else uses[name].kind,
            ranges=tuple(spans),
        )
        for name, spans in ranges.items()
    ]


def _layer_of(module: str) -> str | None:
    """The decoder layer's number, as the first number in a module's name."""
    match = re.search(r"\.(\d+)\.", f".{module}.")
    return match[1] if match else None
