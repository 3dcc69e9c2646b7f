"""Puts compiled functions in the place of what transformers computes between matrix products, where both give equal numbers.

Modules are recognised by what they own, never by a list of names, and each kind is tried out on random numbers in the dtype of computing:
only what is equal to the last bit is replaced.  Arguments that were not foreseen go to transformers' own code.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexgen.base.parallel import Parallel
from flexgen.kernels.cpu import elementwise
from flexgen.kernels.cpu.formats import carried

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROTATION = "apply_rotary_pos_emb"  # the function that transformers' attention modules call
ARGUMENTS = ("q", "k", "cos", "sin")
TRIED_ROWS = (1, 5, 80)  # torch sums many rows on several threads
WORTH_WAKING = 1 << 16  # numbers for which another thread is woken

Forward = Callable[..., Any]


class Fused:
    """Compiled functions in the forwards of a model's norms and attention modules, until they are taken out.

    Args:
        model: The model, whose weights need not be there.
        dtype: The dtype of computing.
        parallel: Runs the loops.

    Attributes:
        counts: How many modules of each kind were replaced.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, parallel: Parallel) -> None:
        self._replaced: list[nn.Module] = []
        self.counts = Counter[str]()
        if dtype not in DTYPES:
            return
        kinds = {"norms": _Norms(dtype, parallel), "rotations": _Rotations(dtype, parallel)}
        with torch.no_grad():
            for module in model.modules():
                if "forward" in module.__dict__:
                    continue
                for name, kind in kinds.items():
                    if (forward := _forward_of(kind, module)) is not None:
                        module.forward = forward  # type: ignore[method-assign]
                        self._replaced.append(module)
                        self.counts[name] += 1
        logger.debug("compiled between products: %s", dict(self.counts))

    def close(self) -> None:
        """Give the modules their own forwards back."""
        for module in self._replaced:
            del module.forward
        self._replaced.clear()


def _forward_of(kind: _Norms | _Rotations, module: nn.Module) -> Forward | None:
    try:
        return kind.forward_of(module)
    except Exception:  # the module computes something else than what it looks like
        logger.debug("%s cannot be tried out", type(module).__name__, exc_info=True)
        return None


def _over(parallel: Parallel, kernel: Callable[[int, int], None], count: int, size: int) -> None:
    """Run a kernel over `count` items of `size` numbers each."""
    if count * size < WORTH_WAKING:
        kernel(0, count)
    else:
        parallel(kernel, count)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return normal numbers of magnitudes that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator)
    scales = torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=generator).float())
    return (numbers * scales).to(dtype)


# ------------------------------------------------------------------------------------------------------------------------- norms


