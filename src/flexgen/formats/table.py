"""All number formats, and the choice of the one that a model's config states.  A new format is a new file and an entry here.

Importing the table does not load torch, so that `flexgen plan` can ask which formats run.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from flexgen.errors import UnsupportedModelError
from flexgen.formats.awq import AWQ
from flexgen.formats.base import NumberFormat
from flexgen.formats.bitsandbytes import BitsAndBytes
from flexgen.formats.compressed_tensors import CompressedTensors
from flexgen.formats.flexgen_v0 import FlexGenV0
from flexgen.formats.fp8_block import FP8Block
from flexgen.formats.gguf import GGUF
from flexgen.formats.gptq import GPTQ
from flexgen.formats.modelopt import ModelOpt
from flexgen.formats.mxfp4 import MXFP4
from flexgen.formats.plain import PlainNumbers
from flexgen.formats.stated import Stated
from flexgen.options import DTYPE_BYTES

_LOW_BIT = (MXFP4(), FP8Block(), ModelOpt(), BitsAndBytes(), CompressedTensors(), GPTQ(), AWQ(), FlexGenV0(), GGUF())
FORMATS: Mapping[str, NumberFormat] = {each.name: each for each in (*map(PlainNumbers, DTYPE_BYTES), *_LOW_BIT)}


# As NumberFormat.common_configs, of all formats.
COMMON_CONFIGS = {name: config for each in FORMATS.values() for name, config in each.common_configs().items()}


def runs(number_format: str) -> bool:
    """Return whether the engine can compute with weights in the format of this name."""
    return number_format in FORMATS and FORMATS[number_format].runs


def stated_format(config: Any) -> NumberFormat | None:
    """Return the format that a config's quantization_config states; None if the weights are plain numbers.

    Args:
        config: The model's transformers config, or the contents of its config.json.

    Raises:
        UnsupportedModelError: The format is not known, or not this variant of it.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return None
    Stated(quantization).text("quant_method", None)
    found = next((found for each in FORMATS.values() if (found := each.stated_by(quantization)) is not None), None)
    if found is None:
        raise refuse_quantization(quantization)
    return found


def check_supported_number_format(config: Any) -> None:
    """Refuse weights that the engine cannot compute with.

    Args:
        config: The model's transformers config, or the contents of its config.json.

    Raises:
        UnsupportedModelError: The weights are quantized; the message names the method.
    """
    found = stated_format(config)
    if found is not None and not found.runs:
        raise refuse_quantization(quantization_of(config) or {})


def quantization_of(config: Any) -> Mapping[str, Any] | None:
    """Return what the config states about the quantization of its weights, or of a part of them; None if they are plain numbers.

    Raises:
        UnsupportedModelError: It is no object.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    for part in (values, *(value for value in values.values() if isinstance(value, Mapping))):
        for key in ("quantization_config", "compression_config"):
            if (quantization := part.get(key)) is not None and (stated := Stated(quantization, key).values):
                return stated
    return None


def without_quantization(config: Any) -> Any:
    """Return the transformers config of the same model with plain weights."""
    if quantization_of(config) is None:
        return config
    plain = deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        part.__dict__.pop("quantization_config", None)
    return plain


def refuse_quantization(quantization: Mapping[str, Any]) -> UnsupportedModelError:
    """Return the error that names the method of a quantization_config."""
    return UnsupportedModelError(
        f"the weights are quantized ({quantization.get('quant_method') or 'by an unnamed method'}, see quantization_config in "
        "config.json), which is not supported: use a repository with the bfloat16, float16 or float32 weights of this model, or a format "
        "of docs/formats.md"
    )
