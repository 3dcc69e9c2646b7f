"""The number format of a config, and the headers of a tiny model as a repository in that format would hold them."""

from __future__ import annotations

from typing import Any

import torch

from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.formats.base import NamedTensor, NumberFormat
from flexgen.formats.table import stated_format
from tests.models.tiny_configs import tiny_config


def stated(quantization: dict[str, Any]) -> NumberFormat:
    found = stated_format({"quantization_config": quantization})
    assert found is not None
    return found


def encoded(quantization: dict[str, Any], model_type: str) -> tuple[Headers, list[NamedTensor]]:
    """The headers, and the tensors of the same model in bfloat16."""
    plain = saved_tensors(meta_model(tiny_config(model_type), torch.bfloat16), torch.bfloat16)
    number_format = stated(quantization)
    return headers_of("x", sharded([part for tensor in plain for part in number_format.encode(tensor)], 10**9)), plain
