"""Values of config.json: bounds that keep memory, signs that keep meaning.  Whatever is wrong is a ModelError that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen.errors import ModelError
from flexgen.hub.config import MAX_INTEGER, MAX_LAYERS, MAX_SIZE, read_config
from flexgen.hub.model_files import ModelFiles

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}


def read(config: dict[str, Any]) -> Any:
    return read_config(
        ModelFiles(name="model", folder=Path("model"), config=config, generation_config={}, commit=None, has_tokenizer=False)
    )


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_a_sound_config(config: dict[str, Any]) -> None:
    assert read(config).hidden_size == 64


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({name: 10**9}, name) for name in SIZES),
        ({"num_local_experts": MAX_SIZE + 1}, "num_local_experts"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers"),
        ({"max_position_embeddings": MAX_INTEGER + 1}, "max_position_embeddings"),
        ({"vision_config": {"depth": 10**7}}, "vision_config.depth"),
        ({"parts": [{"hidden_size": 10**9}]}, "parts.hidden_size"),
        *(({name: value}, name) for name in SIZES for value in (0, -1)),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"model_type": "qwen3", "use_sliding_window": False, "sliding_window": -5}, "sliding_window"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        *(({"rope_parameters": {"rope_type": "default", "rope_theta": value}}, "rope_theta") for value in (0, -1.0, "x")),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -2.0}}, "factor"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json (has|cannot be used).*{field}"):
        read(MIXTRAL | change)


def test_a_window_that_is_not_used() -> None:
    """transformers' class of Qwen2-MoE writes 0 for none."""
    assert read({"model_type": "qwen2_moe", "use_sliding_window": False, "sliding_window": 4096}).sliding_window == 0


def test_fields_that_each_layer_has_of_its_own() -> None:
    assert read({"model_type": "gemma4_text", "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 2}).num_hidden_layers == 2


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, True, 1.5])
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_values_of_another_type(name: str, value: object) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read(LLAMA | {name: value})


def test_numbers_of_the_generation_config() -> None:
    files = ModelFiles(
        name="model", folder=Path("model"), config=LLAMA, generation_config={"eos_token_id": [2, 2**70]}, commit=None, has_tokenizer=False
    )
    with pytest.raises(ModelError, match=r"generation_config\.json has eos_token_id"):
        read_config(files)


def test_tables_of_labels_are_not_made() -> None:
    assert read(LLAMA | {"num_labels": 10**9}).num_labels == 2
