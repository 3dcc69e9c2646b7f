"""What a quantization_config of compressed-tensors states: groups of modules, and how the weights of each group are stored.

Knows no files.  The config's rules are those of compressed-tensors 0.20 (quantization/quant_config.py, utils/match.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.errors import UnsupportedModelError
from flexgen.formats.linear_names import is_embedding
from flexgen.formats.stated import Stated

PACKED, NVFP4, MXFP4, MXFP8 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"
STORED_AS = (PACKED, *_PLAIN, NVFP4, MXFP4, MXFP8)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_METHODS = ("compressed-tensors", "sparseml")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a group of modules are stored.

    Attributes:
        group: The name of the group in the config.
        targets: The names and classes of its modules, or patterns of names that begin with "re:".
        stored_as: The name of the layout.
        floating: Whether the codes are floating-point numbers; otherwise they are integers.
        bits: The bits of a code.
        symmetric: Whether there are no zero points.
        strategy: What shares a scale: "tensor", "channel", "group", "tensor_group" or "block".
        group_size: The columns that share a scale, for the strategies with groups.
        block: The rows and columns that share a scale, for blocks.
        ordered: Whether the group of each column is stored.
        inputs: The config's statement about activations; None if they are not quantized.
    """

    group: str
    targets: tuple[str, ...]
    stored_as: str
    floating: bool
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    ordered: bool
    inputs: Mapping[str, Any] | None

    def block_of(self, shape: tuple[int, int]) -> tuple[int | None, int]:
        """Return the rows and columns of a matrix that share a scale; None for all rows."""
        if self.strategy == "tensor":
            return None, shape[1]
        if self.strategy == "block":
            assert self.block is not None
            return self.block
        return 1, self.group_size or shape[1]


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """All groups of a config.

    Attributes:
        groups: The groups that quantize weights, in the order of the config.
        ignored: The names, patterns of names and classes of modules that are not quantized.
        kv_cache: Whether the config also asks for a quantized KV cache.
    """

    groups: tuple[Scheme, ...]
    ignored: tuple[str, ...]
    kv_cache: bool

    def stored(self, module: str) -> Scheme | None:
        """Return the scheme of a module that is stored encoded; None if the config does not tell.

        The list of ignored modules is not asked, since it may have other names than the files.
        """
        return self._matching(module) or (self.groups[0] if len(self.groups) == 1 else None)

    def planned(self, module: str) -> Scheme | None:
        """Return the scheme by which a linear layer or embedding would be stored; None if it would not be encoded."""
        return None if any(_names(module, each) or _is_class(module, each) for each in self.ignored) else self._matching(module)

    def _matching(self, module: str) -> Scheme | None:
        """Return the scheme whose target fits best: exact names come before patterns, and patterns before classes."""
        by_target = [(target, scheme) for scheme in self.groups for target in scheme.targets]
        for fits in (lambda target: target == module, lambda target: _names(module, target), lambda target: _is_class(module, target)):
            for target, scheme in by_target:
                if fits(target):
                    return scheme
        return None


