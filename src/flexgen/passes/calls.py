"""The values that a model's forward passes on: attention calls, cache updates, and the spans of tokens that it computes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from flexgen.passes.geometry import KVGeometry

KeyValue = tuple[torch.Tensor, torch.Tensor]


class LatentProjection(Protocol):
    """The relation of cached latents to keys and values in multi-head latent attention.

    Attributes:
        key_up: The projection from a latent to the part of each key without a position, (heads, nope_dim, rank).
        value_up: The projection from a latent to each value, (heads, value_dim, rank).
    """

    @property
    def key_up(self) -> torch.Tensor: ...
    @property
    def value_up(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedProjection:
    """A projection by tensors that stay where they are."""

    key_up: torch.Tensor
    value_up: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of the attention function, with the meaning of its arguments made explicit.

    Attributes:
        layer: The index of the layer whose KV is attended to.
        query: The queries, (1, heads, tokens, key_dim).
        key: The keys of this micro-batch's own tokens, (1, kv_heads, tokens, key_dim).
        value: The values of this micro-batch's own tokens, (1, kv_heads, tokens, value_dim).
        new: The keys and values to store first, as they are cached; None if an earlier call has passed them.
        scaling: The factor of the scores.
        softcap: The limit of the scores, applied by tanh; None for no limit.
        sinks: Logits, (heads,), that take a share of the softmax; None for no sinks.
        window: The number of tokens that a query sees, itself included; None for all.
        chunk: The size of the aligned chunks within which tokens attend; None for no chunks.
        latent: The projection of the latents, if the cache holds latents instead of `key` and `value`; None otherwise.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    new: KeyValue | None = None
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    window: int | None = None
    chunk: int | None = None
    latent: LatentProjection | None = None

    @property
    def geometry(self) -> KVGeometry:
        """The geometry of the layer's cache, according to a call that passes new keys and values."""
        assert self.new is not None
        key, value = self.new
        return KVGeometry(
            key_heads=key.shape[1], key_dim=key.shape[3], value_heads=value.shape[1], value_dim=value.shape[3],
            window=self.window, chunk=self.chunk, latent=self.latent is not None,
        )  # fmt: skip

    def new_output(self) -> torch.Tensor:
        """Return uninitialized memory for the result, (1, tokens, heads, value_dim)."""
        return self.query.new_empty(1, self.query.shape[2], self.query.shape[1], self.value.shape[3])


def without_memory(call: AttentionCall, new: KeyValue, tokens: int) -> AttentionCall:
    """Return a call like another one for so many tokens, whose tensors have no memory.

    Args:
        call: The other call.
        new: The keys and values that are stored first, those of an earlier call if this one passes none.
        tokens: The number of tokens.
    """

    def of_tokens(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(1, tensor.shape[1], tokens, tensor.shape[3], device="meta")

    def alike(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(tensor.shape, device="meta")

    latent = call.latent and FixedProjection(key_up=alike(call.latent.key_up), value_up=alike(call.latent.value_up))
    return replace(
        call, query=of_tokens(call.query), key=of_tokens(call.key), value=of_tokens(call.value), new=(of_tokens(new[0]), of_tokens(new[1])),
        sinks=None if call.sinks is None else alike(call.sinks), latent=latent,
    )  # fmt: skip


class CacheUpdate:
    """Keys and values, (1, heads, tokens, dim), that a layer has passed to the cache.

    They are held until they are attended to; afterwards they can be recognized for as long as the model itself holds them.

    Attributes:
        layer: The index under which the model stores them.
        key: The keys; None once they are no longer held.
        value: The values; None once they are no longer held.
        stored: Whether an attention call has taken the tensors to store them.
    """

    def __init__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.layer, self.stored = layer, False
        self.key: torch.Tensor | None = key
        self.value: torch.Tensor | None = value
        self._known = weakref.ref(key), weakref.ref(value)

    def is_of(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Return whether these are the very tensors that the model got back."""
        return self._known[0]() is key and self._known[1]() is value

    def take(self, key: torch.Tensor, value: torch.Tensor) -> KeyValue | None:
        """Return `key` and `value` the first time, to be stored; None afterwards."""
        first, self.stored = not self.stored, True
        return (key, value) if first else None

    def let_go(self) -> None:
        """Drop the references to the tensors."""
        self.key = self.value = None
