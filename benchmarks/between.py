"""Where the time of a compute-bound pass on a CPU goes: matrix products, and what lies between them.

    python benchmarks/between.py [--threads 2] [--layers 2] [--passes 15] [--profile]

A Llama of 3B's width with few layers and all weights in host memory computes passes of two prompts of 256 tokens.  After each pass the same
products run alone, so that a machine that is slower for a moment cancels.  Prints medians as a JSON line: the milliseconds of a pass and of
its products per layer, the share between products, page faults, and the processor time spent in the kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES

from flexgen.base.quantities import MIB
from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.engine.engine import Engine
from flexgen.models.assemble import assemble_model
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest

TOKENS, PROMPT, VOCABULARY = 512, 256, 1024


@dataclasses.dataclass(slots=True)
class Rounds:
    """What each round took, (seconds, page faults, seconds in the kernel), of passes and of products alone."""

    passes: list[tuple[float, int, float]] = dataclasses.field(default_factory=list)
    products: list[tuple[float, int, float]] = dataclasses.field(default_factory=list)

    def summary(self, layers: int) -> dict[str, float]:
        """Return medians per layer."""
        whole, alone = (statistics.median(each[0] for each in rounds) for rounds in (self.passes, self.products))
        shares = [1 - products[0] / whole[0] for whole, products in zip(self.passes, self.products, strict=True)]
        return {
            "pass_ms": round(1e3 * whole / layers, 2),
            "products_ms": round(1e3 * alone / layers, 2),
            "between": round(statistics.median(shares), 4),
            "faults": statistics.median(each[1] for each in self.passes) / layers,
            "faults_products": statistics.median(each[1] for each in self.products) / layers,
            "kernel_ms": round(1e3 * statistics.median(each[2] for each in self.passes) / layers, 2),
        }


def measured(run: Callable[[], object]) -> tuple[float, int, float]:
    """Run something; return its seconds, page faults and processor seconds in the kernel."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime


def policy(threads: int) -> Policy:
    return Policy(
        device="cpu", dtype="bfloat16", weights=Fractions(host=1.0), kv=Fractions(host=1.0), kv_device_bytes=0, kv_host_bytes=64 * MIB,
        kv_disk_bytes=0, host_ring_bytes=4 * MIB, device_ring_bytes=0, workspace_bytes=256 * MIB, embedding_resident=True,
        schedule="zigzag", max_num_seqs=TOKENS // PROMPT, prefill_tokens=TOKENS, micro_batch_tokens=TOKENS, page_tokens=16,
        compute_threads=threads, io_threads=1, longest_sequence=PROMPT + 1,
    )  # fmt: skip


def products_of(config: Any) -> Callable[[], None]:
    """Return a function that computes the linear layers of all decoder layers, each with weights of its own."""
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    shapes = [(heads * dim, hidden), *[(config.num_key_value_heads * dim, hidden)] * 2, (hidden, heads * dim)]
    shapes += [*[(config.intermediate_size, hidden)] * 2, (hidden, config.intermediate_size)]
    weights = [torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1) for shape in shapes * config.num_hidden_layers]
    inputs = {width: torch.empty(1, TOKENS, width, dtype=torch.bfloat16).uniform_(-1, 1) for _, width in shapes}

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def requests() -> list[TokenRequest]:
    return [TokenRequest(index=index, prompt_token_ids=(1 + index,) * PROMPT, max_tokens=1) for index in range(TOKENS // PROMPT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="print torch's operators of one pass, too")
    args = parser.parse_args()
    shape = SHAPES["llama-3b"]
    few = {"num_hidden_layers": args.layers, "vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    config: Any = dataclasses.replace(shape, config=shape.config | few).hf_config()
    rounds = Rounds()
    with tempfile.TemporaryDirectory(prefix="flexgen-between-") as folder:
        write_random_checkpoint(config, Path(folder), torch.bfloat16)
        model = assemble_model(Path(folder), config, torch.bfloat16)
        with Engine(model, policy(args.threads)) as engine, torch.no_grad():
            products = products_of(config)
            for number in range(args.passes + 2):
                whole, alone = measured(lambda: list(engine.generate(requests()))), measured(products)
                if number >= 2:
                    rounds.passes.append(whole)
                    rounds.products.append(alone)
            print(json.dumps(rounds.summary(args.layers)))
            if args.profile:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                    list(engine.generate(requests()))
                print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


if __name__ == "__main__":
    main()
