"""Measures linear layers, attention and elementwise operations, on the device that computes and on the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from flexgen.formats.plain import dtype_name
from flexgen.io.aligned import allocate_memory
from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.plan.machine import Curve, Rate
from flexgen.plan.price.pass_time import elementwise_bytes
from flexgen.profile.timing import measured_rate, median_seconds

DENSE_ROWS = (1, 16, 64, 128, 256, 512, 1024)
DEVICE_ROWS = (2048, 4096, 8192, 16384)  # beside those, on a device: large ones reach their best rate late
QUEUED, MOST_QUEUED_ROWS = 10, 1024  # calls on a device before the host waits, and the rows up to which its waiting would count
DENSE_SHAPES = ((4096, 4096), (8192, 3072))  # (out features, in features)
ATTENTION_TOKENS = (256, 512, 1024)
# (query heads, key heads): 1, 4 and 8 FLOPs per byte of KV in a dtype of two bytes.
STEP_HEADS = ((16, 16), (16, 4), (32, 4))
LAUNCHES = 200  # fewer than a device's queue holds, so that launching them waits for nothing
HEAD_DIM, PAGE_TOKENS, STEP_TOKENS = 128, 16, 512


class LinearLayer(NamedTuple):
    """A linear layer that is measured.

    Attributes:
        row_bytes: The bytes of a row of inputs and of its outputs.
        rate: A function that measures the FLOP/s of so many rows, in so many seconds.
    """

    row_bytes: int
    rate: Callable[[int, float], float]


def dense_rates(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> Curve:
    """Measure linear layers: (rows, FLOP/s), over shapes and rounds."""
    most = max_bytes // 3  # the library may pack weights once more

    def make(shape: tuple[int, int]) -> LinearLayer:
        features_out, features_in = shrunken(shape, dtype.itemsize, most)
        weight = random_numbers((features_out, features_in), where, dtype)

        def rate(rows: int, seconds: float) -> float:
            x = random_numbers((rows, features_in), where, dtype)
            run, calls = queued(lambda: torch.nn.functional.linear(x, weight), where, rows)
            return 2 * rows * features_in * features_out * calls / median_seconds(run, seconds)

        return LinearLayer((features_in + features_out) * dtype.itemsize, rate)

    return rates_by_rows(make, DENSE_ROWS if where.type == "cpu" else (*DENSE_ROWS, *DEVICE_ROWS), most, seconds)


def rates_by_rows(make: Callable[[tuple[int, int]], LinearLayer], row_counts: Sequence[int], most_bytes: int, seconds: float) -> Curve:
    """Measure linear layers for several numbers of rows, each at least once if it fits: (rows, FLOP/s), over DENSE_SHAPES and rounds.

    Args:
        make: A function that makes a layer of (out features, in features), of which one is held at a time.
        row_counts: The numbers of rows, ascending.
        most_bytes: The most bytes of inputs and outputs.
        seconds: About how long it may take.
    """
    rounds: dict[int, list[float]] = {rows: [] for rows in row_counts}
    began = time.perf_counter()
    while not rounds[row_counts[0]] or time.perf_counter() - began < seconds / 2:  # the next round takes as long as those before
        for shape in DENSE_SHAPES:
            layer = make(shape)
            for rows in row_counts:
                if rounds[rows] and time.perf_counter() - began > 2 * seconds:
                    continue
                if rows * layer.row_bytes > most_bytes:
                    break
                rounds[rows].append(layer.rate(rows, seconds / 15))
            del layer
    return tuple((float(rows), Rate.of(rates)) for rows, rates in rounds.items() if rates)


def queued(call: Callable[[], torch.Tensor], where: torch.device, rows: int = 1) -> tuple[Callable[[], None], int]:
    """Return a function that makes some calls for so many rows and waits for the last, and the number of calls.

    On a device several are queued, as in a pass, so that what the host takes to launch and to wait does not count.
    """
    number = 1 if where.type == "cpu" or rows > MOST_QUEUED_ROWS else QUEUED

    def run() -> None:
        for _ in range(number - 1):
            call()
        wait(call())

    return run, number


def launch_seconds(where: torch.device, seconds: float) -> float:
    """Measure what the host takes to launch a small operation on a device, Python included; the device is faster than that."""
    numbers = torch.zeros(16, device=where)

    def launch() -> torch.Tensor:
        return numbers.add_(1)

    return 1 / measured_rate(LAUNCHES, lambda: [launch() for _ in range(LAUNCHES)], seconds).typical


def keep_busy(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> None:
    """Multiply matrices on all cores for a while."""
    weight = random_numbers(shrunken((2048, 2048), dtype.itemsize, max_bytes // 3), where, dtype)
    x = random_numbers((256, 2048), where, dtype)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        wait(torch.nn.functional.linear(x, weight))


def better(typical: Curve, other: Curve) -> Curve:
    """Return the first curve with the best rates of both."""
    best = {rows: rate.best for rows, rate in other}
    return tuple((rows, Rate(max(rate.best, best.get(rows, 0.0)), rate.typical, rate.spread)) for rows, rate in typical)


def random_numbers(shape: tuple[int, ...], where: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers between -1 and 1; zeros would be computed at other rates."""
    return torch.empty(shape, dtype=dtype, device=where).uniform_(-1, 1)


