"""transformers with accelerate's disk offload on a CPU, as compare.py runs it inside a memory cgroup.

One JSON line per event on stdout ("loaded", then "batch" after each), flushed, so that what was measured survives a kill.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from generation import timed_generation
from transformers import AutoModelForCausalLM


def tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("requests", type=Path, help="the file that flexgen gets too; prompts of one length")
    parser.add_argument("--resident-bytes", type=int, required=True, help="weights in memory, at most; the rest stays on disk")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    parser.add_argument("--max-batches", type=int)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; no batch begins that would pass it")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    prompts = torch.tensor([json.loads(line)["prompt"] for line in args.requests.read_text().splitlines()])
    with tempfile.TemporaryDirectory(dir=args.scratch) as offload_folder:
        model = AutoModelForCausalLM.from_pretrained(
            args.model,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": args.resident_bytes},
            offload_folder=offload_folder,
        )
        places = list(getattr(model, "hf_device_map", {}).values())
        tell(event="loaded", seconds=time.perf_counter() - started, modules=len(places), disk_modules=places.count("disk"))
        for batch in prompts.split(args.batch)[: args.max_batches]:
            timed = timed_generation(model, batch, args.output_tokens)
            seconds = timed.prefill_seconds + timed.decode_seconds
            tell(event="batch", requests=timed.requests, steps=timed.tokens, seconds=seconds, prefill_seconds=timed.prefill_seconds)
            if time.perf_counter() - started + seconds > args.time_limit:
                break


if __name__ == "__main__":
    main()
