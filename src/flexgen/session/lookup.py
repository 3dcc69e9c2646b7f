"""Finds the ModelSpec of a model by name: a shipped model, a folder, or a hub repository of which only config and headers are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flexgen.errors import ModelError, OptionError
from flexgen.options import DTYPE_BYTES
from flexgen.plan.known.models import catalogue_name, catalogue_spec, similar_names
from flexgen.plan.model import ModelSpec
from flexgen.session.model import compute_dtype, config_dtype, describing


def spec_of(
    model: str, *, device: str, dtype: str = "auto", kv_format: str = "auto", revision: str | None = None, token: str | None = None
) -> ModelSpec:
    """Return the model as the planner sees it.

    Weights in a published low-bit format are described too, although the engine does not run them (`formats.table.runs`).

    Args:
        model: A folder; else a name of the catalogue or the hub id of one of its models, in any letter case; else another hub id, for which
            the hub is asked. torch is loaded only for a folder, for another hub id, and for a shipped model that is computed in another
            dtype than it ships in.
        device: "cpu", "cuda" or "sim".
        dtype: The dtype to compute in, as in EngineOptions.
        kv_format: The format of KV, as in EngineOptions.
        revision: The branch, tag or commit of a hub repository. If it is given, the hub is asked even for a model of the catalogue.
        token: The access token for the hub, as in `resolve_model`.

    Raises:
        ModelError: The model does not exist, or its architecture, number format or files are not supported.
        OptionError: A revision was given for a name of the catalogue, or the dtype cannot be computed in.
    """
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise OptionError(f"cannot compute in {dtype}; known: auto, {', '.join(sorted(DTYPE_BYTES))}")
    if (name := shipped_name(model)) is not None:
        if revision is None:
            spec = _shipped(name, device, dtype, kv_format)
            return dataclasses.replace(spec, name=model) if "/" in model else spec
        if "/" not in model:
            raise OptionError(f"{model} is a name of the catalogue; a revision ({revision}) only has a meaning for a hub repository")
    return _described(model, device, dtype, kv_format, revision, token)


def shipped_name(model: str) -> str | None:
    """Return the catalogue's name of a model; None for a folder on this machine or a model that is not in the catalogue."""
    return None if Path(model).expanduser().is_dir() else catalogue_name(model)


def _shipped(name: str, device: str, dtype: str, kv_format: str) -> ModelSpec:
    spec = catalogue_spec(name)
    if dtype == "auto":
        dtype = compute_dtype(spec.dtype, device)
    if (dtype, kv_format) == (spec.dtype, "auto"):
        return spec
    import torch

    from flexgen.session.shipped import described

    return described(name, getattr(torch, dtype), kv=kv_format)


def _described(model: str, device: str, dtype: str, kv_format: str, revision: str | None, token: str | None) -> ModelSpec:
    import torch

    from flexgen.checkpoint.files import Checkpoint, Headers
    from flexgen.hub.config import read_config
    from flexgen.hub.download import weight_headers
    from flexgen.hub.model_files import weight_files
    from flexgen.hub.resolve import resolve_model
    from flexgen.kv import low_bit
    from flexgen.models.describe import describe_headers

    try:
        files = resolve_model(model, revision=revision, token=token, with_weights=False)
    except ModelError as error:
        if "/" in model:
            raise
        raise ModelError(f"{error}; nor is it in the catalogue: {', '.join(similar_names(model))}") from error
    config = read_config(files)
    if files.commit is None or all((files.folder / name).is_file() for name in weight_files(files.folder)):
        headers = Checkpoint(files.folder)
    else:
        headers = Headers.parsed(files.folder, weight_headers(model, files.folder, token=token))
    with describing(model):
        computed = compute_dtype(config_dtype(config), device) if dtype == "auto" else dtype
        torch_dtype = getattr(torch, computed)
        return describe_headers(headers, config, torch_dtype, name=model, kv_format=low_bit.kv_format(kv_format, torch_dtype))
