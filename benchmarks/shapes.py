"""The model shapes that the comparison runs, with the cap and the batches of each.  Weights are random: only the shape costs time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from int4 import INT4
from record import DEFAULT_TOKENS

from flexgen.base.quantities import GIB

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model of published dimensions, and how it is compared.

    Attributes:
        model_type: transformers' name. config: what differs from that type's defaults.
        memory_bytes: the cgroup's limit. num_requests: of `PROMPT_TOKENS` and `OUTPUT_TOKENS` each.
        batches: what the peers' sweeps try, rising.
    """

    name: str
    model_type: str
    memory_bytes: int
    num_requests: int
    batches: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)

    def hf_config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, dtype="bfloat16", architectures=[ARCHITECTURES[self.model_type]], **self.config)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a 2-byte KV cache."""
        heads = self.config["num_attention_heads"]
        head_dim = self.config.get("head_dim", self.config["hidden_size"] // heads)
        return 2 * 2 * self.config["num_hidden_layers"] * self.config.get("num_key_value_heads", heads) * head_dim

    @property
    def intermediate_size(self) -> int:
        return self.config.get("intermediate_size") or self.config["ffn_dim"]


ARCHITECTURES = {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM", "gpt_oss": "GptOssForCausalLM"}
PROMPT_TOKENS, OUTPUT_TOKENS = DEFAULT_TOKENS


def _opt(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }


def _llama(
    hidden_size: int, num_hidden_layers: int, num_attention_heads: int, head_dim: int, intermediate_size: int, vocab_size: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-3b",
            model_type="llama",
            memory_bytes=4 * GIB,
            num_requests=192,
            batches=(16, 32, 64, 96),
            config=_llama(3072, 28, 24, 128, 8192, 128256),
        ),
        Shape(name="opt-6.7b", model_type="opt", memory_bytes=6 * GIB, num_requests=32, batches=(4, 8, 16, 32), config=_opt(4096, 32, 32)),
        # For the planner's predictions.
        Shape(
            name="llama-1b",
            model_type="llama",
            memory_bytes=2 * GIB,
            num_requests=96,
            batches=(),
            config=_llama(2048, 16, 32, 64, 8192, 128256),
        ),
        Shape(name="opt-1.3b", model_type="opt", memory_bytes=2 * GIB, num_requests=64, batches=(), config=_opt(2048, 24, 32)),
        Shape(name="opt-2.7b", model_type="opt", memory_bytes=4 * GIB, num_requests=48, batches=(), config=_opt(2560, 32, 32)),
        # For scores: the logits of all positions would take several times the limit.
        Shape(
            name="llama-256k",
            model_type="llama",
            memory_bytes=3 * GIB // 2,
            num_requests=64,
            batches=(),
            config=_llama(1024, 16, 16, 64, 4096, 262144),
        ),
        # Weights in low-bit formats: more than twice the limit in bfloat16, about the limit as stored.
        Shape(
            name="opt-30b-int4",
            model_type="opt",
            memory_bytes=18 * GIB,
            num_requests=32,
            batches=(),
            config=_opt(7168, 48, 56) | {"quantization_config": INT4},
        ),
        Shape(
            name="gpt-oss-20b",
            model_type="gpt_oss",
            memory_bytes=14 * GIB,
            num_requests=64,
            batches=(),
            config={
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 24,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": 32,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "vocab_size": 201088,
                "max_position_embeddings": 131072,
                "tie_word_embeddings": False,
                "quantization_config": {"quant_method": "mxfp4"},
            },
        ),
        Shape(
            name="opt-6.7b-int4",
            model_type="opt",
            memory_bytes=6 * GIB,
            num_requests=32,
            batches=(),
            config=_opt(4096, 32, 32) | {"quantization_config": INT4},
        ),
        # For trying the scripts out in a minute; its figures mean nothing.
        Shape(
            name="llama-tiny",
            model_type="llama",
            memory_bytes=GIB,
            num_requests=8,
            batches=(4, 8),
            config=_llama(1024, 12, 16, 64, 2816, 32000),
        ),
        Shape(name="opt-125m", model_type="opt", memory_bytes=GIB, num_requests=8, batches=(4, 8), config=_opt(768, 12, 12)),
        Shape(
            name="opt-125m-int4",
            model_type="opt",
            memory_bytes=GIB,
            num_requests=8,
            batches=(),
            config=_opt(768, 12, 12) | {"quantization_config": INT4},
        ),
    )
}
