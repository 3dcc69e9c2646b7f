"""A tiny random configuration for every causal language model of the installed transformers that declares an attention backend.

Knows how to make every mechanism of a model type bite within some twenty tokens (windows, chunks, rope thresholds, top-k); knows
nothing about flexgen. `tiny_config` gives the configuration, `vary_constants` finishes a model built from it.
"""

import copy
import dataclasses
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _declares_attention_backend(class_name: str) -> bool:
    """Whether the file of the class says so: to import all of them would take seconds, in every process that collects tests."""
    file = Path(transformers.__file__).parent.joinpath(*transformers._class_to_module[class_name].split(".")).with_suffix(".py")
    return "_supports_attention_backend = True" in file.read_text(encoding="utf-8")


CAUSAL_TYPES: tuple[str, ...] = tuple(
    model_type for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if _declares_attention_backend(class_name)
)

# What a field of this name becomes, in whatever configuration has it. Four layers, so that two kinds of layers alternate twice.
_COMMON: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "init_std": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "is_decoder": True,
    # gpt2's names
    "n_positions": 256,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    # windows
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    # experts
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # sparse indexers
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # multipliers
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    # caps
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 20.0,
    "query_pre_attn_scalar": 16,
    # towers of multimodal wrappers, which a text never enters
    "image_size": 32,
    "patch_size": 16,
    "mlp_dim": 96,
    "output_channels": 64,
    "mm_embed_dim": 64,
    "mm_posemb_size": 32,
    "output_proj_dims": 64,
    "position_embedding_size": 32,
    "num_blocks": 1,
    "ext_pw_out_channel": 64,
    "depthwise_separable_out_channel": 64,
    "nemo_conv_channels": 64,
}

# What a type needs beside or instead of the common values; `...` keeps the type's own default.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
_INDEXED = ["indexed_attention"] * 4
_LATENT = {"num_key_value_heads": 4}
# Where layer norms leave little of the context in the logits.
_LOUD = {"initializer_range": 0.5}

_OVERRIDES: dict[str, dict[str, object]] = {
    "afmoe": {"mup_enabled": True},
    "apertus": {"rope_parameters": _LLAMA3_ROPE},
    "axk1": _LATENT,
    "axk2": _LATENT | {"layer_types": _INDEXED, "gated_norm_rank": 4},
    "bert": _LOUD,
    "bert-generation": _LOUD,
    "camembert": _LOUD,
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
        }
    },
    "ctrl": {"dff": 96},
    "data2vec-text": _LOUD,
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | {"rope_parameters": _YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v32": _LATENT | {"layer_types": _INDEXED},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_topk": 3,
    },
    "doge": {"keep_window_size": 6, "is_moe": True, "num_experts": 16},
    "dots3_note_text": _LATENT
    | {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 8},
    "electra": {"embedding_size": 32, "initializer_range": 0.5},
    "ernie": _LOUD,
    "exaone4": {"sliding_window_pattern": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
        "backbone_hidden_size": 64,
        "num_centroids": 16,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "gemma4_unified_text": {"global_head_dim": 32, "num_kv_shared_layers": 2},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT | {"layer_types": _INDEXED, "indexer_types": ["full", "shared"] * 2},
    "gpt_neox": _LOUD,
    "gpt_oss": {"rope_parameters": _YARN_ROPE},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    # Eight passes through one layer: large weights would make it chaotic.
    "hrm_text": {"num_hidden_layers": 1, "initializer_range": 0.1},
    "hy_v4": _LATENT | {"layer_types": _INDEXED, "indexer_types": ["full", "shared"] * 2, "n_group": 1},
    # Dynamic NTK: other frequencies for every length above the trained one.
    "internlm3": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "jetmoe": {"kv_channels": 16},
    "laguna": {"num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention", "full_attention"]},
    "llama": {"rope_parameters": _LLAMA3_ROPE},
    # Chunks are only in the mask; queries of the layers without rope are scaled by floor(position / floor_scale).
    "llama4_text": {
        "layer_types": ...,
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "attn_scale": 0.5,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": _LATENT | {"head_dim": 8, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "minicpm3": _LATENT | {"dim_model_base": 32},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "dense_intermediate_size": 96,
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "rotary_dim": 8,
    },
    "mllama_text_model": {"cross_attention_layers": [1]},
    "modernbert-decoder": {"local_attention": 12},
    # transformers applies this window only by truncating its own cache; it is as long as the positions.
    "moshi": {"sliding_window": 256},
    "opt": {"word_embed_proj_dim": 48},
    "persimmon": _LOUD,
    "phi3": {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": _LONG_ROPE},
    "phi4_multimodal": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_parameters": _LONG_ROPE,
    },
    "phimoe": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_parameters": _LONG_ROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 6, "layer_types": ...},
    "roberta": _LOUD,
    "roberta-prelayernorm": _LOUD,
    "roc_bert": {
        "initializer_range": 0.5,
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 128,
        "shape_embed_dim": 16,
        "shape_vocab_size": 128,
    },
    "xlm-roberta": _LOUD,
    "xlm-roberta-xl": _LOUD,
    "xmod": _LOUD | {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}


def tiny_config(model_type: str, **overrides: object) -> PreTrainedConfig:
    """The tiny configuration of a type; `overrides` win over everything."""
    return _tiny(CONFIG_MAPPING[model_type], overrides)


@torch.no_grad()
def vary_constants(model: PreTrainedModel, seed: int = 0) -> None:
    """Adds noise to what initialization leaves constant (norms at one; biases and sinks at zero) and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.std() == 0:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


def _tiny(config_class: type[PreTrainedConfig], overrides: dict[str, object]) -> PreTrainedConfig:
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in _COMMON.items() if name in fields}
    values |= {name: _tiny(_config_class(spec), {}) for name, spec in config_class.sub_configs_defaults.items()}
    values |= _OVERRIDES.get(config_class.model_type, {}) | overrides
    return config_class(**{name: copy.deepcopy(value) for name, value in values.items() if value is not ...})


def _config_class(spec: SubConfigSpec) -> type[PreTrainedConfig]:
    return spec.config_class if spec.model_type is None else CONFIG_MAPPING[spec.model_type]
