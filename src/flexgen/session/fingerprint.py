"""Describes everything about a model that changes its answers, as JSON values that a job compares from one run to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexgen.base.digests import digest_of
from flexgen.base.quantities import format_size
from flexgen.hub.model_files import TOKENIZER_FILES, ModelFiles, weight_stamps
from flexgen.hub.private_folder import tokenizer_files
from flexgen.session.model import ResolvedModel
from flexgen.text.answers import RequestTranslator
from flexgen.text.tokenizer import Tokenizer

_BYTES = 8  # of a digest


def fingerprint(model: ResolvedModel, translator: RequestTranslator, chat_template: str | None, load_format: str) -> dict[str, Any]:
    """Return everything about a model that changes its answers, by name.

    Raises:
        ModelError: A file of the model cannot be understood.
        OptionError: As for `ResolvedModel.dtype`.
        CapacityError: As for `ResolvedModel.dtype`.
    """
    return {
        "model": _weights(model.files, load_format),
        "config": digest_of([json.dumps(model.files.config, sort_keys=True).encode()], _BYTES),
        "tokenizer": None if translator.tokenizer is None else _tokenizer_digest(translator.tokenizer, model.files.folder),
        "chat_template": None if chat_template is None else digest_of([chat_template.encode()], _BYTES),
        "eos_token_ids": sorted(translator.eos_token_ids),
        "dtype": model.dtype,
        "cpu_compute": model.cpu_compute,
        "weight_format": model.options.weight_format,
        "kv_format": model.kv_format,
        "sparse_attention": model.options.kept_share,
        "load_format": load_format,
        "max_model_len": translator.max_model_len,
        "seed": translator.seed,
    }


def _weights(files: ModelFiles, load_format: str) -> str:
    """Identify the weights: by the commit of a hub model, by the names, sizes and times of the files of a folder, which are not read."""
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
    if folder != model_folder and (folder / "config.json").is_file():  # a separate tokenizer, loaded according to its own model type
        found["config.json"] = folder / "config.json"
    return digest_of((part for name, path in sorted(found.items()) for part in (name.encode(), path.read_bytes())), _BYTES)
