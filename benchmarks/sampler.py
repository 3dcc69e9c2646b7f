"""What sampling costs on the host: seconds per batch of a large vocabulary, for each kind of row and for all kinds mixed.

python benchmarks/sampler.py --rows 64 --vocab-size 128256

With --together all rows are sampled at once by the operations that a device uses; on a CPU that is slower.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from flexgen.devices.packed import PackedCopies
from flexgen.devices.staging import Staging
from flexgen.engine.device_sampler import start_sampling
from flexgen.engine.sampler import sample
from flexgen.request import TokenRequest

ROUNDS = 9
GREEDY = TokenRequest(index=0, prompt_token_ids=(1,), max_tokens=1)
KINDS = {
    "greedy": GREEDY,
    "plain": replace(GREEDY, temperature=1.0),
    "nucleus": replace(GREEDY, temperature=1.0, top_p=0.95),
    "top-k": replace(GREEDY, temperature=1.0, top_k=50),
}


def seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """The durations of several calls, after one that does not count."""
    found: list[float] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--together", action="store_true")
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(asked.rows, asked.vocab_size, generator=generator)).bfloat16()
    nothing: list[tuple[int, ...]] = [()] * asked.rows
    copies = PackedCopies(Staging(None))
    for name, kinds in [*((name, [kind]) for name, kind in KINDS.items()), ("mixed", list(KINDS.values()))]:
        requests = [replace(kinds[row % len(kinds)], index=row, seed=row) for row in range(asked.rows)]
        if asked.together:
            found = seconds(lambda requests=requests: start_sampling(logits, requests, nothing, copies)(), asked.rounds)
        else:
            found = seconds(lambda requests=requests: sample(logits, requests, nothing), asked.rounds)
        print(f"{name}: {asked.rows} rows of {asked.vocab_size:,} logits: median {statistics.median(found):.4f} s, best {min(found):.4f} s")


if __name__ == "__main__":
    main()
