"""A model's own limits, ends of answers and sampling defaults, for requests that state none, and the seeds of requests that name none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flexgen.base.scalars import in_json
from flexgen.errors import ModelError, OptionError, RequestError
from flexgen.request import SamplingParams
from flexgen.text.tokenizer import Tokenizer

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")  # the first is usual


def token_limits(name: str, config: Any, max_model_len: int | None) -> tuple[int, int]:
    """Return the vocabulary's size, and the most tokens of prompt and answer together.

    Args:
        name: The model's name, for messages.
        config: The model's transformers config.
        max_model_len: The limit that the options state; None stands for the model's context.

    Raises:
        ModelError: The config states no vocabulary size.
        OptionError: `max_model_len` exceeds the model's context, or is needed because the model states none.
    """
    text = config.get_text_config(decoder=True)
    context = next((value for field in _CONTEXT_NAMES if isinstance(value := getattr(text, field, None), int)), None)
    vocab_size = getattr(text, "vocab_size", None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ModelError(f"{name}: config.json has no vocab_size")
    if max_model_len is None:
        if context is None:
            raise OptionError(f"{name} states no context length: give max_model_len")
        return vocab_size, context
    if context is not None and max_model_len > context:
        raise OptionError(f"max_model_len={max_model_len} is more than the model's context of {context}")
    return vocab_size, max_model_len


def eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return every id that ends an answer: generation_config.json's, else config.json's, and the tokenizer's own (as in vLLM).

    Raises:
        ModelError: An eos_token_id is neither an id nor a list of ids.
    """
    value = generation_config.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ModelError(f"eos_token_id is {json.dumps(value)}, neither an id nor a list of ids")
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return frozenset(ids if own is None else [*ids, own])


# The settings that vLLM adopts: their names in generation_config.json and in SamplingParams.
_SAMPLING_NAMES = {
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}  # fmt: skip


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Return vLLM's defaults, overridden by generation_config.json; `do_sample: false` there means greedy sampling.

    Raises:
        ModelError: A value is out of range.
    """
    values = {ours: generation_config[theirs] for theirs, ours in _SAMPLING_NAMES.items() if generation_config.get(theirs) is not None}
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise ModelError(f"generation_config.json: {error}") from error


_NEUTRAL = {
    "typical_p": 1, "no_repeat_ngram_size": 0, "num_beams": 1, "suppress_tokens": [], "min_new_tokens": 0, "bad_words_ids": [],
    "sequence_bias": {}, "stop_strings": [], "min_length": 0, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": [], "forced_eos_token_id": None, "guidance_scale": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
}  # fmt: skip


def unsupported_defaults(generation_config: Mapping[str, Any]) -> list[str]:
    """Return the settings of generation_config.json that would change answers but are not applied, as "name=value"."""
    given = ((name, generation_config.get(name)) for name in _NEUTRAL)
    return [f"{name}={in_json(value)}" for name, value in given if value is not None and value != _NEUTRAL[name]]


def derive_seed(base: int, index: int) -> int:
    """Return the seed of a request that names none; it depends only on the engine's seed and the request's index."""
    return _hashed(f"{base} {index}")


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of one of several answers to a request that names a seed; the first answer has the request's own."""
    return seed if choice == 0 else _hashed(f"{seed} choice {choice}")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
