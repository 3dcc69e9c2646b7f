"""transformers with accelerate's device map: what the GPU cannot hold lies in host memory and is copied to it for each layer.

    python -m benchmarks.gpu.peers.run_accelerate MODEL --batch 8 --device-bytes N --kv-bytes N [--packages DIR]

MODEL is a folder with a config.json.  All weights are 0.01: they are made in host memory, and placed as `from_pretrained` places them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ...generation import timed_generation
from .launch import figures_of, launch, limit_device, peak_device_bytes

NEEDS = {"accelerate": "accelerate", "torch": "torch", "transformers": "transformers"}
WORKSPACE_BYTES = 3 << 30  # of the GPU, for activations and for the layer that is being copied


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Answer one batch, and return its figures."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map  # pyright: ignore[reportMissingImports]

    limit_device(asked.device_bytes)
    start = time.perf_counter()
    model = filled_model(asked.model, getattr(torch, asked.dtype))
    weights_bytes = max(asked.device_bytes - WORKSPACE_BYTES - asked.kv_bytes, 0)
    device_map = infer_auto_device_map(
        model, max_memory={0: weights_bytes, "cpu": sys.maxsize}, no_split_module_classes=sorted(model._no_split_modules)
    )
    model = dispatch_model(model, device_map)
    load_seconds = time.perf_counter() - start
    ids = torch.randint(10, model.config.vocab_size, (asked.batch, asked.prompt_len), device="cuda")
    with torch.no_grad():
        timed = timed_generation(model, ids, asked.timed_tokens)
    places = list(device_map.values())
    return figures_of(
        "accelerate", sequences=timed.requests, output_tokens=asked.gen_len, timed_tokens=timed.tokens,
        prefill_seconds=timed.prefill_seconds, decode_seconds=timed.seconds(asked.gen_len) - timed.prefill_seconds,
        load_seconds=load_seconds, peak_device_bytes=peak_device_bytes(), modules_on_device=[places.count(0), len(places)],
    )  # fmt: skip


def filled_model(folder: Path, dtype: Any) -> Any:
    """Return the model of a config in host memory; every weight is written, so that its pages are there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.to_empty(device="cpu")
    model.tie_weights()  # each of them has got memory of its own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        for buffer in model.buffers():
            buffer.zero_()
    return model.eval()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a folder with a config.json")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--device-bytes", type=int, required=True, help="the most that may be used of the GPU")
    parser.add_argument("--kv-bytes", type=int, required=True, help="what keys and values of the batch take there")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--timed-tokens", type=int, default=4, help="tokens that are generated; the others count as the last of them")


if __name__ == "__main__":
    sys.exit(launch(NEEDS, options, run))
