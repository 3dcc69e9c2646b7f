"""Configs of the metadata of GGUF files, for architectures that transformers' tables do not name and whose tensors they can place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen.errors import CheckpointError
from flexgen.hub.gguf_file import Values
from flexgen.hub.gguf_model import GGUFModel

# What a file has to state: the end of the key -> the field of the config.
_NEEDED = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}

_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """An architecture.

    Attributes:
        model_type: The model type of transformers.
        model_class: The class of the model.
        more: The ends of further keys that a file may state, and their fields.
    """

    model_type: str
    model_class: str
    more: Mapping[str, str] = field(default_factory=dict[str, str])


_KINDS = {
    "granite": _Kind(
        model_type="granite", model_class="GraniteForCausalLM",
        more={
            "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
        },
    ),
    "olmo2": _Kind(model_type="olmo2", model_class="Olmo2ForCausalLM"),
    "seed_oss": _Kind(model_type="seed_oss", model_class="SeedOssForCausalLM"),
    "smollm3": _Kind(model_type="smollm3", model_class="SmolLM3ForCausalLM"),
}  # fmt: skip
OWN_ARCHITECTURES = tuple(_KINDS)


def own_config(model: GGUFModel) -> dict[str, Any]:
    """Return the contents of config.json for one of OWN_ARCHITECTURES.

    Raises:
        CheckpointError: A value is missing.
    """
    kind, prefix, metadata = _KINDS[model.architecture], model.architecture, model.metadata
    if missing := [key for key in _NEEDED if f"{prefix}.{key}" not in metadata]:
        raise CheckpointError(f"{model.parts[0].path}: its metadata lacks {prefix}.{missing[0]}")
    values: dict[str, Any] = {"model_type": kind.model_type, "architectures": [kind.model_class]}
    for key, name in (*_NEEDED.items(), *_OPTIONAL.items(), *kind.more.items()):
        if (value := metadata.get(f"{prefix}.{key}")) is not None:
            values[name] = value
    tokens = metadata.get("tokenizer.ggml.tokens")
    size = metadata.get(f"{prefix}.vocab_size", tokens.count if isinstance(tokens, Values) else None)
    if size is None:
        raise CheckpointError(f"{model.parts[0].path}: its metadata states neither {prefix}.vocab_size nor tokens")
    names = {tensor.name for _, tensor in model.tensors}
    values |= {"vocab_size": size, "tie_word_embeddings": "output.weight" not in names}
    # not those that classes assume, which are of one model's vocabulary
    values |= {name: metadata.get(f"tokenizer.ggml.{key}") for key, name in _TOKENS.items()}
    return values | {"attention_bias": "blk.0.attn_q.bias" in names}
