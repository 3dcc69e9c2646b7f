"""Our experts function: fused expert weights arrive group by group, and each group is used as it arrives.

It is registered with transformers' ExpertsInterface; the arithmetic follows the eager loop of the decorated classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flexgen.kernels.experts import grouped_kernels
from flexgen.models.coroutine import current_forward
from flexgen.models.expert_sums import EveryRow, ExpertLayer, ExpertSums, GroupedRows, ListedRows
from flexgen.models.parts import Part

FEW_ROWS = 128  # a device reads an expert's matrices for about as long as it multiplies so many rows by them


def register_experts(name: str) -> None:
    """Register `name` as an experts implementation of transformers (idempotent)."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, experts_forward)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs.

    Args:
        module: The experts module.
        hidden_states: The inputs, (tokens, hidden).
        top_k_index: The chosen experts of each token, int64 (tokens, k).
        top_k_weights: Their weights, (tokens, k).

    Returns:
        The sum, (tokens, hidden), in the dtype of `hidden_states`.
    """
    sums = empty_sums(expert_layer(module), hidden_states, top_k_index, top_k_weights)
    parts = getattr(module, "flexgen_parts", None)
    if parts is None:  # not split: the module's own hook has entered its unit
        sums.add(dict(module.named_parameters(recurse=False)), 0)
    else:
        _add_parts(sums, parts)
    return sums.total()


def expert_layer(module: Any) -> ExpertLayer:
    """Return how each expert of an experts module computes."""
    return ExpertLayer(
        num_experts=int(module.num_experts),
        first="gate_up_proj" if module.has_gate else "up_proj",
        is_transposed=module.is_transposed,
        has_bias=module.has_bias,
        gate=module._apply_gate if module.has_gate else module.act_fn,
        norm=module.post_expert_norm if module.has_post_expert_norm else None,
    )


def scored_expert_layer(experts: Any) -> ExpertLayer:
    """Return how each of Llama 4's experts computes, for a Llama4TextExperts."""

    def gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * experts.act_fn(gate)

    return ExpertLayer(
        num_experts=experts.num_experts, first="gate_up_proj", is_transposed=True, has_bias=False, gate=gate, norm=None
    )  # fmt: skip


def scored_experts_forward(module: Any, parts: Sequence[Part], hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of Llama 4's experts, whose scores multiply the inputs; each expert computes its own tokens only.

    transformers passes every token to every expert, multiplied by zero where the expert was not chosen.

    Args:
        module: A Llama4TextMoe.
        parts: Ranges of its experts.
        hidden_states: The inputs, (batch, tokens, hidden).

    Returns:
        The output, (tokens, hidden), and the router's logits.
    """
    hidden = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(hidden)  # (tokens, experts), zero where not chosen
    chosen = scores.topk(module.top_k, dim=-1)  # (tokens, k)
    rows = (hidden[:, None] * chosen.values[..., None]).flatten(0, 1)  # (tokens * k, hidden)
    sums = empty_sums(scored_expert_layer(module.experts), rows, chosen.indices.reshape(-1, 1), None)
    _add_parts(sums, parts)
    total = sums.total().view(len(hidden), module.top_k, -1).sum(dim=1)
    return module.shared_expert(hidden) + total, logits


def _add_parts(sums: ExpertSums, parts: Sequence[Part]) -> None:
    forward = current_forward()
    for part in parts:
        forward.enter_unit(part.unit)
        sums.add({**part.tensors, **part.encoded}, part.start)


def empty_sums(layer: ExpertLayer, x: Tensor, experts: Tensor, weights: Tensor | None) -> ExpertSums:
    """Return sums of experts' outputs for the rows `x`, to which experts are added as they arrive.

    The host computes each expert's rows, and a device with kernels of ours the same in groups.  Any other device would have to tell the
    host which rows these are, for which it waits; few rows are computed by all experts instead.

    Args:
        layer: How an expert computes.
        x: The inputs, (R, hidden).
        experts: The experts that each row chose, no expert twice, int64 (R, k).
        weights: The weights of their outputs, (R, k); None for 1.
    """
    kernels = grouped_kernels(x.device)
    if kernels is not None and kernels.covers(x.dtype):
        return GroupedRows(layer, kernels, x, experts, weights)
    if x.device.type == "cpu" or len(x) > FEW_ROWS:
        return ListedRows(layer, x, experts, weights)
    return EveryRow(layer, x, experts, weights)
