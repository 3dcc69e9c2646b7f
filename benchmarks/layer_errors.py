"""Errors of formats in single layers of real sizes with random weights: those of the weights, of what a layer adds, and of logits.

A layer of Llama-3.2-3B, and one of Qwen2.5-7B whose keys have large biases, as that model's have.  All is computed in float32 by
transformers' own layers; only attention is replaced, by one that sees the keys and values of earlier pages as a format of KV stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nf4 import in_nf4
from quantizers import papers, searched
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from flexgen.kernels.codes import HeadCodes, decode, encode
from flexgen.kv.low_bit import LowBitKV, kv_format
from flexgen.options import KV_FORMATS
from flexgen.quantize.settings import QuantizeSettings

PAGE_TOKENS = 16
DEVIATION = 0.02  # of weights
VOCABULARY = 1024
LARGE_BIASES = {63: 60.0, 127: -40.0}  # number of a key's head -> its bias, at the slowest frequency of the rotation by position
TOGETHER = ("auto", "k8v4")  # formats of KV with weights that are not in full precision
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.2-3B": ("llama", {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    }),
    "Qwen2.5-7B": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
}  # fmt: skip


def _ours(name: str) -> Callable[[Tensor], Tensor]:
    settings = QuantizeSettings(weight_format=name)
    return lambda weights: searched(weights, settings.bits, settings.group_size, torch.bfloat16)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda weights: weights,
    "int8": _ours("int8"),
    "int4": _ours("int4"),
    "flexgen-v0": lambda weights: papers(weights, 4, 64, torch.bfloat16),
    "nf4": in_nf4,
}


@dataclass(slots=True)
class Attention:
    """Causal attention to pages in a format of KV: a query sees its own page exactly, and earlier ones as they are stored.

    Attributes:
        kv: The format; None for exact keys and values.
    """

    kv: LowBitKV | None = field(default=None)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
        heads, tokens = query.shape[1:3]
        key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))  # (1, heads, tokens, dim)
        places = torch.arange(tokens)
        own = places[:, None] // PAGE_TOKENS == places // PAGE_TOKENS
        old_key, old_value = (key, value) if self.kv is None else self._stored(self.kv, key, value)
        scores = torch.where(own, query @ key.transpose(2, 3), query @ old_key.transpose(2, 3)) * scaling
        shares = scores.masked_fill(places > places[:, None], -torch.inf).softmax(-1)
        out = (shares * own) @ value + (shares * ~own) @ old_value
        return out.transpose(1, 2), None

    @staticmethod
    def _stored(kv: LowBitKV, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        def through(numbers: Tensor, codes: HeadCodes) -> Tensor:
            return decode(*encode(numbers[0].transpose(0, 1), codes), codes, torch.float32).transpose(0, 1)[None]

        dim = key.shape[-1]
        keys, values = HeadCodes(dim=dim, bits=kv.key_bits, rotated=kv.rotates_keys), HeadCodes(dim=dim, bits=kv.value_bits)
        return through(key, keys), through(value, values)


def normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * DEVIATION


def heavy_tails(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Student's t with 4 degrees of freedom, whose tails are about those of trained weights with outliers."""
    uniform = torch.rand(shape, generator=generator).clamp_(min=1e-12).mul_(torch.rand(shape, generator=generator).clamp_(min=1e-12))
    return torch.randn(shape, generator=generator) * (-2 / uniform.log()).sqrt() * (DEVIATION / 2**0.5)


NUMBERS = {"normal": normal, "Student's t, 4": heavy_tails}


def layer_errors(tokens: int, done: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each layer, kind of random numbers, format of weights and format of KV.

    Args:
        tokens: The tokens that a layer computes.
        done: Rows of earlier runs; a layer whose last row is among them is left out.
    """
    last = {"weights": list(WEIGHTS)[-1], "kv": TOGETHER[-1], "tokens": tokens}
    whole = {(row["shape"], row["numbers"]) for row in done if all(row[name] == value for name, value in last.items())}
    attention = Attention()
    AttentionInterface.register("pages", attention)
    for shape in SHAPES:
        for numbers in NUMBERS:
            if (shape, numbers) not in whole:
                yield from _of_layer(shape, numbers, tokens, attention)


@torch.inference_mode()
def _of_layer(shape: str, numbers: str, tokens: int, attention: Attention) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    model = _model(shape, NUMBERS[numbers], generator)
    entering = torch.randn(1, tokens, model.config.hidden_size, generator=generator)
    layers = [each for each in model.model.layers[0].modules() if isinstance(each, nn.Linear)]
    originals = [layer.weight.detach().clone() for layer in layers]
    wanted: tuple[Tensor, Tensor] | None = None
    for weights, rounded in WEIGHTS.items():
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.copy_(rounded(original))
        weight_error = _relative([layer.weight for layer in layers], originals)
        for name in KV_FORMATS if weights == "full" else TOGETHER:
            kv = kv_format(name, torch.float32)
            attention.kv = kv if isinstance(kv, LowBitKV) else None
            found = _outputs(model, entering)
            wanted = wanted or found
            errors = [_relative([one], [other]) for one, other in zip(found, wanted, strict=True)]
            row = {"shape": shape, "numbers": numbers, "weights": weights, "kv": name, "tokens": tokens}
            yield row | {"weight_error": weight_error, "output_error": errors[0], "logit_error": errors[1]}


def _model(shape: str, numbers: Callable[[torch.Size, torch.Generator], Tensor], generator: torch.Generator) -> Any:
    """Return a model of one layer."""
    kind, sizes = SHAPES[shape]
    config: Any = AutoConfig.for_model(kind, **sizes, num_hidden_layers=1, vocab_size=VOCABULARY, attn_implementation="pages")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.copy_(numbers(parameter.shape, generator))
        elif name.endswith("k_proj.bias"):
            heads = torch.randn(parameter.shape, generator=generator).view(config.num_key_value_heads, -1)
            for place, bias in LARGE_BIASES.items():
                heads[:, place] = bias
            parameter.copy_(heads.flatten())
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _outputs(model: Any, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the layer adds to its input, and the logits."""
    leaving: list[Tensor] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda layer, given, made: leaving.append(made if isinstance(made, Tensor) else made[0])
    )
    try:
        logits = model(inputs_embeds=entering, use_cache=False).logits
    finally:
        hook.remove()
    return leaving[0] - entering, logits - logits.mean(-1, keepdim=True)


def _relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the root mean square of errors, as a share of that of the numbers."""
    wrong = sum((one - other).square().sum().item() for one, other in zip(found, wanted, strict=True))
    return (wrong / sum(each.square().sum().item() for each in wanted)) ** 0.5
