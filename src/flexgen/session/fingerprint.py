"""Describes everything about a model that changes its answers, as JSON values that a job compares from one run to the next."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flexgen.base.digests import digest_of
from flexgen.base.quantities import format_size
from flexgen.hub.model_files import TOKENIZER_FILES, ModelFiles, weight_stamps
from flexgen.hub.private_folder import tokenizer_files
from flexgen.options import EngineOptions
from flexgen.session.model import ResolvedModel
from flexgen.text.answers import RequestTranslator
from flexgen.text.tokenizer import Tokenizer

_BYTES = 8  # of a digest


def fingerprint(model: ResolvedModel, translator: RequestTranslator, chat_template: str | None) -> dict[str, Any]:
    """Return everything about a model that changes its answers, by name.

    Raises:
        ModelError: A file of the model cannot be understood.
        OptionError: As for `ResolvedModel.dtype`.
        CapacityError: As for `ResolvedModel.dtype`.
    """
    return {
        "model": _weights(model.files, model.options.load_format),
        "config": digest_of([json.dumps(model.files.config, sort_keys=True).encode()], _BYTES),
        "tokenizer": None if translator.tokenizer is None else _tokenizer_digest(translator.tokenizer, model.files.folder),
        "chat_template": None if chat_template is None else digest_of([chat_template.encode()], _BYTES),
        "eos_token_ids": sorted(translator.eos_token_ids),
        "dtype": model.dtype,
        "max_model_len": translator.max_model_len,
        **_options(model.options),
    }


def known_beforehand(files: ModelFiles, options: EngineOptions) -> dict[str, Any]:
    """Return the part of the fingerprint that is known before weights are converted and the config is read.

    Args:
        files: The files of the model as they are, without a conversion.
        options: The options, which leave no formats to choose.

    Raises:
        ModelError: A file of the model cannot be understood.
    """
    if options.weight_format != "auto" and files.gguf is None:
        from flexgen.quantize.cache import conversion_of
        from flexgen.quantize.settings import QuantizeSettings

        files = dataclasses.replace(files, conversion=conversion_of(files, QuantizeSettings(weight_format=options.weight_format)))
    return {"model": _weights(files, options.load_format), **_options(options)}


def stated(options: EngineOptions) -> dict[str, Any]:
    """Return the part of the fingerprint that options state by themselves; formats that are to be chosen are left out."""
    left_out = ("weight_format", "kv_format") if options.allow_formats is not None else ()
    return {name: value for name, value in _options(options).items() if name not in left_out}


def _options(options: EngineOptions) -> dict[str, Any]:
    return {
        "cpu_compute": options.cpu_compute,
        "weight_format": options.weight_format,
        "kv_format": options.kv_format,
        "sparse_attention": options.kept_share,
        "load_format": options.load_format,
        "seed": options.seed,
    }


def _weights(files: ModelFiles, load_format: str) -> str:
    """Identify the weights: by the commit of a hub model, by the names, sizes and times of the files of a folder, which are not read.

    The name of a folder is no part of it, because a folder has many, and its files may be copied.
    """
    if files.conversion is not None:
        return files.conversion
    if files.commit is not None:
        return f"{files.name} at {files.commit}"
    if load_format == "dummy":
        return "random weights"
    stamps = weight_stamps(files)
    parts = (f"{name} {size} {changed}".encode() for name, size, changed in stamps)
    return f"{len(stamps)} files, {format_size(sum(size for _, size, _ in stamps))}, {digest_of(parts, _BYTES)}"


def _tokenizer_digest(tokenizer: Tokenizer, model_folder: Path) -> str:
    """Return the digest of all files that the tokenizer is loaded from, chat templates excluded."""
    folder = Path(tokenizer.hf.name_or_path)
    found = {name: path for name, path in tokenizer_files(folder).items() if name in TOKENIZER_FILES}
    is_separate = folder.resolve() != model_folder.resolve()
    if is_separate and (folder / "config.json").is_file():  # it is loaded according to its own model type
        found["config.json"] = folder / "config.json"
    return digest_of((part for name, path in sorted(found.items()) for part in (name.encode(), path.read_bytes())), _BYTES)
