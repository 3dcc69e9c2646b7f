"""vLLM's keywords: what is honoured, what is named in one warning, what is refused."""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch

from flexgen.api.vllm_keywords import _CALLS, _ONLY, check_call, read_keywords
from flexgen.api.vllm_types import ChatKeywords, GenerateKeywords, LLMKeywords
from flexgen.errors import OptionError
from flexgen.options import EngineOptions, OptionKeywords

# LLM and EngineArgs of vLLM 0.6 to 0.15, with the values that scripts pass.
HARMLESS = {
    "task": "generate", "runner": "auto", "convert": "auto", "tokenizer_mode": "auto", "skip_tokenizer_init": False,
    "trust_remote_code": False, "allowed_local_media_path": "", "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
    "data_parallel_size": 1, "dtype": "auto", "quantization": None, "revision": None, "tokenizer_revision": None, "code_revision": None,
    "seed": None, "gpu_memory_utilization": 0.9, "swap_space": 4, "cpu_offload_gb": 0, "enforce_eager": True,
    "max_seq_len_to_capture": 8192, "disable_custom_all_reduce": True, "disable_async_output_proc": False, "hf_token": None,
    "hf_overrides": None, "mm_processor_kwargs": None, "override_pooler_config": None, "pooler_config": None, "compilation_config": 3,
    "disable_log_stats": True, "block_size": 16, "enable_prefix_caching": True, "enable_chunked_prefill": True,
    "max_num_batched_tokens": 8192, "max_num_seqs": 256, "max_model_len": 512, "max_logprobs": 20, "load_format": "auto",
    "kv_cache_dtype": "auto", "download_dir": None, "distributed_executor_backend": "mp", "limit_mm_per_prompt": {"image": 0},
    "num_scheduler_steps": 1, "enable_lora": False, "speculative_config": None, "guided_decoding_backend": "xgrammar",
    "config_format": "auto", "model_impl": "auto", "generation_config": "auto", "override_generation_config": {}, "device": "cpu",
    "kv_cache_memory_bytes": 1 << 30, "async_scheduling": True, "structured_outputs_config": {}, "served_model_name": "it",
    "use_tqdm_on_load": False, "enable_sleep_mode": False, "logits_processors": None, "logprobs_mode": "raw_logprobs",
    "attention_backend": "FLASH_ATTN", "optimization_level": 2, "reasoning_parser": "", "enable_expert_parallel": False,
}  # fmt: skip

NEEDS = {
    "tensor_parallel_size": (2, "one device"), "pipeline_parallel_size": (2, "one device"), "data_parallel_size": (8, "one device"),
    "trust_remote_code": (True, "no code"), "quantization": ("awq", "checkpoint holds"), "kv_cache_dtype": ("fp8", "dtype"),
    "load_format": ("gguf", "safetensors"), "tokenizer_mode": ("mistral", "tokenizer"), "enable_lora": (True, "adapters"),
    "speculative_config": ({"method": "ngram"}, "not supported"), "hf_overrides": ({"rope_theta": 1}, r"config\.json"),
    "runner": ("pooling", "generates text"), "task": ("embed", "generates text"), "download_dir": ("/data", "HF_HUB_CACHE"),
    "logprobs_mode": ("processed_logits", "own logits"), "gpu_memory_utilization": (90, "number above 0"), "dtype": ("int4", "known"),
    "generation_config": ("folder", "SamplingParams"), "override_generation_config": ({"top_k": 3}, "SamplingParams"),
    "disable_sliding_window": (True, r"config\.json"), "logits_processors": (["a"], "not supported"),
}  # fmt: skip


def test_typed_keywords_are_the_options() -> None:
    """Those whose type differs take more: vLLM's None for a seed, torch's dtypes, lists."""
    wanted = {field.name: field.type for field in dataclasses.fields(EngineOptions)}
    typed = {name: hint.__forward_arg__ for name, hint in OptionKeywords.__annotations__.items()}
    assert typed | {"dtype": "str", "seed": "int", "allow_formats": "str | None"} == wanted
    assert (typed["dtype"], typed["seed"]) == ("str | torch.dtype", "int | None")


def test_every_keyword_with_a_reason_is_typed() -> None:
    assert set(_ONLY) <= set(LLMKeywords.__annotations__)
    assert set(_CALLS) == set(GenerateKeywords.__annotations__) | set(ChatKeywords.__annotations__)