class _Norms:
    """Root-mean-square norms: modules so named that own one vector and state one small number."""

    def __init__(self, dtype: torch.dtype, parallel: Parallel) -> None:
        self._dtype, self._parallel = dtype, parallel

    def forward_of(self, module: Any) -> Forward | None:
        """Return a forward that takes the place of the module's own; None if there is none."""
        if not type(module).__name__.endswith("RMSNorm") or module._modules or list(module._parameters) != ["weight"]:
            return None
        epsilons = [value for value in vars(module).values() if isinstance(value, float)]
        weight = module._parameters["weight"]
        if weight is None or weight.ndim != 1 or weight.dtype != self._dtype or len(epsilons) != 1:
            return None
        style = self._proven_style(module, len(weight), epsilons[0])
        return None if style is None else self._forward(module, len(weight), epsilons[0], style)

    def _forward(self, module: Any, size: int, epsilon: float, style: int) -> Forward:
        own, dtype = type(module).forward, self._dtype

        def forward(x: Tensor) -> Tensor:
            weight = module._parameters["weight"]
            if x.dtype != dtype or weight.dtype != dtype or x.shape[-1] != size or not x.is_contiguous():
                return own(module, x)
            return self._normed(x, weight, epsilon, style)

        return forward

    def _normed(self, x: Tensor, weight: Tensor, epsilon: float, style: int) -> Tensor:
        out, size = torch.empty_like(x), len(weight)
        arrays = carried(x.view(-1, size)), carried(weight), np.float32(size), np.float32(epsilon), style, carried(out.view(-1, size))
        _over(self._parallel, lambda begin, end: elementwise.rms_norm(begin, end, *arrays), x.numel() // size, size)
        return out

    def _proven_style(self, module: Any, size: int, epsilon: float) -> int | None:
        """Return the way of applying the weight that gives what the module gives; None if none does."""
        kept = module._parameters["weight"]
        module._parameters["weight"] = weight = nn.Parameter(_random(size, dtype=self._dtype, seed=1), requires_grad=False)
        try:
            tried = [(x, module.forward(x)) for x in (_random(1, rows, size, dtype=self._dtype) for rows in TRIED_ROWS)]
        finally:
            module._parameters["weight"] = kept
        for style in (elementwise.WEIGHT_LAST, elementwise.WEIGHT_BEFORE_ROUNDING, elementwise.ONE_MORE):
            if all(torch.equal(self._normed(x, weight, epsilon, style), wanted) for x, wanted in tried):
                return style
        return None


# --------------------------------------------------------------------------------------------------------------------- rotations


class _Rotations:
    """Attention modules whose own forward calls a module-level function that rotates queries and keys."""

    def __init__(self, dtype: torch.dtype, parallel: Parallel) -> None:
        self._dtype, self._parallel = dtype, parallel
        self._functions: dict[Any, types.FunctionType] = {}

    def forward_of(self, module: Any) -> Callable[..., Any] | None:
        """Return the module's own forward with another function to rotate with; None if it calls none."""
        own = type(module).forward
        if not isinstance(own, types.FunctionType) or ROTATION not in own.__code__.co_names:
            return None
        rotates = own.__globals__.get(ROTATION)
        if not callable(rotates) or tuple(inspect.signature(rotates).parameters)[: len(ARGUMENTS)] != ARGUMENTS:
            return None  # some rotate one tensor at a time
        if own not in self._functions:
            names = {**own.__globals__, ROTATION: Rotation(rotates, self._dtype, self._parallel)}
            self._functions[own] = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
            self._functions[own].__kwdefaults__ = own.__kwdefaults__
        return types.MethodType(self._functions[own], module)


class Rotation:
    """A function that rotates queries and keys, compiled for shapes for which it was found to give what transformers' gives.

    Args:
        own: transformers' function.
        dtype: The dtype of computing.
        parallel: Runs the loops.
    """

    def __init__(self, own: Callable[..., Any], dtype: torch.dtype, parallel: Parallel) -> None:
        self._own, self._dtype, self._parallel = own, dtype, parallel
        self._proven: dict[tuple[int, int], bool] = {}  # by numbers of a head and of its angles

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self._fits(q, k, cos, sin):
            return self._own(q, k, cos, sin, *args, **kwargs)
        key = q.shape[3], cos.shape[2]
        if key not in self._proven:
            self._proven[key] = self._proof(*key)
        return self._rotated(q, k, cos, sin) if self._proven[key] else self._own(q, k, cos, sin)

    def _fits(self, *tensors: Tensor) -> bool:
        """Return whether the tensors are (1, heads, tokens, head_dim), heads without gaps, and (1, tokens, angles), of one sequence."""
        q, k, cos, sin = tensors
        return (
            all(each.dtype == self._dtype and each.shape[0] == 1 and each.stride(-1) == 1 for each in tensors)
            and q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape and q.shape[2:] == k.shape[2:]
            and cos.shape[1] == q.shape[2] and cos.shape[2] <= q.shape[3] and cos.shape[2] % 2 == 0
            and cos.is_contiguous() and sin.is_contiguous()
        )  # fmt: skip

    def _rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        _, heads, tokens, dim = q.shape
        given = [(carried(each.as_strided((1,), (1,))), each.stride(2), each.stride(1)) for each in (q, k)]
        out = [torch.empty(tokens, each.shape[1], dim, dtype=each.dtype) for each in (q, k)]
        arrays = [*given, *(carried(each) for each in (cos[0], sin[0], *out))]
        _over(self._parallel, lambda begin, end: elementwise.rotate(begin, end, *arrays), tokens, heads * dim)
        return out[0].transpose(0, 1)[None], out[1].transpose(0, 1)[None]

    def _proof(self, head_dim: int, angles: int) -> bool:
        """Return whether transformers' function gives the same for random numbers of a shape."""
        q, k = (_random(1, 9, heads, head_dim, dtype=self._dtype, seed=heads).transpose(1, 2) for heads in (6, 2))
        cos, sin = (_random(1, 9, angles, dtype=self._dtype, seed=seed) for seed in (3, 4))
        try:
            wanted = self._own(q, k, cos, sin)
        except RuntimeError:  # it has no numbers without angles
            return False
        found = self._rotated(q, k, cos, sin)
        return all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
