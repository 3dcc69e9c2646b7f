"""Softmax attention over positions of which each query sees some, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute softmax attention (T, H, Dv) of T queries over N positions, of which each query sees some: `visible` (T, N)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    (num_queries, num_heads, key_dim), kv_heads = query.shape, key.shape[1]
    grouped = query.to(dtype).view(num_queries, kv_heads, num_heads // kv_heads, key_dim)
    scores = torch.einsum("tkgd,nkd->kgtn", grouped, key.to(dtype)).flatten(0, 1) * scaling  # (H, T, N)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, num_queries, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[0]]
    weights = weights.view(kv_heads, num_heads // kv_heads, num_queries, -1)  # (K, G, T, N)
    return torch.einsum("kgtn,nkd->tkgd", weights, value.to(dtype)).flatten(1, 2).to(query.dtype)
