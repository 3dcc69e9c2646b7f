"""Traces one forward pass of the skeleton: the order in which parameters are used, every attention call and every cache entry.

The trace computes nothing: parameters are zeros without memory, and linear layers return zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from flexgen.errors import UnsupportedModelError
from flexgen.models.head import Tail, TailRecorder
from flexgen.models.operations import OperationCounter
from flexgen.models.weightless import ParameterReads, WeightlessForward, call_model, run_without_weights
from flexgen.passes.calls import AttentionCall, KeyValue, without_memory
from flexgen.passes.geometry import LayerKV

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
        attention_in: For each of these layer indices, the modules that run when its keys and values are attended to first, each within the
            one before it.
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
    attention_in: dict[int, tuple[str, ...]]
    calls: tuple[AttentionCall, ...]
    experts_per_token: dict[str, tuple[int, int]]
    tail: Tail | None
    num_operations: int


class _Tracer(WeightlessForward):
    """Answers the model's requests with zeros and records them."""

    def __init__(self, run: Any, usage: _Usage) -> None:
        super().__init__(run, TRACE_IDS)
        self._usage = usage
        self.layers: dict[int, LayerKV] = {}
        self.attention_in: dict[int, tuple[str, ...]] = {}
        self.calls: list[AttentionCall] = []
        self._new: dict[int, KeyValue] = {}  # what each layer stores

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.new is not None:
            self.layers[call.layer] = LayerKV(layer=call.layer, geometry=call.geometry, flops_per_pair=_flops_per_pair(call))
            self.attention_in[call.layer] = self._usage.running
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
    """A record of the running modules and of when each module's parameters are used: the watch of a trace."""

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

    @property
    def running(self) -> tuple[str, ...]:
        """The running modules, each within the one before it."""
        return tuple(self._running)

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

    def leave(self, name: str, output: Any) -> None:
        self._running.pop()

    def read(self, tensor: object) -> None:
        owner = self._owner_of.get(id(tensor))
        if owner is not None and owner not in self._running:
            self.used.add(owner)
            self._uses.append((owner, self._running[-1]))

    def choose(self, name: str, chosen: int, of: int) -> None:
        self.experts[name] = (chosen, of)

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


def trace_model(model: Any) -> ModelTrace:
    """Run one forward without weights and record what it used.

    Args:
        model: A fresh skeleton (build_skeleton); it is left unchanged.

    Raises:
        UnsupportedModelError: The forward needs something that the engine does not offer.
    """
    ids = torch.tensor([TRACE_IDS])
    usage = _Usage(ids)
    recorder, counter = TailRecorder(model), OperationCounter()
    tails: list[Tail | None] = []

    def run() -> None:
        with ParameterReads(usage), recorder, counter:
            output = call_model(model, ids)
        tails.append(recorder.tail(output.logits))

    tracer = _Tracer(run, usage)
    run_without_weights(model, usage, tracer)
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
        attention_in=tracer.attention_in,
        calls=tuple(tracer.calls),
        experts_per_token=usage.experts,
        tail=tails[0],
        num_operations=counter.num_operations,
    )
