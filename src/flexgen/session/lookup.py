"""Finds the ModelSpec of a model by name: a shipped model, a folder, or a hub repository of which only config and headers are read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen.errors import ModelError, OptionError
from flexgen.options import DTYPE_BYTES, EngineOptions
from flexgen.plan.known.models import catalogue_name, catalogue_spec, similar_names
from flexgen.plan.model import ModelSpec
from flexgen.session.model import compute_dtype, config_dtype, describing

if TYPE_CHECKING:
    from flexgen.hub.model_files import ModelFiles


def files_of(model: str | os.PathLike[str], options: EngineOptions, *, token: str | None = None, show_progress: bool = False) -> ModelFiles:
    """Return the files of a model that is to be run, which are downloaded if need be.

    Args:
        model: A folder or a hub id; for random weights also a name of the catalogue, which needs no file and no network.
        options: The options, which state the revision and whether weights are random.
        token: The access token for the hub, as in `resolve_model`.
        show_progress: Whether the hub library may draw its progress bars.

    Raises:
        ModelError: As for `resolve_model`.
        CapacityError: As for `resolve_model`.
    """
    from flexgen.hub.resolve import resolve_model

    is_random = options.load_format == "dummy"
    if is_random and options.revision is None and isinstance(model, str) and "/" not in model and (name := shipped_name(model)) is not None:
        from flexgen.session.shipped import catalogue_files

        return catalogue_files(name)
    return resolve_model(model, revision=options.revision, token=token, with_weights=not is_random, show_progress=show_progress)


def spec_of(
    model: str,
    *,
    device: str,
    dtype: str = "auto",
    load_format: str = "auto",
    weight_format: str = "auto",
    revision: str | None = None,
    token: str | None = None,
) -> ModelSpec:
    """Return the model as the planner sees it.

    Args:
        model: A folder or a GGUF file; else a name of the catalogue or the hub id of one of its models, in any letter case; else another
            hub id, for which the hub is asked. torch is loaded only for a folder, for another hub id, and for a shipped model that is
            computed in another dtype than it ships in.
        device: "cpu", "cuda" or "sim".
        dtype: The dtype to compute in, as in EngineOptions.
        load_format: As in EngineOptions; "dummy" describes a folder or a hub repository by its config alone.
        weight_format: The format of the weights, as in EngineOptions. The model is described as a conversion would write it.
        revision: The branch, tag or commit of a hub repository. If it is given, the hub is asked even for a model of the catalogue.
        token: The access token for the hub, as in `resolve_model`.

    Raises:
        ModelError: The model does not exist, or its architecture, number format or files are not supported.
        OptionError: A revision was given for a name of the catalogue, or the dtype or the format of the weights cannot be honoured.
    """
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise OptionError(f"cannot compute in {dtype}; known: auto, {', '.join(sorted(DTYPE_BYTES))}")
    if (name := shipped_name(model)) is not None:
        if revision is None:
            spec = _shipped(name, device, dtype, weight_format)
            return dataclasses.replace(spec, name=model) if "/" in model else spec
        if "/" not in model:
            raise OptionError(f"{model} is a name of the catalogue; a revision ({revision}) only has a meaning for a hub repository")
    return _described(model, device, dtype, load_format, weight_format, revision, token)


def shipped_name(model: str) -> str | None:
    """Return the catalogue's name of a model; None for a folder on this machine or a model that is not in the catalogue."""
    return None if Path(model).expanduser().is_dir() else catalogue_name(model)


def _shipped(name: str, device: str, dtype: str, weight_format: str) -> ModelSpec:
    spec = catalogue_spec(name)
    if dtype == "auto":
        dtype = compute_dtype(spec.dtype, device)
    if dtype == spec.dtype and weight_format == "auto":
        return spec
    import torch

    from flexgen.session.shipped import described, described_in

    if weight_format == "auto":
        return described(name, getattr(torch, dtype))
    return described_in(name, getattr(torch, dtype), weight_format)


def _described(
    model: str, device: str, dtype: str, load_format: str, weight_format: str, revision: str | None, token: str | None
) -> ModelSpec:
    import torch

    from flexgen.checkpoint.files import Checkpoint, Headers
    from flexgen.checkpoint.gguf import GGUFHeaders
    from flexgen.hub.config import read_config
    from flexgen.hub.download import weight_headers
    from flexgen.hub.model_files import weight_files
    from flexgen.hub.resolve import resolve_model
    from flexgen.models.describe import describe_config, describe_headers

    try:
        files = resolve_model(model, revision=revision, token=token, with_weights=False)
    except ModelError as error:
        if "/" in model:
            raise
        raise ModelError(f"{error}; nor is it in the catalogue: {', '.join(similar_names(model))}") from error
    config = read_config(files)
    if load_format == "dummy":
        with describing(model):
            computed = getattr(torch, compute_dtype(config_dtype(config), device) if dtype == "auto" else dtype)
            return describe_config(config, computed, stored=computed, name=model)
    if files.gguf is not None:
        headers = GGUFHeaders(files.gguf)
    elif files.commit is None or all((files.folder / name).is_file() for name in weight_files(files.folder)):
        headers = Checkpoint(files.folder)
    else:
        headers = Headers.parsed(files.folder, weight_headers(model, files.folder, token=token))
    with describing(model):
        computed = compute_dtype(config_dtype(config), device) if dtype == "auto" else dtype
        if weight_format != "auto":
            from flexgen.session.weights import planned_in

            headers, config = planned_in(weight_format, headers, config, name=model)
        return describe_headers(headers, config, getattr(torch, computed), name=model)
