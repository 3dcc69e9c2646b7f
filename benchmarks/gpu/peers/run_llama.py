"""llama.cpp: `llama-batched-bench` with some layers on the GPU, and the others where they are mapped into host memory and computed there.

    python -m benchmarks.gpu.peers.run_llama PROGRAM MODEL.gguf --gpu-layers 20 --parallel 32

It knows no budget of the GPU: how many layers fit is for the caller to say.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .launch import figures_of, launch

CONTEXT_STEP = 256  # to which it rounds a context up


def command(asked: argparse.Namespace) -> list[str]:
    """Return the command line of llama-batched-bench."""
    context = -(-asked.parallel * (asked.prompt_len + asked.gen_len) // CONTEXT_STEP) * CONTEXT_STEP
    return [
        str(asked.program), "-m", str(asked.model), "-ngl", str(asked.gpu_layers), "-c", str(context), "-b", "2048", "-ub", "512",
        "-npp", str(asked.prompt_len), "-ntg", str(asked.gen_len), "-npl", str(asked.parallel), "--kv-unified", "--output-format", "jsonl",
    ]  # fmt: skip


def figures(printed: str, gen_len: int, **more: Any) -> dict[str, Any]:
    """Return the figures that llama-batched-bench has printed as a JSON line."""
    line = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    return figures_of(
        "llama.cpp", sequences=line["pl"], output_tokens=gen_len, prefill_seconds=line["t_pp"],
        decode_seconds=line["t_tg"] * gen_len / line["tg"], timed_tokens=line["tg"], **more,
    )  # fmt: skip


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the program, and return its figures."""
    done = subprocess.run(command(asked), stdout=subprocess.PIPE, text=True, check=True)
    return figures(done.stdout, asked.gen_len, version=_version(asked.program), gpu_layers=asked.gpu_layers)


def _version(program: Path) -> str:
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version: (.+)", done.stdout + done.stderr)
    return found[1] if found else "unknown"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", type=Path, help="llama-batched-bench, built for CUDA")
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--gpu-layers", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True, help="sequences that are answered together")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=32)


if __name__ == "__main__":
    sys.exit(launch({}, options, run))
