"""Scaled rotary frequencies as GGUF files state them, which transformers' reader of GGUF leaves out.

Llama 3's are stored as one factor for each frequency (`rope_freqs.weight`), by which the frequency is divided; the others as values.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any

from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.hub.gguf_model import GGUFModel

FACTORS = "rope_freqs.weight"
_MOST_FACTORS = 1 << 12
_UNKNOWN_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
# The published models' (Llama 3.1, 3.2 and 3.3).
_LOW, _HIGH, _LENGTH = 1.0, 4.0, 8192
_TOLERANCE = 1e-3


def rope_factors(model: GGUFModel) -> tuple[float, ...] | None:
    """Read the factors of a model's rotary frequencies; None if it has none, or if its files are elsewhere.

    Raises:
        CheckpointError: They cannot be read.
        UnsupportedModelError: They are not those of Llama 3.
    """
    found = {tensor.name: (path, tensor) for path, tensor in model.tensors if tensor.name in (FACTORS, *_UNKNOWN_FACTORS)}
    if unknown := found.keys() & set(_UNKNOWN_FACTORS):
        raise UnsupportedModelError(f"{model.parts[0].path}: frequencies scaled by {min(unknown)} (LongRoPE) are not supported in GGUF")
    if FACTORS not in found:
        return None
    path, tensor = found[FACTORS]
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MOST_FACTORS:
        raise CheckpointError(f"{path}: {FACTORS} is {tensor.type.name} of shape {tensor.shape}, not one float32 for each frequency")
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            raw = os.pread(file.fileno(), tensor.nbytes, tensor.offset)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if len(raw) != tensor.nbytes:
        raise CheckpointError(f"{path}: ends before byte {tensor.offset + tensor.nbytes}")
    return struct.unpack(f"<{tensor.shape[0]}f", raw)


def rope_scaling(model: GGUFModel, config: Any) -> dict[str, Any] | None:
    """Return what has to be added to a config's `rope_parameters`; None for frequencies that are not scaled.

    Args:
        model: The headers.
        config: The transformers config of the model without scaling.

    Raises:
        CheckpointError: A value has no meaning.
        UnsupportedModelError: The frequencies are scaled in a way that is not supported.
    """
    path, prefix = model.parts[0].path, f"{model.architecture}.rope"
    kind = model.metadata.get(f"{prefix}.scaling.type", "none")
    factor = model.metadata.get(f"{prefix}.scaling.factor", model.metadata.get(f"{prefix}.scale_linear"))
    if factor is not None and not (isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 0):
        raise CheckpointError(f"{path}: {prefix}.scaling.factor is {str(factor)[:40]}; it should be a number above 0")
    factors = rope_factors(model)
    if factors is not None and max(factors) != 1.0:
        return _llama3(model, config, factors)
    if not factor or factor == 1.0:
        return None
    if kind == "yarn":
        length = model.metadata.get(f"{prefix}.scaling.original_context_length")
        if type(length) is not int or length <= 0:
            raise CheckpointError(f"{path}: YaRN without {prefix}.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": length}
    if kind in ("linear", "none"):
        return {"rope_type": "linear", "factor": float(factor)} if kind == "linear" or f"{prefix}.scale_linear" in model.metadata else None
    raise UnsupportedModelError(f"{path}: rotary frequencies scaled by {str(kind)[:40]!r} are not supported in GGUF; linear and yarn are")


def _llama3(model: GGUFModel, config: Any, factors: tuple[float, ...]) -> dict[str, Any]:
    """Return the scaling of Llama 3 that gives these factors (transformers' `_compute_llama3_parameters`)."""
    path, theta, factor = model.parts[0].path, float(config.rope_parameters["rope_theta"]), max(factors)
    for index, stored in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (index / len(factors))
        smooth = min(max((_LENGTH / wavelength - _LOW) / (_HIGH - _LOW), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not abs(stored - expected) <= _TOLERANCE * expected:
            raise UnsupportedModelError(
                f"{path}: {FACTORS} holds factors of rotary frequencies other than those of Llama 3 (number {index} is {stored:.4g}, "
                f"expected {expected:.4g}), which are not supported"
            )
    return {
        "rope_type": "llama3", "factor": round(factor, 3), "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _LENGTH,
    }  # fmt: skip
