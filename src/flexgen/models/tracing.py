"""Traces one forward pass of the skeleton: the order in which parameters are used, every attention call and every cache entry.

The trace computes nothing: parameters are zeros without memory, and linear layers return zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flexgen.errors import UnsupportedModelError
from flexgen.models.attention import PassCache
from flexgen.models.coroutine import ForwardCoroutine
from flexgen.models.head import Tail, TailRecorder
from flexgen.models.operations import OperationCounter
from flexgen.passes.calls import AttentionCall, KeyValue, without_memory
from flexgen.passes.geometry import LayerKV
from flexgen.passes.plan import Slice

TRACE_IDS = (7, 5)  # descending, so that they cannot be mistaken for positions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTrace:
    """The findings of a trace.

    Attributes:
        order: The modules with matrices, in the order of their first use.
        read_by: For each of these modules whose matrices another module reads before it is entered, that other module.
        revisited: The modules that are used again after others, so that they cannot stream.
        entered: All modules whose forward ran.
        used: The entered modules and those whose parameters were read.
        embeddings: The embedding modules that look input ids up.
        layers: The KV of each layer, by layer index.
        calls: The attention calls, whose tensors have no memory; all of them pass keys and values to store.
        experts_per_token: For each experts module, (k, num_experts).
        tail: What the model does to the logits after its head, see `TailRecorder.tail`.
        num_operations: The operations that would run on a device, with one for each linear layer, layer of experts and attention.
    """

    order: tuple[str, ...]
    read_by: dict[str, str]
    entered: frozenset[str]
    used: frozenset[str]
    revisited: frozenset[str]
    embeddings: frozenset[str]
    layers: tuple[LayerKV, ...]
    calls: tuple[AttentionCall, ...]
    experts_per_token: dict[str, tuple[int, int]]
    tail: Tail | None
    num_operations: int


class _Tracer(ForwardCoroutine):
    """Answers the model's requests with zeros and records them."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.position_ids = torch.arange(len(TRACE_IDS))[None]
        self.layers: dict[int, LayerKV] = {}
        self.calls: list[AttentionCall] = []
        self._new: dict[int, KeyValue] = {}  # what each layer stores

    def slices(self) -> list[Slice]:
        count = len(TRACE_IDS)
        return [Slice(sequence=0, token_ids=TRACE_IDS, start=0, prompt_len=count, total=count)]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.new is not None:
            self.layers[call.layer] = LayerKV(layer=call.layer, geometry=call.geometry, flops_per_pair=_flops_per_pair(call))
            self._new[call.layer] = call.new
        else:
            earlier = self.layers[call.layer]
            if (earlier.geometry.window, earlier.geometry.chunk) != (call.window, call.chunk):
                raise UnsupportedModelError(f"layer {call.layer}'s keys are attended to with different windows")
            self.layers[call.layer] = replace(earlier, flops_per_pair=earlier.flops_per_pair + _flops_per_pair(call))
        self.calls.append(without_memory(call, self._new[call.layer], len(TRACE_IDS)))
        return call.new_output().zero_()


def _flops_per_pair(call: AttentionCall) -> float:
    heads, dims = call.query.shape[1], call.query.shape[3] + call.value.shape[3]
    if call.latent is not None:  # scores over latent and rope, sums over the latent
        nope, rank = call.latent.key_up.shape[1:]
        dims = 2 * rank + call.query.shape[3] - nope
    return 2.0 * heads * dims