def shrunken(shape: tuple[int, int], item_bytes: int, max_bytes: int) -> tuple[int, int]:
    """Return the shape with its outputs halved until it fits."""
    features_out, features_in = shape
    while features_out * features_in * item_bytes > max_bytes and features_out > 256:
        features_out //= 2
    return features_out, features_in


def attention_rate(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> Rate:
    """Measure causal attention in FLOP/s over the visible pairs.

    The typical rate is that of the engine's own kernels; the best one is the best of theirs, torch's and plain products.
    """
    heads, own, best = 16, [], 0.0
    with attention_kernels(where, torch.get_num_threads()) as kernels:
        for tokens in ATTENTION_TOKENS:
            if own and 10 * heads * tokens * HEAD_DIM * max(dtype.itemsize, 4) > max_bytes:
                continue
            q, k, v = (random_numbers((tokens, heads, HEAD_DIM), where, dtype) for _ in range(3))  # (tokens, heads, head_dim)
            flops = 4 * HEAD_DIM * heads * tokens * (tokens + 1) / 2
            runs = _attentions(kernels.prefill_attention, q, k, v)
            rates = [measured_rate(flops, run, seconds / 9) for run in runs]
            own.append(rates[0])
            best = max(best, *(rate.best for rate in rates))
    median = sorted(own, key=lambda rate: rate.typical)[len(own) // 2]
    return Rate(best=best, typical=median.typical, spread=median.spread)


def _attentions(kernel: Callable[..., None], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Callable[[], None]]:
    """Return three ways to compute the same attention, the engine's first."""
    starts, out = torch.zeros(len(q), dtype=torch.int64, device=q.device), torch.empty_like(q)
    q_first, k_first, v_first = (tensor.transpose(0, 1).contiguous() for tensor in (q, k, v))  # (heads, tokens, head_dim)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return [
        lambda: wait(out, kernel(q, k, v, starts, scaling=HEAD_DIM**-0.5, out=out)),
        lambda: wait(sdpa(q_first[None], k_first[None], v_first[None], is_causal=True)),
        lambda: wait(plain_attention(q_first, k_first, v_first)),
    ]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Compute causal attention as two products per block of queries, each against the keys up to it; (heads, tokens, width)."""
    parts: list[torch.Tensor] = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).mul_(q.shape[2] ** -0.5)  # (heads, block, end)
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
        scores[:, :, start:].masked_fill_(hidden, -torch.inf)
        parts.append(torch.bmm(scores.softmax(-1), v[:, :end]))
    return torch.cat(parts, 1)


def step_rates(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> Curve:
    """Measure the attention of next tokens to pages on `where`: (FLOPs per KV byte, KV bytes/s)."""
    points: dict[float, Rate] = {}
    with attention_kernels(where, torch.get_num_threads()) as kernels:
        for heads, key_heads in STEP_HEADS:
            run, kv_bytes = _steps(kernels, where, dtype, heads, key_heads, max_bytes)
            points[2 * heads / (key_heads * dtype.itemsize)] = measured_rate(kv_bytes, run, seconds / len(STEP_HEADS))
    return tuple(sorted(points.items()))


@contextlib.contextmanager
def steps(dtype: torch.dtype, max_bytes: int) -> Iterator[Callable[[], None]]:
    """Yield a function that computes the attention of next tokens on the host."""
    with attention_kernels(torch.device("cpu"), torch.get_num_threads()) as kernels:
        yield _steps(kernels, torch.device("cpu"), dtype, *STEP_HEADS[1], max_bytes)[0]


def _steps(
    kernels: AttentionKernels, where: torch.device, dtype: torch.dtype, heads: int, key_heads: int, max_bytes: int
) -> tuple[Callable[[], None], int]:
    """Make a function that computes next tokens' attention to as many sequences as half the bytes hold.

    Returns:
        The function, and the KV bytes that it reads.
    """
    token_bytes = 2 * key_heads * HEAD_DIM * dtype.itemsize
    sequences = max(min(max_bytes // 2 // (STEP_TOKENS * token_bytes), 64), 1)
    per_sequence = STEP_TOKENS // PAGE_TOKENS
    tables = torch.randperm(sequences * per_sequence, device=where).view(sequences, per_sequence)
    query = random_numbers((sequences, heads, HEAD_DIM), where, dtype)
    keys, values = (
        page_memory(sequences * STEP_TOKENS * token_bytes // 2, where).view(dtype).view(-1, key_heads, *shape).uniform_(-1, 1)
        for shape in ((HEAD_DIM, PAGE_TOKENS), (PAGE_TOKENS, HEAD_DIM))
    )
    starts = torch.zeros(sequences, dtype=torch.int64, device=where)
    out = torch.empty_like(query)

    def call() -> torch.Tensor:
        kernels.decode_attention(query, keys, values, tables, starts, starts + STEP_TOKENS, scaling=HEAD_DIM**-0.5, out=out)
        return out

    run, calls = queued(call, where)
    return run, sequences * STEP_TOKENS * token_bytes * calls


def device_elementwise_rate(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> Rate:
    """Measure a decoder layer without its products, in bytes/s: two norms, two residuals, rotation, activation and gate."""
    hidden, intermediate = 2048, 5632
    rows = max(min(512, max_bytes // (24 * intermediate * dtype.itemsize)), 16)
    x, gate, up = (random_numbers((rows, width), where, dtype) for width in (hidden, intermediate, intermediate))
    weight, cosine = random_numbers((hidden,), where, dtype), random_numbers((rows, hidden), where, dtype)

    def norm(state: torch.Tensor) -> torch.Tensor:
        wide = state.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def layer() -> torch.Tensor:
        state = norm(x)
        turned = torch.cat((-state[:, hidden // 2 :], state[:, : hidden // 2]), -1)
        state = x + (state * cosine + turned * cosine)
        torch.nn.functional.silu(gate) * up  # pyright: ignore[reportUnusedExpression]
        return state + norm(state)

    run, calls = queued(layer, where)
    return measured_rate(calls * rows * elementwise_bytes(hidden, intermediate, dtype_name(dtype)), run, seconds)


def page_memory(size_bytes: int, where: torch.device) -> torch.Tensor:
    """Return memory for pages, uint8 (size_bytes,), as the engine has it on `where`."""
    return allocate_memory(size_bytes) if where.type == "cpu" else torch.empty(size_bytes, dtype=torch.uint8, device=where)


def wait(result: torch.Tensor, *_: object) -> None:
    """Wait until everything that was launched on the result's device is done."""
    if result.is_cuda:
        torch.cuda.synchronize()
