"""How fast memory is read, linear layers and attention are computed, and bytes are copied to a device and back."""

from __future__ import annotations

import time

import torch

from flexgen.profile.timing import best_rate, median_seconds
from flexgen.sizes import MIB

DENSE_ROWS = (64, 128, 256, 512, 1024)
DENSE_SHAPES = ((4096, 4096), (8192, 3072))  # (out features, in features)


def memory_rate(max_bytes: int, seconds: float) -> float:
    """Bytes per second that all cores read together."""
    data = torch.ones(max_bytes // 4, dtype=torch.float32)
    return max(best_rate(data.nbytes, run, seconds / 2) for run in (data.sum, data.max))


def dense_rows(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> list[tuple[int, float]]:
    """(rows, FLOP/s) of linear layers, each the best over shapes and rounds."""
    best = dict.fromkeys(DENSE_ROWS, 0.0)
    began, rounds = time.perf_counter(), 0
    while not rounds or time.perf_counter() - began < seconds / 2:  # the next round takes as long as those before
        for shape in DENSE_SHAPES:
            features_out, features_in = _shrunken(shape, dtype.itemsize, max_bytes // 3)  # the library may pack it once more
            weight = _random((features_out, features_in), where, dtype)
            for rows in DENSE_ROWS:
                if best[DENSE_ROWS[0]] and time.perf_counter() - began > 2 * seconds:
                    break
                if rows * (features_in + features_out) * dtype.itemsize > max_bytes // 3:
                    break
                x = _random((rows, features_in), where, dtype)
                taken = median_seconds(lambda x=x, weight=weight: _wait(torch.nn.functional.linear(x, weight)), seconds / 15)
                best[rows] = max(best[rows], 2 * rows * features_in * features_out / taken)
            del weight
        rounds += 1
    return [(rows, rate) for rows, rate in best.items() if rate]


def _random(shape: tuple[int, ...], where: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=where).uniform_(-1, 1)


def _shrunken(shape: tuple[int, int], item_bytes: int, max_bytes: int) -> tuple[int, int]:
    """The shape, its outputs halved until it fits."""
    features_out, features_in = shape
    while features_out * features_in * item_bytes > max_bytes and features_out > 256:
        features_out //= 2
    return features_out, features_in


def attention_rate(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> float:
    """FLOP/s of causal attention over the visible pairs: the better of torch's own and of plain matrix products."""
    heads, width, best = 16, 128, 0.0
    for tokens in (256, 512, 1024):
        if best and 10 * heads * tokens * width * max(dtype.itemsize, 4) > max_bytes:
            continue
        q, k, v = (_random((1, heads, tokens, width), where, dtype) for _ in range(3))  # (1, heads, tokens, width)
        flops = 4 * width * heads * tokens * (tokens + 1) / 2

        def ready(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            _wait(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

        def plain(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            _wait(_plain_attention(q[0], k[0], v[0]))

        best = max(best, best_rate(flops, ready, seconds / 6), best_rate(flops, plain, seconds / 6))
    return best


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Causal attention as two products per block of queries, each against the keys up to it; (heads, tokens, width)."""
    parts: list[torch.Tensor] = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).mul_(q.shape[2] ** -0.5)  # (heads, block, end)
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
        scores[:, :, start:].masked_fill_(hidden, -torch.inf)
        parts.append(torch.bmm(scores.softmax(-1), v[:, :end]))
    return torch.cat(parts, 1)


def copy_rates(device: str, max_bytes: int, seconds: float) -> tuple[float | None, float | None]:
    """(host to device, device to host) bytes per second; None without a separate device."""
    if device == "cpu":
        return None, None
    size = min(max_bytes // 2, 64 * MIB)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda").fill_(1)
    other = torch.empty(size, dtype=torch.uint8, device="cuda" if device == "cuda" else "cpu").fill_(1)
    to_device = best_rate(size, lambda: _wait(other.copy_(host)), seconds / 2)
    to_host = best_rate(size, lambda: _wait(other, host.copy_(other)), seconds / 2)
    return to_device, to_host


def _wait(result: torch.Tensor, *_: torch.Tensor) -> None:
    """Until what was launched on the result's device is done."""
    if result.is_cuda:
        torch.cuda.synchronize()
