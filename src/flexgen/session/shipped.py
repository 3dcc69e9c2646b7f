"""Describes the catalogue's models from their public configs, for what the shipped files lack: another dtype, or the config itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.hub.model_files import ModelFiles
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


def described(name: str, dtype: torch.dtype | None = None) -> ModelSpec:
    """Describe a shipped model computed in `dtype`; None stands for the dtype of its plain weights."""
    fields = catalogue_fields(name)
    stored = getattr(torch, fields["dtype"])
    return describe_config(catalogue_config(name), dtype or stored, stored=stored, name=fields["source"])


def described_in(name: str, dtype: torch.dtype, weight_format: str) -> ModelSpec:
    """Describe a shipped model computed in `dtype`, as it would be after a conversion of its plain weights.

    Raises:
        ModelError: The conversion is not possible.
    """
    fields = catalogue_fields(name)
    stored, config = getattr(torch, fields["dtype"]), catalogue_config(name)
    headers = headers_of(fields["source"], sharded(saved_tensors(meta_model(config, stored), stored), SHARD_BYTES))
    headers, config = planned_in(weight_format, headers, config, name=fields["source"])
    return describe_headers(headers, config, dtype, name=fields["source"])
