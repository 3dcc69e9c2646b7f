"""Names tell which tensors of a model would be stored encoded, for plans from a config alone."""

from __future__ import annotations

import pytest
import torch

from flexgen.formats.base import NamedTensor
from flexgen.formats.linear_names import is_encoded, is_router

MATRIX, EXPERTS = (64, 32), (4, 64, 32)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.weight", MATRIX),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", MATRIX),
        ("model.layers.3.mlp.experts.17.gate_proj.weight", MATRIX),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", MATRIX),
        ("transformer.h.0.self_attention.query_key_value.weight", MATRIX),
        ("transformer.h.0.mlp.dense_h_to_4h.weight", MATRIX),
        ("model.decoder.layers.0.fc1.weight", MATRIX),
        ("model.layers.0.mlp.experts.gate_up_proj", EXPERTS),
    ],
)
def test_linear_layers_and_experts(name: str, shape: tuple[int, ...]) -> None:
    assert is_encoded(NamedTensor(name, shape, torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lm_head.weight", MATRIX),
        ("model.embed_tokens.weight", MATRIX),
        ("model.layers.0.embed_tokens_per_layer.weight", MATRIX),
        ("transformer.wte.weight", MATRIX),
        ("model.layers.0.mlp.gate.weight", MATRIX),
        ("model.layers.0.mlp.shared_expert_gate.weight", MATRIX),
        ("model.layers.0.input_layernorm.weight", (32,)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4)),
        ("model.vision_tower.layers.0.fc1.weight", MATRIX),
    ],
)
def test_others(name: str, shape: tuple[int, ...]) -> None:
    assert not is_encoded(NamedTensor(name, shape, torch.bfloat16))


def test_routers() -> None:
    routers = ("mlp.gate", "mlp.router", "mlp.shared_expert_gate", "block_sparse_moe.router.layer", "mlp.gate.wg", "gate", "attn_gate")
    assert all(is_router(f"model.layers.0.{name}") for name in routers)
    assert not any(is_router(f"model.layers.0.mlp.{name}") for name in ("gate_proj", "gate_up_proj", "investigate", "routers_out"))
