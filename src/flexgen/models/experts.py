"""Our experts function: fused expert weights arrive group by group, and each group is used as it arrives.

It is registered with transformers' ExpertsInterface; the arithmetic follows the eager loop of the decorated classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flexgen.models.coroutine import current_forward
from flexgen.models.parts import Part


def register_experts(name: str) -> None:
    """Register `name` as an experts implementation of transformers (idempotent)."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, experts_forward)


def experts_forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs.

    Args:
        module: The experts module.
        hidden_states: The inputs, (tokens, hidden).
        top_k_index: The chosen experts of each token, int64 (tokens, k).
        top_k_weights: Their weights, (tokens, k).

    Returns:
        The sum, (tokens, hidden), in the dtype of `hidden_states`.
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
    """Add the outputs of the experts first, first + 1, ..., whose weights are the rows of `tensors`."""
    total = torch.zeros_like(hidden_states)
    num_experts = next(iter(tensors.values())).shape[0]
    inside = (top_k_index >= first) & (top_k_index < first + num_experts)
    token, slot = torch.where(inside)  # (pairs,)
    for index, pairs in _by_expert(top_k_index[token, slot] - first, num_experts):
        rows = token[pairs]
        out = _one_expert(module, tensors, index, hidden_states[rows])
        total.index_add_(0, rows, (out * top_k_weights[rows, slot[pairs], None]).to(total.dtype))
    return total


def _by_expert(expert: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert with a selection of its own pairs, given the expert of each pair, (pairs,)."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts).tolist()
    for index, pairs in enumerate(order.split(counts)):
        if counts[index]:
            yield index, pairs


def _one_expert(module: Any, tensors: dict[str, torch.Tensor], index: int, x: torch.Tensor) -> torch.Tensor:
    """Return the output, (rows, hidden), of one expert for the inputs `x`, (rows, hidden)."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _linear(module, tensors, up, index, x)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = _linear(module, tensors, "down_proj", index, hidden)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _linear(module: Any, tensors: dict[str, torch.Tensor], name: str, index: int, x: torch.Tensor) -> torch.Tensor:
    weight = tensors[name][index]
    out = x @ (weight if module.is_transposed else weight.T)
    return out + tensors[f"{name}_bias"][index] if module.has_bias else out


def scored_experts_forward(module: Any, parts: Sequence[Part], hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of Llama 4's experts, whose scores multiply the inputs; each expert computes its own tokens only.

    transformers passes every token to every expert, multiplied by zero where the expert was not chosen.

    Args:
        module: A Llama4TextMoe.
        parts: Ranges of its experts.
        hidden_states: The inputs, (batch, tokens, hidden).

    Returns:
        The output, (tokens, hidden), and the router's logits.
    """
    forward = current_forward()
    hidden = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(hidden)  # (tokens, experts), zero where not chosen
    total = torch.zeros_like(hidden)
    for part in parts:
        forward.enter_unit(part.unit)
        token, expert = torch.where(scores[:, part.start : part.stop] > 0)
        for index, pairs in _by_expert(expert, part.stop - part.start):
            rows = token[pairs]
            gate_up = (hidden[rows] * scores[rows, part.start + index, None]) @ part.tensors["gate_up_proj"][index]
            gate, up = gate_up.chunk(2, dim=-1)
            total.index_add_(0, rows, (up * module.experts.act_fn(gate)) @ part.tensors["down_proj"][index])
    return module.shared_expert(hidden) + total, logits
