"""Every low-bit format crosses the link to a device as it is stored, and is priced so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.formats.gguf import blocks_of
from flexgen.formats.table import COMMON_CONFIGS
from flexgen.models.describe import describe_config
from flexgen.plan.price.weights import weights_work
from tests.formats.encoded import with_quantization
from tests.gguf_files import BLOCK_TYPES
from tests.models.tiny_configs import tiny_config

WIDE = {"hidden_size": 256, "intermediate_size": 512}
CONFIGS: dict[str, Any] = {**COMMON_CONFIGS, "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_on_the_link_are_the_stored_ones(name: str) -> None:
    config = with_quantization(tiny_config("gpt_oss" if name == "mxfp4" else "llama", **WIDE), CONFIGS[name])
    spec = describe_config(config, torch.bfloat16, stored=torch.bfloat16, name="tiny")
    encoded = [unit for unit in spec.units if unit.encoded_bytes is not None]
    assert encoded == [unit for unit in spec.units if not unit.plain]
    stored, decoded = sum(unit.carried_bytes for unit in encoded), sum(unit.decoded_bytes for unit in encoded)
    assert 0 < stored < 0.7 * decoded
    plain = sum(unit.decoded_bytes for unit in spec.units if unit.plain)
    for home in ("host", "disk"):
        work = weights_work(spec, [home] * len(spec.units), "cuda")
        assert (work.host_to_device_bytes, work.decoded_bytes) == (stored + plain, 0), "the host decodes nothing"


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_of_gguf_cross_as_they_are(kind: str) -> None:
    assert blocks_of(kind).carried_as_stored
