"""A real model in GGUF, streamed from disk: are its answers those of transformers' own GGUF loader, and how fast are blocks decoded?

    pip install gguf accelerate
    python benchmarks/gguf_answers.py MODEL.gguf --scratch DIR

50 chats, greedy, 24 tokens each, in float32.  `flexgen run` gets no more memory for weights, decoded ones included, than a quarter of the
file: its ring, usually a share of the budget, is kept to 8 % of it.  transformers has all weights in memory, one chat at a time.  Then each
type of blocks is decoded to bfloat16 on as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from record import Results
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen.hub.gguf_file import TYPES
from flexgen.hub.gguf_model import read_gguf
from flexgen.kernels.dequantize.gguf import KERNELS, decode_blocks
from flexgen.kernels.threads import KernelThreads
from flexgen.options import EngineOptions
from flexgen.plan.price.memory import scratch_bytes
from flexgen.session.lookup import spec_of

DEFAULT_RESULTS = Path(__file__).parent / "results" / "gguf.jsonl"
MAX_TOKENS = 24
SHARE = 0.25  # of the file, for weights in memory
BUDGETS = (0.58, 0.6, 0.62, 0.64, 0.66, 0.7, 0.8, 1.0, 1.5, 2.0)  # GiB of the whole process; the first that there is a plan for is taken
RING = 0.08  # of the file
WITH_SMALL_RING = "from flexgen.plan.search import drafts; drafts.RING_SHARE = {}; from flexgen.cli import main; raise SystemExit(main())"
SECONDS = 2.0
NUMBERS = 1 << 24

TASKS = ("What is {}?", "Write one sentence about {}.", "Name three facts about {}.", "Why do people like {}?", "Explain {} to a child.")
SUBJECTS = ("rain", "the moon", "bread", "a library", "gravity", "chess", "a lighthouse", "honey", "the sea", "a bicycle")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-requests", type=int, default=len(TASKS) * len(SUBJECTS))
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"
    chats = [task.format(subject) for subject in SUBJECTS for task in TASKS][: args.num_requests]
    row: dict[str, Any] = about(args.model) | answers(args.model, chats, args.scratch) | {"decoded_numbers_per_s": decoding_rates()}
    print(json.dumps(Results(args.results).append({"benchmark": "gguf", **row})))
    return 0 if row["equal"] == row["requests"] and row["weight_memory_share"] <= SHARE else 1


def about(path: Path) -> dict[str, Any]:
    """What is in the file."""
    kinds: dict[str, int] = {}
    for _, tensor in read_gguf(path).tensors:
        kinds[tensor.type.name] = kinds.get(tensor.type.name, 0) + tensor.nbytes
    return {"model": path.name, "file_bytes": path.stat().st_size, "bytes_by_type": kinds}


def answers(path: Path, chats: list[str], scratch: Path) -> dict[str, Any]:
    """Run the chats with flexgen and with transformers, and compare the answers."""
    texts, metrics = with_flexgen(path, chats, scratch)
    memory, spec = metrics["forecast"]["memory_bytes"]["host"], spec_of(str(path), EngineOptions(dtype="float32"), device="cpu")
    held = sum(memory.get(name, 0) for name in ("weights", "weight staging", "small tensors", "embedding"))
    decoded = scratch_bytes(spec, ["disk"] * len(spec.units), "cpu")
    began, kept = time.perf_counter(), (scratch / "transformers.json").exists()
    wanted = with_transformers(path, chats, scratch / "transformers.json")
    return {
        "requests": len(chats),
        "equal": sum(a == b for a, b in zip(texts, wanted, strict=True)),
        "max_tokens": MAX_TOKENS,
        "dtype": "float32",
        "weight_memory_bytes": held + decoded,
        "weight_memory_share": (held + decoded) / path.stat().st_size,
        "host_budget_bytes": metrics["host_budget_bytes"],
        "peak_host_bytes": metrics["peak_host_bytes"],
        "bytes_moved": metrics["bytes_moved"],
        "num_passes": metrics["num_passes"],
        "elapsed_seconds": metrics["elapsed_seconds"],
        "transformers_seconds": None if kept else time.perf_counter() - began,
    }


def with_flexgen(path: Path, chats: list[str], scratch: Path) -> tuple[list[str], Mapping[str, Any]]:
    """Return the answers of `flexgen run`, and its metrics."""
    requests, output, metrics = scratch / "chats.jsonl", scratch / "answers.jsonl", scratch / "metrics.json"
    lines = ({"messages": [{"role": "user", "content": chat}]} for chat in chats)
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for budget in BUDGETS:
        command = [
            sys.executable, "-c", WITH_SMALL_RING.format(RING * path.stat().st_size / (budget * 2**30)),
            "run", path, requests, "-o", output, "--fresh", "--metrics", metrics,
            "--max-tokens", str(MAX_TOKENS), "--temperature", "0", "--dtype", "float32", "--device", "cpu", "--weights", "disk=1",
            "--host-mem", f"{budget}GiB", "--progress", "none",
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        raise SystemExit(done.stderr)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return [record["choices"][0]["message"]["content"] if "choices" in record else record["text"] for record in records], json.loads(
        metrics.read_text()
    )


@torch.no_grad()
def with_transformers(path: Path, chats: list[str], kept: Path) -> list[str]:
    """Return the answers of transformers' own loader, which are kept for the next time."""
    if kept.exists():
        before = json.loads(kept.read_text())
        return [before[chat] for chat in chats]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    found = []
    for chat in chats:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    kept.write_text(json.dumps(dict(zip(chats, found, strict=True))))
    return found


def decoding_rates() -> dict[str, float]:
    """Return the numbers per second that are decoded to bfloat16, by type of blocks."""
    sizes = {kind.name: (kind.block, kind.block_bytes) for kind in TYPES.values()}
    out, rates = torch.empty(NUMBERS, dtype=torch.bfloat16), {}
    with KernelThreads(len(os.sched_getaffinity(0))) as threads:
        for name in KERNELS:
            block, block_bytes = sizes[name]
            raw = torch.randint(0, 100, (NUMBERS // block * block_bytes,), dtype=torch.uint8)
            decode_blocks(name, raw, out, threads.over)  # compiles
            count, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < SECONDS:
                decode_blocks(name, raw, out, threads.over)
                count += 1
            rates[name] = count * NUMBERS / elapsed
    return rates


if __name__ == "__main__":
    raise SystemExit(main())
