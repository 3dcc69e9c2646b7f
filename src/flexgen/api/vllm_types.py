"""The types of vLLM's keywords, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from flexgen.options import OptionKeywords


class LLMKeywords(OptionKeywords, total=False):
    """The keywords of `LLM` that are not in its signature: the fields of EngineOptions, then vLLM's arguments."""

    # Arguments that have a meaning here.
    enable_prefix_caching: bool | None
    generation_config: str
    gpu_memory_utilization: float
    hf_token: bool | str | None
    skip_tokenizer_init: bool
    tokenizer_revision: str | None

    # Arguments that may only ask for what is done anyway.
    calculate_kv_scales: bool
    config_format: str
    convert: str
    cpu_offload_params: Any
    data_parallel_size: int
    decode_context_parallel_size: int
    disable_sliding_window: bool
    download_dir: str | None
    enable_expert_parallel: bool
    enable_lora: bool
    enable_prompt_adapter: bool
    enable_prompt_embeds: bool
    hf_config_path: str | None
    hf_overrides: Any
    kv_cache_dtype: str
    kv_transfer_config: Any
    logits_processors: Any
    logprobs_mode: str
    model_impl: str
    nnodes: int
    override_attention_dtype: str | None
    override_generation_config: Mapping[str, Any] | None
    override_pooler_config: Any
    pipeline_parallel_size: int
    pooler_config: Any
    prefill_context_parallel_size: int
    quantization: str | None
    rope_scaling: Any
    rope_theta: float | None
    runner: str
    scheduling_policy: str
    speculative_config: Any
    speculative_model: str | None
    task: str
    tensor_parallel_size: int
    tokenizer_mode: str
    weight_transfer_config: Any

    # Arguments that change nothing.
    additional_config: Any
    allowed_local_media_path: str
    allowed_media_domains: Any
    async_scheduling: bool | None
    attention_backend: Any
    attention_config: Any
    block_size: int | None
    code_revision: str | None
    collect_detailed_traces: Any
    compilation_config: Any
    cpu_offload_gb: float
    cudagraph_capture_sizes: Any
    device_ids: Any
    disable_async_output_proc: bool
    disable_cascade_attn: bool
    disable_chunked_mm_input: bool
    disable_custom_all_reduce: bool
    disable_hybrid_kv_cache_manager: bool | None
    disable_log_requests: bool
    disable_log_stats: bool
    disable_mm_preprocessor_cache: bool
    distributed_executor_backend: Any
    enable_chunked_prefill: bool | None
    enable_log_requests: bool
    enable_sleep_mode: bool
    enforce_eager: bool | None
    guided_decoding_backend: str
    ignore_patterns: Any
    kv_cache_memory_bytes: int | None
    kv_offloading_backend: str
    kv_offloading_size: float | None
    limit_mm_per_prompt: Any
    long_prefill_token_threshold: int
    max_context_len_to_capture: int | None
    max_cudagraph_capture_size: int | None
    max_long_partial_prefills: int
    max_num_batched_tokens: int | None
    max_num_partial_prefills: int
    max_parallel_loading_workers: int | None
    max_seq_len_to_capture: int
    media_io_kwargs: Any
    mm_processor_cache_gb: float
    mm_processor_kwargs: Any
    model_loader_extra_config: Any
    num_gpu_blocks_override: int | None
    num_lookahead_slots: int
    num_scheduler_steps: int
    optimization_level: Any
    otlp_traces_endpoint: str | None
    performance_mode: str
    preemption_mode: str | None
    prefix_caching_hash_algo: str
    profiler_config: Any
    pt_load_map_location: Any
    ray_workers_use_nsight: bool
    reasoning_parser: str
    safetensors_load_strategy: str
    scheduler_delay_factor: float
    served_model_name: Any
    show_hidden_metrics_for_version: str | None
    skip_mm_profiling: bool
    stream_interval: int
    structured_outputs_config: Any
    swap_space: float
    tokenizer_pool_size: int
    use_tqdm_on_load: bool
    use_v2_block_manager: bool
    worker_cls: Any
    worker_extension_cls: str
    worker_use_ray: bool


class GenerateKeywords(TypedDict, total=False):
    """vLLM's keywords of `generate` that are accepted only with values that have no effect."""

    guided_options_request: None
    lora_request: None
    mm_processor_kwargs: Mapping[str, Any] | None
    priority: list[int] | None
    prompt_adapter_request: None
    prompt_token_ids: None
    tokenization_kwargs: Mapping[str, Any] | None


class ChatKeywords(TypedDict, total=False):
    """vLLM's keywords of `chat` that are accepted only with values that have no effect."""

    chat_template_content_format: str
    lora_request: None
    mm_processor_kwargs: Mapping[str, Any] | None
    tokenization_kwargs: Mapping[str, Any] | None