class _Usage:
    """A record of the running modules and of when each module's parameters are used, written by hooks and a torch function mode."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids
        self._running: list[str] = []
        self._uses: list[tuple[str, str | None]] = []  # (module, None) entered, (owner, reader) read from outside
        self._owner_of: dict[int, str] = {}  # id of a placeholder -> its module
        self._streamable: set[str] = set()
        self.entered: set[str] = set()
        self.used: set[str] = set()
        self.embeddings: set[str] = set()
        self.experts: dict[str, tuple[int, int]] = {}

    def owns(self, name: str, module: nn.Module, parameter: nn.Parameter) -> None:
        self._owner_of[id(parameter)] = name
        if parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
            self._streamable.add(name)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._running.append(name)
        self._uses.append((name, None))
        self.entered.add(name)
        self.used.add(name)
        if isinstance(module, nn.Embedding) and args and torch.equal(args[0], self._ids):
            self.embeddings.add(name)

    def leave(self) -> None:
        self._running.pop()

    def read(self, tensor: object) -> None:
        owner = self._owner_of.get(id(tensor))
        if owner is not None and owner not in self._running:
            self.used.add(owner)
            self._uses.append((owner, self._running[-1]))

    def order(self) -> tuple[list[str], dict[str, str]]:
        """Return the owners of matrices in the order of use, with repeated uses, and the readers of those read before they are entered.

        Parameters that are read from outside must be present when their reader begins.
        """
        read_by: dict[str, str] = {}
        for name, reader in self._uses:
            if name in self._streamable and name not in read_by:
                read_by[name] = reader or name
        needs: dict[str, list[str]] = {}
        for owner, reader in read_by.items():
            needs.setdefault(reader, []).append(owner)
        order = []
        for name, reader in self._uses:
            order += needs.pop(name, []) if reader is None else []
            if name in self._streamable:
                order.append(name)
        return [name for name, _ in groupby(order)], {owner: reader for owner, reader in read_by.items() if owner != reader}


class _ParameterReads(TorchFunctionMode):
    """Reports every parameter that an operation takes to a `_Usage`."""

    def __init__(self, usage: _Usage) -> None:
        super().__init__()
        self._usage = usage

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading a dtype or a shape does not count as use
            for arg in (*args, *(kwargs or {}).values()):
                for each in arg if isinstance(arg, (list, tuple)) else (arg,):
                    self._usage.read(each)
        return func(*args, **(kwargs or {}))


def trace_model(model: Any) -> ModelTrace:
    """Run one forward without weights and record what it used.

    Args:
        model: A fresh skeleton (build_skeleton); it is left unchanged.

    Raises:
        UnsupportedModelError: The forward needs something that the engine does not offer.
    """
    ids = torch.tensor([TRACE_IDS])
    usage = _Usage(ids)
    undo = list(_fake_modules(model, usage))

    recorder, counter = TailRecorder(model), OperationCounter()
    tails: list[Tail | None] = []

    def run() -> None:
        with torch.no_grad(), _ParameterReads(usage), recorder, counter:
            output = model(
                input_ids=ids, position_ids=torch.arange(len(TRACE_IDS))[None], past_key_values=PassCache(), use_cache=True,
                logits_to_keep=torch.tensor([len(TRACE_IDS) - 1]),
            )  # fmt: skip
        tails.append(recorder.tail(output.logits))

    tracer = _Tracer(run)
    try:
        tracer.switch()
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(f"model type {model.config.model_type!r} cannot be traced: {reason}") from error
    finally:
        for restore in reversed(undo):
            restore()
    if unattended := [update.layer for update in tracer.updates if not update.stored]:
        raise UnsupportedModelError(f"model type {model.config.model_type!r} caches keys in layers {unattended} without attention")
    order, read_by = usage.order()
    return ModelTrace(
        order=tuple(dict.fromkeys(order)),
        read_by=read_by,
        used=frozenset(usage.used),
        entered=frozenset(usage.entered),
        revisited=frozenset(name for name in set(order) if order.count(name) > 1),
        embeddings=frozenset(usage.embeddings),
        layers=tuple(tracer.layers[layer] for layer in sorted(tracer.layers)),
        calls=tuple(tracer.calls),
        experts_per_token=usage.experts,
        tail=tails[0],
        num_operations=counter.num_operations,
    )


def _fake_modules(model: nn.Module, usage: _Usage) -> Iterator[Callable[[], Any]]:
    """Make every parameter zeros without memory and every large product free; yield functions that undo this."""
    for name, module in model.named_modules():
        pre_hook = lambda module, args, name=name: usage.enter(name, module, args)  # noqa: E731
        yield module.register_forward_pre_hook(pre_hook, prepend=True).remove
        yield module.register_forward_hook(lambda *_: usage.leave(), always_call=True).remove
        saved = dict(module._parameters)
        yield lambda module=module, saved=saved: module._parameters.update(saved)
        for own, parameter in saved.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[own] = placeholder = nn.Parameter(zeros, requires_grad=False)
                usage.owns(name, module, placeholder)
        top_k = getattr(model.get_submodule(name.rpartition(".")[0]), "top_k", 1)
        if (fake := _fake_forward(name, module, top_k, usage.experts)) is not None:
            module.forward = fake  # type: ignore[method-assign]
            yield lambda module=module: module.__dict__.pop("forward")


def _fake_forward(name: str, module: Any, top_k: Any, experts: dict[str, tuple[int, int]]) -> Any:
    """Return a forward of the right output shape that costs nothing, or None if the real one is cheap."""
    if type(module) is nn.Linear:
        return lambda x: x.new_zeros(*x.shape[:-1], module.out_features)
    if is_experts(module):

        def no_experts(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            experts[name] = (top_k_index.shape[-1], int(module.num_experts))
            return torch.zeros_like(hidden)

        return no_experts
    if is_scored_experts(module):

        def no_scored_experts(hidden: torch.Tensor) -> torch.Tensor:
            experts[name] = (top_k, int(module.num_experts))
            return torch.zeros_like(hidden)

        return no_scored_experts
    return None


def is_experts(module: nn.Module) -> bool:
    """Return whether transformers dispatches this module's forward to our experts function."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate"))


def is_scored_experts(module: nn.Module) -> bool:
    """Return whether these are Llama 4's experts, which transformers does not dispatch."""
    return type(module).__name__ == "Llama4TextExperts"
