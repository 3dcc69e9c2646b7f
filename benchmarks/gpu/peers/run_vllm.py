"""vLLM with a part of the weights in host memory (`--cpu-offload-gb`), from where the GPU reads them in every step.

    python -m benchmarks.gpu.peers.run_vllm MODEL --num-prompts 16 --device-bytes N --cpu-offload-gb G [--packages DIR]

MODEL is a folder with a config.json; weights are vLLM's own dummies.  It runs without its graphs, which would take longer to make than they
would save here.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from .launch import figures_of, launch

NEEDS = {"vllm": "vllm", "torch": "torch"}


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Answer all prompts twice, the first time with one token each, and return the figures of the second."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    total = torch.cuda.get_device_properties(0).total_memory
    llm = LLM(
        model=str(asked.model), skip_tokenizer_init=True, load_format="dummy", dtype=asked.dtype, enforce_eager=True, seed=0,
        cpu_offload_gb=asked.cpu_offload_gb, gpu_memory_utilization=asked.device_bytes / total, enable_prefix_caching=False,
        max_model_len=asked.prompt_len + asked.gen_len, max_num_seqs=asked.num_prompts,
    )  # fmt: skip
    load_seconds = time.perf_counter() - start
    ids = random.Random(0)
    prompts = [{"prompt_token_ids": [ids.randrange(10, 30000) for _ in range(asked.prompt_len)]} for _ in range(asked.num_prompts)]

    def answer(tokens: int) -> float:
        begun = time.perf_counter()
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False), use_tqdm=False
        )
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return time.perf_counter() - begun

    prefill_seconds = answer(1)
    seconds = answer(asked.gen_len)
    return figures_of(
        "vllm", sequences=asked.num_prompts, output_tokens=asked.gen_len, prefill_seconds=prefill_seconds,
        decode_seconds=seconds - prefill_seconds, load_seconds=load_seconds, cpu_offload_gb=asked.cpu_offload_gb,
    )  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a folder with a config.json")
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--device-bytes", type=int, required=True, help="the most that may be used of the GPU")
    parser.add_argument("--cpu-offload-gb", type=float, required=True, help="GiB of the weights in host memory")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=32)


if __name__ == "__main__":
    sys.exit(launch(NEEDS, options, run))
