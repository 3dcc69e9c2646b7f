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
    settings = quantization.get("quantization_config") or quantization  # nested in a compression_config, as older versions wrote it
    if not isinstance(settings, Mapping):
        return None
    method = settings.get("quant_method") or quantization.get("quant_method")
    groups = settings.get("config_groups")
    if method not in _METHODS and not (method is None and isinstance(groups, Mapping)):
        return None
    _check_rest(quantization, settings)
    if not isinstance(groups, Mapping):
        raise _refused("has no config_groups")
    schemes = [_scheme(str(name), group, settings.get("format")) for name, group in groups.items()]
    found = tuple(scheme for scheme in schemes if scheme is not None)
    if not found:
        raise _refused("quantizes no weights")
    ignored = _strings(settings.get("ignore") or (), "ignore")
    return Schemes(groups=found, ignored=ignored, kv_cache=settings.get("kv_cache_scheme") is not None)


def _check_rest(quantization: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse what changes weights or activations in other ways than by quantizing them."""
    for part in (quantization, settings):
        sparsity = part.get("sparsity_config") or {}
        sparse = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
        if sparse != "dense":
            raise _refused(f"stores weights in the format {sparse!r:.40}")
        transform = part.get("transform_config") or {}
        if transform.get("config_groups") if isinstance(transform, Mapping) else transform:
            raise _refused("rotates activations (transform_config)")
        if part.get("moe_sparsity_config"):
            raise _refused("leaves out experts (moe_sparsity_config)")


def _scheme(name: str, group: Any, overall: Any) -> Scheme | None:
    """Return the scheme of a group; None if it quantizes no weights."""
    if not isinstance(group, Mapping):
        raise _refused(f"names the preset {name!r:.40} without its settings")
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise _refused(f"has no settings of weights in {name!r:.40}")
    kind, bits, symmetric = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8), weights.get("symmetric", True)
    stored_as = _stored_as(group.get("format") or overall, kind, weights)
    floating = kind == "float"
    known = type(bits) is int and bits in ((4, 8) if floating else range(2, 9)) and kind in ("int", "float")
    if not known or (floating and not symmetric):
        raise _refused(f"has {'symmetric' if symmetric else 'asymmetric'} weights of {bits!r:.8} bits, type {kind:.20}, in {name!r:.40}")
    if floating != (stored_as in (NVFP4, MXFP4, MXFP8, "float-quantized")) and stored_as != "naive-quantized":
        raise _refused(f"stores numbers of type {kind} as {stored_as} in {name!r:.40}")
    if stored_as in _PLAIN and floating and bits != 8:
        raise _refused(f"stores {bits}-bit floating-point numbers as {stored_as} in {name!r:.40}")
    strategy, group_size, block = _strategy(name, weights)
    inputs = group.get("input_activations")
    return Scheme(
        group=name, targets=_strings(group.get("targets") or (), "targets"), stored_as=stored_as, floating=floating, bits=bits,
        symmetric=bool(symmetric), strategy=strategy, group_size=group_size, block=block, ordered=weights.get("actorder") == "group",
        inputs=inputs if isinstance(inputs, Mapping) else None,
    )  # fmt: skip


def _stored_as(stated: Any, kind: str, weights: Mapping[str, Any]) -> str:
    """Return the layout of a group: the stated one or, for a config of several, the one that compressed-tensors chooses."""
    if stated in STORED_AS:
        return stated
    if stated != _MIXED:
        raise _refused(f"stores weights in the format {stated!r:.40}")
    if kind != "float":
        return PACKED
    if weights.get("num_bits") == 4:
        return MXFP4 if weights.get("group_size") == 32 else NVFP4
    return "float-quantized"


def _strategy(name: str, weights: Mapping[str, Any]) -> tuple[str, int | None, tuple[int, int] | None]:
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    strategy = str(strategy).lower()
    if strategy not in _STRATEGIES:
        raise _refused(f"has the strategy {strategy:.40} in {name!r:.40}")
    grouped = strategy in ("group", "tensor_group")
    if grouped and not (isinstance(size, int) and size > 0):
        raise _refused(f"has groups of {size!r:.20} columns in {name!r:.40}")
    if isinstance(block, str):
        block = [int(each) if each.isdecimal() else 0 for each in block.split("x")]
    if strategy == "block" and not (
        isinstance(block, Sequence) and len(block) == 2 and all(isinstance(each, int) and each > 0 for each in block)
    ):
        raise _refused(f"has blocks of {block!r:.40} in {name!r:.40}")
    return strategy, size if grouped else None, (block[0], block[1]) if strategy == "block" and block is not None else None


def _strings(values: Any, what: str) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(each, str) for each in values):
        raise _refused(f"has {what} that are no list of names")
    for each in values:
        try:
            re.compile(each.removeprefix("re:") if each.startswith("re:") else "")
        except re.error as error:
            raise _refused(f"has the pattern {each!r:.80}, which is not a regular expression ({error})") from error
    return tuple(values)


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"quantization_config in config.json (compressed-tensors) {what}, which is not supported; supported are weights stored as "
        f"{', '.join(STORED_AS)}"
    )
