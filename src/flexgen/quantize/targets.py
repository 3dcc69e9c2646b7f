"""Which stored tensors of a model are rounded, and why the others are not.  Reads headers and a config, never weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.parameters import ModelSources, parameter_sources
from flexgen.checkpoint.repository import meta_model
from flexgen.errors import OptionError, UnsupportedModelError
from flexgen.formats.base import StoredTensor
from flexgen.formats.flexgen_v0 import fits
from flexgen.formats.linear_names import is_router
from flexgen.formats.table import without_quantization
from flexgen.models.weightless import is_experts, is_scored_experts
from flexgen.quantize.settings import QuantizeSettings

_WEIGHT = ".weight"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The tensors that are rounded.

    Attributes:
        rounded: The names of the stored tensors that are rounded.
        kept: For each stored matrix that is not rounded, the reason.
        ignore: The modules with such matrices and the head, by the model's names and by those of the files, for quantization_config.
        eight_bits: The modules with matrices of 8 bits in a model of 4, by the same names.
    """

    rounded: frozenset[str]
    kept: dict[str, str]
    ignore: tuple[str, ...]
    eight_bits: tuple[str, ...]


def find_targets(config: Any, headers: Headers, settings: QuantizeSettings) -> Targets:
    """Return which tensors are rounded: the weights of linear layers and of experts, except as docs/quantization.md says.

    Args:
        config: The model's transformers config.
        headers: The headers of the weights, decoded where they are in a low-bit format.
        settings: What is asked for.

    Raises:
        OptionError: A pattern matches nothing, or the head cannot be rounded.
        UnsupportedModelError: The model cannot be built, or there is nothing to round.
    """
    model = meta_model(without_quantization(config), torch.bfloat16)
    roles = _Roles(model, parameter_sources(model, headers), settings)
    rounded, kept = set[str](), dict[str, str]()
    for name, tensor in headers.tensors.items():
        if len(tensor.shape) < 2 or tensor.dtype not in _FLOATS:
            continue
        reason = roles.why_kept(tensor)
        if reason is None:
            rounded.add(name)
        else:
            kept[name] = reason
    _check_patterns(settings, headers, rounded)
    if not rounded:
        why = "; ".join(sorted({f"{reason}: {name}" for name, reason in kept.items()})[:3])
        raise UnsupportedModelError(f"{headers.folder}: no weights can be rounded to {settings.weight_format} ({why})")
    eight = roles.layers_of(name for name in rounded if settings.bits_of(name) != settings.bits)
    return Targets(rounded=frozenset(rounded), kept=kept, ignore=tuple(sorted(roles.ignored(kept))), eight_bits=tuple(sorted(eight)))


class _Roles:
    """What the stored tensors of a model are for.

    Args:
        model: The model, without weights.
        sources: Where its parameters are stored.
        settings: What is asked for.
    """

    def __init__(self, model: Any, sources: ModelSources, settings: QuantizeSettings) -> None:
        self._settings = settings
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._users: dict[str, set[str]] = {}
        for name in sources.names():
            for piece in sources[name].pieces:
                self._users.setdefault(piece.tensor.name, set()).add(name.rpartition(".")[0])
        head = model.get_output_embeddings()
        self._head = next((name for name, module in self._modules.items() if module is head), None)
        if settings.quantize_head:
            self._check_head(sources)

    def _check_head(self, sources: ModelSources) -> None:
        weight = f"{self._head}{_WEIGHT}"
        if self._head is None or weight not in sources:
            raise OptionError("quantize_head: this model has no output head of its own")
        users = set[str]().union(*(self._users[piece.tensor.name] for piece in sources[weight].pieces)) - {self._head}
        if users:
            raise OptionError(f"quantize_head: the head shares its numbers with {', '.join(sorted(users))}, which is gathered by row")

    def why_kept(self, tensor: StoredTensor) -> str | None:
        """Return why a matrix is not rounded; None if it is."""
        users = self._users.get(tensor.name)
        if users is None:
            return "not used by the language model"
        if self._settings.keeps(tensor.name):
            return "kept as asked for"
        for module in sorted(users, key=lambda name: (name == self._head, name)):  # a tied head is an embedding
            if (reason := self._of_module(module)) is not None:
                return reason
        if len(tensor.shape) != 2 or not tensor.name.endswith(_WEIGHT):
            return "stored as one tensor of all experts"
        if self._settings.is_paper:
            return None if fits(tensor.shape) else "an odd number of outputs"
        whole = tensor.shape[1] > 0 and tensor.shape[1] % self._settings.group_size == 0
        return None if whole else f"inputs that are no multiple of {self._settings.group_size}"

    def _of_module(self, name: str) -> str | None:
        module = self._modules[name]
        if isinstance(module, nn.Embedding):
            return "an embedding"
        if is_experts(module) or is_scored_experts(module):
            return None
        if type(module) is not nn.Linear:
            return "not a linear layer"
        if name == self._head and not self._settings.quantize_head:
            return "the output head"
        return "a router or gate" if is_router(name) else None

    def ignored(self, kept: dict[str, str]) -> Iterator[str]:
        """Yield the modules that other tools must not take for rounded ones."""
        names = set[str]() if self._settings.quantize_head or self._head is None else {self._head}
        for tensor in kept:
            names |= self._users.get(tensor, set())
            names |= {tensor.removesuffix(_WEIGHT)} if tensor.endswith(_WEIGHT) else set()
        yield from names

    def layers_of(self, tensors: Iterable[str]) -> set[str]:
        """Return the linear layers that rounded tensors belong to, by the model's names and by those of the files."""
        names = set[str]()
        for tensor in tensors:
            names |= {name for name in self._users[tensor] if type(self._modules[name]) is nn.Linear}
            names.add(tensor.removesuffix(_WEIGHT))
        return names


def _check_patterns(settings: QuantizeSettings, headers: Headers, rounded: set[str]) -> None:
    for pattern in settings.eight_bits:
        one = replace(settings, eight_bits=(pattern,))
        if not any(one.bits_of(name) == 8 for name in rounded):
            raise OptionError(f"eight_bits={pattern!r} matches no tensor that is rounded; names are such as {min(rounded, default='')}")
    for pattern in settings.keep:
        one = replace(settings, keep=(pattern,))
        if not any(one.keeps(name) for name in headers.tensors):
            raise OptionError(f"keep={pattern!r} matches no stored tensor; names are such as {next(iter(headers.tensors), '')}")
