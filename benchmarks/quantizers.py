"""Ways to round weights without data, on the weights of a model: relative errors of weights and of outputs, and the speed of ours.

    python benchmarks/quantizers.py MODEL [--bits 4] [--group 64]

Prints a line of JSON for each way.  Outputs are those of random inputs of unit variance, 64 for each matrix.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flexgen.checkpoint.files import Checkpoint
from flexgen.kernels.threads import KernelThreads
from flexgen.quantize.convert import num_cores
from flexgen.quantize.rounding import round_as_the_paper, round_groups

Way = Callable[[torch.Tensor, int, int, torch.dtype], torch.Tensor]


def between_extremes(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Round to nearest between the smallest and the largest weight of a group, zero included."""
    data, top = weights.view(len(weights), -1, group), (1 << bits) - 1
    low, high = data.amin(2, keepdim=True).clamp(max=0), data.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-30).to(dtype).float()
    zero = (-low / scale).round().clamp(0, top)
    return (((data / scale + zero).round().clamp(0, top) - zero) * scale).view(weights.shape)


def searched(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what `flexgen convert` makes."""
    packed, scales, zeros = round_groups(weights, bits=bits, group_size=group, dtype=dtype)
    codes = _unpacked(packed, bits, weights.shape[1])
    points = _unpacked(zeros.T.contiguous(), bits, len(weights)).T
    return (codes - points.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)


def hqq(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype, *, whole_zeros: bool = False) -> torch.Tensor:
    """Half-quadratic quantization (Badri and Shaji, 2023), with its defaults: the zero point follows a shrunk residual."""
    data, top, norm, beta = weights.view(len(weights), -1, group), (1 << bits) - 1, 0.7, 10.0
    low, high = data.amin(2, keepdim=True), data.amax(2, keepdim=True)
    inverse = (top / (high - low).clamp(min=1e-30)).clamp(max=2e4)
    inverse = 1 / (1 / inverse).to(dtype).float()
    zero = -low * inverse
    best, best_error = zero, torch.inf
    for _ in range(20):
        codes = (data * inverse + zero).round().clamp(0, top)
        residual = data - (codes - zero) / inverse
        error = residual.abs().mean().item()
        if error >= best_error:
            break
        best, best_error = zero, error
        shrunk = residual.sign() * (residual.abs() - residual.abs().clamp(min=1e-12).pow(norm - 1) / beta).clamp(min=0)
        zero = (codes - (data - shrunk) * inverse).mean(2, keepdim=True)
        beta *= 1.01
    zero = best.round().clamp(0, top) if whole_zeros else best.to(dtype).float()
    return (((data * inverse + zero).round().clamp(0, top) - zero) / inverse).view(weights.shape)


def hqq_with_whole_zeros(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Half-quadratic quantization as compressed-tensors can store it: with zero points that are codes."""
    return hqq(weights, bits, group, dtype, whole_zeros=True)


def papers(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The FlexGen paper's, which has four bits and groups of 64 outputs."""
    codes, ranges = round_as_the_paper(weights)
    both = torch.stack((codes >> 4, codes & 15), 1).flatten(0, 1).float()
    scale, low = (ranges[:, each].float().repeat_interleave(64, 0)[: len(both)] for each in (0, 1))
    return both / scale + low


WAYS: dict[str, Way] = {
    "between extremes": between_extremes,
    "search": searched,
    "hqq": hqq,
    "hqq, whole zero points": hqq_with_whole_zeros,
    "flexgen-v0": papers,
}


def _unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    shifts = torch.arange(0, 32, bits)
    return ((words.long()[..., None] & 0xFFFFFFFF) >> shifts & ((1 << bits) - 1)).flatten(-2)[..., :count].float()


def errors(model: Path, way: Way, bits: int, group: int) -> dict[str, float]:
    """Return the relative root mean square errors of weights and of outputs over all layers, and the largest of a weight."""
    sums = torch.zeros(4, dtype=torch.float64)
    largest, generator = 0.0, torch.Generator().manual_seed(0)
    for tensor in Checkpoint(model).tensors.values():
        if len(tensor.shape) != 2 or "layers" not in tensor.name or tensor.shape[1] % group:
            continue
        data = torch.from_file(str(tensor.path), size=tensor.path.stat().st_size, dtype=torch.uint8)
        weights = data[tensor.offset : tensor.offset + tensor.nbytes].clone().view(tensor.dtype).view(tensor.shape).float()
        wrong = way(weights, bits, group, tensor.dtype) - weights
        inputs = torch.randn(weights.shape[1], 64, generator=generator)
        figures = (wrong, weights, wrong @ inputs, weights @ inputs)
        sums += torch.stack([each.double().square().sum() for each in figures])
        largest = max(largest, (wrong.abs().max() / weights.square().mean().sqrt()).item())
    root = sums.sqrt()
    return {"weights": (root[0] / root[1]).item(), "outputs": (root[2] / root[3]).item(), "largest": largest}


def speed(bits: int, group: int) -> float:
    """Return the millions of weights per second that are rounded on all cores, the best of five."""
    weights = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    best = 0.0
    with KernelThreads(num_cores()) as threads:
        for _ in range(6):
            start = time.perf_counter()
            round_groups(weights, bits=bits, group_size=group, dtype=torch.bfloat16, parallel=threads.over)
            best = max(best, weights.numel() / (time.perf_counter() - start) / 1e6)
    return best


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group", type=int, default=64)
    asked = parser.parse_args()
    for name, way in WAYS.items():
        if name != "flexgen-v0" or (asked.bits, asked.group) == (4, 64):
            found = errors(asked.model, way, asked.bits, asked.group)
            print(json.dumps({"way": name, "bits": asked.bits, "group": asked.group, **found}), flush=True)
    print(json.dumps({"way": "search", "bits": asked.bits, "group": asked.group, "millions_per_s": round(speed(asked.bits, asked.group))}))


if __name__ == "__main__":
    main()
