"""What sampling costs: seconds per batch of a large vocabulary, greedy, plain, nucleus and top-k rows mixed.

python benchmarks/sampler.py --rows 64 --vocab-size 128256
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from flexgen.engine.sampler import sample
from flexgen.request import TokenRequest

ROUNDS = 9
GREEDY = TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=1)
KINDS = (
    GREEDY,
    replace(GREEDY, temperature=1.0),
    replace(GREEDY, temperature=1.0, top_p=0.95),
    replace(GREEDY, temperature=1.0, top_k=50),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(asked.rows, asked.vocab_size, generator=generator)).bfloat16()
    requests = [replace(KINDS[row % len(KINDS)], index=row, seed=row) for row in range(asked.rows)]
    seconds: list[float] = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        sample(logits, requests, [()] * asked.rows)
        seconds.append(time.perf_counter() - start)
    print(f"{asked.rows} rows of {asked.vocab_size:,} logits: median {statistics.median(seconds[1:]):.3f} s, best {min(seconds[1:]):.3f} s")


if __name__ == "__main__":
    main()
