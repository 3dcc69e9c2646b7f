"""Describes the catalogue's models from their public configs, for what the shipped files lack: another dtype, or the config itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from flexgen.hub.model_files import ModelFiles
from flexgen.models.describe import describe_config
from flexgen.plan.known.models import catalogue_fields

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
