"""Finds the ModelSpec of a model by name: a shipped model, a folder, or a hub repository of which only config and headers are read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.errors import ModelError, OptionError
from flexgen.models.unit_size import may_be_cut_smaller
from flexgen.options import EngineOptions
from flexgen.plan.known.models import catalogue_name, catalogue_spec, similar_names
from flexgen.plan.model import ModelSpec
from flexgen.session.dtypes import compute_dtype, config_dtype
from flexgen.session.model import describing

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


def spec_of(model: str, options: EngineOptions | None = None, *, device: str, bfloat16: bool = True, token: str | None = None) -> ModelSpec:
    """Return the model as the planner sees it.

    Args:
        model: A folder or a GGUF file; else a name of the catalogue or the hub id of one of its models, in any letter case; else another
            hub id, for which the hub is asked. torch is loaded only for a folder, for another hub id, and for a shipped model that is
            computed in another dtype or format than it ships in, or is so large that a device needs smaller units than it ships with.
        options: The dtype of computing, how products are computed, the formats of weights and KV (the model is described as a
            conversion would write it), whether weights are random, in which case the config alone is read, and the revision. If there is
            one, the hub is asked even for a model of the catalogue.
        device: "cpu", "cuda" or "sim".
        bfloat16: Whether a CUDA device has units for bfloat16.
        token: The access token for the hub, as in `resolve_model`.

    Raises:
        ModelError: The model does not exist, or its architecture, number format or files are not supported.
        OptionError: A revision was given for a name of the catalogue, or the dtype or the format of the weights cannot be honoured.
    """
    options = options or EngineOptions()
    if (name := shipped_name(model)) is not None:
        if options.revision is None:
            spec = _shipped(name, options, device, bfloat16=bfloat16)
            return dataclasses.replace(spec, name=model) if "/" in model else spec
        if "/" not in model:
            raise OptionError(f"{model} is a name of the catalogue; a revision ({options.revision}) needs the id of a hub repository")
    return _described(model, options, device, token, bfloat16=bfloat16)


def shipped_name(model: str) -> str | None:
    """Return the catalogue's name of a model; None for a folder on this machine or a model that is not in the catalogue."""
    return None if Path(model).expanduser().is_dir() else catalogue_name(model)


def _shipped(name: str, options: EngineOptions, device: str, *, bfloat16: bool) -> ModelSpec:
    spec = catalogue_spec(name)
    dtype = compute_dtype(spec.dtype, device, bfloat16=bfloat16) if options.dtype == "auto" else options.dtype
    given = options.weight_format, options.kv_format, options.cpu_compute, options.kept_share
    if (dtype, *given) == (spec.dtype, "auto", "auto", "auto", None) and not may_be_cut_smaller(spec.decoded_bytes, device):
        return spec
    import torch

    from flexgen.session.shipped import described

    return described(
        name, getattr(torch, dtype), weight_format=options.weight_format, kv=options.kv_format, cpu_compute=options.cpu_compute,
        sparse=options.kept_share, device=device,
    )  # fmt: skip


def _described(model: str, options: EngineOptions, device: str, token: str | None, *, bfloat16: bool) -> ModelSpec:
    from flexgen.hub.resolve import resolve_model

    try:
        files = resolve_model(model, revision=options.revision, token=token, with_weights=False)
    except ModelError as error:
        if "/" in model or Path(model).expanduser().is_file() or model.lower().endswith((".gguf", ".safetensors")):
            raise
        raise ModelError(f"{error}; nor is it in the catalogue: {', '.join(similar_names(model))}") from error
    return describe_files(files, options, device=device, bfloat16=bfloat16, token=token)


def describe_files(files: ModelFiles, options: EngineOptions, *, device: str, bfloat16: bool = True, token: str | None = None) -> ModelSpec:
    """Return the model of these files as the planner sees it.

    Args:
        files: The model's files, of which the weights may be on the hub.
        options: As for `spec_of`.
        device: "cpu", "cuda" or "sim".
        bfloat16: As for `spec_of`.
        token: The access token for the hub, as in `resolve_model`.

    Raises:
        ModelError: As for `spec_of`.
    """
    import torch

    from flexgen.checkpoint.stored import stored_headers
    from flexgen.hub.config import read_config
    from flexgen.kv.low_bit import kv_format
    from flexgen.models.describe import describe_config, describe_headers
    from flexgen.quantize.source import check_convertible
    from flexgen.session.weights import planned_in

    config = read_config(files)
    with describing(files.name):
        auto = compute_dtype(config_dtype(config), device, bfloat16=bfloat16)
        dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
        given: dict[str, Any] = {
            "name": files.name, "kv_format": kv_format(options.kv_format, dtype), "cpu_compute": options.cpu_compute,
            "sparse_attention": options.kept_share, "device": device,
        }  # fmt: skip
        if options.load_format == "dummy":
            return describe_config(config, dtype, stored=dtype, **given)
    headers = stored_headers(files, token=token)
    with describing(files.name):
        if options.weight_format != "auto":
            check_convertible(files)
            headers, config = planned_in(options.weight_format, headers, config, name=files.name)
        return describe_headers(headers, config, dtype, **given)
