"""The original FlexGen 0.1.8 with ones for weights: `python -m flexgen.flex_opt` as released, on today's torch and without a network.

    python -m benchmarks.gpu.peers.run_flexgen --packages DIR --device-bytes N -- --model facebook/opt-30b --path _DUMMY_ ...

What stands behind `--` is its own command line.  What is changed, and why:

* Its prompt comes from a tokenizer that it downloads; the stand-in returns as many ids, padding in front, which costs the same time.
* At the end it looks through all of Python's objects for tensors in host memory, only to print their bytes.  This may meet objects of newer
  packages that do not bear it, after all has been timed.  It prints 0.
* Torch may hold no more of the GPU than it is told, so that a larger card stands for a smaller one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import sys
import time
import types
from typing import Any

from .launch import figures_of, launch, limit_device

NEEDS = {"flexgen.flex_opt": "flexgen==0.1.8", "torch": "torch", "transformers": "transformers", "attr": "attrs", "tqdm": "tqdm"}
PAD_ID = 1  # of OPT
PROMPT_IDS = (2, 39993, 16, 5, 812, 343, 9)  # the last ids of a prompt; which ones they are changes no time
_LOG = re.compile(
    r"peak gpu mem: (?P<peak>[\d.]+) GB\s+projected: (?P<projected>\w+)\s+"
    r"prefill latency: (?P<prefill>[\d.]+) s\s+prefill throughput: [\d.]+ token/s\s+"
    r"decode latency: (?P<decode>[\d.]+) s\s+decode throughput: [\d.]+ token/s\s+"
    r"total latency: (?P<total>[\d.]+) s\s+total throughput: (?P<rate>[\d.]+) token/s"
)


class Tokenizer:
    """Stands for the tokenizer: it has one text, and any length."""

    @classmethod
    def from_pretrained(cls, name: str, **how: Any) -> Tokenizer:
        return cls()

    def __call__(self, prompts: list[str], *, padding: str, max_length: int) -> types.SimpleNamespace:
        text = list(PROMPT_IDS[:max_length])
        return types.SimpleNamespace(input_ids=[[PAD_ID] * (max_length - len(text)) + text for _ in prompts])


def read_log(text: str) -> dict[str, Any]:
    """Return the figures that the original prints at its end.

    Raises:
        ValueError: They are not in the text.
    """
    found = _LOG.search(text)
    if found is None:
        raise ValueError("FlexGen has printed no figures")
    return {
        "peak_device_bytes": round(float(found["peak"]) * 2**30), "projected": found["projected"] == "True",
        "prefill_seconds": float(found["prefill"]), "decode_seconds": float(found["decode"]),
        "printed_tokens_per_s": float(found["rate"]),
    }  # fmt: skip


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the original, and return its figures."""
    import transformers

    setattr(transformers, "AutoTokenizer", Tokenizer)  # noqa: B010 - it is imported from there by name
    flex_opt, backend = (importlib.import_module(f"flexgen.{name}") for name in ("flex_opt", "pytorch_backend"))
    setattr(backend, "cpu_mem_stats", lambda: 0)  # noqa: B010
    if asked.device_bytes is not None:
        limit_device(asked.device_bytes)
    parser = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(parser)
    theirs = parser.parse_args(asked.command)
    start, printed = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        flex_opt.run_flexgen(theirs)
    whole = time.perf_counter() - start
    sys.stderr.write(printed.getvalue())
    found = read_log(printed.getvalue())
    seconds = found["prefill_seconds"], found["decode_seconds"]
    return figures_of(
        "flexgen", sequences=theirs.gpu_batch_size * theirs.num_gpu_batches, output_tokens=theirs.gen_len,
        other_seconds=whole - sum(seconds), setting=" ".join(asked.command), **found,
    )  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device-bytes", type=int, help="the most that may be used of the GPU; all of it if left out")
    parser.add_argument("command", nargs="*", help="the original's own command line, behind --")


if __name__ == "__main__":
    sys.exit(launch(NEEDS, options, run))
