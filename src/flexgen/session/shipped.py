"""Describes the catalogue's models from their public configs, for what the shipped files lack: another dtype, or the config itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.hub.model_files import ModelFiles
from flexgen.kv.low_bit import kv_format
from flexgen.models.describe import SHARD_BYTES, describe_config, describe_headers
from flexgen.plan.known.models import catalogue_fields
from flexgen.session.weights import planned_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flexgen.plan.model import ModelSpec


def catalogue_config(name: str) -> PretrainedConfig:
    """Return the config of a shipped model, made from the values that differ from the defaults of its type or decide a size."""
    fields = catalogue_fields(name)
    return AutoConfig.for_model(fields["model_type"], **fields["config"])


def catalogue_files(name: str) -> ModelFiles:
    """Return a shipped model as if its config.json were all that its folder holds."""
    config = json.loads(catalogue_config(name).to_json_string()) | {"dtype": catalogue_fields(name)["dtype"]}
    return ModelFiles(name=name, folder=Path(name), config=config, generation_config={}, commit=None, has_tokenizer=False)


def described(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    weight_format: str = "auto",
    kv: str = "auto",
    cpu_compute: str = "auto",
    sparse: float | None = None,
    device: str = "cpu",
) -> ModelSpec:
    """Describe a shipped model.

    Args:
        name: Its name in the catalogue.
        dtype: The dtype of computing; None for that of its plain weights.
        weight_format: The format to which its plain weights would be converted, as in EngineOptions.
        kv: The format of KV, as in EngineOptions.
        cpu_compute: How linear layers are computed, as in EngineOptions.
        sparse: The share of positions that generated tokens keep; None for all.
        device: Where it is computed, which decides how large its units are: "cpu", "cuda" or "sim".

    Raises:
        ModelError: The conversion is not possible.
    """
    fields, config = catalogue_fields(name), catalogue_config(name)
    source, stored = fields["source"], getattr(torch, fields["dtype"])
    computed = dtype or stored
    given: dict[str, Any] = {
        "name": source, "kv_format": kv_format(kv, computed), "cpu_compute": cpu_compute, "sparse_attention": sparse, "device": device,
    }  # fmt: skip
    if weight_format == "auto":
        return describe_config(config, computed, stored=stored, **given)
    headers = headers_of(source, sharded(saved_tensors(meta_model(config, stored), stored), SHARD_BYTES))
    headers, config = planned_in(weight_format, headers, config, name=source)
    return describe_headers(headers, config, computed, **given)
