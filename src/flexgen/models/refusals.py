"""Refuses models because of their config, before anything is built or read.

Other reasons appear only in the forward (masks, unknown arguments, attention that is not causal), and are refused by the trace.
"""

from __future__ import annotations

from typing import Any

from flexgen.errors import UnsupportedModelError

SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

REFUSED_LAYERS = {
    "indexed_attention": "picks the keys that it attends to with an indexer",
    "compressed_sparse_attention": "attends to compressed keys",
    "heavily_compressed_attention": "attends to compressed keys",
    "minimax_m3_sparse": "picks the key blocks that it attends to with an indexer",
    "linear_attention": "has recurrent state",
    "conv": "has convolution state",
    "hybrid": "has convolution state",
    "hybrid_sliding": "has convolution state",
}

REFUSED = {
    "gemma4_assistant": "drafts for another model, whose keys it needs",
    "gemma4_unified_assistant": "drafts for another model, whose keys it needs",
    "minimax": "has recurrent state",
    "recurrent_gemma": "has recurrent state",
}


def check_supported_architecture(config: Any) -> None:
    """Refuse models that the engine would compute wrongly.

    Args:
        config: The model's transformers config.

    Raises:
        UnsupportedModelError: The model is refused; the message names its type and the reason.
    """
    if (reason := REFUSED.get(config.model_type)) is not None:
        raise UnsupportedModelError(f"model type {config.model_type!r} {reason}, which is not supported")
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    for kind in sorted(kinds - SUPPORTED_LAYERS):
        reason = REFUSED_LAYERS.get(kind, "does what flexgen does not know")
        raise UnsupportedModelError(f"model type {config.model_type!r} has layers of type {kind!r}: each {reason}, which is not supported")
