"""The attention kernels of the host alone: decode against the rate at which memory is read, prefill against torch's own attention.

    python benchmarks/attention.py --threads 2

One JSON line per case; rates are of the best of the repeats, since others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from record import commit, machine, versions

from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.reference import AttentionKernels

PAGE_TOKENS = 32
DTYPE = torch.bfloat16
DECODE = (  # heads, kv_heads, head_dim, sequences, tokens
    (24, 8, 128, 64, 272),
    (32, 32, 128, 64, 272),
    (32, 8, 128, 64, 272),
    (64, 8, 128, 64, 272),
    (64, 8, 64, 64, 272),
    (24, 8, 128, 8, 4096),
)
PREFILL = ((24, 8, 128, 256), (24, 8, 128, 1024), (32, 32, 128, 1024), (24, 8, 128, 4096))  # heads, kv_heads, head_dim, tokens
LATENT = ((128, 512, 64, 16, 272), (16, 512, 64, 64, 272))  # heads, rank, rope_dim, sequences, tokens


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def read_bytes_per_s(repeats: int) -> float:
    """Of memory that no cache holds."""
    numbers = torch.ones(64 * 2**20)
    return numbers.nbytes / best_seconds(numbers.sum, repeats)


def pages(sequences: int, tokens: int) -> tuple[int, torch.Tensor]:
    """How many there are, and tables in which they lie in random order."""
    per_sequence = -(-tokens // PAGE_TOKENS)
    return sequences * per_sequence, torch.randperm(sequences * per_sequence).view(sequences, per_sequence)


def decode(
    kernels: AttentionKernels, heads: int, kv_heads: int, head_dim: int, sequences: int, tokens: int, repeats: int
) -> dict[str, Any]:
    num_pages, page_tables = pages(sequences, tokens)
    query = torch.randn(sequences, heads, head_dim).to(DTYPE)
    key_pages = torch.randn(num_pages, kv_heads, head_dim, PAGE_TOKENS).to(DTYPE)
    value_pages = torch.randn(num_pages, kv_heads, PAGE_TOKENS, head_dim).to(DTYPE)
    positions = torch.zeros(sequences, dtype=torch.int64), torch.full((sequences,), tokens)
    arguments = query, key_pages, value_pages, page_tables, *positions
    out = torch.empty_like(query)
    seconds = best_seconds(lambda: kernels.decode_attention(*arguments, scaling=head_dim**-0.5, out=out), repeats)
    kv_bytes = 2 * sequences * tokens * kv_heads * head_dim * DTYPE.itemsize
    return {"seconds": seconds, "bytes_per_s": kv_bytes / seconds}


def prefill(kernels: AttentionKernels, heads: int, kv_heads: int, head_dim: int, tokens: int, repeats: int) -> dict[str, Any]:
    query, key, value = (torch.randn(tokens, n, head_dim).to(DTYPE) for n in (heads, kv_heads, kv_heads))
    starts, out = torch.zeros(tokens, dtype=torch.int64), torch.empty_like(query)
    seconds = best_seconds(lambda: kernels.prefill_attention(query, key, value, starts, scaling=head_dim**-0.5, out=out), repeats)
    q, k, v = (tensor.transpose(0, 1)[None].contiguous() for tensor in (query, key, value))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    sdpa_seconds = best_seconds(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=heads != kv_heads), repeats)
    flops = 4 * heads * head_dim * tokens * (tokens + 1) / 2
    return {"seconds": seconds, "flops_per_s": flops / seconds, "sdpa_seconds": sdpa_seconds, "sdpa_flops_per_s": flops / sdpa_seconds}


def latent(kernels: AttentionKernels, heads: int, rank: int, rope_dim: int, sequences: int, tokens: int, repeats: int) -> dict[str, Any]:
    num_pages, page_tables = pages(sequences, tokens)
    query_latent, query_rope = (torch.randn(sequences, heads, dim).to(DTYPE) for dim in (rank, rope_dim))
    key_pages = torch.randn(num_pages, 1, rank, PAGE_TOKENS).to(DTYPE)
    value_pages = torch.randn(num_pages, 1, PAGE_TOKENS, rope_dim).to(DTYPE)
    positions = torch.zeros(sequences, dtype=torch.int64), torch.full((sequences,), tokens)
    arguments = query_latent, query_rope, key_pages, value_pages, page_tables, *positions
    out = torch.empty_like(query_latent)
    seconds = best_seconds(lambda: kernels.decode_latent_attention(*arguments, scaling=0.1, out=out), repeats)
    flops = 2 * sequences * heads * tokens * (2 * rank + rope_dim)
    return {"seconds": seconds, "flops_per_s": flops / seconds}


def cases(kernels: AttentionKernels, repeats: int) -> Iterator[dict[str, Any]]:
    for shape in DECODE:
        read = read_bytes_per_s(repeats)
        row = decode(kernels, *shape, repeats)
        names = dict(zip(("heads", "kv_heads", "head_dim", "sequences", "tokens"), shape, strict=True))
        yield {"kernel": "decode", **names, **row, "read_bytes_per_s": read, "share_of_read": row["bytes_per_s"] / read}
    for shape in PREFILL:
        names = dict(zip(("heads", "kv_heads", "head_dim", "tokens"), shape, strict=True))
        yield {"kernel": "prefill", **names, **prefill(kernels, *shape, max(3, repeats // 4))}
    for shape in LATENT:
        names = dict(zip(("heads", "rank", "rope_dim", "sequences", "tokens"), shape, strict=True))
        yield {"kernel": "latent", **names, **latent(kernels, *shape, max(3, repeats // 4))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    place = {"threads": options.threads, "dtype": str(DTYPE), **commit(), "machine": machine(), "versions": versions()}
    with attention_kernels(torch.device("cpu"), options.threads) as kernels:
        for row in cases(kernels, options.repeats):
            print(json.dumps({**row, **place}), flush=True)


if __name__ == "__main__":
    main()
