"""The models that are measured: the budget of the device for each, its options, and configs of those that the catalogue lacks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.plan.known.models import catalogue_fields

from ..int4 import INT4

CAPS = ("16GiB", "24GiB")
PEERS_MODEL = "opt-30b"  # the one that peers run, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model, and how it is measured.

    Attributes:
        cap: The budget of the device with which it comes first.
        seconds: About how long 12 passes take, with planning and loading.
        options: Further options of `flexgen bench steady`.
        config: What its config.json says beside that of the catalogue's model `of`; None for the catalogue's own model of that name.
        of: The catalogue's model; empty for that of the same name.
    """

    cap: str
    seconds: float
    options: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    of: str = ""


# By importance: what does not fit the time is left for another run of the same command.
MODELS: dict[str, Measured] = {
    "opt-30b": Measured(cap="16GiB", seconds=90),
    "gpt-oss-120b": Measured(cap="24GiB", seconds=110),
    "mixtral-8x7b": Measured(cap="24GiB", seconds=110),
    "opt-175b-int4": Measured(
        cap="16GiB", seconds=150, options=("--kv-format", "int4"), config={"quantization_config": INT4}, of="opt-175b"
    ),
    "llama-3-70b": Measured(cap="24GiB", seconds=150),
    "qwen3-30b-a3b": Measured(cap="16GiB", seconds=90),
}
TINY: dict[str, dict[str, Any]] = {
    "opt-30b": {
        "model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": 512,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "vocab_size": 512, "max_position_embeddings": 512, "quantization_config": {"quant_method": "mxfp4"},
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 512,
    },
    "opt-175b-int4": {
        "model_type": "opt", "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": 512, "quantization_config": INT4,
    },
    "llama-3-70b": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip


def write_configs(folder: Path, *, tiny: bool) -> None:
    """Write config.json files, without weights: of tiny models, or of the large ones that are not in the catalogue and that peers read."""
    for name, config in TINY.items() if tiny else _large().items():
        path = folder / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"dtype": "float32", **config}, indent=2) + "\n")


def _large() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, measured in MODELS.items():
        if measured.config is not None or name == PEERS_MODEL:
            fields = catalogue_fields(measured.of or name)
            own = {"model_type": fields["model_type"], "dtype": fields["dtype"], "architectures": ["OPTForCausalLM"]}
            found[name] = own | fields["config"] | (measured.config or {})
    return found


def where(name: str, folder: Path, *, tiny: bool) -> str:
    """Return how `flexgen` is told of a model: its name in the catalogue, or the folder of its config."""
    return str(folder / name) if tiny or MODELS[name].config is not None else name
