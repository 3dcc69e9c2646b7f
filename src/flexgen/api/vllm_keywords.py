"""Reads vLLM's keywords: some have a meaning here, some change nothing, some ask for what flexgen cannot do (docs/vllm.md).

Knows names and values, and nothing of models and engines.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

from flexgen.api.vllm_types import LLMKeywords
from flexgen.base.option_values import flag, text_or_none
from flexgen.base.scalars import as_float, in_python, shown_in_python
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.profile.limits import find_device

logger = logging.getLogger(__name__)


_ONE_DEVICE = "flexgen runs on one device, and streams what is larger than its memory"
_GENERATES = "flexgen generates text, and does nothing else with a model"
_NO_ADAPTERS = "adapters are not supported: merge them into the checkpoint"
_AS_CONFIGURED = "a model runs as its config.json says: change it in a copy of the folder"
_NOT_YET = "this is not supported"
_SAFETENSORS = "only config.json, tokenizer files and safetensors of a Hugging Face folder are read"

# vLLM's argument -> (values that ask for what is done anyway, as None always does; the reason why others cannot be honoured)
_ONLY: Mapping[str, tuple[tuple[object, ...], str]] = {
    "calculate_kv_scales": ((False,), "the KV cache is not scaled"),
    "config_format": (("auto", "hf"), _SAFETENSORS),
    "convert": (("auto", "none"), _GENERATES),
    "cpu_offload_params": ((set(), [], ()), "the planner chooses what lives where; weights= says it by shares"),
    "data_parallel_size": ((1,), _ONE_DEVICE),
    "decode_context_parallel_size": ((1,), _ONE_DEVICE),
    "disable_sliding_window": ((False,), _AS_CONFIGURED),
    "download_dir": ((), "downloads go to the cache of the hub library: set HF_HUB_CACHE, or give a folder as the model"),
    "enable_expert_parallel": ((False,), _ONE_DEVICE),
    "enable_lora": ((False,), _NO_ADAPTERS),
    "enable_prompt_adapter": ((False,), _NO_ADAPTERS),
    "enable_prompt_embeds": ((False,), "prompts are text or token ids"),
    "generation_config": (("auto", "vllm"), 'take "auto" (the model\'s), "vllm" (vLLM\'s defaults), or give SamplingParams'),
    "hf_config_path": ((), _AS_CONFIGURED),
    "hf_overrides": (({},), _AS_CONFIGURED),
    "kv_cache_dtype": (("auto",), "the KV cache has the dtype that is computed in, or the format that kv_format names"),
    "kv_transfer_config": ((), _NOT_YET),
    "logits_processors": (([], ()), _NOT_YET),
    "logprobs_mode": (("raw_logprobs",), "log probabilities are of the model's own logits"),
    "model_impl": (("auto", "transformers"), "models are transformers' own"),
    "nnodes": ((1,), _ONE_DEVICE),
    "override_attention_dtype": ((), "attention has the dtype that is computed in"),
    "override_generation_config": (({},), "give SamplingParams"),
    "override_pooler_config": ((), _GENERATES),
    "pipeline_parallel_size": ((1,), _ONE_DEVICE),
    "pooler_config": ((), _GENERATES),
    "prefill_context_parallel_size": ((1,), _ONE_DEVICE),
    "quantization": (
        (),
        "weights are computed with as the checkpoint holds them; leave it out, or convert them with weight_format='int4'",
    ),
    "rope_scaling": (({},), _AS_CONFIGURED),
    "rope_theta": ((), _AS_CONFIGURED),
    "runner": (("auto", "generate"), _GENERATES),
    "scheduling_policy": (("fcfs",), "requests have no priorities"),
    "speculative_config": (({},), _NOT_YET),
    "speculative_model": ((), _NOT_YET),
    "task": (("auto", "generate"), _GENERATES),
    "tensor_parallel_size": ((1,), _ONE_DEVICE),
    "tokenizer_mode": (("auto", "hf"), "the tokenizer is the one that transformers finds in the folder"),
    "weight_transfer_config": ((), _NOT_YET),
}
_MEANT = frozenset(
    {"enable_prefix_caching", "generation_config", "gpu_memory_utilization", "hf_token", "skip_tokenizer_init", "tokenizer_revision"}
)
_OPTIONS = frozenset(field.name for field in fields_of(EngineOptions))
_WITHOUT_EFFECT = frozenset(LLMKeywords.__annotations__) - _OPTIONS - _MEANT - frozenset(_ONLY)
_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKeywords:
    """The keywords of `LLM`, sorted.

    Attributes:
        options: The options of the engine.
        tokenizer_revision: The revision of another tokenizer on the hub; None for the default branch.
        skip_tokenizer_init: Whether to load no tokenizer, so that prompts are token ids and answers have no text.
        token: The access token for the hub; None for that of the hub library.
        own_defaults: Whether the default SamplingParams come from the model's generation_config.json.
    """

    options: EngineOptions
    tokenizer_revision: str | None = None
    skip_tokenizer_init: bool = False
    token: str | None = None
    own_defaults: bool = True


def read_keywords(given: Mapping[str, Any]) -> ModelKeywords:
    """Sort the keywords of `LLM`, and log one warning with the names of those that change nothing.

    Raises:
        OptionError: A keyword is unknown or its value cannot be honoured; the message names it.
    """
    _check_names("LLM", given, LLMKeywords.__annotations__)
    _check_values(given, _ONLY)
    options, idle = _options(given)
    if idle := sorted(idle):
        logger.warning("of vLLM's arguments, these change nothing in flexgen: %s", ", ".join(idle))
    skip, token = given.get("skip_tokenizer_init"), given.get("hf_token")
    if token is not None and not isinstance(token, (str, bool)):
        raise OptionError(f"hf_token must be a text, True or None, not {shown_in_python(token)}")
    return ModelKeywords(
        options=EngineOptions(**options),
        tokenizer_revision=text_or_none("tokenizer_revision", given.get("tokenizer_revision")),
        skip_tokenizer_init=skip is not None and flag("skip_tokenizer_init", skip),
        token=token if isinstance(token, str) else None,
        own_defaults=given.get("generation_config") != "vllm",
    )


def _options(given: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the fields of EngineOptions, and the names of keywords that have no effect."""
    options, idle = {name: value for name, value in given.items() if name in _OPTIONS}, set(_WITHOUT_EFFECT & set(given))
    for name in ("dtype", "device"):
        if name in options:
            options[name] = _named(options[name])
    if options.get("seed", 0) is None:
        options["seed"] = 0
    if given.get("enable_prefix_caching") is not None:
        sharing = flag("enable_prefix_caching", given["enable_prefix_caching"])
        if flag("prefix_sharing", options.setdefault("prefix_sharing", sharing)) != sharing:
            raise OptionError(f"enable_prefix_caching={sharing!r} contradicts prefix_sharing={options['prefix_sharing']!r}")
    if (share := given.get("gpu_memory_utilization")) is not None:
        given_share, share = share, as_float(share)
        if share is None or not 0 < share <= 1:
            raise OptionError(f"gpu_memory_utilization must be a number above 0 and up to 1, not {shown_in_python(given_share)}")
        if options.get("device_mem") is None and find_device(options.get("device", "auto")) == "cuda":
            options["device_mem"] = f"{100 * share:g}%"
        else:
            idle.add("gpu_memory_utilization")
    return options, idle


