"""Weights of 4 bits in groups of 128, as compressed-tensors packs them: what a config.json says of such a checkpoint."""

from __future__ import annotations

from typing import Any

INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
        }
    },
    "ignore": ["lm_head"],
}
