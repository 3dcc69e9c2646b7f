"""What all stages of a pipeline must have in common: versions, the model's files, and the options on which answers depend."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from flexgen.base.digests import digest_of
from flexgen.hub.model_files import ModelFiles, weight_paths
from flexgen.session.fingerprint import stated
from flexgen.session.model import ResolvedModel

_PACKAGES = ("flexgen-engine", "torch", "transformers", "numba")
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each file of weights, at equal distances


def stage_facts(found: ResolvedModel, num_stages: int) -> dict[str, Any]:
    """Return what every stage must have alike, by name.

    Raises:
        ModelError: A file of the model cannot be understood.
        OptionError: As for `ResolvedModel.dtype`.
    """
    versions = {f"version of {name}": metadata.version(name) for name in _PACKAGES}
    return versions | {
        "number of stages": num_stages,
        "config.json": digest_of([json.dumps(found.files.config, sort_keys=True).encode()], 8),
        "weights": "random weights" if found.options.load_format == "dummy" else weights_digest(found.files),
        "dtype": found.dtype,
        **stated(found.options),
    }


def weights_digest(files: ModelFiles) -> str:
    """Return a digest of the weights' files: their names, their sizes, and samples of each; copies on other hosts have the same.

    Raises:
        ModelError: A file cannot be read.
    """
    parts: list[bytes] = []
    for path in weight_paths(files):
        size = path.stat().st_size
        parts.append(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for each in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * each // (_SAMPLES - 1))
                parts.append(file.read(_SAMPLE_BYTES))
    return digest_of(parts, 8)
