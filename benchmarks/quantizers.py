"""Ways to round weights without data, on the weights of a model: relative errors of weights and of outputs, and the speed of ours.

    python benchmarks/quantizers.py MODEL [--bits 4] [--group 64 ...]
    python benchmarks/quantizers.py MODEL --text wiki.test.raw [--tokens 4096] [--group 32 64] [--ways search nf4] [--eight PATTERN ...]

Prints a line of JSON for each way and group size.  Outputs are those of random inputs of unit variance, 64 for each matrix.  With a text,
the rounded model's next tokens are compared with the model's own, in float32 and windows of 512 tokens: the divergence
(Kullback-Leibler) and the difference of the loss, both per token, each with the standard error over windows.  Matrices that a pattern
of --eight names (such as '*down_proj*') have 8 bits.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nf4 import in_nf4
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def nf4(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """NF4 of bitsandbytes, which has four bits and groups of 64 inputs."""
    return in_nf4(weights)


def exhaustive(weights: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Try every zero point with 40 scales, and keep the least error with weights |w| + mean |w|."""
    data, top = weights.view(-1, group), (1 << bits) - 1
    importance = data.abs() + data.abs().mean(1, keepdim=True)
    best, least = torch.zeros_like(data), torch.full((len(data), 1), math.inf)
    low, high = data.amin(1, keepdim=True).clamp(max=0), data.amax(1, keepdim=True).clamp(min=0)
    for zero in range(top + 1):
        # the largest scale cuts nothing
        whole = torch.maximum(-low / max(zero, 0.25), high / max(top - zero, 0.25)).clamp(min=1e-30)
        for share in torch.linspace(0.5, 1.02, 40).tolist():
            scale = (whole * share).to(dtype).float()
            found = ((data / scale + zero).round().clamp(0, top) - zero) * scale
            error = ((found - data).square() * importance).sum(1, keepdim=True)
            better = error < least
            best, least = torch.where(better, found, best), torch.where(better, error, least)
    return best.view(weights.shape)


WAYS: dict[str, Way] = {
    "between extremes": between_extremes,
    "search": searched,
    "hqq": hqq,
    "hqq, whole zero points": hqq_with_whole_zeros,
    "flexgen-v0": papers,
    "nf4": nf4,
}
SLOW_WAYS: dict[str, Way] = {"exhaustive": exhaustive}
FIXED = ("flexgen-v0", "nf4")  # which have 4 bits and groups of 64
WINDOW = 512


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


class Divergence:
    """A model and its own next tokens over a text.

    Args:
        model: The folder.
        text: The file.
        tokens: How many tokens of it are read.
    """

    def __init__(self, model: Path, text: Path, tokens: int) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        ids = tokenizer(text.read_text(encoding="utf-8")[: 8 * tokens], verbose=False)["input_ids"][:tokens]
        self._windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        head = self._model.get_output_embeddings()
        modules = self._model.named_modules()
        self._layers = {f"{name}.weight": each for name, each in modules if type(each) is nn.Linear and each is not head}
        self._weights = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        self._own = [self._next_tokens(window) for window in self._windows]

    @torch.inference_mode()
    def _next_tokens(self, window: torch.Tensor) -> torch.Tensor:
        return self._model(window[None]).logits[0].log_softmax(-1)  # (tokens, vocabulary)

    @torch.inference_mode()
    def of(self, way: Way, bits: int, group: int, eight: Sequence[str]) -> dict[str, float]:
        """Return the divergence of the model with weights rounded in a way, and the difference of its loss."""
        for name, weights in self._weights.items():
            is_eight = any(fnmatch.fnmatchcase(name, pattern) for pattern in eight)
            found = searched(weights, 8, 64, torch.bfloat16) if is_eight else way(weights, bits, group, torch.bfloat16)
            self._layers[name].weight.copy_(found)
        divergences, losses = [], []
        for window, own in zip(self._windows, self._own, strict=True):
            found, following = self._next_tokens(window), window[1:, None]
            divergences.append((own.exp() * (own - found)).sum(-1).mean().item())
            losses.append((own - found)[:-1].gather(1, following).mean().item())
        return {
            "divergence": _mean(divergences), "divergence_error": _mean_error(divergences),
            "loss": _mean(losses), "loss_error": _mean_error(losses), "tokens": self._windows.numel(),
        }  # fmt: skip


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _mean_error(numbers: list[float]) -> float:
    return torch.tensor(numbers).std().item() / math.sqrt(len(numbers))


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
    parser.add_argument("--group", type=int, nargs="+", default=[64])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *SLOW_WAYS], default=list(WAYS))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--eight", nargs="+", default=[], metavar="PATTERN")
    asked = parser.parse_args()
    divergence = Divergence(asked.model, asked.text, asked.tokens) if asked.text else None
    for group in asked.group:
        for name in asked.ways:
            if name in FIXED and (asked.bits, group) != (4, 64):
                continue
            way = (WAYS | SLOW_WAYS)[name]
            found = divergence.of(way, asked.bits, group, asked.eight) if divergence else errors(asked.model, way, asked.bits, group)
            print(json.dumps({"way": name, "bits": asked.bits, "group": group, "eight": asked.eight, **found}), flush=True)
        if not divergence:
            print(json.dumps({"way": "search", "bits": asked.bits, "group": group, "millions_per_s": round(speed(asked.bits, group))}))


if __name__ == "__main__":
    main()
