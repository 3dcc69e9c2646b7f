"""Which tensors are rounded, and the reasons for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.errors import OptionError, UnsupportedModelError
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.targets import Targets, find_targets
from tests.models.tiny_configs import tiny_config


def found(model_type: str = "llama", asked: dict[str, Any] | None = None, **config: Any) -> tuple[Headers, Targets]:
    made = tiny_config(model_type, **config)
    headers = headers_of("x", sharded(saved_tensors(meta_model(made, torch.bfloat16), torch.bfloat16), 10**9))
    settings: dict[str, Any] = {"group_size": 32, **(asked or {})}
    return headers, find_targets(made, headers, QuantizeSettings(**settings))


def test_linear_layers_are_rounded_and_nothing_else() -> None:
    headers, targets = found()
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name for name in headers.tensors if name.split(".")[-2] in parts} == targets.rounded
    assert targets.kept == {"model.embed_tokens.weight": "an embedding", "lm_head.weight": "the output head"}
    assert targets.ignore == ("lm_head", "model.embed_tokens")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_rounded_and_routers_are_not(model_type: str) -> None:
    latent: dict[str, Any] = {"kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16} if "deepseek" in model_type else {}
    headers, targets = found(model_type, **latent)
    experts = {name for name in headers.tensors if ".experts." in name and name.endswith(".weight")}
    assert experts
    assert experts <= targets.rounded
    routers = {name for name in headers.tensors if name.endswith((".gate.weight", ".router.weight"))}
    assert routers
    assert routers <= targets.kept.keys()
    assert {name.removesuffix(".weight") for name in routers} <= set(targets.ignore)


def test_the_head_is_rounded_where_asked_for() -> None:
    _, targets = found(asked={"quantize_head": True})
    assert "lm_head.weight" in targets.rounded
    assert targets.ignore == ("model.embed_tokens",)


def test_a_tied_head_cannot_be_rounded() -> None:
    with pytest.raises(OptionError, match=r"quantize_head: the head shares its numbers with model\.embed_tokens"):
        found(asked={"quantize_head": True}, tie_word_embeddings=True)
    _, targets = found(tie_word_embeddings=True)
    assert targets.kept == {"model.embed_tokens.weight": "an embedding"}
    assert "lm_head" in targets.ignore


def test_patterns_keep_tensors_and_must_match() -> None:
    _, targets = found(asked={"keep": ("*.down_proj.weight",)})
    assert {name for name, reason in targets.kept.items() if reason == "kept as asked for"} == {
        f"model.layers.{index}.mlp.down_proj.weight" for index in range(4)
    }
    assert "model.layers.0.mlp.down_proj" in targets.ignore
    with pytest.raises(OptionError, match=r"keep='\*\.w2' matches no stored tensor"):
        found(asked={"keep": ("*.w2",)})


def test_patterns_give_tensors_of_four_bits_eight_and_must_match() -> None:
    _, targets = found(asked={"eight_bits": ("*.down_proj.weight", "*.0.*.v_proj.*")})
    expected = {f"model.layers.{index}.mlp.down_proj" for index in range(4)} | {"model.layers.0.self_attn.v_proj"}
    assert targets.eight_bits == tuple(sorted(expected))
    assert found()[1].eight_bits == ()
    with pytest.raises(OptionError, match=r"eight_bits='lm_head\..' matches no tensor that is rounded; names are such as model\.layers\.0"):
        found(asked={"eight_bits": ("lm_head.*",)})


def test_an_expert_of_eight_bits_is_named_alone() -> None:
    _, targets = found("mixtral", asked={"eight_bits": ("*.experts.0.w2.weight",)})
    assert targets.eight_bits
    assert all(name.endswith(".experts.0.w2") for name in targets.eight_bits)


def test_each_format_has_a_usual_group_size() -> None:
    assert [QuantizeSettings(weight_format=name).group_size for name in ("int4", "int8", "flexgen-v0")] == [32, 64, 64]


def test_inputs_that_are_no_multiple_of_the_group_are_kept() -> None:
    _, targets = found(asked={"group_size": 64})  # 64 inputs of most layers, 96 of down_proj
    assert {reason for name, reason in targets.kept.items() if "down_proj" in name} == {"inputs that are no multiple of 64"}
    _, targets = found(asked={"weight_format": "flexgen-v0", "group_size": 64})
    assert any("down_proj" in name for name in targets.rounded)


def test_a_model_with_nothing_to_round_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no weights can be rounded to int4"):
        found(asked={"group_size": 128})
    with pytest.raises(UnsupportedModelError, match="not a linear layer"):
        found("gpt2")


def test_positions_and_projections_of_opt(novels_opt: Path) -> None:
    from flexgen.hub.resolve import resolve_model
    from flexgen.quantize.source import open_source

    source = open_source(resolve_model(novels_opt))
    targets = find_targets(source.config, source.headers, QuantizeSettings())
    assert all("embed" in name for name in targets.kept)
    assert len(targets.rounded) == 6 * source.config.num_hidden_layers


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"weight_format": "int3"}, "known: int4, int8, flexgen-v0"),
        ({"group_size": 48}, "take one of 32, 64, 128"),
        ({"weight_format": "flexgen-v0", "group_size": 32}, "groups of 64"),
        ({"weight_format": "int8", "eight_bits": ("*.down_proj.*",)}, r"eight_bits='\*\.down_proj\.\*' names tensors of a model in int4"),
    ],
    ids=["format", "group", "paper", "eight bits"],
)
def test_settings_that_do_not_exist_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        QuantizeSettings(**asked)
