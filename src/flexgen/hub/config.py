"""From config.json to a transformers config.  Its values are checked before anything is made of them, and nothing else is read.

The checks are bounds that no real model comes near.  Whether the config fits the weights is found out where the model is built
(models/skeleton.py).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flexgen.errors import CheckpointError, ModelError
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.private_folder import config_folder

MAX_LAYERS = 1 << 10
MAX_SIZE = 1 << 24  # of a dimension
MAX_INTEGER = 1 << 53

_LAYERS = re.compile(r"(^|_)layers?$|_types$|(^|_)depth$|_layers_per_|^num_.*_(blocks|modules)$")
_SIZES = re.compile(
    r"(^|_)(size|sizes|dim|dims|heads?|rank|experts|channels|features|width|embd|inner|groups?|top_?k|blocks)$|^d_(model|ff|kv|inner)$"
)
_WHOLE = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "sliding_window", "attention_chunk_size", "original_max_position_embeddings",
)  # fmt: skip
_POSITIVE = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logits_scaling", "rope_theta")
_NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROPE = re.compile(r"(^|_)factor$|^rope_theta$|^original_max_position_embeddings$")


def read_config(files: ModelFiles) -> Any:
    """Make the transformers config of a model.  No code from its folder is run, and no other file of it is read.

    Raises:
        CheckpointError: A value is out of bounds, or contradicts another.
        ModelError: transformers cannot make a config of it.
    """
    from transformers import AutoConfig

    for file, values in (("config.json", files.config), ("generation_config.json", files.generation_config)):
        for key, value in _values(values):
            _check_bounds(f"{files.name}: {file}", key, value)
    _check_quantization(f"{files.name}: config.json", files.config)
    for part in (files.config, files.config.get("text_config")):  # as written: transformers' classes leave out what they take for unused
        if isinstance(part, dict):
            _check_meaning(f"{files.name}: config.json", part.get)
    try:
        with config_folder(files.config) as folder:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config(decoder=True)
    except Exception as error:  # configs validate themselves with whatever they like
        raise ModelError(f"{files.name}: config.json cannot be used: {reason_of(error)}") from error
    _check_meaning(f"{files.name}: config.json", functools.partial(_field, text))
    return config


def reason_of(error: BaseException) -> str:
    """Return what an error of transformers or torch says, on one line that can be shown."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if said else ''}{said[:300]}{'...' if len(said) > 300 else ''}"


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every single value of a config with its dotted name; values in lists have the name of the list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    else:
        yield key, value


def _check_quantization(file: str, config: Mapping[str, Any]) -> None:
    """Refuse a description of low-bit weights that is no object; what is in it is checked by the format."""
    parts = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, dict)}}
    for place, part in parts.items():
        for key in ("quantization_config", "compression_config"):
            if (value := part.get(key)) is not None and not isinstance(value, dict):
                raise _refused(file, place + key, value, "an object")


def _check_bounds(file: str, key: str, value: Any) -> None:
    """Refuse numbers that would lead to tables larger than any memory."""
    if not _is_number(value):
        return
    name = key.rpartition(".")[2]
    if not math.isfinite(value) or (isinstance(value, int) and abs(value) > MAX_INTEGER):
        raise _refused(file, key, value, f"a number of at most {MAX_INTEGER:,}")
    if _LAYERS.search(name) and value > MAX_LAYERS:
        raise _refused(file, key, value, f"at most {MAX_LAYERS:,}")
    if _SIZES.search(name) and value > MAX_SIZE:
        raise _refused(file, key, value, f"at most {MAX_SIZE:,}")


def _check_meaning(file: str, field: Callable[[str], Any]) -> None:
    """Refuse values of the language model that have no meaning, or another one than they seem to have."""
    for name in (*_WHOLE, *_POSITIVE, *_NOT_NEGATIVE):
        value = field(name)
        if value is None or isinstance(value, list):  # one for each layer
            continue
        if name == "sliding_window" and not value and field("use_sliding_window") is False:  # Qwen2-MoE's class writes 0 for none
            continue
        if name in _WHOLE and not (_is_number(value) and isinstance(value, int) and value > 0):
            raise _refused(file, name, value, "a whole number above 0")
        if not _is_number(value) or value < 0 or (value == 0 and name not in _NOT_NEGATIVE):
            raise _refused(file, name, value, "a number of at least 0" if name in _NOT_NEGATIVE else "a number above 0")
    experts = next((value for name in _EXPERTS if isinstance(value := field(name), int)), None)
    chosen = field("num_experts_per_tok")
    if experts and isinstance(chosen, int) and not 1 <= chosen <= experts:  # models without experts have 0 of 0
        raise _refused(file, "num_experts_per_tok", chosen, f"from 1 to the number of experts, {experts}")
    _check_rope(file, "rope_parameters", field("rope_parameters"))


def _check_rope(file: str, key: str, parameters: Any) -> None:
    """Check factors and bases of rotary frequencies, which may be given by layer type."""
    for name, value in parameters.items() if isinstance(parameters, dict) else ():
        where = f"{key}.{name}"
        if isinstance(value, dict):
            _check_rope(file, where, value)
        elif isinstance(value, list):
            if not all(_is_number(each) and each > 0 for each in value):
                raise _refused(file, where, value, "a list of numbers above 0")
        elif _ROPE.search(str(name)) and value is not None and not (_is_number(value) and value > 0):
            raise _refused(file, where, value, "a number above 0")


def _field(text: Any, name: str) -> Any:
    """Return a field of a config.

    The result is None if there is no such field, or if each layer has its own, for which transformers raises an error.
    """
    try:
        return getattr(text, name, None)
    except Exception:  # noqa: BLE001
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refused(file: str, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{file} has {key} {str(value)[:40]}; it should be {wanted}")
