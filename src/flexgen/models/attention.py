"""Our attention function and Cache, as transformers' models call them.

Responsible for understanding what a model passes (windows, chunks, caps, sinks, latents) and refusing what it does
not understand.  Does not know pages or tiers: the coroutine it runs in attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, Cache

from flexgen.errors import UnsupportedModelError
from flexgen.models.suspension import current_forward

# Arguments that cannot change what a token attends to, or that we honour elsewhere.
HARMLESS = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "training", "is_causal", "position_embeddings", "past_key_values", "logits_to_keep", "deterministic", "cache_position",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentProjection:
    """Multi-head latent attention: how cached latents relate to keys and values.

    Attributes:
        key_up: (heads, nope_dim, rank): latent -> the part of each key without position.
        value_up: (heads, value_dim, rank): latent -> each value.
    """

    key_up: torch.Tensor
    value_up: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of the attention function, understood.

    Attributes:
        layer: index of the layer whose KV is attended to.
        query: (1, heads, tokens, key_dim). key, value: this micro-batch's own, (1, kv_heads, tokens, dim).
        scaling: multiplies the scores. softcap: caps them by tanh, or None. sinks: (heads,) logits, or None.
        latent: set when the cache holds latents instead of `key` and `value`.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    latent: LatentProjection | None = None
    arguments: dict[str, Any] | None = None


def register_attention(name: str) -> None:
    """Make `name` an attention implementation of transformers (idempotent).

    No mask function goes with it: for an unregistered name transformers builds no mask.
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
    """Attention of packed queries over everything their sequences have stored; (1, tokens, heads, value_dim)."""
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} builds an attention mask of its own")
    call = AttentionCall(
        layer=module.layer_idx,
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        sinks=s_aux,
        latent=_latent_projection(module),
        arguments=arguments,
    )
    return current_forward().attend(call), None


def _latent_projection(module: Any) -> LatentProjection | None:
    """The up-projection of a latent attention module (DeepSeek-V2/V3 and kin), split into keys and values."""
    projection = getattr(module, "kv_b_proj", None)
    if projection is None:
        return None
    weight = projection.weight  # (heads * (nope + value), rank)
    nope, value_dim = module.qk_nope_head_dim, module.v_head_dim
    per_head = weight.view(-1, nope + value_dim, weight.shape[-1])
    return LatentProjection(key_up=per_head[:, :nope], value_up=per_head[:, nope:])


class PassCache(Cache):
    """What a forward sees as `past_key_values`: new keys and values go to the coroutine, nothing comes back.

    Stateless: one instance serves every micro-batch.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        current_forward().store_kv(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # type: ignore[override]
        return query_length, 0
