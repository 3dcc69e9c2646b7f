"""Our attention function and Cache, as transformers' models call them.

This module interprets what a model passes (windows, chunks, caps, sinks, latents) and refuses what it does not understand.
It knows no pages and no tiers: the coroutine in which it runs computes the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, Cache

from flexgen.errors import UnsupportedModelError
from flexgen.models.coroutine import current_forward
from flexgen.models.head_maps import HEAD_MAPS
from flexgen.passes.calls import AttentionCall, CacheUpdate, LatentProjection

# Arguments that cannot change which tokens are attended to, or that are handled elsewhere.
HARMLESS = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "training", "is_causal", "position_embeddings", "past_key_values", "logits_to_keep", "deterministic", "cache_position",
    }
)  # fmt: skip


def register_attention(name: str) -> None:
    """Register `name` as an attention implementation of transformers (idempotent).

    No mask function is registered with it: without one, transformers builds no mask.
    """
    AttentionInterface.register(name, attention_forward)


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention, (1, tokens, heads, value_dim), of packed queries over all stored tokens of their sequences.

    Raises:
        UnsupportedModelError: An argument has an unknown meaning.
    """
    _refuse_unknown(module, attention_mask, arguments)
    forward = current_forward()
    window, chunk = visible_tokens(module, arguments)
    understood = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "softcap": softcap, "sinks": s_aux, "window": window, "chunk": chunk,
    }  # fmt: skip
    if (update := _update_of(forward.updates, key, value)) is not None:
        new = update.take(key, value)
        update.let_go()
        call = AttentionCall(layer=update.layer, query=query, key=key, value=value, new=new, **understood)
        return forward.attend(call), None
    last = forward.updates[-1] if forward.updates else None
    if last is None or last.key is None or last.value is None:
        raise _unsupported(module, "attends to keys that it does not cache")
    if (latent := _latent_projection(module, last)) is not None:
        if softcap is not None or s_aux is not None:
            raise _unsupported(module, "caps scores or has sinks in latent attention")
        new = last.take(last.key, last.value)
        last.let_go()
        call = AttentionCall(layer=last.layer, query=query, key=key, value=value, new=new, latent=latent, **understood)
        return forward.attend(call), None
    head_map = HEAD_MAPS.get(module.config.model_type)  # may need the cached tensors for a second call
    if head_map is None or (mapped := head_map(query, key, value, last.key, last.value)) is None:
        raise _unsupported(module, "changes keys or values after caching them")
    new = last.take(mapped.key, mapped.value)
    call = AttentionCall(layer=last.layer, query=mapped.query, key=mapped.key, value=mapped.value, new=new, **understood)
    return mapped.restore(forward.attend(call)), None


def _unsupported(module: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model type {module.config.model_type!r} {reason}, which is not supported")


def _refuse_unknown(module: Any, attention_mask: torch.Tensor | None, arguments: Mapping[str, Any]) -> None:
    if attention_mask is not None:
        raise _unsupported(module, "builds an attention mask of its own")
    if getattr(module, "is_causal", True) is False or arguments.get("is_causal") is False:
        raise _unsupported(module, "has attention that is not causal")
    for name, given in arguments.items():
        if given is not None and given is not False and name not in HARMLESS and name != "sliding_window":
            raise _unsupported(module, f"passes {name!r} to attention")


def visible_tokens(module: Any, arguments: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the (window, chunk) of a layer: from the call if it passes a window, otherwise from the config.

    The index in `layer_types` is the module's own, whatever index its cache has.
    """
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    kind = layer_types[module.layer_idx] if layer_types is not None else None
    if kind == "chunked_attention":
        return None, config.attention_chunk_size
    if "sliding_window" in arguments:
        return arguments["sliding_window"], None
    if kind in ("sliding_attention", None):
        return getattr(config, "sliding_window", None), None
    return None, None


def _update_of(updates: list[CacheUpdate], key: torch.Tensor, value: torch.Tensor) -> CacheUpdate | None:
    """Return the update that stored these keys and values: usually the last layer's, or an earlier one's if layers share them."""
    return next((update for update in reversed(updates) if update.is_of(key, value)), None)


def _latent_projection(module: Any, update: CacheUpdate) -> LatentProjection | None:
    """Return the up-projection of a latent attention module (DeepSeek-V2/V3 and similar), split into keys and values; None for others."""
    projection = getattr(module, "kv_b_proj", None)
    if projection is None or update.key is None or update.key.shape[1] != 1 or update.key.shape[3] != projection.in_features:
        return None
    return _BoundProjection(projection=projection, nope_dim=module.qk_nope_head_dim, value_dim=module.v_head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BoundProjection:
    """The projection of a module, by the weights that are bound when it is used: they may be others when attention has been waited for.

    Attributes:
        projection: The linear layer, whose weight is (heads * (nope_dim + value_dim), rank).
        nope_dim: The rows of a head that make the part of its keys without a position.
        value_dim: The rows that make its values.
    """

    projection: Any
    nope_dim: int
    value_dim: int

    @property
    def key_up(self) -> torch.Tensor:
        return self._per_head()[:, : self.nope_dim]

    @property
    def value_up(self) -> torch.Tensor:
        return self._per_head()[:, self.nope_dim :]

    def _per_head(self) -> torch.Tensor:
        weight: torch.Tensor = self.projection.weight
        return weight.view(-1, self.nope_dim + self.value_dim, weight.shape[-1])


class PassCache(Cache):
    """The `past_key_values` of a forward: new keys and values go to the coroutine, and nothing is returned from storage.

    It is stateless, so that one instance serves every micro-batch.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        current_forward().update(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Return the number of tokens stored before those of the forward.

        If a layer asks, there is one number per token, since each token has its own sequence.

        Without a layer it is 0: models use it for the length of a mask or of a range of positions, which covers the forward's own tokens.
        """
        if layer_idx is None:
            return 0
        positions = current_forward().position_ids[0]
        return positions - torch.arange(len(positions), device=positions.device)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # type: ignore[override]
        return query_length, 0
