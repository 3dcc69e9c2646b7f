"""Processors of GGUF tensors in the manner of transformers' own, for models that those do not place.

A processor names the stored tensors that a parameter is made of, and undoes what llama.cpp's converter did to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers.modeling_gguf_pytorch_utils import GGUFTensor, LlamaTensorProcessor, Qwen2MoeTensorProcessor, TensorProcessor

_EXPERTS = re.compile(r"(?:model\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<projections>gate_up|down)_proj(?P<bias>_bias)?")
_STORED_EXPERTS = re.compile(r".*\.ffn_(?P<projection>gate|up|down)_exps\.(?P<field>weight|bias)")


class GptOss(TensorProcessor):
    """Of gpt-oss.

    The converter (conversion/gpt_oss.py) transposes experts, whose rows are then outputs, and stores the outputs of gates and of up
    projections apart, which alternate in the model; so it does with their biases.  Blocks of MXFP4 are GGUF's own.
    """

    def perform_fallback_tensor_mapping(self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str) -> None:
        """Name the stored tensors of a parameter that the package gguf has no name for."""
        if (found := _EXPERTS.fullmatch(hf_name)) is None:
            return
        field = "bias" if found["bias"] else "weight"
        for projection in found["projections"].split("_"):
            gguf_to_hf_name_map[f"blk.{found['layer']}.ffn_{projection}_exps.{field}"] = qual_name + hf_name

    def process(self, weights: Any, name: str, **kwargs: Any) -> GGUFTensor:
        """Undo the converter's changes to a tensor."""
        names: Mapping[str, str] = kwargs["tensor_key_mapping"]
        if (found := _STORED_EXPERTS.fullmatch(name)) is not None:
            if found["field"] == "weight":
                weights = weights.swapaxes(1, 2)
            if found["projection"] != "down":
                self._set_moe_expert_tensor(weights, kwargs["parsed_parameters"], names[name], found["projection"])
                return GGUFTensor(weights, None, {})  # pyright: ignore[reportArgumentType]  (as transformers' own do)
        bare = name.removesuffix(".weight")  # sinks and experts have no such ending in the model
        return GGUFTensor(weights, bare if bare in names else name, {})

    def _set_moe_expert_tensor(self, weights: Any, parsed_parameters: Any, hf_name: str, w: str) -> None:
        """Set a part of merged experts apart; who uses a processor says how."""
        raise NotImplementedError


class Mixtral(Qwen2MoeTensorProcessor, LlamaTensorProcessor):
    """Of Mixtral, whose files are those of a llama with experts: attention as there, experts as Qwen's."""

    def process(self, weights: Any, name: str, **kwargs: Any) -> GGUFTensor:
        kind = LlamaTensorProcessor if ".attn_" in name else Qwen2MoeTensorProcessor
        return kind.process(self, weights, name, **kwargs)


# By the model type of the config.
OWN_PROCESSORS: Mapping[str, type[TensorProcessor]] = {
    "gpt_oss": GptOss, "mixtral": Mixtral, "granite": LlamaTensorProcessor, "smollm3": LlamaTensorProcessor,
}  # fmt: skip
# Those whose gates and up projections alternate along the last dimension of a parameter, in place of following one another.
INTERLEAVED = frozenset({"gpt_oss"})
# The architecture whose names files use, where it is not called as the model type is.
NAMED_AS: Mapping[str, str] = {"mixtral": "llama"}
