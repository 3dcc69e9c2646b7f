"""DeepSpeed's ZeRO-Inference: stage 3 with all weights in host memory, keys and values on the GPU.

    python -m benchmarks.gpu.peers.run_deepspeed MODEL --batch 8 --device-bytes N [--pin-memory] [--packages DIR]

MODEL is a folder with a config.json; weights are those with which transformers begins to train.  The settings are those of DeepSpeed's own
example (DeepSpeedExamples, inference/huggingface/zero_inference/run_model.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from ...generation import timed_generation
from .launch import figures_of, launch, limit_device, peak_device_bytes

NEEDS = {"deepspeed": "deepspeed", "torch": "torch", "transformers": "transformers"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def settings(hidden_size: int, batch: int, dtype: str, *, pin_memory: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a model of this size."""
    return {
        "fp16": {"enabled": dtype == "float16"},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * hidden_size * hidden_size,
            "stage3_param_persistence_threshold": hidden_size,
            "stage3_max_live_parameters": 2 * hidden_size * hidden_size,
            "offload_param": {"device": "cpu", "pin_memory": pin_memory},
        },
        "steps_per_print": 2000,
        "train_batch_size": batch,
        "wall_clock_breakdown": False,
    }


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Answer one batch, and return its figures."""
    os.environ.update({name: value for name, value in ALONE.items() if name not in os.environ})
    import deepspeed  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    limit_device(asked.device_bytes)
    start = time.perf_counter()
    deepspeed.init_distributed("nccl")
    config = AutoConfig.from_pretrained(asked.model)
    chosen = settings(config.hidden_size, asked.batch, asked.dtype, pin_memory=asked.pin_memory)
    kept = HfDeepSpeedConfig(chosen)  # as long as it lives, models are made in parts
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked.dtype)).eval()
        engine = deepspeed.initialize(model=model, config=chosen)[0]
        engine.module.eval()
        load_seconds = time.perf_counter() - start
        ids = torch.randint(10, config.vocab_size, (asked.batch, asked.prompt_len), device="cuda")
        timed = timed_generation(engine.module, ids, asked.timed_tokens)
    del kept
    return figures_of(
        "deepspeed", sequences=timed.requests, output_tokens=asked.gen_len, timed_tokens=timed.tokens,
        prefill_seconds=timed.prefill_seconds, decode_seconds=timed.seconds(asked.gen_len) - timed.prefill_seconds,
        load_seconds=load_seconds, peak_device_bytes=peak_device_bytes(), pin_memory=asked.pin_memory,
    )  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a folder with a config.json")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--device-bytes", type=int, required=True, help="the most that may be used of the GPU")
    parser.add_argument("--pin-memory", action="store_true", help="whether weights are pinned, which takes more memory")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--timed-tokens", type=int, default=4, help="tokens that are generated; the others count as the last of them")


if __name__ == "__main__":
    sys.exit(launch(NEEDS, options, run))