def _named(value: Any) -> Any:
    """Return the name of a dtype or device of torch or numpy, without vLLM's other names; any other value as it is."""
    if not isinstance(value, str):
        if type(value).__module__.partition(".")[0] not in ("torch", "numpy"):
            return value
        value = str(value)
    name = value.removeprefix("torch.")
    return _DTYPES.get(name, name)


# -- calls ------------------------------------------------------------------------------------------------------------------------------


_CALLS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "chat_template_content_format": (("auto",), "how a template wants its contents is found from the template"),
    "guided_options_request": ((), "give SamplingParams(structured_outputs=...)"),
    "lora_request": ((), _NO_ADAPTERS),
    "mm_processor_kwargs": (({},), "prompts are text or token ids"),
    "priority": (([],), "requests have no priorities"),
    "prompt_adapter_request": ((), _NO_ADAPTERS),
    "prompt_token_ids": ((), 'give ids as prompts: [1, 2, 3], or {"prompt_token_ids": [1, 2, 3]}'),
    "tokenization_kwargs": (({},), "tokenize the prompts yourself, and give token ids"),
}


def check_call(call: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check the keywords of a call.

    Args:
        call: The name of the call, for messages.
        given: The keywords with their values.
        known: The names of the call's own keywords and of vLLM's.

    Raises:
        OptionError: A keyword is unknown or its value cannot be honoured; the message names it.
    """
    _check_names(call, given, known)
    _check_values(given, _CALLS)


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(_OPTIONS) if what == 'LLM' else known)}"
            raise OptionError(f"{what} has no option {name!r}{hint}")


def _check_values(given: Mapping[str, Any], only: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    for name, value in given.items():
        neutral, why = only.get(name, (None, ""))
        if neutral is None:
            continue
        if value is not None and not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
            raise OptionError(f"{name}={in_python(value)} cannot be honoured: {why}")
