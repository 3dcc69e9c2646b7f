"""Describes the catalogue's models from their public configs, for what the shipped files lack: another dtype, or the config itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from flexgen.kv.low_bit import kv_format
from flexgen.models.describe import describe_config
from flexgen.plan.known.models import catalogue_fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flexgen.plan.model import ModelSpec


def catalogue_config(name: str) -> PretrainedConfig:
    """Return the config of a shipped model, made from the values that differ from the defaults of its type or decide a size."""
    fields = catalogue_fields(name)
    return AutoConfig.for_model(fields["model_type"], **fields["config"])


def described(name: str, dtype: torch.dtype | None = None, *, kv: str = "auto") -> ModelSpec:
    """Describe a shipped model computed in `dtype`, with KV in the format of that name; None stands for the dtype of its plain weights."""
    fields = catalogue_fields(name)
    stored = getattr(torch, fields["dtype"])
    computed = dtype or stored
    return describe_config(catalogue_config(name), computed, stored=stored, name=fields["source"], kv_format=kv_format(kv, computed))
