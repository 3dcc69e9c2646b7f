"""The catalogue's configs, and the command that writes them down as ModelSpecs: `python -m flexgen.models.catalogue [NAME ...]`.

Only what differs from the defaults of transformers' config classes, or decides a size, is given.  The numbers are those of the
public config.json files; the sizes that follow are checked against published ones in tests/plan/test_catalogue.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from flexgen.models.describe import describe_config
from flexgen.plan.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A public model.

    Attributes:
        source: hub id, or what its numbers were taken from. model_type: transformers' name.
        config: as in its config.json. dtype: of its plain weights.
    """

    source: str
    model_type: str
    config: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16

    def spec(self, dtype: torch.dtype | None = None) -> ModelSpec:
        """The model computed in `dtype`; None is the dtype of its plain weights."""
        config = AutoConfig.for_model(self.model_type, **self.config)
        return describe_config(config, dtype or self.dtype, stored=self.dtype, name=self.source)


def _opt(source: str, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **others: object) -> CatalogueEntry:
    """Zhang et al., "OPT: Open Pre-trained Transformer Language Models", arXiv:2205.01068, table 1."""
    config = {
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }
    return CatalogueEntry(source=source, model_type="opt", config=config | others, dtype=torch.float16)


def _llama_3(
    source: str, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int, **others: object
) -> CatalogueEntry:
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate_size,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    return CatalogueEntry(source=source, model_type="llama", config=config | others)


def _mixtral(
    source: str, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int, max_position_embeddings: int
) -> CatalogueEntry:
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate_size,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "vocab_size": 32000,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": False,
    }
    return CatalogueEntry(source=source, model_type="mixtral", config=config)


def _qwen3(source: str, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int) -> CatalogueEntry:
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate_size,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    }
    return CatalogueEntry(source=source, model_type="qwen3", config=config)


def _qwen3_moe(
    source: str, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int, moe_intermediate_size: int
) -> CatalogueEntry:
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": intermediate_size,
        "moe_intermediate_size": moe_intermediate_size,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    }
    return CatalogueEntry(source=source, model_type="qwen3_moe", config=config)


def _gpt_oss(source: str, num_hidden_layers: int, num_local_experts: int) -> CatalogueEntry:
    config = {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": num_local_experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    return CatalogueEntry(source=source, model_type="gpt_oss", config=config)


_LONG = {"max_position_embeddings": 131072}  # the context of Llama 3.1 and later
_DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

ENTRIES: Mapping[str, CatalogueEntry] = {
    "opt-125m": _opt("facebook/opt-125m", 768, 12, 12),
    "opt-350m": _opt("facebook/opt-350m", 1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt("facebook/opt-1.3b", 2048, 24, 32),
    "opt-2.7b": _opt("facebook/opt-2.7b", 2560, 32, 32),
    "opt-6.7b": _opt("facebook/opt-6.7b", 4096, 32, 32),
    "opt-13b": _opt("facebook/opt-13b", 5120, 40, 40),
    "opt-30b": _opt("facebook/opt-30b", 7168, 48, 56),
    "opt-66b": _opt("facebook/opt-66b", 9216, 64, 72),
    "opt-175b": _opt("OPT-175B (arXiv:2205.01068)", 12288, 96, 96),  # never was on the hub
    "llama-3-8b": _llama_3("meta-llama/Meta-Llama-3-8B", 4096, 32, 32, 14336),
    "llama-3-70b": _llama_3("meta-llama/Meta-Llama-3-70B", 8192, 80, 64, 28672),
    "llama-3.1-8b": _llama_3("meta-llama/Llama-3.1-8B", 4096, 32, 32, 14336, **_LONG),
    "llama-3.1-70b": _llama_3("meta-llama/Llama-3.1-70B", 8192, 80, 64, 28672, **_LONG),
    "llama-3.2-1b": _llama_3("meta-llama/Llama-3.2-1B", 2048, 16, 32, 8192, **_LONG, tie_word_embeddings=True),
    "llama-3.2-3b": _llama_3("meta-llama/Llama-3.2-3B", 3072, 28, 24, 8192, **_LONG, tie_word_embeddings=True),
    "mixtral-8x7b": _mixtral("mistralai/Mixtral-8x7B-v0.1", 4096, 32, 32, 14336, 32768),
    "mixtral-8x22b": _mixtral("mistralai/Mixtral-8x22B-v0.1", 6144, 56, 48, 16384, 65536),
    "qwen3-8b": _qwen3("Qwen/Qwen3-8B", 4096, 36, 32, 12288),
    "qwen3-14b": _qwen3("Qwen/Qwen3-14B", 5120, 40, 40, 17408),
    "qwen3-32b": _qwen3("Qwen/Qwen3-32B", 5120, 64, 64, 25600),
    "qwen3-30b-a3b": _qwen3_moe("Qwen/Qwen3-30B-A3B", 2048, 48, 32, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe("Qwen/Qwen3-235B-A22B", 4096, 94, 64, 12288, 1536),
    "gpt-oss-20b": _gpt_oss("openai/gpt-oss-20b", 24, 32),
    "gpt-oss-120b": _gpt_oss("openai/gpt-oss-120b", 36, 128),
    "deepseek-v3": CatalogueEntry(source="deepseek-ai/DeepSeek-V3", model_type="deepseek_v3", config=_DEEPSEEK_V3),
}


def write_catalogue(folder: Path, names: list[str]) -> None:
    """Write NAME.json for each entry named, over what is there."""
    for name in names:
        (folder / f"{name}.json").write_text(ENTRIES[name].spec().to_json(), encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m flexgen.models.catalogue", description="Write the catalogue's files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(ENTRIES)}")
    names = parser.parse_args().names
    if unknown := set(names) - ENTRIES.keys():
        parser.error(f"no such entry: {', '.join(sorted(unknown))}")
    with resources.as_file(resources.files("flexgen.plan.known.models")) as folder:
        write_catalogue(folder, names or list(ENTRIES))


if __name__ == "__main__":
    main()
