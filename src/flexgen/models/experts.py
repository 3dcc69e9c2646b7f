"""Our experts function: fused expert weights arrive group by group, each group is used as it arrives.

Registered with transformers' ExpertsInterface; the arithmetic follows the eager loop of the decorated classes.
"""

from __future__ import annotations

from typing import Any

import torch

from flexgen.models.suspension import current_forward


def register_experts(name: str) -> None:
    """Make `name` an experts implementation of transformers (idempotent)."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, experts_forward)


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        hidden_states: (tokens, hidden). top_k_index: int64 (tokens, k). top_k_weights: (tokens, k).

    Returns:
        (tokens, hidden), dtype of `hidden_states`.
    """
    parts = getattr(module, "flexgen_parts", None)
    if parts is None:  # not split: the module's own hook has entered its unit
        return _add_experts(module, dict(module.named_parameters(recurse=False)), 0, hidden_states, top_k_index, top_k_weights)
    forward = current_forward()
    total = torch.zeros_like(hidden_states)
    for part in parts:
        forward.enter_unit(part.unit)
        total += _add_experts(module, part.tensors, part.start, hidden_states, top_k_index, top_k_weights)
    return total


def _add_experts(
    module: Any,
    tensors: dict[str, torch.Tensor],
    first: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Contribution of the experts first, first + 1, ... whose weights are the rows of `tensors`."""
    total = torch.zeros_like(hidden_states)
    num_experts = next(iter(tensors.values())).shape[0]
    inside = (top_k_index >= first) & (top_k_index < first + num_experts)
    token, slot = torch.where(inside)  # (pairs,)
    expert = top_k_index[token, slot] - first
    order = torch.argsort(expert, stable=True)
    token, slot = token[order], slot[order]
    counts = torch.bincount(expert, minlength=num_experts).tolist()
    position = 0
    for index, count in enumerate(counts):
        if count == 0:
            continue
        rows = token[position : position + count]
        weights = top_k_weights[rows, slot[position : position + count], None]
        position += count
        out = _one_expert(module, tensors, index, hidden_states[rows])
        total.index_add_(0, rows, (out * weights).to(total.dtype))
    return total


def _one_expert(module: Any, tensors: dict[str, torch.Tensor], index: int, x: torch.Tensor) -> torch.Tensor:
    """x: (rows, hidden) -> (rows, hidden)"""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, tensors, up, index, x)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = _linear(module, tensors, "down_proj", index, hidden)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _linear(module: Any, tensors: dict[str, torch.Tensor], name: str, index: int, x: torch.Tensor) -> torch.Tensor:
    weight = tensors[name][index]
    out = x @ (weight if module.is_transposed else weight.T)
    return out + tensors[f"{name}_bias"][index] if module.has_bias else out