def test_harmless_arguments_are_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flexgen"):
        asked = read_keywords(HARMLESS)
    assert asked.options == EngineOptions(device="cpu", max_num_seqs=256, max_model_len=512)
    (warning,) = caplog.messages
    assert all(name in warning for name in ("gpu_memory_utilization", "swap_space", "enforce_eager", "max_num_batched_tokens"))
    assert not any(name in warning for name in ("tensor_parallel_size", "max_num_seqs", "enable_prefix_caching"))


def test_nothing_is_said_of_our_own_options(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flexgen"):
        read_keywords({"host_mem": "1GiB", "tensor_parallel_size": 1, "trust_remote_code": False})
    assert caplog.messages == []


@pytest.mark.parametrize("name", NEEDS)
def test_what_cannot_be_done_is_refused_with_the_reason(name: str) -> None:
    value, reason = NEEDS[name]
    with pytest.raises(OptionError, match=f"{name}.*{reason}"):
        read_keywords({name: value})


@pytest.mark.parametrize(
    "name", ["enable_prefix_caching", "gpu_memory_utilization", "hf_token", "skip_tokenizer_init", "tokenizer_revision"]
)
@pytest.mark.parametrize("value", [float("nan"), [], -1, 10**400, object(), ""], ids=["nan", "list", "-1", "huge", "object", "empty"])
def test_what_a_keyword_cannot_be_is_refused_by_its_name(name: str, value: object) -> None:
    assert read_keywords({name: None}).options == EngineOptions()
    if (name, value) != ("hf_token", ""):
        with pytest.raises(OptionError, match=f"^{name} must be .*, not "):
            read_keywords({name: value})


@pytest.mark.parametrize("name", ["dtype", "device"])
def test_a_value_that_names_nothing_is_shown_as_it_was_given(name: str) -> None:
    for value in (None, [], 5, float("nan")):
        with pytest.raises(OptionError, match=re.escape(f"{name}={value!r} is unknown; known: auto, ")):
            read_keywords({name: value})


def test_what_means_something_is_honoured() -> None:
    assert read_keywords({"enable_prefix_caching": False}).options.prefix_sharing is False
    assert read_keywords({"dtype": torch.bfloat16}).options.dtype == "bfloat16"
    of_others = read_keywords({"dtype": np.dtype("float32"), "device": torch.device("cpu")})
    assert of_others.options == EngineOptions(dtype="float32", device="cpu")
    assert read_keywords({"dtype": "half"}).options.dtype == "float16"
    assert read_keywords({"dtype": "float"}).options.dtype == "float32"
    assert read_keywords({"hf_token": "hf_x", "tokenizer_revision": "main"}).token == "hf_x"
    assert read_keywords({"generation_config": "vllm"}).own_defaults is False
    with pytest.raises(OptionError, match="contradicts"):
        read_keywords({"enable_prefix_caching": False, "prefix_sharing": True})


def test_a_share_of_the_gpu_is_its_budget(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("flexgen.profile.limits._cuda_memory", lambda: (1 << 30, 1 << 31))
    assert read_keywords({"gpu_memory_utilization": 0.55}).options.device_mem == "55%"
    assert caplog.messages == []
    assert read_keywords({"gpu_memory_utilization": 0.5, "device_mem": "1GiB"}).options.device_mem == "1GiB"
    assert read_keywords({"gpu_memory_utilization": 0.5, "device": "cpu"}).options.device_mem is None
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(("name", "near"), [("tensor_parallel", "tensor_parallel_size"), ("gpu_mem_utilization", "gpu_memory_utilization")])
def test_a_misspelt_argument_of_vllm_is_named_with_the_near_one(name: str, near: str) -> None:
    with pytest.raises(OptionError, match=f"no option '{name}'; did you mean {near}"):
        read_keywords({name: 1})


def test_keywords_of_calls() -> None:
    known = GenerateKeywords.__annotations__
    check_call("generate", {"lora_request": None, "priority": None, "mm_processor_kwargs": {}, "tokenization_kwargs": None}, known)
    for keywords, reason in (
        ({"lora_request": object()}, "adapters"),
        ({"priority": [1]}, "priorities"),
        ({"prompt_token_ids": [[1]]}, "give ids as prompts"),
        ({"sampling_parms": None}, "generate has no option"),
    ):
        with pytest.raises(OptionError, match=reason):
            check_call("generate", keywords, known)


def test_values_of_numpy_and_torch() -> None:
    given = {"gpu_memory_utilization": np.float32(0.5), "device": torch.device("cpu"), "max_model_len": np.int64(8)}
    assert read_keywords(given).options == EngineOptions(device="cpu", max_model_len=8)
