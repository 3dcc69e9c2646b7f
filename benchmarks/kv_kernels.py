"""Attention of next tokens to KV pages on the host, by format and group size, beside what the same cores can attain.

    python benchmarks/kv_kernels.py --threads 2
    python benchmarks/kv_kernels.py --threads 2 --formats bfloat16 int4 --groups 1
    python benchmarks/kv_kernels.py --threads 2 --formats bfloat16 int8 --groups --latents 16 128
    python benchmarks/kv_kernels.py --threads 1 --formats bfloat16 int4 --groups 1 4 --latents --tokens 2048 --sparse 0.1

Three rates are measured in turns within each round: reads of memory that no cache holds, float32 matrix products, and the kernel.  With n
bytes per number of keys and values and g query heads per key head, each number is read once and takes g multiply-adds, so no kernel can
attend to more numbers per second than min(read rate / n, multiply-adds per second / g).  One JSON line per format and group: medians over
the rounds, the share of what is attainable, and tokens/s relative to bfloat16.  Latents are those of DeepSeek-V2 and V3 (V2-Lite has 16
heads); all heads share them, as keys and as values, so that a number takes nearly two multiply-adds per head.

Sparse attention counts every number that it sees, read or not, on random keys and queries: heads that share keys keep different positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import commit, machine, versions

from flexgen.io.aligned import allocate_memory
from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import KVFormat
from flexgen.kv.low_bit import LowBitKV, kv_format
from flexgen.options import KV_FORMATS
from flexgen.passes.calls import AttentionCall, FixedProjection
from flexgen.passes.geometry import KVGeometry
from flexgen.plan.policy import kept_positions
from flexgen.profile.low_bit import low_bit_steps
from flexgen.profile.sparse import filled_pages, geometry_of, seen_steps, sparse_steps

PAGE_TOKENS, HEAD_DIM = 16, 128
HOST = torch.device("cpu")
RANK, ROPE = 512, 64  # of latents
PLAIN = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORMATS = (*PLAIN, *(name for name in KV_FORMATS if name != "auto"))
QUERY_HEADS = 32
SPARSE = ", sparse"  # behind the name of a format


class Attainable:
    """What the cores can attain: reads of memory, and float32 multiply-adds."""

    def __init__(self) -> None:
        self._numbers = torch.ones(64 * 2**20)
        self._factors = torch.rand(512, 1024), torch.rand(1024, 1024)

    def read_bytes_per_s(self) -> float:
        """Return the rate of one pass over memory that no cache holds."""
        begun = time.perf_counter()
        self._numbers.sum()
        return self._numbers.nbytes / (time.perf_counter() - begun)

    def multiply_adds_per_s(self) -> float:
        """Return the rate of float32 matrix products."""
        one, other = self._factors
        return one.numel() * other.shape[1] / timed(lambda: torch.mm(one, other), 0.05)


def plain_steps(
    kernels: AttentionKernels, dtype: torch.dtype, heads: int, key_heads: int, max_bytes: int, tokens: int
) -> tuple[Callable[[], None], int]:
    """Make a function that attends to pages of plain numbers; return it and the KV bytes that it reads."""
    token_bytes = 2 * key_heads * HEAD_DIM * dtype.itemsize
    sequences, per_sequence = max(max_bytes // (tokens * token_bytes), 1), tokens // PAGE_TOKENS
    number = sequences * per_sequence
    keys, values = (
        allocate_memory(number * PAGE_TOKENS * token_bytes // 2).view(dtype).view(number, key_heads, *shape).uniform_(-1, 1)
        for shape in ((HEAD_DIM, PAGE_TOKENS), (PAGE_TOKENS, HEAD_DIM))
    )
    query = torch.empty(sequences, heads, HEAD_DIM, dtype=dtype).uniform_(-1, 1)
    tables, starts, out = torch.randperm(number).view(sequences, -1), torch.zeros(sequences, dtype=torch.int64), torch.empty_like(query)

    def run() -> None:
        kernels.decode_attention(query, keys, values, tables, starts, starts + tokens, scaling=HEAD_DIM**-0.5, out=out)

    return run, sequences * tokens * token_bytes


def made(kernels: AttentionKernels, name: str, heads: int, key_heads: int, max_bytes: int, tokens: int) -> tuple[Callable[[], None], int]:
    """Make the function of a format."""
    if name in PLAIN:
        return plain_steps(kernels, PLAIN[name], heads, key_heads, max_bytes, tokens)
    kv = kv_format(name, torch.bfloat16)
    assert isinstance(kv, LowBitKV)
    return low_bit_steps(kernels, torch.device("cpu"), kv, heads, key_heads, 2 * max_bytes, tokens)


def format_of(name: str) -> tuple[KVFormat, torch.dtype]:
    """Return a format, and the dtype of computing beside it."""
    dtype = PLAIN.get(name, torch.bfloat16)
    return kv_format("auto" if name in PLAIN else name, dtype), dtype


def sized(kv: KVFormat, geometry: KVGeometry, max_bytes: int, tokens: int) -> tuple[int, int]:
    """Return the number of sequences whose KV takes about so many bytes, and the bytes of a token."""
    token_bytes = kv.key_bytes(geometry) + kv.value_bytes(geometry)
    return max(max_bytes // (tokens * token_bytes), 1), token_bytes


def latent_steps(kernels: AttentionKernels, name: str, heads: int, max_bytes: int, tokens: int) -> tuple[Callable[[], None], int]:
    """Make a function that attends to latents in a format; return it and the bytes of latents that it reads."""
    geometry = KVGeometry(key_heads=1, key_dim=RANK, value_heads=1, value_dim=ROPE, latent=True)
    kv, dtype = format_of(name)
    sequences, token_bytes = sized(kv, geometry, max_bytes, tokens)
    pages = filled_pages(kernels, HOST, kv, dtype, geometry, sequences, tokens)
    query = torch.empty(sequences, heads, RANK + ROPE, dtype=dtype).uniform_(-1, 1)
    out, steps = torch.empty(sequences, heads, RANK, dtype=dtype), seen_steps(HOST, sequences, tokens)
    call = AttentionCall(
        layer=0, query=query, key=query, value=query, scaling=HEAD_DIM**-0.5, latent=FixedProjection(key_up=query, value_up=query)
    )

    def run() -> None:
        pages.decode(kernels, call, query, steps, out)

    return run, sequences * tokens * token_bytes


def sparse_case(
    kernels: AttentionKernels, name: str, heads: int, key_heads: int, share: float, max_bytes: int, tokens: int
) -> tuple[Callable[[], None], int, float]:
    """Make a function that attends to a share of the positions.

    Returns:
        The function, the KV bytes that dense attention would read, and the share of the values that is not read.
    """
    kv, dtype = format_of(name)
    sequences, _ = sized(kv, geometry_of(key_heads), max_bytes, tokens)
    return sparse_steps(kernels, HOST, kv, dtype, (heads, key_heads), kept_positions(share, tokens), sequences, tokens)


def timed(run: Callable[[], object], least_seconds: float) -> float:
    """Return the seconds of one call, over enough calls to be measured."""
    calls, begun = 0, time.perf_counter()
    while not calls or time.perf_counter() - begun < least_seconds:
        run()
        calls += 1
    return (time.perf_counter() - begun) / calls


Runs = dict[str, tuple[Callable[[], None], int]]  # by format: what attends, and the KV bytes that it reads


def of_heads(kernels: AttentionKernels, group: int, options: Any) -> list[dict[str, Any]]:
    """Measure all formats for one group size."""
    key_heads = QUERY_HEADS // group
    runs = {name: made(kernels, name, QUERY_HEADS, key_heads, options.mebibytes << 20, options.tokens) for name in options.formats}
    numbers = {name: _number_bytes(name) for name in runs}
    about = {"heads_per_key_head": group, "tokens": options.tokens, "head_dim": HEAD_DIM}
    if options.sparse is None:
        return case(runs, numbers, group, options, about)
    unread: dict[str, float] = {}
    for name in options.formats:
        how = QUERY_HEADS, key_heads, options.sparse, options.mebibytes << 20, options.tokens
        run, kv_bytes, unread[name + SPARSE] = sparse_case(kernels, name, *how)
        runs[name + SPARSE], numbers[name + SPARSE] = (run, kv_bytes), numbers[name]
    rows = case(runs, numbers, group, options, about)
    for row in rows:
        if row["format"] in unread:
            row |= {"share": options.sparse, "values_not_read": unread[row["format"]]}
    return rows


def of_latents(kernels: AttentionKernels, heads: int, options: Any) -> list[dict[str, Any]]:
    """Measure all formats on latents that so many heads share; in those of few bits they have 8."""
    runs = {name: latent_steps(kernels, name, heads, options.mebibytes << 20, options.tokens) for name in options.formats}
    numbers = {name: _number_bytes(name if name in PLAIN else "int8") for name in runs}
    adds = heads * (2 * RANK + ROPE) / (RANK + ROPE)
    return case(runs, numbers, adds, options, {"latent_heads": heads, "tokens": options.tokens, "rank": RANK, "rope": ROPE})


def case(
    runs: Runs, bytes_per_number: dict[str, float], adds_per_number: float, options: Any, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure formats in turns.

    Args:
        runs: What is measured.
        bytes_per_number: By format, scales included.
        adds_per_number: The multiply-adds that a number takes.
        options: The options of the command.
        about: What the lines say of the case.
    """
    attainable = Attainable()
    for run, _ in runs.values():
        run()
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (run, kv_bytes) in runs.items():
            read, adds = attainable.read_bytes_per_s(), attainable.multiply_adds_per_s()
            seconds = timed(run, 0.1)
            number_bytes = bytes_per_number[name]
            numbers = kv_bytes / number_bytes / seconds
            limit = min(read / number_bytes, adds / adds_per_number)
            rates[name].append({
                "numbers_per_s": numbers, "bytes_per_s": kv_bytes / seconds, "read_bytes_per_s": read, "multiply_adds_per_s": adds,
                "share_of_attainable": numbers / limit,
            })  # fmt: skip
    rows = []
    for name, measured in rates.items():
        row: dict[str, Any] = {"format": name, **about}
        row |= {key: statistics.median(each[key] for each in measured) for key in measured[0]}
        if "bfloat16" in rates:
            pairs = zip(measured, rates["bfloat16"], strict=True)
            row["tokens_per_s_over_bfloat16"] = statistics.median(own["numbers_per_s"] / other["numbers_per_s"] for own, other in pairs)
        if name.endswith(SPARSE):
            pairs = zip(measured, rates[name.removesuffix(SPARSE)], strict=True)
            row["tokens_per_s_over_dense"] = statistics.median(own["numbers_per_s"] / other["numbers_per_s"] for own, other in pairs)
        rows.append(row)
    return rows


def _number_bytes(name: str) -> float:
    if name in PLAIN:
        return PLAIN[name].itemsize
    return {"int8": 8.5, "k8v4": 6.75, "int4": 5.0}[name] / 8  # scales included


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--groups", nargs="*", type=int, default=[1, 4, 8])
    parser.add_argument("--latents", nargs="*", type=int, default=[16, 128], help="heads that share latents")
    parser.add_argument("--sparse", type=float, metavar="SHARE", help="measure sparse attention, too, beside dense attention")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--mebibytes", type=int, default=128, help="of KV per case")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    place = {"threads": options.threads, **commit(), "machine": machine(), "versions": versions()}
    with attention_kernels(torch.device("cpu"), options.threads) as kernels:
        cases = [(of_heads, group) for group in options.groups] + [(of_latents, heads) for heads in options.latents]
        for measure, heads in cases:
            for row in measure(kernels, heads, options):
                print(json.dumps({**row, **place}), flush=True)


if __name__ == "__main__":
    main()