def _names(module: str, target: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


def _is_class(module: str, target: str) -> bool:
    return target == ("Embedding" if is_embedding(module) else "Linear")


def stated_schemes(quantization: Mapping[str, Any]) -> Schemes | None:
    """Return what a quantization_config states; None if it is not one of compressed-tensors.

    Raises:
        UnsupportedModelError: It states something that is not supported; the message names it.
    """
    stated = Stated(quantization)
    settings = stated.inner("quantization_config") or stated  # nested in a compression_config, as older versions wrote it
    method = settings.text("quant_method", None) or stated.text("quant_method", None)
    if method not in _METHODS and not (method is None and "config_groups" in settings):
        return None
    for part in (stated, settings):
        _check_rest(part)
    if "config_groups" not in settings:
        raise settings.wrong("config_groups", "an object with the settings of groups of modules")
    schemes = [_scheme(name, group, settings.text("format", None)) for name, group in settings.objects("config_groups")]
    found = tuple(scheme for scheme in schemes if scheme is not None)
    if not found:
        raise _refused("quantizes no weights")
    return Schemes(groups=found, ignored=_modules(settings, "ignore"), kv_cache="kv_cache_scheme" in settings)


def _check_rest(stated: Stated) -> None:
    """Refuse what changes weights or activations in other ways than by quantizing them."""
    sparsity, transform = stated.inner("sparsity_config"), stated.inner("transform_config")
    if sparsity is not None and (sparse := sparsity.text("format", "dense")) != "dense":
        raise _refused(f"stores weights in the format {sparse!r:.40}")
    if transform is not None and any(transform.objects("config_groups")):
        raise _refused("rotates activations (transform_config)")
    if stated.inner("moe_sparsity_config") is not None:
        raise _refused("leaves out experts (moe_sparsity_config)")


def _scheme(name: str, group: Stated, overall: str | None) -> Scheme | None:
    """Return the scheme of a group; None if it quantizes no weights."""
    weights = group.inner("weights")
    if weights is None:
        return None
    kind, bits, symmetric = weights.text("type", "int").lower(), weights.whole("num_bits", 8), weights.flag("symmetric", True)
    stored_as = _stored_as(group.text("format", overall), kind, weights)
    floating = kind == "float"
    known = bits in ((4, 8) if floating else range(2, 9)) and kind in ("int", "float")
    if not known or (floating and not symmetric):
        raise _refused(f"has {'symmetric' if symmetric else 'asymmetric'} weights of {bits} bits, type {kind:.20}, in {name!r:.40}")
    if floating != (stored_as in (NVFP4, MXFP4, MXFP8, "float-quantized")) and stored_as != "naive-quantized":
        raise _refused(f"stores numbers of type {kind} as {stored_as} in {name!r:.40}")
    if stored_as in _PLAIN and floating and bits != 8:
        raise _refused(f"stores {bits}-bit floating-point numbers as {stored_as} in {name!r:.40}")
    strategy, group_size, block = _strategy(name, weights)
    inputs = group.inner("input_activations")
    return Scheme(
        group=name, targets=_modules(group, "targets"), stored_as=stored_as, floating=floating, bits=bits,
        symmetric=symmetric, strategy=strategy, group_size=group_size, block=block,
        ordered=weights.values.get("actorder") in ("group", True),  # its names, or whether there is one
        inputs=None if inputs is None else inputs.values,
    )  # fmt: skip


def _stored_as(stated: str | None, kind: str, weights: Stated) -> str:
    """Return the layout of a group: the stated one or, for a config of several, the one that compressed-tensors chooses."""
    if stated is not None and stated in STORED_AS:
        return stated
    if stated != _MIXED:
        raise _refused(f"stores weights in the format {stated!r:.40}")
    if kind != "float":
        return PACKED
    if weights.whole("num_bits", 8) == 4:
        return MXFP4 if weights.whole("group_size", None) == 32 else NVFP4
    return "float-quantized"


def _strategy(name: str, weights: Stated) -> tuple[str, int | None, tuple[int, int] | None]:
    size, block = weights.whole("group_size", None), weights.values.get("block_structure")
    strategy = weights.text("strategy", "tensor" if size is None else "channel" if size == -1 else "group").lower()
    if strategy not in _STRATEGIES:
        raise _refused(f"has the strategy {strategy:.40} in {name!r:.40}")
    grouped = strategy in ("group", "tensor_group")
    if grouped and (size is None or size <= 0):
        raise weights.wrong("group_size", "a whole number above 0")
    if isinstance(block, str):
        block = [int(each) if each.isdecimal() else 0 for each in block.split("x")]
    if strategy == "block" and not (
        isinstance(block, Sequence) and len(block) == 2 and all(isinstance(each, int) and each > 0 for each in block)
    ):
        raise weights.wrong("block_structure", "rows and columns, both above 0")
    return strategy, size if grouped else None, (block[0], block[1]) if strategy == "block" and block is not None else None


def _modules(stated: Stated, key: str) -> tuple[str, ...]:
    """Return names and classes of modules, and patterns of names."""
    names = stated.names(key)
    for each in names:
        if each.startswith("re:"):
            stated.pattern(key, each.removeprefix("re:"))
    return names


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"quantization_config in config.json (compressed-tensors) {what}, which is not supported; supported are weights stored as "
        f"{', '.join(STORED_AS)}"
    )
